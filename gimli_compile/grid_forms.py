"""Sampling at the places of a grid, by look-ups and weights: the fused operators have no forward-mode derivative."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from itertools import product
from typing import Any, cast

import torch

Tensor = torch.Tensor
_LINEAR, _NEAREST, _CUBIC = 0, 1, 2
_ZEROS, _BORDER, _REFLECTION = 0, 1, 2
_CUBIC_COEFFICIENT = -0.75
_Neighbour = tuple[Tensor, Tensor]  # places along one dimension, and their weights


def _grid_sampler(value: Tensor, grid: Tensor, mode: int, padding: int, align_corners: bool) -> Tensor:
    """`torch.grid_sampler`: (N, C, *sizes) at (N, *out, rank), whose last entry is first of the sizes' last."""
    sizes = value.shape[2:]
    along = []
    for size, place in zip(sizes, reversed(grid.unbind(-1)), strict=True):
        place = _in_pixels(place, size, align_corners)
        if mode != _CUBIC:
            place = _padded(place, size, padding, align_corners)
        along.append(_NEIGHBOURS[mode](place))
    looked_up = []
    for corner in product(*along):
        weight = reduce(torch.mul, (weight for _, weight in corner))
        places = [place for place, _ in corner]
        if mode == _CUBIC:
            places = [_padded(place, size, padding, align_corners) for place, size in zip(places, sizes, strict=True)]
        looked_up.append(_look_up(value, places) * weight.unsqueeze(1))
    return reduce(torch.add, looked_up)


def _in_pixels(place: Tensor, size: int, align_corners: bool) -> Tensor:
    """Returns places that go from -1 to 1 in pixels, from the middle of a corner pixel or from its edge."""
    return (place + 1) / 2 * (size - 1) if align_corners else ((place + 1) * size - 1) / 2


def _padded(place: Tensor, size: int, padding: int, align_corners: bool) -> Tensor:
    if padding == _REFLECTION:
        place = _reflected(place, 0, size - 1) if align_corners else _reflected(place, -0.5, size)
    return place if padding == _ZEROS else place.clamp(0, size - 1)


def _reflected(place: Tensor, low: float, span: int) -> Tensor:
    """Folds places into `low` to `low + span`."""
    if span == 0:
        return torch.zeros_like(place)
    distance = (place - low).abs()
    flips = torch.floor(distance / span)
    rest = distance - flips * span
    return torch.where(flips % 2 == 0, rest + low, span - rest + low)


def _linear_neighbours(place: Tensor) -> list[_Neighbour]:
    low = torch.floor(place)
    return [(low, low + 1 - place), (low + 1, place - low)]


def _nearest_neighbour(place: Tensor) -> list[_Neighbour]:
    return [(torch.round(place), torch.ones_like(place))]


def _cubic_neighbours(place: Tensor) -> list[_Neighbour]:
    low = torch.floor(place)
    t = place - low
    weights = (_cubic_far(t + 1), _cubic_near(t), _cubic_near(1 - t), _cubic_far(2 - t))
    return [(low + offset, weight) for offset, weight in zip((-1, 0, 1, 2), weights, strict=True)]


def _cubic_near(t: Tensor) -> Tensor:
    a = _CUBIC_COEFFICIENT
    return ((a + 2) * t - (a + 3)) * t * t + 1


def _cubic_far(t: Tensor) -> Tensor:
    a = _CUBIC_COEFFICIENT
    return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a


def _look_up(value: Tensor, places: list[Tensor]) -> Tensor:
    """Returns the values at whole places, zero outside; shape (N, C, *out)."""
    inside = None
    flat: Any = 0
    for place, size in zip(places, value.shape[2:], strict=True):
        within = (place >= 0) & (place <= size - 1)
        inside = within if inside is None else inside & within
        flat = flat * size + place.clamp(0, size - 1).to(torch.int64)
    assert inside is not None
    rows = flat.flatten(1).unsqueeze(1).expand(-1, value.shape[1], -1)
    found = value.flatten(2).gather(2, rows).unflatten(2, flat.shape[1:])
    return torch.where(inside.unsqueeze(1), found, torch.zeros_like(found))


_NEIGHBOURS: dict[int, Callable[[Tensor], list[_Neighbour]]] = {
    _LINEAR: _linear_neighbours,
    _NEAREST: _nearest_neighbour,
    _CUBIC: _cubic_neighbours,
}
GRID_FORMS: dict[Any, Callable[..., Any]] = {
    torch.grid_sampler: _grid_sampler,
    cast(Any, torch).grid_sampler_2d: _grid_sampler,
    cast(Any, torch).grid_sampler_3d: _grid_sampler,
}
