"""What each leaf of a loop's inputs is: its slot, and the step that it belongs to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.row_gradients import by_slot
from gimli_compile.slot import HELD, Role, Slot
from gimli_compile.state import TrainState
from gimli_compile.tree_slots import tree_slots

Label = tuple[int | None, Slot]  # the step, for what every step has of its own, and the slot


def state_slots(state: TrainState) -> dict[Slot, torch.Tensor]:
    """Returns the leaves of a state by slot, in their order."""
    found = {Slot(Role.PARAM, name): value for name, value in state.params.items()}
    found.update({Slot(Role.BUFFER, name): value for name, value in state.buffers.items()})
    found.update({Slot(Role.STATE, path): value for path, value in state.opt_state.items()})
    return {**found, **by_slot(state.grads, HELD)}


def labels_of(inputs: Any) -> list[Label | None]:
    """Returns for each leaf of (state, batches, hyper, meta) what it is; None for what is no tensor."""
    state, batches, hyper, meta = inputs
    found: list[Label | None] = [(None, slot) for slot in state_slots(state)]
    for index, batch in enumerate(batches):
        found += _labels(batch, Role.BATCH, index)
    found += [(None, Slot(Role.HYPER, path)) for path in hyper]
    return found + _labels(meta, Role.META, None)


def settled_buffers(
    inputs: Any, needed: Sequence[bool], state: TrainState, carried: Collection[str]
) -> list[torch.Tensor]:
    """Returns the buffers of a loop's last state that depend on nothing that is differentiated."""
    asked = {label for label, is_needed in zip(labels_of(inputs), needed, strict=True) if is_needed}
    kept = (name for name in state.buffers if name not in carried and (None, Slot(Role.BUFFER, name)) not in asked)
    return [state.buffers[name] for name in kept]


def _labels(tree: Any, role: Role, step: int | None) -> list[Label | None]:
    slots = iter(tree_slots(role, tree))
    return [(step, next(slots)) if isinstance(leaf, torch.Tensor) else None for leaf in pytree.tree_leaves(tree)]
