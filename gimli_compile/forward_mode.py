"""The forward way through a loop: tangents of the state, one for each number that is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from gimli_compile.checkpointing import distinct
from gimli_compile.errors import InputError, compose_message
from gimli_compile.loop_labels import Label, labels_of, state_slots
from gimli_compile.loop_node import run_as_node
from gimli_compile.loop_steps import LoopSteps
from gimli_compile.records import opened
from gimli_compile.slot import CARRIED, Slot
from gimli_compile.state import TrainState
from gimli_compile.tasks import Loop, TaskSteps

Tensor = torch.Tensor
LIMIT = 128  # directions: each costs two plain steps in every step


class Advancing(Protocol):
    """Takes the steps of one loop with tangents."""

    def advance(
        self, index: int, state: TrainState, along: Mapping[Slot, Tensor]
    ) -> tuple[TrainState, Any, dict[int, Tensor]]:
        """Returns the new state, the loss, and the tangents of both by the place of the leaf."""
        ...


Advance = Callable[..., Advancing]  # of batches, hyper and meta


def unroll_forward(advance: Advance, loop: Loop) -> tuple[TrainState, list[Any]]:
    """Runs a loop and carries the derivatives of its state along (Franceschi et al. 2017, section 3.2)."""
    return run_as_node(ForwardMode(advance), (loop.state, list(loop.batches), loop.hyper, loop.meta))


class UncompiledSteps:
    """Takes steps, and pushes tangents through each."""

    def __init__(self, steps: LoopSteps | TaskSteps, batches: Sequence[Any], hyper: Any, meta: Any) -> None:
        self._steps, self._batches, self._others = steps, batches, (hyper, meta)

    def advance(
        self, index: int, state: TrainState, along: Mapping[Slot, Tensor]
    ) -> tuple[TrainState, Any, dict[int, Tensor]]:
        """Returns the new state, the loss, and the tangents of both by the place of the leaf."""
        draws: dict[Slot, Tensor] = {}
        given = (state, self._batches[index], *self._others, draws)
        after, loss = self._steps.step(*given)
        return after, opened(loss), self._steps.push_forward(*given, along) if along else {}


class ForwardMode:
    """Keeps the derivative of the results in every differentiated number, and nothing of the steps."""

    name = "forward"

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def forward(self, inputs: Any, needed: Sequence[bool]) -> tuple[Any, Any, Any]:
        """Returns the last state with the losses; keeps their tangents, by the place of the result."""
        state, batches, hyper, meta = inputs
        tangents = _basis(inputs, needed)
        losses, of_losses = [], []
        steps = self._advance(batches, hyper, meta)
        for index in range(len(batches)):
            along = {slot: tangent for (step, slot), tangent in tangents.items() if step in (None, index)}
            after, loss, made = steps.advance(index, state, along)
            of_losses.append(_split(made, after, loss, tangents))
            state = after
            losses.append(loss)
        of_state = {i: tangents[None, slot] for i, slot in enumerate(state_slots(state)) if (None, slot) in tangents}
        constant = [value for i, value in enumerate(state_slots(state).values()) if i not in of_state]
        return (state, losses), (of_state, of_losses), constant

    def backward(self, inputs: Any, kept: Any, grads: Any, needed: Sequence[bool]) -> list[Tensor | None]:
        """Contracts the adjoints of the results with the tangents."""
        of_state, of_losses = kept
        pairs = list(_pairs(of_state, grads[0]))
        for tangents, grad in zip(of_losses, grads[1], strict=True):
            pairs += _pairs(tangents, grad)
        leaves = pytree.tree_leaves(inputs)
        _, places = distinct(leaves)
        found: list[Tensor | None] = [None] * len(leaves)
        if not pairs:
            return found
        total = sum(torch.einsum("ki,i->k", t.reshape(len(t), -1), g.reshape(-1)).double() for t, g in pairs)
        assert isinstance(total, Tensor)
        at, seen = 0, set()
        for index, (leaf, is_needed, place) in enumerate(zip(leaves, needed, places, strict=True)):
            if is_needed and place not in seen:
                seen.add(place)
                found[index] = total[at : at + leaf.numel()].reshape(leaf.shape).to(leaf.dtype)
                at += leaf.numel()
        return found


def _basis(inputs: Any, needed: Sequence[bool]) -> dict[Label, Tensor]:
    """Returns one tangent for each element of each tensor to differentiate by, stacked; by what the tensor is."""
    leaves = pytree.tree_leaves(inputs)
    tensors, places = distinct(leaves)
    pairs = zip(places, needed, strict=True)
    chosen = list(dict.fromkeys(place for place, is_needed in pairs if place is not None and is_needed))
    count = sum(tensors[place].numel() for place in chosen)
    if count > LIMIT:
        raise InputError(
            compose_message(
                f'backward="forward" with {count:,} numbers to differentiate by',
                None,
                f"Each of them costs a tangent of the whole state; {LIMIT} is the limit.",
                'Let fewer inputs require a gradient, or use `backward="mixed"` or `"reverse"`, whose cost does not '
                "depend on their number.",
            )
        )
    at, made = 0, {}
    for place in chosen:
        tensor = tensors[place]
        basis = torch.zeros(count, tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        basis[at : at + tensor.numel()] = torch.eye(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        made[place] = basis.reshape(count, *tensor.shape)
        at += tensor.numel()
    labels = zip(labels_of(inputs), places, strict=True)
    return {label: made[place] for label, place in labels if label is not None and place in made}


def _split(
    made: Mapping[int, Tensor], after: TrainState, loss: Any, tangents: dict[Label, Tensor]
) -> dict[int, Tensor]:
    """Puts the tangents of the new state in the place of those of the old one; returns those of the loss."""
    for label in [label for label in tangents if label[1].role in CARRIED]:
        del tangents[label]
    slots = list(state_slots(after))
    tangents.update({(None, slot): made[index] for index, slot in enumerate(slots) if index in made})
    return {index - len(slots): tangent for index, tangent in made.items() if index >= len(slots)}


def _pairs(tangents: Mapping[int, Tensor], grads: Any) -> list[tuple[Tensor, Tensor]]:
    leaves = pytree.tree_leaves(grads)
    return [(tangent, leaves[index]) for index, tangent in tangents.items() if leaves[index] is not None]
