"""Compares a program's derivative with the slope of the live eager code, and says what the comparison is worth."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

from gimli_compile.coverage.slopes import (
    Function,
    Slope,
    central_slope,
    local_slope,
    nearby_jump,
    noisy_slope,
    side_slope,
)

TOLERANCE = 1e-6
NEGLIGIBLE = 1e-3  # derivatives below this are compared absolutely
_KINK = 1e-5  # how far the slopes of the two sides differ, relatively, where there is a kink
_BEND = 1e-4  # how well the slope of a small surrounding must be known, relatively, to be believed
_STEPS = 1e-3  # how far, as a part of the room, to look for the jumps of a staircase
_UNEQUAL = 1e-2  # a side with less than this part of the other's room is an edge


class Verdict(enum.Enum):
    """What a comparison of derivatives found."""

    EXACT = "exact"
    KINK = "kink"
    JUMP = "jump"
    PRECISION = "precision"
    COUNT = "count"
    REPORTED = "reported"
    UNMEASURED = "unmeasured"
    STAIRCASE = "staircase"
    WRONG = "wrong"


@dataclass(frozen=True)
class Derivative:
    """One derivative of a program (`got`) and the live code's slope (`expected`).

    `error` is relative to the larger of the two, or absolute below 1e-3; at a kink it is the distance from the slopes
    of the two sides. `uncertainty` is how well the slope could be measured, in the same unit.

    The verdicts: EXACT is within 1e-6. KINK lies between the slopes of the two sides. JUMP: the live code has another
    value beside this one, however near, and so no slope; the program has that of the branch taken. PRECISION is what
    the coarsest dtype inside the step allows. COUNT is an integer that the live code does not take as a smooth
    quantity. REPORTED differs, and the library says that the number is a constant. UNMEASURED differs by no more than
    the slope of the live code is uncertain by. STAIRCASE: the live code jumps nearby, as the result of a search does;
    the program has the slope up to the jumps, `expected` and `error` are those of differences beyond. WRONG differs.
    """

    path: str
    verdict: Verdict
    error: float
    got: float
    expected: float
    uncertainty: float = 0.0


@dataclass(frozen=True)
class Line:
    """A straight way through the point where the program was differentiated.

    `function` is the live code along it; `left` and `right` say how far one may go, 0 where values are not allowed.
    `count` marks an integer; `reported` a number that the library says is a constant; `rounding` is the coarsest
    relative rounding inside the step, 0 where all is float64.
    """

    path: str
    function: Function
    left: float = 1.0
    right: float = 1.0
    count: bool = False
    reported: bool = False
    rounding: float = 0.0


def judge(line: Line, got: float) -> Derivative:
    """Compares the derivative `got` of a program along a line with the slope of the live code."""
    found = _judge_noisy(line, got) if line.rounding else _judge_smooth(line, got)
    if not line.rounding and not line.count:
        found = _as(found, _seen_closer(line, found))
    if found.verdict is Verdict.WRONG and line.reported:
        return _as(found, Verdict.REPORTED)
    if line.count and found.verdict is not Verdict.EXACT and not _is_smooth(found):
        return _as(found, Verdict.COUNT)
    return found


def _as(found: Derivative, verdict: Verdict) -> Derivative:
    return Derivative(found.path, verdict, found.error, found.got, found.expected, found.uncertainty)


def _is_smooth(found: Derivative) -> bool:
    """Tells whether the live code had one well-measured slope, so that the number is more than a count."""
    return found.verdict is Verdict.WRONG and math.isfinite(found.expected) and found.uncertainty < _KINK


def _seen_closer(line: Line, found: Derivative) -> Verdict:
    """Returns STAIRCASE where the live code jumps nearby, and has the program's slope up to there though not beyond.

    Without values to tell, because time is up, a derivative is unmeasured and not wrong.
    """
    doubtful = (Verdict.WRONG, Verdict.UNMEASURED, Verdict.JUMP, Verdict.KINK)
    if found.verdict not in doubtful or not (math.isfinite(found.got) and math.isfinite(found.expected)):
        return found.verdict
    sides = _wide_sides(line)
    room = max(line.left, line.right)
    jump = nearby_jump(line.function, found.got, sides[-1] * room * _STEPS)
    near = local_slope(line.function, room, sides) if jump > 0 else None
    if math.isnan(jump) or (jump and near is None):
        return Verdict.UNMEASURED
    if near is None or near.uncertainty > abs(found.got - found.expected) / 10:
        return found.verdict
    scale = max(abs(found.got), abs(near.value), NEGLIGIBLE)
    agrees = abs(found.got - near.value) <= TOLERANCE * scale + 4 * near.uncertainty
    return Verdict.STAIRCASE if agrees else found.verdict


def _wide_sides(line: Line) -> list[int]:
    return [s for s, room in ((-1, line.left), (1, line.right)) if room >= _UNEQUAL * max(line.left, line.right)]


def _judge_smooth(line: Line, got: float) -> Derivative:
    center = central_slope(line.function, min(line.left, line.right)) if line.left and line.right else None
    if center is not None and _error(got, center.value) <= TOLERANCE:
        return _derivative(line, Verdict.EXACT, got, center)
    found = _judge_by_sides(line, got, center)
    if found.verdict in (Verdict.WRONG, Verdict.JUMP) and center is not None and _is_near(got, center):
        return _derivative(line, Verdict.UNMEASURED, got, center)
    return found


def _is_near(got: float, center: Slope) -> bool:
    """Tells whether `got` is the slope as far as that is known of a small surrounding, whatever a wider one says.

    A tiny constant is moved on its own scale and, more exactly, on a wider one: the code may bend between the two.
    """
    known = center.uncertainty <= _BEND * max(abs(got), abs(center.value), NEGLIGIBLE)
    return known and abs(got - center.value) <= 3 * center.uncertainty


def _judge_by_sides(line: Line, got: float, center: Slope | None) -> Derivative:
    left = side_slope(line.function, line.left, -1) if line.left else None
    right = side_slope(line.function, line.right, 1) if line.right else None
    known = [slope for slope in (center, left, right) if slope is not None]
    if not known:
        return Derivative(line.path, Verdict.UNMEASURED, math.nan, got, math.nan, math.nan)
    best = min(known, key=lambda slope: slope.uncertainty)
    if any(slope is not None and slope.jump for slope in (left, right)):
        return _derivative(line, Verdict.JUMP if math.isfinite(got) else Verdict.WRONG, got, best)
    if left is not None and right is not None and _disagree(left, right):
        return _judge_kink(line, got, left, right)
    if _error(got, best.value) <= TOLERANCE:
        return _derivative(line, Verdict.EXACT, got, best)
    if abs(got - best.value) <= 3 * best.uncertainty:
        return _derivative(line, Verdict.UNMEASURED, got, best)
    return _judge_at_edge(line, got, best)


def _judge_at_edge(line: Line, got: float, best: Slope) -> Derivative:
    """Looks for a kink at the lower end of what a number may be: a threshold of 1, or a tiny constant, decides a tie.

    The code is then run on values beyond that end, to get the slope of the other side. Where the constructor refuses
    those, the program's derivative may lie between the two, as that of a tie does, and not be the refused side's.
    """
    beyond = side_slope(line.function, line.right, -1) if line.left < _UNEQUAL * line.right else None
    if beyond is None or beyond.jump or not _disagree(beyond, best):
        return _derivative(line, Verdict.WRONG, got, best)
    if not line.left and _error(got, beyond.value) <= TOLERANCE:
        return _derivative(line, Verdict.WRONG, got, best)
    return _judge_kink(line, got, beyond, best)


def _disagree(left: Slope, right: Slope) -> bool:
    scale = max(abs(left.value), abs(right.value), NEGLIGIBLE)
    return abs(left.value - right.value) > _KINK * scale + 3 * (left.uncertainty + right.uncertainty)


def _judge_kink(line: Line, got: float, left: Slope, right: Slope) -> Derivative:
    low, high = sorted((left.value, right.value))
    nearest = min(max(got, low), high)
    slope = Slope(nearest if math.isfinite(got) else low, left.uncertainty + right.uncertainty)
    allowed = TOLERANCE * max(abs(low), abs(high), NEGLIGIBLE) + slope.uncertainty
    verdict = Verdict.KINK if abs(got - nearest) <= allowed else Verdict.WRONG
    return _derivative(line, verdict, got, slope)


def _judge_noisy(line: Line, got: float) -> Derivative:
    sides = _wide_sides(line)
    room = min(room for room in (line.left, line.right) if room > 0)
    slope = noisy_slope(line.function, room, sides, line.rounding)
    if slope is None:
        return Derivative(line.path, Verdict.UNMEASURED, math.nan, got, math.nan, math.nan)
    scale = max(abs(got), abs(slope.value), NEGLIGIBLE)
    allowed = 4 * slope.uncertainty + (TOLERANCE + 16 * line.rounding) * scale
    if not abs(got - slope.value) <= allowed:
        return _derivative(line, Verdict.WRONG, got, slope)
    return _derivative(line, Verdict.PRECISION if allowed < scale / 2 else Verdict.UNMEASURED, got, slope)


def _error(got: float, expected: float) -> float:
    difference = abs(got - expected)
    return difference / max(abs(got), abs(expected), NEGLIGIBLE) if math.isfinite(difference) else math.inf


def _derivative(line: Line, verdict: Verdict, got: float, slope: Slope) -> Derivative:
    unit = max(abs(got), abs(slope.value), NEGLIGIBLE) if math.isfinite(got) else 1.0
    return Derivative(line.path, verdict, _error(got, slope.value), got, slope.value, slope.uncertainty / unit)
