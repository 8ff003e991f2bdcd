"""Whether fusing two loops takes more memory, as Inductor estimates it, asked only where memory could be used again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._inductor.codegen import wrapper
from torch._inductor.scheduler import Scheduler

_general = getattr(Scheduler, "can_fusion_increase_peak_memory", None)


@contextmanager
def memory_asked_where_shared() -> Iterator[None]:
    """Within this, Inductor (torch 2.13) estimates what a fusion saves only where the loops read buffers of one size.

    Where none of the buffers that each of the two reads last could take the place of one of the other, there is nothing
    to lose, and the estimate took half of the search for fusions.
    """
    general = _general
    if general is None:
        yield
        return
    keys: dict[Any, Any] = {}  # the buffers live as long as the graph

    def key_of(buffer: Any) -> Any:
        known = keys.get(buffer.name)
        if known is None or known[0] is not buffer.layout:
            known = keys[buffer.name] = (buffer.layout, wrapper.buffer_reuse_key(buffer))
        return known[1]

    def read_last(scheduler: Any, node: Any) -> set[Any]:
        buffers = (scheduler.name_to_buf.get(read.name) for read in node.read_writes.reads)
        return {key_of(one.node) for one in buffers if one and len(one.users) == 1 and one.node.has_tensor_output()}

    def increases(scheduler: Any, node1: Any, node2: Any) -> bool:
        first = read_last(scheduler, node1)
        if not first or first.isdisjoint(read_last(scheduler, node2)):
            return False
        return general(scheduler, node1, node2)

    with mock.patch.object(Scheduler, "can_fusion_increase_peak_memory", increases):
        yield
