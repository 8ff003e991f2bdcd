"""Look-ups in tables whose second derivative torch lacks or has wrong: sparse and scaled gradients, padding, bags."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gimli_compile.written_gradients import with_gradient

if TYPE_CHECKING:
    from gimli_compile.interception import Interception

Tensor = torch.Tensor
_SUM, _MEAN, _MAX = 0, 1, 2


def _embedding(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.embedding`: with `sparse=True` the table's gradient becomes one of the rows that were looked up.

    The gradients of rows that are padding, or are scaled by how often a row occurs, are written out: the derivatives of
    the operators that make them forget both.
    """
    names = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
    given = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
    weight, indices, scaled = given["weight"], given["indices"], given["scale_grad_by_freq"]
    padding = -1 if given["padding_idx"] is None else given["padding_idx"]
    if given["sparse"] and not scaled:
        weight = _with_row_gradient(mode, weight, indices, padding)
    entries = func(weight, indices)
    if scaled:
        entries = _scaled_by_frequency(mode, entries, indices, weight.shape[0])
    if padding < 0:
        return entries
    with mode:
        return torch.where((indices != padding).unsqueeze(-1), entries, entries.detach())


def _scaled_by_frequency(mode: Interception, entries: Tensor, indices: Tensor, rows: int) -> Tensor:
    """Returns the entries under another name, whose gradient is divided by how often the row of each occurs."""
    if not (entries.requires_grad and torch.is_grad_enabled()):
        return entries
    with torch.no_grad():
        flat = indices.reshape(-1)
        ones = torch.ones(flat.shape, dtype=entries.dtype, device=entries.device)
        counts = torch.zeros(rows, dtype=entries.dtype, device=entries.device).index_add(0, flat, ones)
        scale = counts[indices].reciprocal().unsqueeze(-1)
    return with_gradient(mode, entries, lambda gradient: gradient * scale)


def _with_row_gradient(mode: Interception, weight: Tensor, indices: Tensor, padding: int) -> Tensor:
    """Returns the table under another name, whose gradient is sparse from here on."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    with torch.no_grad():
        rows = torch.zeros(weight.shape[:1], dtype=torch.bool, device=weight.device)
        rows = rows.index_fill(0, indices.reshape(-1), True)
        if padding >= 0:
            rows = rows.index_fill(0, torch.full((1,), padding, device=weight.device), False)
    return with_gradient(mode, weight, lambda gradient: mode.recorder.sparse.make(gradient, rows))


def _embedding_bag(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.embedding_bag` as a look-up, and a sum over each bag or its largest entries."""
    names = (
        "weight", "indices", "offsets", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights",
        "include_last_offset", "padding_idx",
    )  # fmt: skip
    given = {**dict.fromkeys(names), **dict(zip(names, args, strict=False)), **kwargs}
    weight, indices, offsets, padding = given["weight"], given["indices"], given["offsets"], given["padding_idx"]
    padding = -1 if padding is None else padding % weight.shape[0]
    if given["include_last_offset"]:
        offsets = offsets[:-1]
    if given["sparse"]:
        weight = _with_row_gradient(mode, weight, indices, padding)
    kept = indices != padding
    entries = torch.embedding(weight, indices)
    if given["scale_grad_by_freq"]:
        entries = _scaled_by_frequency(mode, entries, indices, weight.shape[0])
    if given["per_sample_weights"] is not None:
        entries = entries * given["per_sample_weights"].unsqueeze(1)
    entries = torch.where(kept.unsqueeze(1), entries, torch.zeros_like(entries))
    places = torch.arange(indices.shape[0], device=offsets.device, dtype=offsets.dtype)
    bags = torch.searchsorted(offsets, places, right=True) - 1
    if given["mode"] == _MAX and indices.numel():
        totals = _largest(entries, bags, kept, offsets.shape[0])
    else:
        totals = entries.new_zeros(offsets.shape[0], weight.shape[1]).index_add(0, bags, entries)
    counts = entries.new_zeros(offsets.shape[0]).index_add(0, bags, kept.to(entries.dtype))
    if given["mode"] == _MEAN:
        totals = totals / counts.clamp(min=1).unsqueeze(1)
    return totals, bags, counts, counts


def _largest(entries: Tensor, bags: Tensor, kept: Tensor, count: int) -> Tensor:
    """Returns the largest entries of each bag, zeros for an empty one."""
    members = (bags == torch.arange(count, device=bags.device).unsqueeze(1)) & kept
    outside = torch.full((), -torch.inf, dtype=entries.dtype, device=entries.device)
    largest = torch.where(members.unsqueeze(-1), entries, outside).max(1).values
    return torch.where(members.any(1, keepdim=True), largest, torch.zeros_like(largest))


EMBEDDING_HANDLERS: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {
    torch.embedding: _embedding,
    torch.embedding_bag: _embedding_bag,
}
