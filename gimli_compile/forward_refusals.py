"""Operators without a forward-mode derivative, or that cannot be mapped: torch's words, in the user's terms."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING

from torch import fx

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.printing import target_name

if TYPE_CHECKING:
    from gimli_compile.program import Program

_UNMAPPED = re.compile(r"does not have vmap support")
_LACKING = re.compile(r"forward(-mode| mode)? (AD|automatic)|\bjvp\b", re.IGNORECASE)


def refusal_of(error: Exception, program: Program, filename: str) -> CaptureError | None:
    """Returns what to raise in place of an error of a program that ran; None if it is about something else."""
    is_unmapped = bool(_UNMAPPED.search(str(error)))
    if not is_unmapped and not _LACKING.search(str(error)):
        return None
    node = _failing_node(error, program, filename)
    if node is None:
        return None
    if is_unmapped:
        return _unmapped(node)
    return CaptureError(
        compose_message(
            f"`{target_name(node)}` has no forward-mode derivative",
            node.meta.get("source"),
            "`torch.func.jvp` and dual numbers need one of every operator of the program, and torch has no formula for "
            "this one, which this line calls or whose gradient needs it.",
            "Differentiate backwards (`torch.autograd.grad`, `torch.func.vjp`), or write the line in other operators.",
        )
    )


def _unmapped(node: fx.Node) -> CaptureError:
    return CaptureError(
        compose_message(
            f"`{target_name(node)}` cannot be mapped by `torch.func.vmap`",
            node.meta.get("source"),
            "Tasks, and tangents in several directions, are mapped over; this function of yours has no rule for it.",
            "Give it `generate_vmap_rule = True` or a `vmap` of its own (torch's notes on extending torch.func), or "
            'unroll one task at a time, with `backward="reverse"`.',
        )
    )


def _failing_node(error: Exception, program: Program, filename: str) -> fx.Node | None:
    """Returns the node at whose line of the program's text an error was raised."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == filename]
    if not frames or frames[0].lineno is None:
        return None
    name = program.code.splitlines()[frames[0].lineno - 1].partition(" = ")[0].strip()
    return next((node for node in program.graph.nodes if node.name == name), None)
