"""The mixed way through the backward pass: adjoints carried back step by step, forward over reverse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.joint_capture import refuse_complex
from gimli_compile.loop_labels import labels_of, settled_buffers, state_slots
from gimli_compile.loop_node import run_as_node
from gimli_compile.loop_steps import LoopSteps
from gimli_compile.slot import Role, Slot
from gimli_compile.state import TrainState
from gimli_compile.step_adjoint import LOSS
from gimli_compile.tasks import Loop, TaskSteps

Tensor = torch.Tensor
_OF_STATE = (Role.PARAM, Role.BUFFER, Role.STATE)


def unroll_mixed(steps: LoopSteps | TaskSteps, loop: Loop, length: int) -> tuple[TrainState, list[Tensor]]:
    """Runs a loop over a list of batches and keeps the state of every `length`-th step.

    If `length` is 1, the inner gradients are kept as well, which the adjoint of the update needs.
    """
    return run_as_node(MixedMode(steps, length), (loop.state, list(loop.batches), loop.hyper, loop.meta))


class MixedMode:
    """Runs forward segment by segment, and back with the steps of each segment taken again."""

    name = "mixed"

    def __init__(self, steps: LoopSteps | TaskSteps, length: int) -> None:
        self.steps = steps
        self.length = length

    def forward(self, inputs: Any, needed: Sequence[bool]) -> tuple[Any, Any, Any]:
        """Returns the last state with the losses; keeps the state before each segment, the draws, inner gradients."""
        state, batches, hyper, meta = inputs
        _refuse_complex(inputs, needed)
        losses, kept = [], []
        for start in range(0, len(batches), self.length):
            before, draws, grads = state, [], None
            for batch in batches[start : start + self.length]:
                draws.append({})
                state, loss, grads = self.steps.step_with_gradient(state, batch, hyper, meta, draws[-1])
                losses.append(loss)
            if any(needed):
                kept.append((before, draws, grads if self.length == 1 else None))
        return (state, losses), kept, settled_buffers(inputs, needed, state, self.steps.carried_buffers())

    def backward(self, inputs: Any, kept: Any, grads: Any, needed: Sequence[bool]) -> list[Tensor | None]:
        """Returns the adjoints of the inputs."""
        batches = inputs[1]
        carrier = _Carrier(self.steps, inputs, grads, needed)
        for index in reversed(range(len(kept))):
            start = index * self.length
            moments = self._moments(kept[index], batches[start : start + self.length], *inputs[2:])
            while moments:
                carrier.carry(start + len(moments) - 1, *moments.pop())
        return carrier.by_leaf()

    def _moments(self, kept: Any, batches: Sequence[Any], hyper: Any, meta: Any) -> list[tuple[Any, Any, Any]]:
        """Returns state, draws and inner gradient of every step of a segment."""
        state, draws, grads = kept
        if grads is not None:
            return [(state, draws[0], grads)]
        found = []
        for batch, drawn in zip(batches, draws, strict=True):
            after, _, grads = self.steps.step_with_gradient(state, batch, hyper, meta, drawn)
            found.append((state, drawn, grads))
            state = after
        return found


def _refuse_complex(inputs: Any, needed: Sequence[bool]) -> None:
    triples = zip(labels_of(inputs), pytree.tree_leaves(inputs), needed, strict=True)
    refuse_complex(label[1] for label, leaf, is_needed in triples if label and is_needed and leaf.is_complex())
    refuse_complex(Slot(Role.PARAM, name) for name, value in inputs[0].params.items() if value.is_complex())


class _Carrier:
    """The adjoints on their way back: of the present state, and the sums of all others that were passed."""

    def __init__(self, steps: LoopSteps | TaskSteps, inputs: Any, grads: Any, needed: Sequence[bool]) -> None:
        self.steps = steps
        _, self.batches, self.hyper, self.meta = inputs
        of_state, self.of_losses = grads
        self.seeds = {slot: grad for slot, grad in state_slots(of_state).items() if grad is not None}
        self.labels = labels_of(inputs)
        pairs = zip(self.labels, needed, strict=True)
        self.needed = {label for label, is_needed in pairs if label is not None and is_needed}
        self.totals: dict[Any, Tensor] = {}
        self.varying = {Role.PARAM: steps.trained, Role.BUFFER: steps.carried_buffers()}

    def _is_carried(self, slot: Slot) -> bool:
        """Tells whether a part of the state has an adjoint between steps: what steps change, or started from."""
        return slot.role is Role.STATE or (None, slot) in self.needed or slot.path in self.varying[slot.role]

    def carry(self, index: int, state: TrainState, draws: Any, grads: Any) -> None:
        """Carries the adjoint of the state after a step back to the state before it."""
        if self.of_losses[index] is not None:
            self.seeds[LOSS] = self.of_losses[index]
        if not self.seeds:
            return
        wanted = {slot for step, slot in self.needed if step in (None, index) and slot.role not in _OF_STATE}
        floating = [slot for slot, value in state_slots(state).items() if value.is_floating_point()]
        wanted |= {slot for slot in floating if (self._is_carried(slot) if index else (None, slot) in self.needed)}
        found = self.steps.carry_back(
            state, self.batches[index], self.hyper, self.meta, draws, grads, self.seeds, wanted=wanted
        )
        self.seeds = {slot: found.pop(slot) for slot in list(found) if slot.role in _OF_STATE}
        for slot, value in found.items():
            label = (index if slot.role is Role.BATCH else None, slot)
            self.totals[label] = self.totals[label] + value if label in self.totals else value

    def by_leaf(self) -> list[Tensor | None]:
        """Returns the adjoints of all inputs."""
        found = {**self.totals, **{(None, slot): value for slot, value in self.seeds.items()}}
        return [found.get(label) for label in self.labels]
