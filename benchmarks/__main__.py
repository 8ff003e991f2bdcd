"""Times meta-gradients: all contenders in one run, in turn, several times; a wrong gradient is marked, not timed away.

python -m benchmarks [--repeats 15] [--output docs/performance.md]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.contenders import MetaGradient, Task, by_hand, compiled_program, plain_training

HEADER = ("contender", "median ms", "to plain training", "build s", "error in float64", "rounding of float32")
WRONG = 1e-9  # the relative error of a meta-gradient in float64 from which on a contender is wrong


def mlp_task(steps: int, optimizer: str) -> Task:
    """One task of an MLP 32-64-64-5 on batches of 16."""
    torch.manual_seed(1)
    draw = partial(torch.randn, dtype=torch.float64)

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))

    batches = draw(steps, 16, 32), torch.randint(5, (steps, 16))
    return Task(make, cross_entropy, batches, (draw(16, 32), torch.randint(5, (16,))), optimizer)


CONTENDERS: dict[str, Callable[[Task, torch.dtype], MetaGradient]] = {
    "plain training (no meta-gradient)": plain_training,
    "gimli_compile, everything kept": compiled_program,
    "gimli_compile, checkpoint='step'": partial(compiled_program, checkpoint="step"),
    "optimizer copied by hand, create_graph": by_hand,
}


def relative_error(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Returns the largest difference, relative to the largest entry of each tensor."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs)


def measure(task: Task, repeats: int) -> list[tuple[str, ...]]:
    """Returns a row for each contender."""
    exact = by_hand(task, torch.float64)()
    runs, builds, errors = {}, {}, {}
    for name, make in CONTENDERS.items():
        start = time.perf_counter()
        runs[name] = make(task, torch.float32)
        found = runs[name]()
        builds[name] = time.perf_counter() - start
        doubles = make(task, torch.float64)()
        errors[name] = (relative_error(doubles, exact), relative_error(found, exact)) if found else None
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    plain = statistics.median(times["plain training (no meta-gradient)"])
    return [_row(name, statistics.median(times[name]), plain, builds[name], errors[name]) for name in runs]


def _row(name: str, median: float, plain: float, build: float, errors: tuple[float, float] | None) -> tuple[str, ...]:
    exact, rounding = errors if errors is not None else (None, None)
    text = "-" if exact is None else f"{exact:.0e}" if exact < WRONG else f"WRONG ({exact:.0e})"
    return (
        name,
        f"{median:.2f}",
        f"{median / plain:.2f}",
        f"{build:.2f}",
        text,
        "-" if rounding is None else f"{rounding:.0e}",
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows as a Markdown table."""
    lines = [HEADER, ["---"] * len(HEADER), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Measures and prints; writes the tables to a file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path, help="replaces the measured part of this Markdown file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [
        f"torch {torch.__version__}, {platform.machine()} CPU, one thread, medians of {options.repeats} runs in turn."
    ]
    for optimizer in ("sgd", "adam"):
        for steps in (5, 20, 100):
            rows = measure(mlp_task(steps, optimizer), options.repeats)
            parts.append(f"### MLP 32-64-64-5, batch 16, {optimizer}, {steps} steps, float32\n\n{table(rows)}")
            print(parts[-1] + "\n", flush=True)
    if options.output:
        _replace_measured(options.output, "\n\n".join(parts))


def _replace_measured(path: Path, text: str) -> None:
    begin, end = "<!-- measured -->", "<!-- end -->"
    before, _, rest = path.read_text().partition(begin)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")


if __name__ == "__main__":
    main()
