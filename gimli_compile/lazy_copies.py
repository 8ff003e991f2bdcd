"""Copies that take memory when they are written to, or what they were made from is.

Code that is traced or run for comparison gets copies of everything, and writes to little of it: gradients are only
read, parameters one after the other. torch shares the memory of such a copy until one side writes.
"""

from __future__ import annotations

import torch


def lazy_copy(value: torch.Tensor) -> torch.Tensor:
    """Returns a detached copy, of the same strides."""
    value = value.detach()
    if type(value) is not torch.Tensor or value.layout is not torch.strided or not value.is_contiguous():
        return value.clone()
    if value.nbytes < _SMALL or value.device.type not in ("cpu", "cuda"):
        return value.clone()
    try:
        return torch._lazy_clone(value)  # pyright: ignore[reportPrivateImportUsage]
    except RuntimeError:  # memory that is not torch's own cannot be shared so
        return value.clone()


_SMALL = 1 << 12
