"""Directional derivatives of programs: tangents pushed forward, nothing kept."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import fx

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.program import Program
from gimli_compile.slot import Slot

Values = Mapping[Slot, torch.Tensor]
_LACKING = re.compile(r"forward AD|forward-mode|jvp", re.IGNORECASE)


def push_forward(program: Program, values: Values, directions: Values, cure: str) -> tuple[Values, Values]:
    """Returns the results of a program and the derivatives of the floating ones along `directions`, by input slot.

    Without any directions nothing moves, and there are no derivatives.

    Raises:
        CaptureError: torch has no forward derivative of an operator; the message names its line.
    """
    if not directions:
        with torch.no_grad():
            return program(values), {}
    slots = tuple(directions)

    def run(*moved: torch.Tensor) -> Any:
        results = program({**values, **dict(zip(slots, moved, strict=True))})
        floating = {slot: value for slot, value in results.items() if value.is_floating_point()}
        return floating, {slot: value for slot, value in results.items() if slot not in floating}

    try:
        given = tuple(values[slot] for slot in slots)
        floating, tangents, others = jvp(run, given, tuple(directions.values()))
    except (RuntimeError, NotImplementedError) as error:
        if not _LACKING.search(str(error)):
            raise
        raise _refusal(program, values, directions, cure) from error
    return {**floating, **others}, tangents


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Calls `torch.func.jvp` with an auxiliary result and without what torch warns of itself.

    All are made contiguous: a tangent of another layout would be copied into the primal's, which has no room for it
    where tasks share one tensor.
    """
    primals, tangents = (tuple(value.contiguous() for value in values) for values in (primals, tangents))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        return cast(Any, torch.func.jvp(function, primals, tangents, has_aux=True))


class _Finder(fx.Interpreter):
    """Runs a graph node by node and knows which one it is at."""

    def __init__(self, program: Program) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), program.graph))
        self.at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node."""
        self.at = n
        return super().run_node(n)


def _refusal(program: Program, values: Values, directions: Values, cure: str) -> CaptureError:
    finder = _Finder(program)
    slots = tuple(directions)

    def run(*moved: torch.Tensor) -> Any:
        given = {**values, **dict(zip(slots, moved, strict=True))}
        finder.run(*(program._bind(slot, given) for slot in program.inputs), enable_io_processing=False)
        return (), ()

    try:
        jvp(run, tuple(values[slot] for slot in slots), tuple(directions.values()))
    except (RuntimeError, NotImplementedError):
        pass
    node = finder.at
    return CaptureError(
        compose_message(
            f"torch cannot differentiate `{'?' if node is None else node.target}` in forward mode",
            None if node is None else node.meta.get("source"),
            "This way through the backward pass pushes derivatives forward through every operator.",
            cure,
        )
    )
