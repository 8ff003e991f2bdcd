"""Selections by constants: what they select is part of the program, as positions, so that all shapes are known.

    y[:, mask]          becomes     y[:, positions]          where `mask` is no input of the program
    repeat(counts)      becomes     a constant

That the constants keep their values is a condition of the program (`outside_values.py`), if anyone may write to them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from gimli_compile.call_arguments import tensors_of
from gimli_compile.selections import is_mask, is_write, masks_of

if TYPE_CHECKING:
    from gimli_compile.recording import Recorder

aten = torch.ops.aten


class ConstantSelections:
    """The selections of one trace whose masks, counts or values are constants."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._found = WeakTensorKeyDictionary()

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs and records a selection by constants; returns None for any other operator."""
        if torch.Tag.dynamic_output_shape not in func.tags:
            return self._write(func, args, kwargs) if is_write(func) else None
        by_mask = func in (aten.index.Tensor, aten.masked_select.default)
        chosen = masks_of(func, args) if by_mask else tensors_of((args, kwargs))
        self._recorder.outside.pin(chosen)
        if not chosen or any(map(self._recorder.reach, chosen)) or func is aten.linalg_lstsq.default:
            return None
        if func is aten.index.Tensor:
            if not all(mask.dim() for mask in chosen):
                return None  # `x[True]` has a new dimension
            return self._run(func, args[0], self._positions(args[1]), *args[2:])
        if func is aten.masked_select.default:
            shape = torch.broadcast_shapes(args[0].shape, args[1].shape) or (1,)
            positions = self._positions([args[1].expand(shape)])
            return self._run(aten.index.Tensor, self._run(aten.expand.default, args[0], shape), positions)
        return tree_map_only(torch.Tensor, self._recorder.as_constant, func(*args, **kwargs))

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs and records a write through masks that were selected by, such as the gradient of `x[mask]`."""
        masks = [index for index in args[1] if is_mask(index)] if isinstance(args[1], (list, tuple)) else []
        if not masks or any(mask not in self._found for mask in masks):
            return None
        return self._run(func, args[0], self._positions(args[1]), *args[2:], **kwargs)

    def _run(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        with self._recorder:
            return func(*args, **kwargs)

    def _positions(self, indices: Any) -> list[torch.Tensor | None]:
        """Returns indices with positions in the place of masks."""
        made: list[torch.Tensor | None] = []
        for index in indices:
            made += self._positions_of(index) if is_mask(index) else [index]
        return made

    def _positions_of(self, mask: torch.Tensor) -> list[torch.Tensor]:
        version = 0 if mask.is_inference() else mask._version
        known = self._found.get(mask)
        if known is None or known[0] != version:
            found = (mask != 0).nonzero().unbind(1)
            known = self._found[mask] = (version, [self._recorder.as_constant(place) for place in found])
        return known[1]
