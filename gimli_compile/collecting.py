"""Python's collector of cycles, while a graph is made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_OBJECTS = 100_000


@contextmanager
def rare_collections() -> Iterator[None]:
    """Lets Python look for cycles less often than it does, where that is more often than every 100,000 objects.

    Nodes of graphs are many small objects that refer to each other. Most stay until the work is done, and to look for
    garbage among them after every 700 new ones takes more time than to make them.
    """
    before = gc.get_threshold()
    if not 0 < before[0] < _OBJECTS:
        yield
        return
    gc.set_threshold(_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
