"""Measures the contenders of a workload in turn, and says which of them are right."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.results import Measured, Row
from benchmarks.roster import REFERENCE, Contender
from benchmarks.seats import OutError, Seat
from benchmarks.worker import Job
from benchmarks.workloads import Workload

WRONG = 1e-6  # the relative error of a gradient in float64 from which on a contender is wrong
ROUNDING = 100  # times the reference's own rounding in float32, from which on one is wrong
COARSE = 1e-3  # rounding in float32 that is always allowed
UNSAID = 0.1  # the reference's own rounding from which on float32 says nothing

Arrays = Mapping[str, np.ndarray]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Limits:
    """What a measurement may take."""

    repeats: int = 15
    time_limit: float = 300.0  # seconds for one request to a contender
    round_limit: float = 600.0  # seconds for all rounds of a workload
    memory_limit: int = 12 * 2**30
    threads: int | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class References:
    """What is right: in float64 cut and whole, and how far the reference itself is off in float32."""

    checked: Arrays
    whole: Arrays | None
    rounding: float | None


def relative_error(found: Arrays, expected: Arrays) -> float:
    """Returns the largest error of what was found, each relative to the norm of what is expected."""
    errors = [
        np.linalg.norm((found[name] - expected[name]).ravel()) / max(np.linalg.norm(expected[name].ravel()), 1e-300)
        for name in found
    ]
    return float(max(errors)) if np.isfinite(errors).all() else float("nan")


def measure(workload: Workload, contenders: Sequence[Contender], limits: Limits, logs: Path, say: Say) -> Measured:
    """Returns a row for each contender, all measured in the same rounds."""
    threads = limits.threads or workload.threads
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as cache:

        def sit(contender: Contender) -> Seat:
            log = logs / f"{workload.key}.{contender.key}.log"
            job = Job(contender, workload, limits.device, threads, str(log))
            folder = Path(cache) / contender.key
            return Seat(job, folder, time_limit=limits.time_limit, memory_limit=limits.memory_limit)

        say("reference")
        references = _references(sit(REFERENCE))
        seats: dict[str, Seat] = {}
        rows = {contender.key: _row(contender) for contender in contenders}
        try:
            for contender in contenders:
                say(f"{contender.key}: build")
                seats[contender.key] = sit(contender)
                _attempt(rows, seats, contender.key, lambda row, seat: _prepare(row, seat, references, say))
            rounds = _race(rows, seats, limits, say)
        finally:
            for seat in seats.values():
                seat.close()
    return Measured.of(workload, list(rows.values()), threads=threads, device=limits.device, rounds=rounds)


def _row(contender: Contender) -> Row:
    c = contender
    return Row(key=c.key, title=c.title, family=c.family, baseline=c.baseline, is_exact=c.is_exact)


def _attempt(rows: dict[str, Row], seats: dict[str, Seat], key: str, ask: Callable[[Row, Seat], None]) -> None:
    """Asks a contender; who has no answer is out and leaves its seat."""
    try:
        ask(rows[key], seats[key])
    except OutError as error:
        rows[key].status, rows[key].text = error.status, str(error)
        seats.pop(key).close()


def _references(seat: Seat) -> References:
    try:
        checked = seat.ask("outcome", "float64", True)
        try:
            whole = seat.ask("outcome", "float64", False)
            return References(checked, whole, relative_error(seat.ask("outcome", "float32", False), whole))
        except OutError:
            return References(checked, None, None)
    finally:
        seat.close()


def _prepare(row: Row, seat: Seat, references: References, say: Say) -> None:
    row.build, found = seat.ask("build")
    say(f"{row.key}: memory")
    row.memory = seat.ask("memory", seat.time_limit / 2)
    if found:
        say(f"{row.key}: check")
        judge(row, seat.ask("outcome", "float64", True), found, references)
    seat.ask("release")


def judge(row: Row, exact: Arrays, found: Arrays, references: References) -> None:
    """Compares what a contender found with the references, in float64 and in float32, and sets its status."""
    row.missing = sorted({name.split(".")[0] for name in references.checked if name not in exact})
    row.error = relative_error(exact, references.checked)
    if references.whole is not None:
        row.rounding = relative_error(found, references.whole)
    row.natural = references.rounding
    if not row.is_exact:
        row.status = "approximate"
    elif np.isnan(row.error):
        row.status = "nan"
    elif row.error > WRONG or _is_off(row.rounding, references.rounding):
        row.status = "wrong"


def _is_off(rounding: float | None, natural: float | None) -> bool:
    if rounding is None or natural is None or natural > UNSAID:
        return False
    return not rounding <= max(COARSE, ROUNDING * natural)


def _race(rows: dict[str, Row], seats: dict[str, Seat], limits: Limits, say: Say) -> int:
    """Times all contenders in turn, in rounds; returns how many there were."""
    end = time.monotonic() + limits.round_limit
    for turn in range(limits.repeats):
        for key in list(seats):
            say(f"{key}: round {turn + 1} of {limits.repeats}")

            def clock(row: Row, seat: Seat) -> None:
                row.times.append(seat.ask("time"))

            _attempt(rows, seats, key, clock)
        if time.monotonic() > end:
            return turn + 1
    return limits.repeats
