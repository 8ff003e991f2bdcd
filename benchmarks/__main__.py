"""Measures meta-gradients: this project against its peers, all in one run, in turn, each in a process of its own.

    python -m benchmarks                                   # all workloads, all contenders
    python -m benchmarks --workloads W2 W3 --repeats 15 --contenders gimli by-hand jax
    python -m benchmarks --quick --repeats 2               # small versions of everything, to see that it works
    python -m benchmarks --render --output docs/performance.md

A contender is right if its loss and gradients in float64 agree with the reference's (Algorithm 1 by hand, one step at a
time), and in float32 up to rounding; one that is not is marked. Every workload's results are a file in
benchmarks/measured/ (with --quick: benchmarks/output/), so that workloads measured separately come together in one
document.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import roster, workloads
from benchmarks.measuring import Limits, measure
from benchmarks.plots import plot_memory, plot_times
from benchmarks.results import Measured, load
from benchmarks.tables import replace_measured, report, table

MEASURED, OUTPUT = (Path(__file__).parent / name for name in ("measured", "output"))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", default=[], help="keys or their beginnings, as W3 or W3-adam-20")
    parser.add_argument("--contenders", nargs="+", default=[], help="keys or their beginnings, as gimli or jax")
    parser.add_argument("--list", action="store_true", help="lists workloads and contenders")
    parser.add_argument("--quick", action="store_true", help="smaller workloads; the tables say so")
    parser.add_argument("--repeats", type=int, default=15, help="rounds in which all contenders are timed")
    parser.add_argument("--time-limit", type=float, default=300, help="seconds for a contender's build, or one run")
    parser.add_argument("--round-limit", type=float, default=600, help="seconds after which no new round begins")
    parser.add_argument("--memory-limit", type=float, default=12, help="GiB that a contender's process may take")
    parser.add_argument("--threads", type=int, help="instead of each workload's own number")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where torch's contenders run")
    parser.add_argument("--results", type=Path, help="another folder of the measurements")
    parser.add_argument("--render", action="store_true", help="measures nothing, and writes what was measured")
    parser.add_argument("--output", type=Path, help="the Markdown file to write into; plots go beside")
    args = parser.parse_args(arguments)
    args.results = args.results or (OUTPUT if args.quick else MEASURED)
    return args


def measure_all(args: argparse.Namespace, console: Console) -> None:
    """Measures what was chosen, and saves every workload as soon as it is done."""
    chosen = workloads.chosen(args.workloads, workloads.workloads(quick=args.quick))
    contenders = roster.chosen(args.contenders)
    memory = int(args.memory_limit * 2**30)
    limits = Limits(args.repeats, args.time_limit, args.round_limit, memory, args.threads, args.device)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(chosen))
        for workload in chosen:

            def say(text: str, key: str = workload.key) -> None:
                progress.update(bar, description=f"{key}, {text}")

            measured = measure(workload, contenders, limits, OUTPUT / "logs", say)
            measured.save(args.results)
            console.print(table(measured) + "\n", markup=False, soft_wrap=True)
            progress.advance(bar)


def write(every: Sequence[Measured], output: Path) -> None:
    """Writes tables and plots."""
    output.parent.mkdir(parents=True, exist_ok=True)
    plots = [output.parent / f"{output.stem}_time.png", output.parent / f"{output.stem}_memory.png"]
    plot_times(every, plots[0])
    if not plot_memory(every, plots[1]):
        plots.pop()
    replace_measured(output, report(every, [plot.name for plot in plots]))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, and writes the document if asked to."""
    args = parse_arguments(arguments)
    console = Console()
    if args.list:
        for key, workload in workloads.workloads(quick=args.quick).items():
            console.print(f"{key:22} {workload.title}", markup=False, soft_wrap=True)
        for contender in roster.CONTENDERS:
            console.print(f"{contender.key:22} {contender.title}", markup=False, soft_wrap=True)
        return
    if not args.render:
        measure_all(args, console)
    if args.output:
        every = load(args.results)
        if not every:
            raise SystemExit(f"nothing was measured in {args.results}")
        write(every, args.output)


if __name__ == "__main__":
    main()
