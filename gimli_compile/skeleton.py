"""The structure of what an optimizer holds, without its values."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

Value = torch.Tensor | float | int


@dataclass(frozen=True)
class Leaf:
    """The place of one tensor or number. `path` names it, `kind` is tensor, int or float.

    `requires_grad` and `is_parameter` say it of a tensor that no operator made; `of_module` of a module's parameter.
    """

    path: str
    kind: str
    requires_grad: bool = False
    is_parameter: bool = False
    of_module: bool = False

    @property
    def is_tensor(self) -> bool:
        """Tells a tensor from a number."""
        return self.kind == "tensor"


@dataclass(frozen=True)
class ParamRef:
    """The place of a parameter, by name."""

    name: str


@dataclass(frozen=True)
class IdRef:
    """The place of the `id` of a parameter, as a key, by name."""

    name: str


@dataclass(frozen=True)
class Companion:
    """The key of an object that is walked beside the root and is no attribute of it."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Container:
    """The place of a dict, list, tuple, deque, set or object; `index` counts them in the order of the walk."""

    index: int
    make: Callable[[list[Any]], Any]
    items: tuple[tuple[Any, Any], ...]
    owner: Any = None
    fixed: bool = False


@dataclass(frozen=True)
class Again:
    """A second place of the container with this index."""

    index: int


@dataclass(frozen=True)
class Skeleton:
    """A structure without its values. Two skeletons are equal when every part but the values is.

    `groups` are the parts that are parameter groups, wherever in the structure they are held.
    """

    root: Any
    key: tuple[Any, ...]
    groups: tuple[Any, ...] = ()

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Skeleton) and self.key == other.key)

    @cached_property
    def _hash(self) -> int:
        return hash(self.key)

    def __hash__(self) -> int:
        """Returns the hash, made once: skeletons are looked up in every step."""
        return self._hash

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """The leaves in the order of the walk, each once."""
        found: dict[str, Leaf] = {}

        def visit(part: Any) -> None:
            if isinstance(part, Leaf):
                found.setdefault(part.path, part)
            elif isinstance(part, Container):
                for _, item in part.items:
                    visit(item)

        visit(self.root)
        return tuple(found.values())


def leaves_of(skeleton: Skeleton) -> list[Leaf]:
    """Returns the leaves of a skeleton in the order of the walk, each once."""
    return list(skeleton.leaves)


def parts_by_parameter(skeleton: Skeleton) -> list[Any]:
    """Returns the parts that dicts hold under a parameter as the key: what is kept for that parameter."""
    found: list[Any] = []

    def visit(part: Any) -> None:
        if isinstance(part, Container):
            for key, item in part.items:
                if isinstance(key, (ParamRef, IdRef)):
                    found.append(item)
                visit(item)

    visit(skeleton.root)
    return found


def static_parts(skeleton: Skeleton) -> list[Any]:
    """Returns what is neither container, number nor tensor: flags, functions, generators."""
    found: list[Any] = []

    def visit(part: Any) -> None:
        if isinstance(part, Container):
            for _, item in part.items:
                visit(item)
        elif not isinstance(part, (Leaf, ParamRef, Again)):
            found.append(part)

    visit(skeleton.root)
    return found


def owners_of(skeleton: Skeleton) -> list[Any]:
    """Returns the live objects of a skeleton."""
    return [part.owner for part in containers_of(skeleton) if part.owner is not None]


def containers_of(skeleton: Skeleton) -> list[Container]:
    """Returns the containers of a skeleton, in the order of the walk."""
    return [part for part in _parts(skeleton.root) if isinstance(part, Container)]


def opaque_of(skeleton: Skeleton) -> list[Any]:
    """Returns what a skeleton holds by identity: functions and the like."""
    return [part for part in _parts(skeleton.root) if is_opaque(part)]


def _parts(part: Any) -> Iterator[Any]:
    yield part
    if isinstance(part, Container):
        for _, item in part.items:
            yield from _parts(item)


def is_opaque(part: Any) -> bool:
    """Tells whether a part of a skeleton is an object that is known by its identity only, such as a function."""
    known = (bool, str, bytes, torch.dtype, torch.device, enum.Enum, type, Leaf, ParamRef, IdRef, Again, Container)
    return part is not None and not isinstance(part, known)
