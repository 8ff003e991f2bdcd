"""Tensors whose leading size depends on values, because a mask selected their elements.

A selection runs with the size that it has at capture. What the code learns of that size, in Python or by an operator
for which it matters, becomes a condition of the program; `passes.selection` makes the rest independent of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from gimli_compile.call_arguments import tensors_of
from gimli_compile.passes.masked_form import is_elementwise, is_reduction
from gimli_compile.refusals import number_for_each

if TYPE_CHECKING:
    from gimli_compile.recording import Recorder

aten = torch.ops.aten
SELECTING = {aten.index.Tensor, aten.masked_select.default, aten.nonzero.default}
_MASKED = (torch.bool, torch.uint8)
_WRITES = {"index_put", "masked_scatter", "_index_put_impl"}


def masks_of(func: Any, args: Any) -> list[torch.Tensor]:
    """Returns the masks by which an operator selects."""
    if func is aten.nonzero.default:
        return [args[0]]
    if func is aten.masked_select.default:
        return [args[1]]
    return [index for index in args[1] if index is not None and index.dtype in _MASKED]


def is_write(func: Any) -> bool:
    """Tells whether an operator may write through a mask."""
    return func._opname.removesuffix("_") in _WRITES


def is_mask(value: Any) -> bool:
    """Tells whether a value is a mask."""
    return isinstance(value, torch.Tensor) and value.dtype in _MASKED


@dataclass(frozen=True)
class Count:
    """How many elements of a mask are set: traced, and at capture."""

    tensor: torch.Tensor
    value: int


@dataclass(frozen=True)
class Extent:
    """What a leading size follows from; `exact`: it is the one count itself."""

    counts: tuple[Count, ...]
    exact: bool


class Extents:
    """Follows the tensors of one recording whose leading size depends on values."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._found = WeakTensorKeyDictionary()
        self._gathered = WeakTensorKeyDictionary()
        self._counted = WeakTensorKeyDictionary()
        self._carried = False

    @contextmanager
    def carried(self) -> Iterator[None]:
        """Says that what is inside does not use how many elements there are: what it gives may, later."""
        before, self._carried = self._carried, True
        try:
            yield
        finally:
            self._carried = before

    # ------------------------------------------------------------------ below the recording mode

    def select(self, func: Any, args: Any, out: torch.Tensor) -> None:
        """Notes what a selecting operator gave, and on its node how many elements each mask selected."""
        masks = masks_of(func, args)
        if func is aten.masked_select.default and masks[0].shape != args[0].shape:
            shape = torch.broadcast_shapes(masks[0].shape, args[0].shape)
            with self._recorder:
                masks = [masks[0].expand(shape)]
        counts = tuple(map(self._count, masks))
        self._found[out] = Extent(counts, func is not aten.index.Tensor or len(args[1]) == 1)
        node = self._recorder.node_of(out)
        node.meta.update(counts=[count.value for count in counts], differentiated=torch.is_grad_enabled())

    def _count(self, mask: torch.Tensor) -> Count:
        version = 0 if mask.is_inference() else mask._version
        known = self._counted.get(mask)
        if known is None or known[0] != version:
            with self._recorder:
                total = mask.sum() if mask.dtype is torch.bool else (mask != 0).sum()
            known = self._counted[mask] = (version, Count(total, int(total)))
        return known[1]

    def refuse_each(self, func: Any, args: Any, kwargs: Any, is_each: Callable[[torch.Tensor], bool]) -> None:
        """Refuses numbers that are one for each element of a parameter where there are selected elements only."""
        tensors = tensors_of((args, kwargs))
        if is_write(func):
            written = args[2] if any(map(is_mask, tree_leaves(args[1]))) else None
            meeting = isinstance(written, torch.Tensor) and bool(written.dim()) and is_each(written)
            if meeting and not self.knows(written):
                raise number_for_each(func._opname)
            return
        chosen = [tensor for tensor in tensors if tensor in self._found or tensor in self._gathered]
        others = [tensor for tensor in tensors if tensor.dim() and all(tensor is not other for other in chosen)]
        if chosen and any(map(is_each, others)):
            raise number_for_each(func._opname)

    def follow(self, func: Any, tensors: list[torch.Tensor], out: Any) -> None:
        """Notes the results of an operator on selections; one to which their number may matter makes it a condition."""
        carries = func is aten.index.Tensor or is_elementwise(func)
        if self._gathered and carries and any(tensor in self._gathered for tensor in tensors):
            self._gather(out)
        extents = [self._found[tensor] for tensor in tensors if tensor in self._found]
        if not extents or is_write(func):
            return
        counts = {id(count): count for extent in extents for count in extent.counts}
        if not (self._carried or is_elementwise(func) or is_reduction(func)):
            with self._recorder:
                self._expect(counts.values())
            self._gather(out)
            return
        sizes = {tensor.shape[0] for tensor in tensors if tensor in self._found}
        for item in tree_leaves(out):
            if isinstance(item, torch.Tensor) and item.dim() and item not in self._found:
                exact = is_elementwise(func) and len(counts) == 1 and all(extent.exact for extent in extents)
                self._found[item] = Extent(tuple(counts.values()), exact and sizes == {item.shape[0]})

    def _gather(self, out: Any) -> None:
        """Notes results whose elements are selected ones in another order or shape, as many as there are now."""
        for item in tree_leaves(out):
            if isinstance(item, torch.Tensor) and item.dim():
                self._gathered[item] = True

    # ------------------------------------------------------------------ above it

    def knows(self, value: Any) -> bool:
        """Tells whether a value is a selection."""
        return isinstance(value, torch.Tensor) and value in self._found

    def fix(self, *tensors: Any) -> None:
        """Makes it a condition that these tensors, if they are selections, have the size that they have now.

        What the recording itself asks, while it handles an operator, is none.
        """
        if _get_current_dispatch_mode() is None:
            return
        for tensor in tensors:
            if self.knows(tensor):
                self._expect(self._found[tensor].counts)

    def element_count(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """Returns the number of elements of a selection as a traced tensor; None if its size is to be fixed."""
        extent = self._found.get(tensor)
        if extent is None or not extent.exact:
            return None
        return extent.counts[0].tensor * math.prod(tensor.shape[1:])

    def _expect(self, counts: Any) -> None:
        for count in counts:
            self._recorder.expect(count.tensor == count.value)
