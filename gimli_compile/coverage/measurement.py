"""Measures one optimizer class: values and derivatives of its program against the live eager code."""

from __future__ import annotations

import enum
import math
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from gimli_compile.coverage.captured import Captured, Gradients, coarsest_rounding, size_of
from gimli_compile.coverage.lines import Start, constants, hyper_lines, parameter_lines, state_lines, with_facts
from gimli_compile.coverage.live import Drive, Trial, double_precision
from gimli_compile.coverage.recipe import Recipe, Shapes
from gimli_compile.coverage.trials import NoTrial, find_trial
from gimli_compile.coverage.verdict import NEGLIGIBLE, Derivative, Line, Verdict, judge
from gimli_compile.coverage.widening import Widened
from gimli_compile.errors import GimliError
from gimli_compile.searches import Search

VALUE_TOLERANCE = 1e-12
_COARSE = 4  # how many roundings of the coarsest dtype inside a step the values may differ by
_WARM = 3


class Status(enum.Enum):
    """What became of a class."""

    RIGHT = "right"
    REPORTED = "reported"
    STAIRCASE = "staircase"
    STOPPED = "stopped"
    WRONG = "wrong"
    REFUSED = "refused"
    FAILED = "failed"
    NOT_RUN = "not run"


@dataclass(frozen=True)
class Measurement:
    """What was measured of one class.

    Status RIGHT: values and derivatives are the live code's. REPORTED: so they are but for derivatives of numbers that
    the library reports as constants. STAIRCASE: the live code jumps wherever a search ends otherwise, the derivatives
    are its slopes between jumps, and the library says so. STOPPED: nothing is wrong so far, and time was up. WRONG:
    they differ and nothing says so. REFUSED: the library refuses with a reason. FAILED: it raises something else.
    NOT_RUN: the live class could not be made or run.

    `value_error` is the largest relative difference of a parameter after any step, from a fresh and from a warmed-up
    state; `constants` are numbers that the live code depends on and neither program nor report knows; `seconds` is the
    time of capture; `nodes` the operators of the largest variant; `precision` the coarsest dtype inside, without whose
    roundings the derivatives are measured; `widened` says that the values are as well, because the live code mixes
    dtypes and does not run.
    """

    name: str
    status: Status
    reason: str = ""
    shapes: Shapes = ()
    driven_by: str = ""
    value_error: float = math.nan
    derivatives: tuple[Derivative, ...] = ()
    constants: tuple[str, ...] = ()
    variants: int = 0
    nodes: int = 0
    seconds: float = 0.0
    precision: str = ""
    baked: tuple[str, ...] = ()
    widened: bool = False

    @property
    def worst(self) -> Derivative | None:
        """The derivative that is off most, the worst verdict first."""
        return max(self.derivatives, key=_badness, default=None)


def _badness(derivative: Derivative) -> tuple[int, float]:
    return list(Verdict).index(derivative.verdict), -1.0 if math.isnan(derivative.error) else derivative.error


def _worst_of(derivatives: tuple[Derivative, ...]) -> tuple[Derivative, ...]:
    """Returns for each path the worse of what was found from the fresh and from the warmed-up state."""
    found: dict[str, Derivative] = {}
    for derivative in derivatives:
        found[derivative.path] = max(found.get(derivative.path, derivative), derivative, key=_badness)
    return tuple(found.values())


def measure(kind: type, recipe: Recipe | None = None, time_limit: float = math.inf) -> Measurement:
    """Measures one class; never raises for what the class or the library does.

    After `time_limit` seconds the derivatives that are left are taken as unmeasured.
    """
    deadline = time.monotonic() + time_limit
    recipe = Recipe() if recipe is None else recipe
    name = f"{kind.__module__}.{kind.__qualname__}"
    with warnings.catch_warnings(), double_precision():
        warnings.simplefilter("ignore")  # what becomes a constant is in the measurement; libraries warn of their own
        try:
            trial = find_trial(kind, recipe)
        except NoTrial as error:
            return _measure_widened(kind, recipe, Measurement(name, Status.NOT_RUN, str(error)), deadline)
        return _measure(replace(trial, deadline=deadline), Measurement(name, Status.RIGHT))


def _measure_widened(kind: type, recipe: Recipe, failed: Measurement, deadline: float) -> Measurement:
    """Measures a class that mixes float32 into float64 parameters, and so does not run, with all of it in float64."""
    with Widened():
        try:
            trial = find_trial(kind, recipe)
        except NoTrial:
            return failed
        return _measure(replace(trial, deadline=deadline), replace(failed, reason="", widened=True))


def _measure(trial: Trial, blank: Measurement) -> Measurement:
    blank = replace(blank, shapes=trial.shapes, driven_by=trial.driven_by)
    try:
        return _measured(trial, blank)
    except GimliError as error:
        return replace(blank, status=Status.REFUSED, reason=str(error))
    except Exception as error:
        return replace(blank, status=Status.FAILED, reason=f"{type(error).__name__}: {error}")


