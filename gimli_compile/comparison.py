"""Compares what two runs computed, without taking much memory: piece by piece, and changes on a sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch

ROUNDINGS = 256
_PIECE = 1 << 18
_SAMPLED = 1 << 16


def close(value: torch.Tensor, expected: torch.Tensor, eps: float, change: float = 0.0) -> bool:
    """Compares up to rounding, or up to a part of the largest `change` that the eager result itself made."""
    if value.shape != expected.shape:
        return False
    if value.numel() == 0 or (value.dtype == expected.dtype and torch.equal(value.detach(), expected)):
        return True
    largest = difference = 0.0
    for part, wanted in _pieces(value.detach(), expected):
        same = (part == wanted) | (part.isnan() & wanted.isnan())
        difference = max_with_nan(difference, torch.where(same, 0.0, (part - wanted).abs()))
        largest = max(largest, float(torch.where(wanted.isfinite(), wanted.abs(), 0.0).max()))
    return difference <= largest * ROUNDINGS * eps + 1e-2 * change


def max_with_nan(known: float, values: torch.Tensor) -> float:
    """Returns the largest of a number and the entries of a tensor; NaN if there is one."""
    found = float(values.max())
    return found if found != found or found > known else known


def _pieces(value: torch.Tensor, expected: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    flat = zip(value.flatten().split(_PIECE), expected.flatten().split(_PIECE), strict=True)
    yield from ((wide(part), wide(wanted)) for part, wanted in flat)


def wide(value: torch.Tensor) -> torch.Tensor:
    """Returns a tensor in float64; of a complex one, its real and imaginary parts."""
    return (torch.view_as_real(value) if value.is_complex() else value).to(torch.float64)


def sampled(value: torch.Tensor) -> torch.Tensor:
    """Returns all entries of a small tensor, and of a large one some, evenly spread: enough for the size of a change.

    A change that no sampled entry shows counts as none, which only makes a comparison stricter.
    """
    if value.numel() <= _SAMPLED:
        return value
    return value.flatten()[:: value.numel() // _SAMPLED].clone()


def largest_change(after: torch.Tensor, before: torch.Tensor) -> float:
    """Returns the largest finite difference of two samples; zero where they have different shapes."""
    if after.shape != before.shape or not after.numel():
        return 0.0
    change = (wide(after) - wide(before)).abs()
    return float(torch.where(change.isfinite(), change, 0.0).max())
