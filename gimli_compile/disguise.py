"""Finds uses of counters that nobody sees: as an index of a list, in a text, in a function written in C.

A concolic int is an int, and Python's own containers read it without asking. So a step that counts is traced a second
time, with counters in disguise: whoever asks such a number gets the right answer, and whoever reads it as the int that
it is finds another one. Where the two traces differ, the step uses its counters in a way that no capture sees, and the
program is for these very values of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from gimli_compile.findings import Baked
from gimli_compile.program import Program
from gimli_compile.skeleton import leaves_of
from gimli_compile.slot import Role, Slot
from gimli_compile.update_values import UpdateInputs, UpdateOutputs
from gimli_compile.variant import UpdateVariant


class Traced(NamedTuple):
    """One trace of a step: what it left, the program before any pass, and its conditions with their outcomes."""

    outputs: UpdateOutputs
    program: Program
    conditions: list[tuple[Slot, bool]]


def differs_in_disguise(traced: Traced, trace_again: Callable[[], Traced]) -> bool:
    """Tells whether a second trace of the same step, from the same random states, is another one, or fails."""
    try:
        again = trace_again()
    except Exception:  # whatever the step's own code raises on an index that does not exist
        return True
    return (
        again.outputs.skeleton != traced.outputs.skeleton
        or _calls(again.program) != _calls(traced.program)
        or again.conditions != traced.conditions
    )


def _calls(program: Program) -> list[Any]:
    """Returns what a program does: the calls that reach a result or write to a tensor, their inputs by meaning."""
    live: set[fx.Node] = set()
    for node in reversed(program.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node in live or node.op == "output" or (schema is not None and schema.is_mutable):
            live.update((node, *node.all_input_nodes))
    slots = dict(zip(program.placeholders, program.inputs, strict=True))
    known: dict[fx.Node, Any] = {}
    calls: list[Any] = []
    for node in program.graph.nodes:
        if node not in live:
            continue
        known[node] = f"%{len(known)}"
        if node.op == "placeholder":
            slot = slots[node]
            calls.append(_bytes(program.constants[slot]) if slot.role is Role.CONSTANT else slot)
        else:
            calls.append((node.target, repr(fx.map_arg((node.args, node.kwargs), known.__getitem__))))
    return calls


def _bytes(value: torch.Tensor) -> Any:
    if value.layout is not torch.strided:
        return repr(value)
    flat = value.detach().cpu().contiguous().reshape(-1)
    return value.dtype, value.shape, flat.view(torch.uint8).numpy().tobytes()


def pin_counters(variant: UpdateVariant, inputs: UpdateInputs) -> UpdateVariant:
    """Returns the variant that holds for the present counts only."""
    counts = [leaf for leaf in leaves_of(inputs.opt_state.skeleton) if leaf.kind == "int"]
    values = {Slot(inputs.role_of(leaf), leaf.path): inputs.value_of(leaf) for leaf in counts}
    pins = {slot: float(value) for slot, value in values.items() if not value.dim()}
    shown = ", ".join(str(slot) for slot in pins if slot.role is Role.STATE)
    baked = Baked(
        f"{shown}: constants of the program, since the step uses a count as an index, or in another way that no "
        "capture sees. Each step has a program of its own",
        None,
    )
    return replace(variant, pins={**variant.pins, **pins}, baked=(*variant.baked, baked))
