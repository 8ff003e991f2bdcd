"""Numbers and tensors that a model's code keeps in plain attributes and assigns while it runs: they are state.

`self.calls += 1`, `model.average = 0.9 * model.average + 0.1 * loss.detach()`. Which attributes are meant is read from
the code of the train step and of the model's own methods: those that it both assigns and reads. One that it only
assigns is a log, and needs no place in the state.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import nn

from gimli_compile.model_view import ModelView
from gimli_compile.outside import is_of_framework, names_in, reachable_from, with_inner
from gimli_compile.schedulers import Schedulers
from gimli_compile.scripted_modules import is_scripted
from gimli_compile.skeleton import Skeleton, containers_of, leaves_of
from gimli_compile.snapshot import is_number

MODEL = "model"
_READS = ("LOAD_ATTR", "LOAD_METHOD")


class KeptAttributes:
    """Attributes of modules as an object of their own, whose attributes they are under the modules' paths.

    The views walk it beside the optimizer. `read` and `write` carry the values from the modules and to them. There is
    one for the same attributes of the same modules, as there is one optimizer: states refer to it.
    """

    __slots__ = ("__dict__", "__weakref__", "places")

    def __init__(self, places: Mapping[str, tuple[nn.Module, str]]) -> None:
        self.places = places

    @classmethod
    def over(cls, places: Mapping[str, tuple[nn.Module, str]]) -> KeptAttributes:
        """Returns the one for these attributes."""
        key = tuple((path, id(module)) for path, (module, _) in places.items())
        made = _MADE.get(key)
        if made is None:
            made = _MADE[key] = cls(places)
        made.read()
        return made

    def read(self) -> None:
        """Takes what the modules hold now."""
        found = {path: vars(module).get(name) for path, (module, name) in self.places.items()}
        held = vars(self)
        if held.keys() != found.keys() or any(held[path] is not value for path, value in found.items()):
            held.clear()
            held.update(found)

    def write(self) -> None:
        """Gives the modules what is held here."""
        for path, (module, name) in self.places.items():
            vars(module)[name] = vars(self)[path]

    def of(self, modules: Mapping[str, nn.Module]) -> KeptAttributes:
        """Returns the same attributes of the modules of another model, by path."""
        paths = {path: path.rpartition(".")[0] for path in self.places}
        return KeptAttributes.over({path: (modules[paths[path]], name) for path, (_, name) in self.places.items()})

    def by_module(self) -> dict[int, list[str]]:
        """Returns the names of the attributes by the id of their module."""
        found: dict[int, list[str]] = {}
        for module, name in self.places.values():
            found.setdefault(id(module), []).append(name)
        return found


_MADE: WeakValueDictionary[Any, KeptAttributes] = WeakValueDictionary()  # their modules live as long as they do


def kept_among(companions: Mapping[str, Any]) -> list[KeptAttributes]:
    """Returns the kept attributes among the companions of an optimizer."""
    return [one for one in companions.values() if isinstance(one, KeptAttributes)]


def read_kept(companions: Mapping[str, Any]) -> None:
    """Takes what modules hold now into the companions of an optimizer."""
    for one in kept_among(companions):
        one.read()


def kept_paths(skeleton: Skeleton) -> set[str]:
    """Returns the paths of kept attributes: they are state, whether the first steps change them or not."""
    parts = [part for part in containers_of(skeleton) if isinstance(part.owner, KeptAttributes)]
    return {leaf.path for part in parts for leaf in leaves_of(Skeleton(part, ()))}


def keep_attributes(schedulers: Schedulers, view: ModelView, train_step: Callable[..., Any] | None) -> None:
    """Makes the attributes that a train step keeps companions of the optimizer, and no options of the model."""
    made = None if train_step is None else kept_attributes(train_step, view.modules_by_path())
    if made is None:
        return
    name = MODEL
    while name in schedulers.companions:
        name += "_"
    schedulers.companions[name] = made
    view.leave_out(made.by_module())


def kept_attributes(train_step: Callable[..., Any], modules: Mapping[str, nn.Module]) -> KeptAttributes | None:
    """Returns the attributes of a model that its train step keeps; None if there are none. Modules are by path."""
    own = {path: one for path, one in modules.items() if not is_of_framework(type(one)) and not is_scripted(one)}
    names = assigned_names(train_step, own.values())
    places = {
        f"{path}.{name}" if path else name: (module, name)
        for path, module in own.items()
        for name in sorted(names & vars(module).keys())
        if _is_kept(vars(module)[name])
    }
    return KeptAttributes.over(places) if places else None


def _is_kept(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not isinstance(value, nn.Parameter) and not value.requires_grad
    return is_number(value)


def assigned_names(train_step: Callable[..., Any], modules: Iterable[nn.Module]) -> set[str]:
    """Returns the names of attributes that the code of a train step, or of modules, both assigns and reads."""
    instructions = [step for code in _codes(train_step, list(modules)) for step in dis.get_instructions(code)]
    assigned = {step.argval for step in instructions if step.opname == "STORE_ATTR"}
    return assigned & {step.argval for step in instructions if step.opname in _READS}


def _codes(train_step: Callable[..., Any], modules: list[nn.Module]) -> list[CodeType]:
    """Returns the code of the train step and what it reaches, of `forward`, and of methods that these name."""
    functions = [found for found in reachable_from(train_step) if isinstance(found, FunctionType)]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    functions += [hook for one in modules for name in hooks for hook in vars(one).get(name, {}).values()]
    methods = {function: None for one in modules for function in methods_of(type(one))}
    used = {"forward", "__call__"}.union(*(names_in(f.__code__) for f in functions if isinstance(f, FunctionType)))
    pending, chosen = list(methods), []
    while True:
        named = [method for method in pending if method.__name__ in used]
        if not named:
            break
        chosen += named
        pending = [method for method in pending if method.__name__ not in used]
        used = used.union(*(names_in(method.__code__) for method in named))
    codes = [f.__code__ for f in (*functions, *chosen) if isinstance(f, FunctionType)]
    return [inner for code in codes for inner in with_inner(code)]


def methods_of(cls: type) -> Iterator[FunctionType]:
    """Yields the functions that the user's classes among the bases of a class define; constructors are none."""
    for base in cls.__mro__:
        if is_of_framework(base):
            continue
        for value in vars(base).values():
            parts = (value.fget, value.fset) if isinstance(value, property) else (value,)
            parts = [getattr(part, "__func__", part) for part in parts]
            yield from (f for f in parts if isinstance(f, FunctionType) and f.__name__ != "__init__")
