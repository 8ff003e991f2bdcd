"""What a gradient scaler does to gradients and to its own scale, in operators that a program can have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

Tensor = torch.Tensor


def _unscale(grads: Sequence[Tensor], found_inf: Tensor, inverse_scale: Tensor) -> None:
    """Divides gradients by the scale, and notes whether one of them is not finite."""
    for grad in grads:
        bad = torch.logical_not(torch.isfinite(grad)).any().to(found_inf.dtype)
        found_inf.copy_(torch.maximum(found_inf, bad))
        grad.mul_(inverse_scale)


def _update_scale(
    scale: Tensor, growth_tracker: Tensor, found_inf: Tensor, growth: Any, backoff: Any, interval: Any
) -> Tensor:
    """Lowers the scale after gradients that were not finite; raises it after `interval` steps without any."""
    skipped = found_inf > 0
    successful = growth_tracker + 1
    grown = scale * growth
    is_due = successful == interval
    raised = torch.where(torch.logical_and(is_due, torch.isfinite(grown)), grown, scale)
    scale.copy_(torch.where(skipped, scale * backoff, raised))
    growth_tracker.copy_(torch.where(torch.logical_or(skipped, is_due), torch.zeros_like(successful), successful))
    return scale


LOSS_SCALING_FORMS: dict[Any, Callable[..., Any]] = {
    cast(Any, torch)._amp_foreach_non_finite_check_and_unscale_: _unscale,
    cast(Any, torch)._amp_update_scale_: _update_scale,
}
