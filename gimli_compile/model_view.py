"""A model seen from outside: its tensors by name, and a run with other tensors in their place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gimli_compile.environment import Environment
from gimli_compile.environment_walk import is_option
from gimli_compile.errors import InputError, compose_message
from gimli_compile.lazy_copies import lazy_copy
from gimli_compile.scripted_modules import is_scripted, options_of, refuse_detaching, scripts_substituted
from gimli_compile.shared_memory import refuse_shared_memory
from gimli_compile.surroundings import surroundings
from gimli_compile.tree_paths import named_leaves
from gimli_compile.watching import Watch

_Any = TypeVar("_Any")


class ModelView:
    """The live model, read and run without being changed.

    A model is a module, a tensor, or any pytree of modules and tensors. A tensor is known by the first name that it
    has, however many modules hold it: the name that `named_parameters` or `named_buffers` gives it, after the path of
    the module in the pytree (`generator.0.weight`), or its own path in the pytree (`weights.w1`). A tensor that is the
    whole model is called `0`. Tensors of a pytree are parameters; those that the optimizer does not have stay as they
    are. `guards_branches` tells whether its code, and the loss, may branch on values that have derivatives.
    """

    def __init__(self, model: Any, *, guards_branches: bool = False) -> None:
        self.model = model
        self.guards_branches = guards_branches
        self._watch: Watch | None = None
        self._surroundings: tuple[Any, ...] = ()
        self._kept: Mapping[int, Collection[str]] = {}
        self.environment = Environment()
        self._outside = 0
        _refuse_nothing(model)
        _refuse_uninitialized(self)
        refuse_detaching(self.modules())
        refuse_shared_memory(self.live_params, self.live_buffers, "buffer")
        self.param_names = {id(p): name for name, p in self.live_params.items()}
        self.buffer_names = {id(b): name for name, b in self.live_buffers.items()}

    @property
    def live_params(self) -> dict[str, torch.Tensor]:
        """The live parameters by name."""
        self.refresh()
        return dict(self.params)

    @property
    def live_buffers(self) -> dict[str, torch.Tensor]:
        """The live buffers by name."""
        self.refresh()
        return dict(self.buffers)

    def signature(self) -> tuple[Any, ...]:
        """Returns what a captured program of this model depends on besides parameters and buffers.

        That is training flags and options, the default dtype and autocast, which decide about dtypes within, and what
        its code reads besides.
        """
        self.refresh()
        return self.options

    def refresh(self) -> None:
        """Reads the model again if it changed: `params` and `buffers` by name, and `options`, its signature."""
        around, outside = surroundings(), self.environment.read()
        is_around = around == self._surroundings and outside == self._outside
        if self._watch is not None and is_around and self._watch.holds():
            return
        self._watch, self._surroundings, self._outside = None, around, outside
        self.buffers = self._read_buffers()
        self.params = self._read_params()
        self.options = self._read_signature()
        modules = list(self.modules())
        registries = [part for m in modules for part in (m._parameters, m._buffers, m._modules)]
        if not any(map(is_scripted, modules)) and isinstance(self.model, nn.Module):
            self._watch = Watch([*modules, *registries])

    def _read_params(self) -> dict[str, torch.Tensor]:
        if isinstance(self.model, nn.Module):
            return dict(self.model.named_parameters())
        found: dict[str, torch.Tensor] = {}
        buffers = {id(buffer) for buffer in self.buffers.values()}
        for path, leaf in _parts(self.model):
            if isinstance(leaf, nn.Module):
                found.update(leaf.named_parameters(prefix=path))
            elif id(leaf) not in buffers:
                found[path] = leaf
        return _each_once(found)

    def _read_buffers(self) -> dict[str, torch.Tensor]:
        if isinstance(self.model, nn.Module):
            return dict(self.model.named_buffers())
        found: dict[str, torch.Tensor] = {}
        for path, leaf in _parts(self.model):
            found.update(leaf.named_buffers(prefix=path) if isinstance(leaf, nn.Module) else ())
        return _each_once(found)

    def modules(self) -> Iterator[nn.Module]:
        """Yields all modules, each once."""
        seen: set[int] = set()
        for _, leaf in _parts(self.model):
            for module in leaf.modules() if isinstance(leaf, nn.Module) else ():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield module

    def modules_by_path(self) -> dict[str, nn.Module]:
        """Returns all modules by path, each once."""
        parts = [(path, leaf) for path, leaf in _parts(self.model) if isinstance(leaf, nn.Module)]
        found = {name: module for path, leaf in parts for name, module in leaf.named_modules(prefix=path)}
        return _each_once(found)

    def modules_and_state(self) -> list[tuple[nn.Module, Collection[str]]]:
        """Returns all modules, with the names of their attributes that are state."""
        return [(module, self._kept.get(id(module), ())) for module in self.modules()]

    def leave_out(self, kept: Mapping[int, Collection[str]]) -> None:
        """Takes attributes, by the id of their module, out of the options: they are state."""
        self._kept, self._watch = kept, None
        self.refresh()

    def filled(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Returns the model with `tensors`, by name, in place of those of its pytree; modules are the live ones."""
        if isinstance(self.model, nn.Module):
            return self.model
        names = {**self.param_names, **self.buffer_names}
        return pytree.tree_map_only(torch.Tensor, lambda leaf: tensors[names[id(leaf)]], self.model)

    def as_leaf(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Returns a leaf with a copy of the value of a parameter, trained or frozen as the live one, with its hooks."""
        live = self.live_params[name]
        leaf = nn.Parameter(lazy_copy(value), live.requires_grad)
        for hook in (live._backward_hooks or {}).values():
            leaf.register_hook(hook)
        for hook in (getattr(live, "_post_accumulate_grad_hooks", None) or {}).values():
            leaf.register_post_accumulate_grad_hook(hook)
        return leaf

    def _read_signature(self) -> tuple[Any, ...]:
        found = tuple(
            (
                id(module),
                *((key, value) for key, value in options_of(module) if is_option(value) and key not in state),
            )
            for module, state in self.modules_and_state()
        )
        around = zip(("default dtype", "autocast"), self._surroundings, strict=True)
        found = (("surroundings", *around), ("environment", ("number", self._outside)), *found)
        if isinstance(self.model, nn.Module):
            return found
        others = ((path, leaf) for path, leaf in named_leaves(self.model) if is_option(leaf))
        return (*found, (id(self.model), *others))

    @contextmanager
    def substituted(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Runs with `tensors` in place of the live parameters and buffers of those names; modules come back unchanged.

        Every module is given a copy of its attributes, in which the tensors are replaced wherever they occur, so that
        hooks, parametrizations and modules reached by two paths work as they are.
        """
        live = {**self.live_params, **self.live_buffers}
        by_id = {id(live[name]): tensor for name, tensor in tensors.items() if name in live}
        before = [(module, vars(module)) for module in self.modules() if not is_scripted(module)]
        known = (self._watch, self._surroundings, self.params, self.buffers, self.options)
        with self.environment.frozen():
            try:
                for module, attributes in before:
                    module.__dict__ = {key: _replace(value, by_id) for key, value in attributes.items()}
                with scripts_substituted(list(self.modules()), by_id):
                    yield
            finally:
                for module, attributes in before:
                    module.__dict__ = attributes
                self._watch, self._surroundings, self.params, self.buffers, self.options = known

    def tensor_attributes(self) -> dict[tuple[int, str], torch.Tensor]:
        """Returns the tensors that modules hold as plain attributes, by module and name."""
        return {
            (id(module), key): value
            for module in self.modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.Tensor)
        }

    def set_attributes(self, values: Mapping[tuple[int, str], torch.Tensor]) -> None:
        """Gives modules plain attributes, by module and name; inside `substituted`, until it is left."""
        for module in self.modules():
            vars(module).update({key: value for (owner, key), value in values.items() if owner == id(module)})

    def identity(self) -> dict[str, tuple[int, bool]]:
        """Returns which parameters the model has now, and which of them require gradients."""
        self.refresh()
        return {name: (id(p), p.requires_grad) for name, p in self.params.items()}

    def read_buffers(self) -> dict[str, torch.Tensor]:
        """Returns the present buffers by the names of the live ones; inside `substituted`, the new ones."""
        return self.live_buffers


