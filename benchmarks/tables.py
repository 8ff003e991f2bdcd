"""Tables of what was measured, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Measured, Row

HEADER = (
    "contender",
    "median ms",
    "to our fastest",
    "to plain training",
    "first result s",
    "live MB",
    "growth MB",
    "process MB",
    "error, float64",
    "error, float32",
)
MARKS = {"wrong": "WRONG", "nan": "NaN", "approximate": "approximate"}
BEGIN, END = "<!-- measured -->", "<!-- end -->"
WITHOUT = {"hyper": "hyperparameters", "params": "initial parameters"}


def fastest(measured: Measured, family: str = "gimli") -> Row | None:
    """Returns the fastest contender of a family that is right and gives all gradients."""
    right = [r for r in measured.rows if r.family == family and r.status == "ok" and r.median and not r.missing]
    return min(right, key=lambda row: row.median or 0.0, default=None)


def plain_of(measured: Measured, row: Row) -> Row | None:
    """Returns the plain training that a contender is compared with: in its executor, or in eager torch."""
    for key in (row.baseline, "plain"):
        plain = measured.row(key)
        if plain is not None and plain.median is not None:
            return plain
    return None


def table(measured: Measured) -> str:
    """Returns the table of a workload, with what it needs to be read."""
    rows = [_line(measured, row) for row in measured.rows if row.times]
    absent = [f"{row.title} ({row.status}: {_escaped(row.text)})" for row in measured.rows if not row.times]
    unit = "thread" if measured.threads == 1 else "threads"
    caption = f"{measured.rounds} rounds, {measured.threads} {unit}, {measured.device}, float32."
    parts = [f"### {measured.key}: {measured.title}", caption]
    if measured.note:
        parts[-1] += f" **{measured.note}**."
    parts.append("\n".join("| " + " | ".join(line) + " |" for line in (HEADER, ["---"] * len(HEADER), *rows)))
    if absent:
        parts.append("Without times:\n\n" + "\n".join(f"- {line}" for line in absent))
    return "\n\n".join(parts)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").rstrip(".")


def _line(measured: Measured, row: Row) -> tuple[str, ...]:
    ours, plain = fastest(measured), plain_of(measured, row)
    title = row.title
    if row.missing:
        title += f" (without gradients in {' and '.join(WITHOUT.get(name, name) for name in row.missing)})"
    return (
        title,
        f"{row.median:.3g}" if (row.median or 0) < 1000 else f"{row.median:.0f}",
        _ratio(row, ours),
        _ratio(row, plain) if row.family != "plain" else "-",
        "-" if row.build is None else f"{row.build:.1f}",
        _megabytes(row.memory.get("live")),
        _megabytes(row.memory.get("growth")),
        _megabytes(row.memory.get("process")),
        _error(row.error, row.status),
        "-" if row.rounding is None else f"{row.rounding:.0e} ({row.natural:.0e})",
    )


def _ratio(row: Row, other: Row | None) -> str:
    if other is None or row.median is None or not other.median:
        return "-"
    return f"{row.median / other.median:.2f}"


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.3g}" if count < 1e9 else f"{count / 1e6:.0f}"


def _error(error: float | None, status: str) -> str:
    if error is None:
        return "-"
    text = f"{error:.0e}"
    return f"{MARKS[status]} ({text})" if status in MARKS else text


def summary(every: Sequence[Measured]) -> str:
    """Returns one table of all workloads: our fastest against plain training and against the best of each family."""
    header = ("workload", "our fastest", "ms", "to plain training", "torch", "libraries", "JAX", "live MB", "JAX's")
    lines = [header, ["---"] * len(header)]
    for measured in every:
        ours = fastest(measured)
        if ours is None:
            continue
        peers = [fastest(measured, family) for family in ("torch", "library", "jax")]
        lines.append(
            (
                measured.key,
                ours.title.removeprefix("gimli_compile, "),
                f"{ours.median:.3g}",
                _ratio(ours, plain_of(measured, ours)),
                *(f"{_ratio(peer, ours)} ({peer.title})" if peer else "-" for peer in peers),
                _megabytes(ours.memory.get("live")),
                _megabytes(peers[2].memory.get("live") if peers[2] else None),
            )
        )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(every: Sequence[Measured], plots: Sequence[str]) -> str:
    """Returns the whole measured part of a document."""
    kinds = {(one.device, tuple(sorted(one.environment.items()))): one for one in every}
    parts = [_environment(one) for one in kinds.values()]
    parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})" for plot in plots]
    parts += ["Other columns than ms and MB are times divided by our fastest's.", summary(every)]
    return "\n\n".join([*parts, *(table(measured) for measured in every)])


def _environment(measured: Measured) -> str:
    versions = [f"{name} {value}" for name, value in measured.environment.items() if name not in ("processor", "cores")]
    machine = f"{measured.environment['processor']}, {measured.environment['cores']} cores"
    return f"{', '.join(versions)}; {machine}; device {measured.device}."


def replace_measured(path: Path, text: str) -> None:
    """Writes a text between the marks of a document; one without marks, or that is not there yet, gets them."""
    before, _, rest = (path.read_text() if path.exists() else "").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
