"""Train states as flat lists of tensors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from gimli_compile.row_gradients import by_slot, from_slots
from gimli_compile.skeleton import Skeleton
from gimli_compile.slot import HELD, Role, Slot
from gimli_compile.state import OptState, TrainState
from gimli_compile.tree_slots import form

Tensor = torch.Tensor


@functools.lru_cache(maxsize=512)
def named_slots(role: Role, paths: tuple[str, ...]) -> tuple[Slot, ...]:
    """Returns the slots of a role at these paths."""
    return tuple(Slot(role, path) for path in paths)


def state_slots(state: TrainState) -> tuple[Slot, ...]:
    """Returns the slots of a train state: parameters, buffers, the optimizer's state."""
    held = tuple(by_slot(state.grads, HELD)) if state.grads else ()
    return _all_slots(tuple(state.params), tuple(state.buffers), tuple(state.opt_state), held)


@functools.lru_cache(maxsize=512)
def _all_slots(
    params: tuple[str, ...], buffers: tuple[str, ...], state: tuple[str, ...], held: tuple[Slot, ...]
) -> tuple[Slot, ...]:
    parts = ((Role.PARAM, params), (Role.BUFFER, buffers), (Role.STATE, state))
    return (*(slot for role, paths in parts for slot in named_slots(role, paths)), *held)


def state_values(state: TrainState) -> list[Tensor]:
    """Returns the tensors of a train state, in the order of `state_slots`."""
    held = by_slot(state.grads, HELD).values() if state.grads else ()
    return [*state.params.values(), *state.buffers.values(), *state.opt_state.values(), *held]


def build_state(slots: tuple[Slot, ...], values: Sequence[Tensor], skeleton: Skeleton) -> TrainState:
    """Returns the train state that these are the tensors of."""
    params, buffers, state, held = (
        dict(zip(names, [values[index] for index in places], strict=True)) for names, places in layout(slots)
    )
    names = [name for name in params if Slot(Role.HELD, name) in held] if held else []
    return TrainState(params, buffers, OptState(skeleton, state), from_slots(held, names, HELD) if held else {})


@functools.lru_cache(maxsize=512)
def layout(slots: tuple[Slot, ...]) -> list[tuple[list[Any], list[int]]]:
    """Returns names and places of parameters, buffers and state; and those of the gradients held, as slots."""
    parts: list[tuple[list[Any], list[int]]] = [([], []) for _ in range(4)]
    for index, slot in enumerate(slots):
        part = 3 if slot.role in HELD else (Role.PARAM, Role.BUFFER, Role.STATE).index(slot.role)
        parts[part][0].append(slot if part == 3 else slot.path)
        parts[part][1].append(index)
    return parts


def in_order(value: Tensor) -> Tensor:
    """Returns a tensor of which the memory holds the elements themselves, one after the other."""
    if value.is_conj() or value.is_neg():
        value = value.resolve_conj().resolve_neg()
    return value.contiguous()


def forms(values: Sequence[Tensor]) -> Any:
    """Returns the forms of tensors."""
    return tuple(map(form, values))