def changed_attributes(before: tuple[Any, ...], after: tuple[Any, ...]) -> list[str]:
    """Returns the names of plain attributes that differ between two signatures."""
    changed = []
    for old, new in zip(before, after, strict=True):
        was = dict(old[1:])
        changed += [key for key, value in new[1:] if key in was and was[key] != value]
    return changed


def _replace(value: Any, by_id: Mapping[int, torch.Tensor]) -> Any:
    """Returns a value with tensors replaced by identity; dicts, lists and tuples are copied."""
    if isinstance(value, torch.Tensor):
        return by_id.get(id(value), value)
    if type(value) is dict or (isinstance(value, dict) and type(value).__module__ == "collections"):
        copied = value.copy()
        for key, item in value.items():
            copied[key] = _replace(item, by_id)
        return copied
    if type(value) in (list, tuple):
        return type(value)(_replace(item, by_id) for item in value)
    return value


def _parts(model: Any) -> Iterator[tuple[str, nn.Module | torch.Tensor]]:
    """Yields the modules and tensors of a pytree with their paths."""
    for path, leaf in named_leaves(model):
        if isinstance(leaf, (nn.Module, torch.Tensor)):
            yield path if path or isinstance(leaf, nn.Module) else "0", leaf


def _each_once(named: Mapping[str, _Any]) -> dict[str, _Any]:
    """Returns the tensors, or modules, by the first of their names."""
    first: dict[int, str] = {}
    return {name: one for name, one in named.items() if first.setdefault(id(one), name) == name}


def _refuse_nothing(model: Any) -> None:
    if next(_parts(model), None) is None:
        raise InputError(
            f"the model is a {type(model).__name__} without tensors. Pass an instance of `torch.nn.Module`, a tensor, "
            "or lists, tuples and dicts of them."
        )
    for path, leaf in named_leaves(model):
        if isinstance(leaf, (nn.Module, torch.Tensor)) or is_option(leaf):
            continue
        raise InputError(
            compose_message(
                f"the model has a {type(leaf).__name__} at {path!r}, which is neither a module nor a tensor",
                None,
                "What such an object holds would not be seen.",
                "Put its modules and tensors themselves into the lists, tuples or dicts.",
            )
        )


def _refuse_uninitialized(view: ModelView) -> None:
    for name, tensor in (*view.live_params.items(), *view.live_buffers.items()):
        if isinstance(tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
            raise InputError(
                compose_message(
                    f"the model's {name!r} is not initialized: the model has lazy modules that never ran",
                    None,
                    "A program needs the shapes of all parameters.",
                    "Pass a batch that reaches them: `functionalize(model, optimizer, loss_fn, example=batch)`. Or run "
                    "the model once on a batch (`model(x)`) before.",
                )
            )
