"""Operators that torch cannot differentiate."""

from __future__ import annotations

import operator
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map_only

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.metadata import FAKE
from gimli_compile.program import Program
from gimli_compile.slot import CARRIED, Role, Slot

aten = torch.ops.aten
_DIFFERENTIATED = (Role.PARAM, Role.META)
_LACKING = re.compile(r"derivative for .* (is )?not implemented")


def refuse_missing_derivatives(program: Program) -> Program:
    """Returns the program as it is, if every operator between the parameters and its results has a derivative.

    A gradient is part of the program, and a loop differentiates it again: without this, an operator whose gradient has
    no derivative would fail in the user's outer backward pass, in torch's words and far from the line that called it.

    Updates and whole steps do without this pass: they may be run without being differentiated at all, or in part. For
    them `check_derivatives` looks at what a run is asked for.

    Raises:
        CaptureError: an operator has no derivative; the message names the line that called it.
    """
    lacking = next(_lacking(program, {slot for slot in program.inputs if slot.role in _DIFFERENTIATED}), None)
    if lacking is not None:
        raise _error(lacking)
    return program


def check_derivatives(program: Program, asked: Collection[Slot]) -> None:
    """Refuses a program that lacks a derivative of the new parameters or the new state in the inputs asked for.

    What it returns besides, such as quantities to log, may lack some: torch says so if they are differentiated.

    Raises:
        CaptureError: an operator has no derivative; the message names the line that called it.
    """
    lacking = set(_lacking(program, asked))
    if not lacking:
        return
    pairs = zip(program.results, program.returned, strict=True)
    waiting = [node for slot, node in pairs if slot.role in CARRIED and _has_gradient(node)]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        if node in seen or node.meta.get("stop"):
            continue
        if node in lacking:
            raise _error(node)
        seen.add(node)
        waiting += node.all_input_nodes


def _has_gradient(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], torch.Tensor) and _is_floating(node.meta["val"])


def _lacking(program: Program, asked: Collection[Slot]) -> Iterator[fx.Node]:
    """Yields the calls on the way from these inputs that torch cannot differentiate."""
    slots = zip(program.placeholders, program.inputs, strict=True)
    reached = {node: [True] for node, slot in slots if slot in asked}
    known: dict[Any, tuple[list[bool], bool]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function" or node.meta.get("stop"):
            continue
        if node.target is operator.getitem:
            source, index = node.args
            reached[node] = [source in reached and reached[source][index]]
            continue
        count = len(tree_leaves(node.meta["val"]))
        key = (node.target, tuple(any(reached.get(source, ())) for source in node.all_input_nodes), count)
        if key not in known:
            known[key] = _differentiate(node, reached)
        reached[node], lacks = known[key]
        if lacks:
            yield node


def _differentiate(node: fx.Node, reached: Mapping[fx.Node, list[bool]]) -> tuple[list[bool], bool]:
    """Differentiates a call on fake tensors: which of its results have gradients, and whether torch lacks the formula.

    What cannot be tried, such as a custom function, is left to torch.
    """
    leaves: list[torch.Tensor] = []

    def leaf(source: fx.Node) -> Any:
        val = source.meta["val"]
        if not any(reached.get(source, ())) or not isinstance(val, torch.Tensor) or not _is_floating(val):
            return val
        leaves.append(val.detach().requires_grad_())
        return leaves[-1]

    args, kwargs = tree_map_only(fx.Node, leaf, (node.args, node.kwargs))
    flows = [bool(leaves)] * len(tree_leaves(node.meta["val"]))
    if not leaves or not isinstance(node.target, torch._ops.OpOverload):
        return flows, False
    try:
        with FAKE, torch.enable_grad():
            made = tree_leaves(node.target(*args, **kwargs))
            flows = [isinstance(out, torch.Tensor) and out.requires_grad for out in made]
            outs = [out for out, flow in zip(made, flows, strict=True) if flow]
            if outs:
                torch.autograd.grad(outs, leaves, [torch.ones_like(out) for out in outs], allow_unused=True)
    except Exception as error:
        return flows, _LACKING.search(str(error)) is not None
    return flows, False


def _is_floating(value: torch.Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _error(node: fx.Node) -> CaptureError:
    return CaptureError(
        compose_message(
            f"`{node.target}` has no derivative",
            node.meta.get("source"),
            "The outer loop differentiates steps and inner gradients, and torch has no formula for this operator, "
            "which this line calls or whose gradient needs it.",
            "Write the line in elementary operators, or detach what goes into it.",
        )
    )
