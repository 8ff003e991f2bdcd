"""Tells on the error stream how far a survey is: a bar where rich is installed, a line a class where it is not."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator

from gimli_compile.coverage.measurement import Measurement


def followed(measurements: Iterable[Measurement], total: int) -> Iterator[Measurement]:
    """Yields the measurements, and shows each as it comes."""
    if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
        yield from _with_bar(measurements, total)
        return
    for count, measurement in enumerate(measurements, 1):
        print(f"[{count}/{total}] {measurement.name}: {measurement.status.value}", file=sys.stderr, flush=True)
        yield measurement


def _with_bar(measurements: Iterable[Measurement], total: int) -> Iterator[Measurement]:
    console = importlib.import_module("rich.console").Console(stderr=True)
    with importlib.import_module("rich.progress").Progress(console=console) as progress:
        task = progress.add_task("measuring", total=total)
        for measurement in measurements:
            progress.update(task, advance=1, description=f"{measurement.name.rsplit('.', 1)[-1]:<24.24}")
            yield measurement
