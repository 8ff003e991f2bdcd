"""Look-ups in tables: sparse gradients, and bags, which torch differentiates only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gimli_compile.interception import Interception

Tensor = torch.Tensor
_SUM, _MEAN = 0, 1


class _WithRowGradient(torch.autograd.Function):
    """The same tensor, with a gradient that `make` makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.make = make
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.make(gradient), None


def _embedding(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.embedding` with `sparse=True`: the table's gradient becomes one of the rows that were looked up."""
    names = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if not given.get("sparse", False) or given.get("scale_grad_by_freq", False):
        return func(*args, **kwargs)
    weight, indices, padding = given["weight"], given["indices"], given.get("padding_idx", -1)
    return func(_with_row_gradient(mode, weight, indices, padding), indices, padding)


def _with_row_gradient(mode: Interception, weight: Tensor, indices: Tensor, padding: int) -> Tensor:
    """Returns the table under another name, whose gradient is sparse from here on."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    with torch.no_grad():
        rows = torch.zeros(weight.shape[:1], dtype=torch.bool, device=weight.device)
        rows = rows.index_fill(0, indices.reshape(-1), True)
        if padding >= 0:
            rows = rows.index_fill(0, torch.full((1,), padding, device=weight.device), False)
    recorder = mode.recorder
    with recorder.paused():
        looked_up: Any = _WithRowGradient.apply(weight, lambda gradient: recorder.sparse.make(gradient, rows))
    recorder.rename(weight, looked_up)
    return looked_up


def _embedding_bag(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.embedding_bag` as a look-up and a sum over each bag; the largest of a bag stays the fused operator."""
    names = (
        "weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights",
        "include_last_offset", "padding_idx",
    )  # fmt: skip
    given = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
    if given["scale_grad_by_freq"] or (given["mode"] or _SUM) not in (_SUM, _MEAN):
        return func(*args, **kwargs)
    weight, indices, offsets, padding = given["weight"], given["indices"], given["offsets"], given["padding_idx"]
    padding = -1 if padding is None else padding % weight.shape[0]
    if given["include_last_offset"]:
        offsets = offsets[:-1]
    if given["sparse"]:
        weight = _with_row_gradient(mode, weight, indices, padding)
    kept = indices != padding
    entries = torch.embedding(weight, indices, padding)
    if given["per_sample_weights"] is not None:
        entries = entries * given["per_sample_weights"].unsqueeze(1)
    entries = torch.where(kept.unsqueeze(1), entries, torch.zeros_like(entries))
    places = torch.arange(indices.shape[0], device=offsets.device, dtype=offsets.dtype)
    bags = torch.searchsorted(offsets, places, right=True) - 1
    totals = entries.new_zeros(offsets.shape[0], weight.shape[1]).index_add(0, bags, entries)
    counts = entries.new_zeros(offsets.shape[0]).index_add(0, bags, kept.to(entries.dtype))
    if given["mode"] == _MEAN:
        totals = totals / counts.clamp(min=1).unsqueeze(1)
    return totals, bags, counts, counts


EMBEDDING_HANDLERS: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {
    torch.embedding: _embedding,
    torch.embedding_bag: _embedding_bag,
}
