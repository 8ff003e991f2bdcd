"""Live state that a train step changes and the program does not have: a scheduler or a scaler that nobody passed.

A train step is a function, and what it encloses may be anything. Numbers of the optimizer are inputs and results of the
program; those of an object beside it, which holds the optimizer and changes with every step, would be constants.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

from gimli_compile.concolic import plain
from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.literals import content_of
from gimli_compile.side_effects import (
    Place,
    SideEffects,
    places_of_functions,
    places_of_objects,
    side_effects_undone,
)
from gimli_compile.skeleton import Skeleton, Value
from gimli_compile.snapshot import freeze, installed, is_owned_object

_FRAMEWORK = ("torch", "numpy", __name__.split(".")[0])


@contextmanager
def outside_kept(
    function: Callable[..., Any], known: Collection[int], modules: Collection[torch.nn.Module], places: Iterable[Place]
) -> Iterator[SideEffects]:
    """Leaves what a train step holds as it was; refuses changes of objects that belong to training.

    Those are the objects that hold the optimizer, and those that have a `state_dict`. `known` are the ids of the
    optimizer, and of everything else whose numbers the program has; `places` are the attributes of the modules. What
    else the step changes is told when it is over.
    """
    places = list(places)
    reachable = reachable_from(function, modules)
    functions = [found for found in reachable if isinstance(found, FunctionType)]
    objects = [found for found in reachable if not isinstance(found, FunctionType)]
    holders = [found for found in objects if id(found) not in known and (_holds(found, known) or _is_stateful(found))]
    ids = {*known, *map(id, holders)}
    frozen = [(holder, *freeze(holder, {}, ids - {id(holder)})) for holder in holders]
    installing = _all_installed([(skeleton, values) for _, skeleton, values in frozen])
    others = [found for found in objects if id(found) not in ids]
    places += [*places_of_functions(functions, names_in), *places_of_objects(others)]
    with side_effects_undone(places) as effects, installing:
        yield effects
        for holder, _, before in frozen:
            _, after = freeze(holder, {}, ids - {id(holder)})
            for path in {**before, **after}:
                is_new = not (path in before and path in after)
                if is_new and not _is_stateful(holder):
                    continue
                if is_new or _differs(after[path], before[path]):
                    raise _refusal(holder, path, holds=_holds(holder, known))


@contextmanager
def _all_installed(frozen: list[tuple[Skeleton, dict[str, Value]]]) -> Iterator[None]:
    if not frozen:
        yield
        return
    skeleton, values = frozen[0]
    with installed(skeleton, lambda leaf: values[leaf.path], str), _all_installed(frozen[1:]):
        yield


def _differs(after: Value, before: Value) -> bool:
    if isinstance(after, torch.Tensor) or isinstance(before, torch.Tensor):
        return after is not before
    after, before = plain(after), plain(before)
    return bool(after != before and not (after != after and before != before))


def _refusal(holder: Any, path: str, *, holds: bool) -> CaptureError:
    name = type(holder).__name__
    which, option = "that has a `state_dict`", "objects={name: object}"
    if holds:
        which, option = "that holds the optimizer", "scheduler=..."
    return CaptureError(
        compose_message(
            f"the train step changes `{path}` of a {name} {which}",
            None,
            "It is no part of the program: every step would begin with the value that it has now.",
            f"Pass the {name} as well: `functionalize(model, optimizer, train_step=..., {option})`.",
        )
    )


# ---------------------------------------------------------------------- what a function can reach


def reachable_from(function: Callable[..., Any], modules: Iterable[torch.nn.Module] = ()) -> list[Any]:
    """Returns functions, classes and objects with attributes that a function encloses, names, or reaches by others.

    And those that modules hold or name in their methods.
    """
    found: list[Any] = []
    seen: dict[int, Any] = {}
    pending = [function, *(part for module in modules for part in _of_module(module))]
    while pending:
        value = pending.pop()
        if id(value) in seen or type(value).__module__.split(".")[0] == _FRAMEWORK[-1]:
            continue
        seen[id(value)] = value
        if is_owned_object(value) and not isinstance(value, torch.nn.Module):
            found.append(value)
        if isinstance(value, (FunctionType, type)) and not is_of_framework(value):
            found.append(value)
        pending.extend(_inside(value))
    return found


def _of_module(module: torch.nn.Module) -> Iterator[Any]:
    """Yields the classes of the user's that a module is of, their functions, and what it holds that is the user's."""
    for cls in type(module).__mro__:
        if not is_of_framework(cls):
            yield from (cls, *(value for value in vars(cls).values() if isinstance(value, FunctionType)))
    for value in vars(module).values():
        if isinstance(value, (dict, list, tuple, set, deque)) or not is_of_framework(type(value)):
            yield value


def _inside(value: Any) -> list[Any]:
    """Returns what a value leads to; code of frameworks, modules and tensors lead nowhere."""
    if isinstance(value, FunctionType):
        return _of_function(value)
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if is_owned_object(value) and not isinstance(value, (torch.nn.Module, torch.Tensor)):
        return list(vars(value).values())
    return []


def _of_function(function: FunctionType) -> list[Any]:
    if is_of_framework(function):
        return []
    named = [function.__globals__[name] for name in names_in(function.__code__) if name in function.__globals__]
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    enclosed = map(content_of, function.__closure__ or ())
    return [*named, *defaults, *enclosed, getattr(function, "__wrapped__", None)]


def is_of_framework(function: FunctionType | type) -> bool:
    """Tells whether a function or a class is that of a framework, and not the user's."""
    module = (function.__module__ or "").split(".")[0]
    return module in _FRAMEWORK or module in sys.stdlib_module_names


def names_in(code: CodeType) -> set[str]:
    """Returns the names that code uses, of globals and of attributes."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(names_in, inner))


def with_inner(code: CodeType) -> Iterator[CodeType]:
    """Yields code and the code that is defined inside of it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from with_inner(constant)


def _is_stateful(owner: Any) -> bool:
    return not isinstance(owner, type) and callable(getattr(type(owner), "state_dict", None))


def _holds(owner: Any, known: Collection[int]) -> bool:
    if isinstance(owner, type):
        return False
    values = list(vars(owner).values())
    values += [item for value in values if isinstance(value, (dict, list, tuple)) for item in _inside(value)]
    return any(id(value) in known for value in values)
