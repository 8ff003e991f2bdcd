"""Captures what the requirements are decided on: the loss on one batch, and the first and a later update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gimli_compile.loss_table import LossTable
from gimli_compile.program import Program
from gimli_compile.records import opened
from gimli_compile.requirements import Captured
from gimli_compile.row_gradients import made_up_gradients
from gimli_compile.slot import Role, Slot
from gimli_compile.state import TrainState
from gimli_compile.transforms import is_zero
from gimli_compile.tree_slots import form, tree_slots
from gimli_compile.update_table import UpdateTable, assemble
from gimli_compile.update_values import UpdateInputs
from gimli_compile.variant import UpdateVariant

_STEPS = 2


def capture_for_requirements(
    losses: LossTable,
    updates: UpdateTable,
    state: TrainState,
    hyper: Mapping[str, torch.Tensor],
    trained: Sequence[str],
    batch: Any = None,
    meta: Any = None,
) -> Captured:
    """Takes two steps from `state` and returns the programs that they run.

    Without a batch the gradients are made up, and the loss is the one captured last, if any was.
    """
    batch, meta = opened((batch, meta))
    variants: list[UpdateVariant] = []
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), torch.random.fork_rng():
        for _ in range(_STEPS):
            if batch is None:
                sparse = updates.view.sparse
                grads: Mapping[str, Any] = made_up_gradients(state.params, trained, generator, sparse=sparse)
                buffers = state.buffers
            else:
                _, grads, buffers = losses.gradient(state, batch, meta, list(trained), order=2, draws={})
            inputs = UpdateInputs(state.params, grads, state.opt_state, hyper)
            variant, results = updates.run_variant(inputs)
            variants += [variant] if variant not in variants else []
            params, opt_state = assemble(inputs, variant, results)
            state = TrainState(params, buffers, opt_state)
    gradient = _gradient_of(losses, state, batch, meta)
    zeros = frozenset(path for path, value in hyper.items() if is_zero(value))
    return Captured(updates.title, gradient, tuple(variants), tuple(trained), zeros)


def _gradient_of(losses: LossTable, state: TrainState, batch: Any, meta: Any) -> Program | None:
    """Returns the latest of the captured gradients that take inputs of these forms."""
    values = {Slot(Role.PARAM, name): value for name, value in state.params.items()}
    values.update(tree_slots(Role.BATCH, batch) | tree_slots(Role.META, meta))
    known = [gradient.exact for gradient in losses.all_gradients]
    fitting = [program for program in known if batch is None or _fits(program, values)]
    return fitting[-1] if fitting else None


def _fits(program: Program, values: Mapping[Slot, torch.Tensor]) -> bool:
    taken = {
        slot: form(node.meta["val"])
        for slot, node in zip(program.inputs, program.placeholders, strict=True)
        if slot.role in (Role.PARAM, Role.BATCH, Role.META)
    }
    return taken == {slot: form(value) for slot, value in values.items()}
