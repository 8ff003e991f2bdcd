"""What plain containers hold at one moment, however nested, to compare with and to put back."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gimli_compile.concolic import plain
from gimli_compile.snapshot import is_number

_CONTAINERS = (list, dict, OrderedDict, defaultdict, deque, set, tuple)


@dataclass(frozen=True, eq=False)
class Contents:
    """A container and what it held: keys and values, which are contents themselves, or what lies there."""

    container: Any
    items: tuple[tuple[Any, Any], ...]


def contents_of(value: Any, seen: frozenset[int] = frozenset()) -> Any:
    """Returns what a value holds; the value itself if it is no plain container."""
    if type(value) not in _CONTAINERS or id(value) in seen:
        return value
    seen |= {id(value)}
    if isinstance(value, set):
        return Contents(value, tuple((item, None) for item in value))
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return Contents(value, tuple((key, contents_of(item, seen)) for key, item in pairs))


def refilled(held: Any, stands_for: Mapping[int, torch.Tensor] | None = None) -> Any:
    """Gives containers back what they held, and returns the value; tensors may be replaced, by identity."""
    if isinstance(held, torch.Tensor):
        return held if stands_for is None else stands_for.get(id(held), held)
    if not isinstance(held, Contents):
        return held
    container = held.container
    if stands_for is None and same_contents(contents_of(container), held):
        return container
    pairs = [(key, refilled(item, stands_for)) for key, item in held.items]
    if isinstance(container, tuple):
        same = all(a is b for a, (_, b) in zip(container, pairs, strict=True))
        return container if same else type(container)(item for _, item in pairs)
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(pairs if isinstance(container, dict) else [key for key, _ in pairs])
    else:
        container.extend(item for _, item in pairs)
    return container


def same_contents(after: Any, before: Any) -> bool:
    """Tells whether two values hold the same: equal numbers, flags and strings, and otherwise the very objects."""
    if isinstance(after, Contents) and isinstance(before, Contents):
        if type(after.container) is not type(before.container) or len(after.items) != len(before.items):
            return False
        if isinstance(after.container, set):
            return set(after.items) == set(before.items)
        pairs = zip(after.items, before.items, strict=True)
        return all(_is_same_key(a, b) and same_contents(x, y) for (a, x), (b, y) in pairs)
    if is_number(before) or isinstance(before, (bool, str)):
        now, then = plain(after), plain(before)
        return type(now) is type(then) and bool(now == then or (now != now and then != then))
    return after is before


def _is_same_key(key: Any, other: Any) -> bool:
    return key is other or (not isinstance(key, torch.Tensor) and bool(key == other))


def length_of(held: Any) -> int:
    """Returns how many items a value holds, those of its containers included."""
    if not isinstance(held, Contents):
        return 0
    return len(held.items) + sum(length_of(item) for _, item in held.items)
