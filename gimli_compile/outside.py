"""Live state that a train step changes and the program does not have: a scheduler or a scaler that nobody passed.

A train step is a function, and what it encloses may be anything. Numbers of the optimizer are inputs and results of the
program; those of an object beside it, which holds the optimizer and changes with every step, would be constants.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

from gimli_compile.concolic import plain
from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.literals import content_of
from gimli_compile.side_effects import side_effects_undone
from gimli_compile.skeleton import Skeleton, Value
from gimli_compile.snapshot import freeze, installed, is_owned_object

_FRAMEWORK = ("torch", "numpy", __name__.split(".")[0])


@contextmanager
def outside_kept(function: Callable[..., Any], known: Collection[int]) -> Iterator[None]:
    """Leaves what a train step holds as it was; refuses changes of objects that belong to training.

    Those are the objects that hold the optimizer, and those that have a `state_dict`. `known` are the ids of the
    optimizer, and of everything else whose numbers the program has.
    """
    reachable = _reachable(function)
    functions = [found for found in reachable if isinstance(found, FunctionType)]
    objects = [found for found in reachable if not isinstance(found, FunctionType)]
    holders = [found for found in objects if id(found) not in known and (_holds(found, known) or _is_stateful(found))]
    ids = {*known, *map(id, holders)}
    frozen = [(holder, *freeze(holder, {}, ids - {id(holder)})) for holder in holders]
    installing = _all_installed([(skeleton, values) for _, skeleton, values in frozen])
    others = [found for found in objects if id(found) not in ids]
    with side_effects_undone(functions, _names_in, others), installing:
        yield
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


def _reachable(function: Any) -> list[Any]:
    """Returns functions, and objects with attributes, that a function encloses, names, or reaches through others."""
    found: list[Any] = []
    seen: dict[int, Any] = {}
    pending = [function]
    while pending:
        value = pending.pop()
        if id(value) in seen or type(value).__module__.split(".")[0] == _FRAMEWORK[-1]:
            continue
        seen[id(value)] = value
        if is_owned_object(value) and not isinstance(value, torch.nn.Module):
            found.append(value)
        if isinstance(value, FunctionType) and not _is_of_framework(value):
            found.append(value)
        pending.extend(_inside(value))
    return found


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
    if _is_of_framework(function):
        return []
    named = [function.__globals__[name] for name in _names_in(function.__code__) if name in function.__globals__]
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    enclosed = map(content_of, function.__closure__ or ())
    return [*named, *defaults, *enclosed, getattr(function, "__wrapped__", None)]


def _is_of_framework(function: FunctionType) -> bool:
    module = (function.__module__ or "").split(".")[0]
    return module in _FRAMEWORK or module in sys.stdlib_module_names


def _names_in(code: CodeType) -> set[str]:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return set(code.co_names).union(*map(_names_in, inner))


def _is_stateful(owner: Any) -> bool:
    return callable(getattr(type(owner), "state_dict", None))


def _holds(owner: Any, known: Collection[int]) -> bool:
    values = list(vars(owner).values())
    values += [item for value in values if isinstance(value, (dict, list, tuple)) for item in _inside(value)]
    return any(id(value) in known for value in values)
