"""Operators that lack a forward-mode derivative, a rule to be mapped, or a known form: torch's words, in the user's."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)

from gimli_compile.custom_operators import OTHER_SHAPES
from gimli_compile.errors import CaptureError, CompileError, GimliError, compose_message
from gimli_compile.printing import target_name

if TYPE_CHECKING:
    from gimli_compile.program import Program

_UNMAPPED = re.compile(r"does not have vmap support")
_WITHOUT_FORM = re.compile(r"no fake impl registered|register_fake")
_LACKING = re.compile(r"forward(-mode| mode)? (AD|automatic)|\bjvp\b", re.IGNORECASE)


def refusal_of(error: Exception, program: Program, filename: str) -> GimliError | None:
    """Returns what to raise in place of an error of a program that ran; None if it is about something else."""
    explain = _explanation_of(error)
    node = None if explain is None else _failing_node(error, program, filename)
    return None if explain is None or node is None else explain(node)


def _explanation_of(error: Exception) -> Callable[[fx.Node], GimliError] | None:
    if isinstance(error, (DynamicOutputShapeException, DataDependentOutputException)):
        return _varying
    if isinstance(error, UnsupportedOperatorException) or _WITHOUT_FORM.search(str(error)):
        return _formless
    if str(error) == OTHER_SHAPES:
        return _reshaped
    if _UNMAPPED.search(str(error)):
        return _unmapped
    return _underived if _LACKING.search(str(error)) else None


def _varying(node: fx.Node) -> CompileError:
    return CompileError(
        compose_message(
            f"`{target_name(node)}` cannot be compiled",
            node.meta.get("source"),
            "Compiled programs know all shapes beforehand, and how large a result of this one is depends on values.",
            "Write the line in operators whose results have one size (least squares by `torch.linalg.pinv`), or leave "
            "out `compile`.",
        )
    )


def _formless(node: fx.Node) -> CompileError:
    return CompileError(
        compose_message(
            f"`{target_name(node)}` cannot be compiled",
            node.meta.get("source"),
            "Programs are compiled without running them, and torch does not know the shapes of what this one gives.",
            "Tell it by `torch.library.register_fake`, or leave out `compile`.",
        )
    )


def _reshaped(node: fx.Node) -> CaptureError:
    return CaptureError(
        compose_message(
            f"`{target_name(node)}` gave results of other shapes than at capture",
            node.meta.get("source"),
            "A program is for the shapes at capture, and those of this custom operator depend on values.",
            "Let it return as many entries each time, some of them unused, and a mask: programs follow `x[mask]`.",
        )
    )


def _underived(node: fx.Node) -> CaptureError:
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
