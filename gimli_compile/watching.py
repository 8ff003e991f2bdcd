"""Whether live objects still hold what they held when they were read, told by identity."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch


class Watch:
    """Remembers what objects hold: the very keys, items and attribute values, and which tensors require gradients.

    What it remembers is kept alive, so that nothing else can take its identity. A number that is assigned anew is
    another object; what a tensor's memory holds is not watched.
    """

    def __init__(self, objects: Iterable[Any]) -> None:
        self._kept = list(objects)
        self._tensors = [value for value in self._kept if isinstance(value, torch.Tensor)]
        self._flags = [tensor.requires_grad for tensor in self._tensors]
        readers = [_reader(value) for value in self._kept if not isinstance(value, torch.Tensor)]
        self._readers = [reader for reader in readers if reader is not None]
        self._is_possible = len(self._readers) == len(readers)
        self._held = [list(reader()) for reader in self._readers]
        self._ids = [list(map(id, held)) for held in self._held]

    def holds(self) -> bool:
        """Tells whether nothing changed; False where that cannot be told."""
        if not self._is_possible:
            return False
        for reader, ids in zip(self._readers, self._ids, strict=True):
            if list(map(id, reader())) != ids:
                return False
        return [tensor.requires_grad for tensor in self._tensors] == self._flags


def _reader(container: Any) -> Callable[[], Iterable[Any]] | None:
    """Returns what reads the contents of a container or the attributes of an object; None if there is no way."""
    if isinstance(container, dict):
        if hasattr(container, "__dict__"):
            return lambda: chain(container, container.values(), container.__dict__.values())
        return lambda: chain(container, container.values())
    if isinstance(container, (list, tuple, deque, set, frozenset)):
        return container.__iter__
    return (lambda: container.__dict__.values()) if hasattr(container, "__dict__") else None
