"""Finds every number and tensor of a live optimizer by its path, wherever it is kept, and changes it there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gimli_compile.skeleton import Container, IdRef, Leaf, ParamRef
from gimli_compile.snapshot import freeze


@dataclass(frozen=True)
class Place:
    """Where one number or tensor of a live optimizer is; `kind` is tensor, int or float."""

    path: str
    kind: str
    value: Any
    assign: Callable[[Any], None]

    def move(self, offset: Any) -> None:
        """Adds `offset`: to a tensor in place, so that whatever shares it moves along."""
        if isinstance(self.value, torch.Tensor):
            self.value.add_(torch.as_tensor(offset).to(self.value.dtype))
        else:
            self.assign(self.value + offset)


def places_of(optimizer: Any, params: Mapping[str, torch.Tensor]) -> dict[str, Place]:
    """Returns the places by path: parameter groups, state, attributes, and whatever objects these hold."""
    skeleton, _ = freeze(optimizer, {id(p): name for name, p in params.items()})
    found: dict[str, Place] = {}

    def visit(part: Any, value: Any, assign: Callable[[Any], None]) -> None:
        if isinstance(part, Leaf):
            found.setdefault(part.path, Place(part.path, part.kind, value, assign))
        elif isinstance(part, Container) and not isinstance(value, (set, frozenset)):
            for key, item in part.items:
                key = params[key.name] if isinstance(key, ParamRef) else key
                key = id(params[key.name]) if isinstance(key, IdRef) else key
                inside = vars(value) if part.owner is not None else value
                visit(item, inside[key], _assigner(inside, key, assign))

    visit(skeleton.root, optimizer, _refuse)
    return found


def _assigner(container: Any, key: Any, assign: Callable[[Any], None]) -> Callable[[Any], None]:
    """Returns what sets an entry; that of a tuple replaces the tuple."""

    def replace(value: Any) -> None:
        if not isinstance(container, tuple):
            container[key] = value
            return
        entries = [value if index == key else entry for index, entry in enumerate(container)]
        assign(type(container)(*entries) if hasattr(container, "_fields") else tuple(entries))

    return replace


def _refuse(value: Any) -> None:
    raise TypeError("an optimizer is not an entry of anything")
