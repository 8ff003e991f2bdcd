"""What was measured, as files: one for each workload, so that runs of different workloads come together."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.workloads import Workload, workloads

PACKAGES = ("torch", "higher", "torchopt", "jax", "optax")


@dataclass
class Row:
    """What became of a contender. Times are milliseconds for each round, `build` seconds, memory bytes.

    `status` is "ok", "approximate" (on purpose), "wrong", "nan", or why there are no times: "not there", "failed",
    "too slow", "too large"; `text` says more. `error` is relative and in float64, `rounding` in float32, `natural` that
    of the reference in float32; `missing` names groups of gradients that it does not give.
    """

    key: str
    title: str
    family: str
    baseline: str
    is_exact: bool = True
    status: str = "ok"
    text: str = ""
    times: list[float] = field(default_factory=list)
    build: float | None = None
    memory: dict[str, int | None] = field(default_factory=dict)
    error: float | None = None
    rounding: float | None = None
    natural: float | None = None
    missing: list[str] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        """The median time in milliseconds."""
        return statistics.median(self.times) if self.times else None


@dataclass
class Measured:
    """A workload's rows, and where and how they were measured."""

    key: str
    title: str
    note: str
    steps: int
    threads: int
    device: str
    rounds: int
    environment: dict[str, str]
    rows: list[Row]

    @classmethod
    def of(cls, workload: Workload, rows: list[Row], *, threads: int, device: str, rounds: int) -> Measured:
        """Notes what the rows belong to."""
        environment = describe_environment()
        w = workload
        return cls(w.key, w.title, w.note, w.steps, threads, device, rounds, environment, rows)

    def save(self, folder: Path) -> None:
        """Writes the file of the workload, over an older one."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_without_nan(asdict(self)), indent=1)
        (folder / f"{self.key}.{self.device}.json").write_text(text + "\n")

    def row(self, key: str) -> Row | None:
        """Returns the row of a contender."""
        return next((row for row in self.rows if row.key == key), None)


def _without_nan(value: Any) -> Any:
    """Returns JSON's values: NaN and infinity as their names."""
    if isinstance(value, Mapping):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def load(folder: Path) -> list[Measured]:
    """Returns all that was measured, in the order of the workloads."""
    found = []
    for path in folder.glob("*.json"):
        values = json.loads(path.read_text())
        rows = [Row(**_with_nan(row)) for row in values.pop("rows")]
        found.append(Measured(**values, rows=rows))
    order = list(workloads())
    return sorted(found, key=lambda one: (one.device, order.index(one.key) if one.key in order else -1, one.key))


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    numbers = ("error", "rounding", "natural")
    return row | {name: float(row[name]) for name in numbers if row.get(name) is not None}


def describe_environment() -> dict[str, str]:
    """Returns the versions of the packages that are there, and the processor."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions | {"processor": _processor(), "cores": str(os.cpu_count())}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{platform.machine()} CPU ({names[0]})" if names else f"{platform.machine()} CPU"
