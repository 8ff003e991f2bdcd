"""The slope of a function of one number, from its values: from both sides, from one side, and through noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Function = Callable[[float], float]
_LADDER = tuple(4.0**-power for power in range(3, 13))  # widths, as parts of the room to move in
_JUMP = 1e-9  # values are of the order of 1
_SMOOTH = 1e-9  # two widths that agree to this end the search
_FIT_LADDER = tuple(10.0 ** (-power / 2) for power in range(1, 11))
_FIT_POINTS = 24
_FIT_DEGREES = (3, 5)
_LOCAL_LADDER = tuple(10.0**-power for power in range(6, 13))
_LOCAL_POINTS = 12
_HALVINGS = 45  # from a thousandth of a number to its last places
_ROUNDING = 1e-15  # of the values of a function that is computed in float64


@dataclass(frozen=True)
class Slope:
    """An estimate of a derivative, and by how much it may be off.

    `jump` is how far the values beside 0 lead away from the value at 0, as far as that is more than their noise.
    """

    value: float
    uncertainty: float
    jump: float = 0.0


def central_slope(function: Function, room: float) -> Slope | None:
    """Returns the derivative at 0 by central differences of the sixth order, moving by less than `room`.

    Of several widths, the one is taken that agrees best with the next; None if the function has no finite values.
    """
    return _best(function, (-3, -2, -1, 1, 2, 3), room)


def side_slope(function: Function, room: float, side: int) -> Slope | None:
    """Returns the derivative at 0 from one side (1: right, -1: left), of the sixth order, and whether there is a jump.

    The value at 0 itself is used for the jump only: a branch may hold there and nowhere beside it.
    """
    places = tuple(side * place for place in (1, 2, 3, 4, 5, 6))
    return _best(function, places, room, at_zero=_value(function, 0.0))


def noisy_slope(function: Function, room: float, sides: Sequence[int], rounding: float) -> Slope | None:
    """Returns the derivative at 0 of a function that is computed with a coarse relative rounding.

    Polynomials are fitted over intervals of several widths. The uncertainty is that of the fit's residuals, of the
    polynomial's degree, and of a rounding over the interval; the interval with the least is taken.
    """
    fits = [_fit(function, room * width, sides, rounding) for width in _FIT_LADDER]
    known = [fit for fit in fits if fit is not None]
    return min(known, key=lambda slope: slope.uncertainty, default=None)


def local_slope(function: Function, room: float, sides: Sequence[int]) -> Slope | None:
    """Returns the derivative at 0 between the nearest jumps to both sides, however near they are.

    Lines are fitted over intervals that shrink to nothing but rounding. Of those from which the function deviates by
    no more than rounding, so that no jump is inside, the one with the least uncertainty is taken: jumps at even
    distances make a good line too, of another slope. If there is none, it is the one with the least uncertainty of all.
    """
    fits = [_fit_line(function, room * width, sides) for width in _LOCAL_LADDER]
    known = [fit for fit in fits if fit is not None]
    smooth = [slope for slope, is_smooth in known if is_smooth]
    return min(smooth or [slope for slope, _ in known], key=lambda slope: slope.uncertainty, default=None)


def nearby_jump(function: Function, slope: float, reach: float) -> float:
    """Returns by how much the function jumps somewhere between 0 and `reach`; 0 if it does not, NaN without values.

    The interval is halved, always to where the function leaves the line of this slope more, until the ends are
    neighbours: what is left is then many times what any slope could make of so short a way.
    """
    low, high = 0.0, reach
    at_low, at_high = (_value(function, end) - slope * end for end in (low, high))
    steepness = abs(at_high - at_low) / abs(reach)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        at_middle = _value(function, middle) - slope * middle
        if abs(at_middle - at_low) > abs(at_high - at_middle):
            high, at_high = middle, at_middle
        else:
            low, at_low = middle, at_middle
        if math.isnan(at_middle):
            return math.nan
    left = abs(at_high - at_low)
    explained = 1e3 * (steepness + abs(slope)) * abs(high - low) + 10 * _ROUNDING * max(abs(at_high), abs(at_low))
    return left if left > explained else 0.0


def _weights(places: tuple[int, ...]) -> np.ndarray:
    """Returns what to multiply the values at these places with to get, in two rows, value and derivative at 0."""
    powers = np.vander(np.array(places, dtype=float), increasing=True).T
    return np.linalg.solve(powers, np.eye(len(places))[:, :2]).T


def _best(function: Function, places: tuple[int, ...], room: float, at_zero: float = math.nan) -> Slope | None:
    level, weights = _weights(places)
    best: Slope | None = None
    last: float | None = None
    for width in _LADDER:
        h = room * width
        values = np.array([_value(function, place * h) for place in places])
        if not np.isfinite(values).all():
            continue
        estimate = float(weights @ values) / h
        rounding = float(np.abs(weights) @ np.abs(values)) * 1e-16 / h
        if last is not None:
            uncertainty = abs(estimate - last) + rounding
            away = float(level @ values) - at_zero
            found = Slope(estimate, uncertainty, away if abs(away) > _JUMP + 10 * uncertainty * h else 0.0)
            best = found if best is None or found.uncertainty < best.uncertainty else best
            if found.uncertainty <= _SMOOTH * max(abs(estimate), 1e-3):
                break
        last = estimate
    return best


def _value(function: Function, offset: float) -> float:
    """Returns the function's value, NaN where it has none."""
    try:
        return function(offset)
    except Exception:  # the live code need not take every value
        return math.nan


def _fit_line(function: Function, width: float, sides: Sequence[int]) -> tuple[Slope, bool] | None:
    """Returns the slope of a line over an interval, and whether the function leaves it by no more than rounding."""
    points = _points(_LOCAL_POINTS, sides)
    values = np.array([_value(function, float(point) * width) for point in points])
    if not np.isfinite(values).all():
        return None
    rises = values - values[0]
    found = _fitted(points, rises, 1)
    rounding = _ROUNDING * float(np.abs(values).max())
    deviations = rises - rises.mean() - found.value * (points - points.mean())
    slope = Slope(found.value / width, (found.uncertainty + rounding / math.sqrt(_LOCAL_POINTS)) / width)
    return slope, float(np.abs(deviations).max()) <= 10 * rounding


def _points(count: int, sides: Sequence[int]) -> np.ndarray:
    points = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    return sides[0] * (points + 1) / 2 if len(sides) == 1 else points


def _fit(function: Function, width: float, sides: Sequence[int], rounding: float) -> Slope | None:
    points = _points(_FIT_POINTS, sides)
    values = np.array([_value(function, float(point) * width) for point in points])
    if not np.isfinite(values).all():
        return None
    slopes = [_fitted(points, values, degree) for degree in _FIT_DEGREES]
    low, high = slopes
    rounded = rounding * float(np.abs(values).max()) / math.sqrt(_FIT_POINTS)
    return Slope(low.value / width, (low.uncertainty + abs(low.value - high.value) + rounded) / width)


def _fitted(points: np.ndarray, values: np.ndarray, degree: int) -> Slope:
    powers = np.vander(points, degree + 1, increasing=True)
    solution, *_ = np.linalg.lstsq(powers, values, rcond=None)
    residual = values - powers @ solution
    variance = float(residual @ residual) / (len(points) - degree - 1)
    spread = variance * np.linalg.inv(powers.T @ powers)[1, 1]
    return Slope(float(solution[1]), math.sqrt(max(spread, 0.0)))
