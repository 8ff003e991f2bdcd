"""Plots of what was measured: time for each workload, and memory against the number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import matplotlib.patches
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.results import Measured, Row

COLORS = {"gimli": "tab:green", "torch": "tab:gray", "library": "tab:orange", "jax": "tab:blue", "plain": "lightgray"}
NAMES = {"gimli": "gimli_compile", "torch": "torch alone", "library": "higher, TorchOpt", "jax": "JAX"}
NAMES["plain"] = "plain training, no meta-gradient"
COLUMNS = 3
STYLE = {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}


def plot_times(every: Sequence[Measured], path: Path) -> None:
    """Draws a panel of bars for each workload, its times on a logarithmic axis; what is not right is hatched."""
    count = max(len(measured.rows) for measured in every)
    lines = math.ceil(len(every) / COLUMNS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6 * COLUMNS, lines * (1 + 0.19 * count)), layout="constrained", dpi=80)
        panels = figure.subplots(lines, COLUMNS, squeeze=False).flat
        for axes, measured in zip(panels, every, strict=False):
            _draw_times(axes, measured)
        for axes in list(figure.axes)[len(every) :]:
            axes.set_axis_off()
        patches = [matplotlib.patches.Patch(color=COLORS[family], label=NAMES[family]) for family in COLORS]
        patches.append(matplotlib.patches.Patch(facecolor="white", hatch="////", label="wrong, NaN or approximate"))
        figure.legend(handles=patches, loc="outside upper center", ncols=len(patches))
        figure.savefig(path)


def _draw_times(axes: Axes, measured: Measured) -> None:
    rows = sorted((row for row in measured.rows if row.median), key=lambda row: -(row.median or 0.0))
    titles, medians = [row.title for row in rows], [row.median or 0.0 for row in rows]
    bars = axes.barh(titles, medians, color=[COLORS[row.family] for row in rows])
    for bar, row in zip(bars, rows, strict=True):
        bar.set_hatch("" if row.status == "ok" else "////")
    axes.bar_label(bars, [f" {median:.3g}" for median in medians], fontsize=6)
    axes.set(xscale="log", title=f"{measured.key}, {measured.device}: ms")
    axes.xaxis.set_minor_formatter(NullFormatter())  # on an axis of less than a decade its labels overlap
    if measured.note:
        axes.set_xlabel(measured.note)
    axes.margins(x=0.1)


def plot_memory(every: Sequence[Measured], path: Path) -> bool:
    """Draws the peak of live tensors and the growth of the process against J; returns whether there is anything."""
    long = [measured for measured in every if measured.key.startswith("W5-")]
    models = sorted({_model(measured) for measured in long})
    if not models:
        return False
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5 * len(models)), layout="constrained", dpi=80)
        panels = figure.subplots(len(models), 2, squeeze=False)
        for line, model in zip(panels, models, strict=True):
            own = sorted((one for one in long if _model(one) == model), key=lambda one: one.steps)
            for axes, kind in zip(line, ("live", "growth"), strict=True):
                _draw_memory(axes, own, kind)
            line[0].set(title=f"{model}: peak of live tensors (JAX: XLA's plan)")
            line[1].set(title=f"{model}: growth of the process in a run")
        figure.savefig(path)
    return True


def _model(measured: Measured) -> str:
    return measured.key.split("-")[1] + (" (quick)" if measured.note else "")


def _draw_memory(axes: Axes, every: Sequence[Measured], kind: str) -> None:
    points: dict[str, list[tuple[int, float]]] = {}
    rows: dict[str, Row] = {}
    for measured in every:
        for row in measured.rows:
            count = row.memory.get(kind)
            if count and row.status == "ok":
                points.setdefault(row.title, []).append((measured.steps, count / 1e6))
                rows[row.title] = row
    markers = "os^vDPX*<>"
    for index, (title, pairs) in enumerate(points.items()):
        marker, color = markers[index % len(markers)], COLORS[rows[title].family]
        axes.plot(*zip(*pairs, strict=True), marker=marker, color=color, label=title, linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="J", ylabel="MB")
    if points:
        axes.legend(fontsize=6)
