"""What Python code asks of tensors whose size depends on values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from gimli_compile.concolic import number_of
from gimli_compile.recording import Region

if TYPE_CHECKING:
    from gimli_compile.interception import Interception

Tensor = torch.Tensor


def _size(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """Shapes are those of the capture; for a selection that is a condition."""
    mode.recorder.extents.fix(*args)
    return func(*args, **kwargs)


def _number_of_elements(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    in_step = mode.recorder.region is Region.OPTIMIZER
    count = mode.recorder.extents.element_count(args[0]) if in_step else None
    return _size(mode, func, args, kwargs) if count is None else number_of(count, mode.recorder)


def with_dimension(mode: Interception, target: Any, index: Any) -> tuple[Any, Any]:
    """A single bool as a mask, whose value torch would read, becomes a mask with a dimension."""
    single = isinstance(index, Tensor) and index.dtype is torch.bool and index.dim() == 0
    if single and mode.recorder.reach(index):
        return target.unsqueeze(0), index.unsqueeze(0)
    return target, index


SIZE_HANDLERS: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {
    cast(Any, Tensor.shape).__get__: _size,
    cast(Any, Tensor.nbytes).__get__: _size,
    Tensor.size: _size,
    Tensor.__len__: _size,
    torch.is_same_size: _size,
    Tensor.is_same_size: _size,
    Tensor.numel: _number_of_elements,
    Tensor.nelement: _number_of_elements,
    torch.numel: _number_of_elements,
}
