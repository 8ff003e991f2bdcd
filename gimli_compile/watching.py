"""Whether live objects still hold what they held when they were read, told by identity."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch


@dataclass(frozen=True, eq=False)
class Same:
    """Equals what holds the very same object, which is kept alive."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


class Watch:
    """Remembers what objects hold: the very keys, items and attribute values, and which tensors require gradients.

    What it remembers is kept alive, so that nothing else can take its identity. A number that is assigned anew is
    another object; what a tensor's memory holds is not watched.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        kept = list(objects)
        containers = [value for value in kept if not isinstance(value, torch.Tensor)]
        self._is_possible = all(map(_is_readable, containers))
        self._tensors = [value for value in kept if isinstance(value, torch.Tensor)]
        self._flags = [tensor.requires_grad for tensor in self._tensors]
        self._owners = [value for value in containers if hasattr(value, "__dict__")]
        self._attributes = list(map(_attributes_of, self._owners))
        parts = [part for value in containers for part in _parts_of(value)]
        self._parts = [*parts, *(attributes.values() for attributes in self._attributes)]
        self._sizes = list(map(len, self._parts))
        self._held = list(chain.from_iterable(self._parts))

    def holds(self) -> bool:
        """Tells whether nothing changed; False where that cannot be told."""
        return (
            self._is_possible
            and all(map(is_, map(_attributes_of, self._owners), self._attributes))
            and list(map(len, self._parts)) == self._sizes
            and all(map(is_, chain.from_iterable(self._parts), self._held))
            and [tensor.requires_grad for tensor in self._tensors] == self._flags
        )


_attributes_of = attrgetter("__dict__")
_DICTS = (dict, OrderedDict, defaultdict)
_SEQUENCES = (list, tuple, deque, set, frozenset)


def _is_readable(container: Any) -> bool:
    return isinstance(container, (dict, *_SEQUENCES)) or hasattr(container, "__dict__")


def _parts_of(container: Any) -> tuple[Any, ...]:
    """Returns what shows the contents of a container, as they are whenever one looks."""
    if isinstance(container, dict):
        if type(container) in _DICTS:
            return container.keys(), container.values()
        return dict.keys(container), dict.values(container)  # whatever a class of the user's makes of them
    return (container,) if isinstance(container, _SEQUENCES) else ()