def _measured(trial: Trial, blank: Measurement) -> Measurement:
    fresh = _measure_from(trial, 0)
    warm = fresh if trial.is_late else _measure_from(trial, _WARM)
    found = _worst_of(fresh.derivatives + warm.derivatives)
    value_error = max(fresh.value_error, warm.value_error)
    allowed = VALUE_TOLERANCE if not fresh.rounding else max(VALUE_TOLERANCE, _COARSE * fresh.rounding)
    wrong = not value_error <= allowed or bool(fresh.constants)
    searched = fresh.searched or warm.searched
    return replace(
        blank,
        status=_status(
            {derivative.verdict for derivative in found}, wrong=wrong, searched=searched, late=trial.is_late
        ),
        value_error=value_error,
        derivatives=found,
        constants=fresh.constants,
        variants=fresh.variants,
        nodes=fresh.nodes,
        seconds=fresh.seconds,
        precision=fresh.precision,
        baked=tuple(dict.fromkeys((*fresh.baked, *warm.baked))),
    )


def _status(verdicts: set[Verdict], *, wrong: bool, searched: bool, late: bool) -> Status:
    if wrong or Verdict.WRONG in verdicts or (Verdict.STAIRCASE in verdicts and not searched):
        return Status.WRONG
    if late and Verdict.UNMEASURED in verdicts:
        return Status.STOPPED
    if Verdict.STAIRCASE in verdicts:
        return Status.STAIRCASE
    return Status.REPORTED if Verdict.REPORTED in verdicts else Status.RIGHT


@dataclass(frozen=True)
class _Part:
    """What was measured from one state."""

    value_error: float
    derivatives: tuple[Derivative, ...]
    constants: tuple[str, ...]
    variants: int
    nodes: int
    seconds: float
    rounding: float
    precision: str
    baked: tuple[str, ...]
    searched: bool


def _measure_from(trial: Trial, warm: int) -> _Part:
    expected = trial.history(warm)
    captured = Captured(trial, warm)
    values = captured.values()
    variants = captured.programs()
    history, gradients = captured.gradients()
    rounding, precision = coarsest_rounding(captured.programs())
    report = captured.fn.report()
    baked = tuple(map(str, report))
    start = Start.of(trial, warm)
    lines = [
        (with_facts(line, reported=_is_reported(line.path, baked), rounding=rounding), got)
        for line, got in _lines(start, gradients)
    ]
    judged = _judge_widened(trial, warm, lines) if rounding else [judge(line, got) for line, got in lines]
    known = {*captured.fn.hyperparameters().by_path(), *captured.state.opt_state}
    hidden = () if warm else constants(start, known, expected)
    return _Part(
        max(_value_error(values, expected), _value_error(history, expected)),
        tuple(judged),
        tuple(path for path in hidden if not _is_reported(path, baked)),
        len(variants),
        max(map(size_of, variants)),
        captured.seconds,
        rounding,
        precision,
        baked,
        any(isinstance(entry, Search) for entry in report),
    )


def _lines(start: Start, gradients: Gradients) -> Iterator[tuple[Line, float]]:
    yield from hyper_lines(start, gradients)
    yield from parameter_lines(start, gradients)
    yield from state_lines(start, gradients)


def _judge_widened(trial: Trial, warm: int, lines: list[tuple[Line, float]]) -> list[Derivative]:
    """Judges the derivatives of code with low precision inside, live and captured, without its roundings.

    A derivative that is missing with them is wrong. Code that does not run without them is judged as it is.
    """
    try:
        with Widened():
            captured = Captured(trial, warm)
            _, gradients = captured.gradients()
            wide = {line.path: judge(line, got) for line, got in _lines(Start.of(trial, warm), gradients)}
    except Exception:
        return [judge(line, got) for line, got in lines]
    return [
        _with_roundings(wide[line.path], got, line) if line.path in wide else judge(line, got) for line, got in lines
    ]


def _with_roundings(found: Derivative, got: float, line: Line) -> Derivative:
    """Takes into account what the program with its roundings gives, and what the library says of it."""
    lost = not math.isfinite(got) or (got == 0 and abs(found.got) > NEGLIGIBLE)
    verdict = Verdict.WRONG if lost and found.verdict in (Verdict.EXACT, Verdict.STAIRCASE) else found.verdict
    reported = verdict is Verdict.WRONG and line.reported
    return replace(found, verdict=Verdict.REPORTED if reported else verdict)


def _is_reported(path: str, baked: tuple[str, ...]) -> bool:
    """Tells whether an entry names the number, or quotes a line of the user's that does."""
    words = [word for word in path.split(".") if not word.isdigit()]
    quoted = re.compile(rf"\b{re.escape(words[-1])}\b") if words else None
    return any(f"[{path}]" in entry or (quoted is not None and _quotes(entry, quoted)) for entry in baked)


def _quotes(entry: str, name: re.Pattern[str]) -> bool:
    _, _, source = entry.partition("\n")
    return name.search(source.partition(": ")[2]) is not None


def _value_error(history: list[Drive], expected: list[Drive]) -> float:
    pairs = zip(history, expected, strict=True)
    return max(relative_error(got[name], wanted[name]) for got, wanted in pairs for name in wanted)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest entry; infinite where there is NaN."""
    if not value.numel():
        return 0.0
    value, expected = value.detach().double(), expected.detach().double()
    error = float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    return math.inf if math.isnan(error) else error
