"""Writes measurements as text, Markdown or JSON."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gimli_compile.coverage.measurement import Measurement, Status
from gimli_compile.coverage.verdict import Derivative, Verdict

HEADER = ("class", "status", "values", "worst derivative", "variants", "nodes", "capture s", "remarks")
_WIDTHS_OF_REASON = 160


_LEGEND = """\
**values**: the largest relative difference of a parameter to the live eager code after any of the steps, from a fresh
and from a warmed-up optimizer. **derivatives** of a random projection of the last parameters, in every number and
tensor that the optimizer has: the difference to finite differences of the live code, relative, or absolute below 1e-3;
up to 1e-6 they are right. *kink*: between the slopes of the two sides. *jump*: the live code has no slope. *count*: an
integer that is no smooth quantity. *staircase*: the live code jumps wherever a search ends otherwise, and the library
warns of it; the program has the slope between two jumps, and the number is how far that is from differences over many.
*reported*: the library says that the number is a constant. *unmeasured*: the slope
of the live code cannot be measured to 1e-6. Where a class computes in *float32* or less inside, values are those with
its roundings, derivatives those without, in program and live code alike. Paths without `groups` are of group 0 or of
attributes.\
"""


def as_json(measurements: Sequence[Measurement], command: str) -> str:
    """Returns everything that was measured; numbers that are not finite are null."""
    found = {"command": command, "classes": [_plain(dataclasses.asdict(m)) for m in measurements]}
    return json.dumps(found, indent=1, allow_nan=False) + "\n"


def as_markdown(measurements: Sequence[Measurement], command: str) -> str:
    """Returns the table with how it was made and what it means, then the derivatives one by one."""
    title = ["# Coverage", "", f"Made by `{command}` with torch {torch.__version__}.", "", _LEGEND, ""]
    rows = [["---"] * len(HEADER), *(_row(m) for m in measurements)]
    lines = [_markdown_row(row) for row in (HEADER, *rows)]
    each = [
        f"- `{_short(m)}`: {', '.join(_derivative(d) for d in m.derivatives)}" for m in measurements if m.derivatives
    ]
    return "\n".join([*title, summary(measurements), "", *lines, "", "Derivatives, one by one:", "", *each]) + "\n"


def as_text(measurements: Sequence[Measurement], command: str) -> str:
    """Returns the table in columns, with the derivatives of each class below it."""
    rows = [_row(m) for m in measurements]
    widths = [max(map(len, column)) for column in zip(HEADER, *rows, strict=True)][:-1]

    def line(row: Sequence[str]) -> str:
        return "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()

    lines = [line(HEADER)]
    for measurement, row in zip(measurements, rows, strict=True):
        lines.append(line(row))
        if measurement.derivatives:
            lines.append("    " + ", ".join(_derivative(d) for d in measurement.derivatives))
    return "\n".join([*lines, "", summary(measurements)]) + "\n"


FORMATS: dict[str, Callable[[Sequence[Measurement], str], str]] = {
    "text": as_text,
    "markdown": as_markdown,
    "json": as_json,
}


def summary(measurements: Sequence[Measurement]) -> str:
    """Returns how many classes there are of each status, in a sentence."""
    counts = Counter(measurement.status for measurement in measurements)
    parts = ", ".join(f"{counts[status]} {status.value}" for status in Status if counts[status])
    return f"{len(measurements)} classes: {parts}."


def _row(m: Measurement) -> list[str]:
    if not m.variants:
        return [_short(m), m.status.value, "-", "-", "-", "-", "-", remarks(m)]
    worst = "-" if m.worst is None else _derivative(m.worst)
    return [
        _short(m),
        m.status.value,
        _error(m.value_error),
        worst,
        str(m.variants),
        str(m.nodes),
        f"{m.seconds:.2f}",
        remarks(m),
    ]


def remarks(m: Measurement) -> str:
    """Returns, in one line, why a class was not measured, and what to know of the numbers of one that was."""
    parts = [" ".join(m.reason.split())[:_WIDTHS_OF_REASON]] if m.reason else []
    if m.precision:
        parts.append(f"{m.precision} inside")
    if m.widened:
        parts.append("its float32 made float64, without which it does not run")
    if m.variants and m.driven_by != "gradients":
        parts.append(f"driven by {m.driven_by}")
    if m.variants and m.shapes and len(m.shapes) < 3:
        parts.append("shapes " + " ".join("x".join(map(str, shape)) for shape in m.shapes))
    if m.constants:
        parts.append(f"silent constants: {', '.join(m.constants)}")
    if m.baked:
        parts.append(f"{len(m.baked)} reported")
    return "; ".join(parts)


def _derivative(d: Derivative) -> str:
    path = d.path.removeprefix("groups.0.")
    if d.verdict is Verdict.EXACT:
        return f"{path} {_error(d.error)}"
    if d.verdict in (Verdict.COUNT, Verdict.KINK, Verdict.JUMP) or math.isnan(d.error):
        return f"{path} {d.verdict.value}"
    return f"{path} {d.verdict.value} {_error(d.error)}"


def _error(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}" if math.isfinite(error) else "not finite"


def _short(m: Measurement) -> str:
    return m.name.rsplit(".", 1)[-1]


def _markdown_row(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    return None if isinstance(value, float) and not math.isfinite(value) else value
