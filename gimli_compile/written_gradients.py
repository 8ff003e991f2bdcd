"""Tensors whose gradient in the backward pass is another than the derivative of what made them, as torch has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gimli_compile.interception import Interception

Tensor = torch.Tensor


class _WithGradient(torch.autograd.Function):
    """The same tensor, with a gradient that `make` makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.make = make
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.make(gradient), None


def with_gradient(mode: Interception, value: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns a tensor under another name, whose gradient goes through `make` on its way back.

    What `make` calls is recorded when the backward pass comes there; in the forward program nothing changes.
    """
    if not (value.requires_grad and torch.is_grad_enabled()):
        return value
    with mode.recorder.paused():
        renamed: Any = _WithGradient.apply(value, make)
    mode.recorder.rename(value, renamed)
    return renamed
