"""Writes docs/layers.md: how exact the layers and losses of `torch.nn` are, measured as tests/test_layers.py does."""

import warnings
from pathlib import Path

import torch
from layer_cases import CASES
from layer_measurement import Measured, measure

HEAD = """# Layers

Made by `make layers` with torch {version}.

Each layer or loss of `torch.nn` is part of a small model that is trained for two steps of SGD in float64.
**values**: the largest relative difference of parameters, buffers and losses to the live loop.
**reverse over reverse**: the largest error of the gradients in the initial parameters, the learning rate and the
batches against finite differences of the live loop, relative, or absolute below 1e-3. **forward over reverse**:
`torch.func.jvp` through `unroll` against its gradient. **tasks**: values and gradients of `unroll(..., tasks=True)`
against a loop over two tasks. Right is up to 1e-12, 1e-6, 1e-9 and 1e-9. What is refused is refused at capture,
with the user's line.

| layer | values | reverse over reverse | forward over reverse | tasks | remarks |
| --- | --- | --- | --- | --- | --- |
"""


def row(name: str, measured: Measured) -> str:
    """Returns the row of one layer."""
    columns = [
        f"{measured.errors[key]:.0e}" if key in measured.errors else "-"
        for key in ("values", "reverse", "forward", "tasks")
    ]
    remarks = "refused: " + measured.refused.split("\n")[0] if measured.refused else ""
    if measured.beyond():
        remarks = "wrong: " + ", ".join(measured.beyond())
    return f"| {name} | {' | '.join(columns)} | {remarks} |"


def main() -> None:
    """Measures all layers and writes the table."""
    warnings.simplefilter("ignore")
    rows = [row(name, measure(case)) for name, case in CASES.items()]
    (Path(__file__).parent / "layers.md").write_text(HEAD.format(version=torch.__version__) + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
