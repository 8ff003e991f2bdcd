"""What code assigns, if only the value that was there before.

A schedule that lowers the learning rate at step 30 writes it at every step. What it writes is state from the start, and
not a hyperparameter that turns into state at step 30.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gimli_compile.several_optimizers import members
from gimli_compile.skeleton import Companion, Container, Leaf, Skeleton, containers_of, leaves_of
from gimli_compile.snapshot import GROUPS

_MISSING = object()


class _WatchedGroup(dict[Any, Any]):
    """A parameter group that notes the keys that are assigned."""

    def __init__(self, group: dict[Any, Any]) -> None:
        super().__init__(group)
        self.assigned: set[Any] = set()

    def __setitem__(self, key: Any, value: Any) -> None:
        self.assigned.add(key)
        super().__setitem__(key, value)

    def update(self, *args: Any, **options: Any) -> None:
        """Assigns several keys."""
        for key, value in dict(*args, **options).items():
            self[key] = value


def assigned_paths(skeleton: Skeleton, optimizer: Any, run: Callable[[], None]) -> set[str]:
    """Runs code on an optimizer and its companions, whose structure `skeleton` is, and returns what it assigned.

    Of the groups: the numbers whose key is assigned, and those inside of other entries that are other objects
    afterwards. Of the objects: what lies in attributes that are other objects afterwards.
    """
    each = members(optimizer)
    owned = [part for part in containers_of(skeleton) if part.owner is not None]
    owners = [part for part in owned if all(part.owner is not one for one in each)]
    holders = [part for part in owned if any(part.owner is one for one in each)]
    before = [dict(vars(part.owner)) for part in owners]
    paths: set[str] = set()
    for part in holders:
        run = partial(_watch_groups, part, run, paths)
    run()
    for part, attributes in zip(owners, before, strict=True):
        paths |= _replaced(part, attributes)
    return paths


def _watch_groups(holder: Container, run: Callable[[], None], paths: set[str]) -> None:
    """Runs code, and adds what it assigns in the groups of one optimizer."""
    optimizer, part = holder.owner, dict(holder.items).get(GROUPS)
    plain = list(optimizer.param_groups)
    parts = [group for _, group in part.items] if isinstance(part, Container) else []
    pairs = list(zip(parts, plain, strict=False))
    marks = [{leaf: _mark(value) for leaf, value in _leaves(*pair)} for pair in pairs]
    watched = [_WatchedGroup(group) for group in plain]
    optimizer.param_groups[:] = watched
    try:
        run()
    finally:
        for group, now in zip(plain, watched, strict=True):
            group.clear()
            group.update(now)
        optimizer.param_groups[:] = plain
    for (group, _), now, known in zip(pairs, watched, marks, strict=False):
        entries = group.items if isinstance(group, Container) else ()
        paths |= {item.path for key, item in entries if isinstance(item, Leaf) and key in now.assigned}
        paths |= {leaf.path for leaf, value in _leaves(group, now) if _is_other(_mark(value), known.get(leaf))}


def _leaves(part: Any, value: Any) -> Iterator[tuple[Leaf, Any]]:
    """Yields the leaves of a part of a group with what is there now; other structure yields nothing."""
    if isinstance(part, Leaf):
        yield part, value
    elif isinstance(part, Container) and isinstance(value, (dict, list, tuple)):
        for key, item in part.items:
            inside = value.get(key, _MISSING) if isinstance(value, dict) else (*value, *[_MISSING] * (key + 1))[key]
            if inside is not _MISSING:
                yield from _leaves(item, inside)


def _mark(value: Any) -> tuple[Any, int]:
    return value, value._version if isinstance(value, torch.Tensor) else 0


def _is_other(now: tuple[Any, int], before: tuple[Any, int] | None) -> bool:
    return before is None or now[0] is not before[0] or now[1] != before[1]


def _replaced(part: Container, before: dict[str, Any]) -> set[str]:
    now = vars(part.owner)
    changed = [
        item
        for key, item in part.items
        if not isinstance(key, Companion) and now.get(key, _MISSING) is not before.get(key, _MISSING)
    ]
    return {leaf.path for item in changed for leaf in leaves_of(Skeleton(item, ()))}
