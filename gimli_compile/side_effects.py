"""Side effects of a train step on what it encloses: counters, logs. They are undone, and said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

from gimli_compile.concolic import plain
from gimli_compile.errors import BakedValueWarning
from gimli_compile.snapshot import is_number


@dataclass(frozen=True)
class _Place:
    """A variable that a function encloses, or a global that it names; a list or dict that one of these holds.

    Or all attributes of an object: `name` is then what stands before theirs.
    """

    name: str
    read: Callable[[], Any]
    restore: Callable[[Any], None]
    is_owner: bool = False

    def changed(self, now: Any, before: Any) -> list[str]:
        """Returns the names of what changed; of attributes, only those that are numbers, tensors, lists or dicts."""
        if not self.is_owner:
            return [self.name]
        pairs = {key: (now.get(key), before.get(key)) for key in {**before, **now}}
        return [f"{self.name}.{key}" for key, (a, b) in pairs.items() if a is not b and (_counts(a) or _counts(b))]


@contextmanager
def side_effects_undone(
    functions: Iterable[FunctionType], names_in: Callable[[Any], set[str]], objects: Iterable[Any] = ()
) -> Iterator[None]:
    """Gives counters and logs their contents back on leaving, and warns of those that changed.

    They are what these functions enclose and name, and the attributes of these objects.
    """
    places = [place for function in functions for place in _places(function, names_in)]
    places += [place for owner in objects for place in _attributes(owner)]
    before = [place.read() for place in places]
    changed = []
    try:
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            now = place.read()
            if not _same(now, value):
                changed += place.changed(now, value)
                place.restore(value)
    if changed:
        warnings.warn(
            f"the train step changes {', '.join(f'`{name}`' for name in dict.fromkeys(changed))}, which is no part of "
            "model and optimizer. A program does not: it has what was there at capture. That is right for logs. If "
            "later steps depend on it, keep it in a buffer of the model or in the optimizer, or pass what holds it: "
            "`functionalize(..., objects={name: object})`.",
            BakedValueWarning,
            stacklevel=2,
        )


def _places(function: FunctionType, names_in: Callable[[Any], set[str]]) -> Iterator[_Place]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield from _place(name, cell.cell_contents, lambda cell=cell: cell.cell_contents, _setter(cell))
        except ValueError:  # a cell that is not filled yet
            continue
    names = function.__globals__
    for name in names_in(function.__code__):
        if name in names:
            put = lambda value, name=name: names.__setitem__(name, value)  # noqa: E731
            yield from _place(name, names[name], lambda name=name: names[name], put)


def _counts(value: Any) -> bool:
    return is_number(value) or isinstance(value, (torch.Tensor, list, dict))


def _attributes(owner: Any) -> Iterator[_Place]:
    """Yields the lists and dicts that an object holds, and all its attributes."""
    kind, held = type(owner).__name__, vars(owner)
    for key, value in list(held.items()):
        if type(value) in (list, dict):
            yield from _place(f"{kind}.{key}", value, dict, lambda _: None)
    yield _Place(kind, lambda: dict(held), lambda items: (held.clear(), held.update(items))[1], is_owner=True)


def _setter(cell: Any) -> Callable[[Any], None]:
    return lambda value: setattr(cell, "cell_contents", value)


def _place(name: str, value: Any, read: Callable[[], Any], put: Callable[[Any], None]) -> Iterator[_Place]:
    if is_number(value) or isinstance(value, (bool, str)):
        yield _Place(name, read, put)
    elif type(value) is list:
        yield _Place(name, lambda: list(value), lambda items: value.__setitem__(slice(None), items))
    elif type(value) is dict:
        yield _Place(name, lambda: dict(value), lambda items: (value.clear(), value.update(items))[1])


def _same(after: Any, before: Any) -> bool:
    if isinstance(before, (list, dict)):
        items = (list(part.items()) if isinstance(part, dict) else list(enumerate(part)) for part in (after, before))
        now, then = items
        return len(now) == len(then) and all(a == b and x is y for (a, x), (b, y) in zip(now, then, strict=True))
    return type(plain(after)) is type(before) and bool(plain(after) == before or after != after)
