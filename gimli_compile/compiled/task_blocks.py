"""Loops of many large tasks, some tasks at a time.

Programs over all tasks save calls. Where the values of a few tasks fill the caches there is nothing more to save, and
what one operator leaves is out of the caches before the next one reads it. Convolutions over tasks are grouped ones,
which are slower than one after the other unless they are small. So large tasks run in blocks, by the same programs; in
mixed mode, that takes the memory of one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.compiled.binding import Carried
from gimli_compile.compiled.choice import Choice, DrawnError, Draws, LoopInputs, Place, capture_step
from gimli_compile.compiled.inputs import forms, state_slots, state_values
from gimli_compile.errors import InputError, compose_message
from gimli_compile.host_draws import generators_forked, host_states, set_host_states
from gimli_compile.live_bytes import made_bytes
from gimli_compile.records import opened, rebuilt
from gimli_compile.state import TrainState
from gimli_compile.transforms import generator_states, rewind
from gimli_compile.tree_slots import fixed_form, form

Tensor = torch.Tensor
Block = tuple[TrainState, LoopInputs]
Unrolled = tuple[TrainState, Any]
# Bytes that the first program of a step makes, its loss and gradient, by what was measured (docs/performance.md).
BLOCK_BYTES = 16 << 20  # for the tasks of one block
ALONE_BYTES = 2 << 20  # for a task with convolutions that runs alone


class TaskBlocks:
    """Cuts loops over tasks into loops over some of them."""

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._sizes: dict[Any, int | None] = {}

    def size(self, state: TrainState, inputs: LoopInputs) -> int | None:
        """Returns how many tasks a block has; None if all run together.

        All do where tasks are small, on other devices than CPUs, and where steps draw random numbers: these are made
        for all tasks at once, step by step.
        """
        values = state_values(state)
        if inputs.tasks is None or inputs.is_block or inputs.tasks == 1 or not all(value.is_cpu for value in values):
            return None
        key = (state_slots(state), state.opt_state.skeleton, forms(values), inputs.key())
        if key not in self._sizes:
            self._sizes[key] = self._new_size(inputs.tasks, *next(blocks(state, inputs, 1)))
        return self._sizes[key]

    def _new_size(self, tasks: int, state: TrainState, inputs: LoopInputs) -> int | None:
        """Returns the size of blocks by what the first step of one task makes."""
        place = Place(0, Carried(state_slots(state), frozenset()), state.opt_state.skeleton, state_values(state))
        draws: Draws = {}
        with torch.no_grad(), generators_forked():
            if not self._choice.fitting(place, inputs, draws):
                capture_step(self._choice, place, inputs, draws)
            steps = self._choice.fitting(place, inputs, draws)
        if not steps or draws or any(step.draws for step in steps):
            return None
        programs = [step.programs[0] for step in steps]
        made = max(map(made_bytes, programs))
        is_alone = made >= ALONE_BYTES and any(
            program.calls(torch.ops.aten.convolution.default) for program in programs
        )
        fitting = 1.0 if is_alone else max(1.0, BLOCK_BYTES / max(1, made))
        sizes = [size for size in range(1, tasks + 1) if tasks % size == 0]
        found = min(sizes, key=lambda size: abs(math.log(size / fitting)))
        return None if found == tasks else found


def unroll_blocks(
    unroll: Callable[[TrainState, LoopInputs], Unrolled], state: TrainState, inputs: LoopInputs, size: int
) -> Unrolled | None:
    """Runs a loop over tasks block by block; returns nothing where the tasks have to run together.

    That is where a later step draws after all, and where what tasks end with, or return, differs in more than the
    values of tensors.
    """
    generators, of_host = generator_states(), host_states()
    try:
        made = [pytree.tree_flatten(_opened(*unroll(*block))) for block in blocks(state, inputs, size)]
    except DrawnError:
        rewind(generators)
        set_host_states(of_host)
        return None
    structure, kinds = made[0][1], [(other, list(map(_form, leaves))) for leaves, other in made]
    if any(kind != kinds[0] for kind in kinds):
        return None
    join = torch.stack if size == 1 else torch.cat
    columns = zip(*(leaves for leaves, _ in made), strict=True)
    joined = [join(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    last, returned = pytree.tree_unflatten(joined, structure)
    return last, rebuilt(returned)


def _opened(state: TrainState, returned: Any) -> Unrolled:
    return state, opened(returned)


def _form(leaf: Any) -> Any:
    return form(leaf) if isinstance(leaf, Tensor) else fixed_form(leaf)


def blocks(state: TrainState, inputs: LoopInputs, size: int) -> Iterator[Block]:
    """Yields a loop for each block of tasks. Blocks of one are loops without tasks."""
    assert inputs.dims is not None and inputs.tasks is not None
    of_state, of_batch, of_hyper, of_meta = inputs.dims
    cut = _Cut(size, inputs.tasks)
    new: dict[str, Any] = {"dims": None, "tasks": None} if size == 1 else {"tasks": size}
    for index in range(inputs.tasks // size):
        given = replace(
            inputs,
            batches=inputs.batches if of_batch is None else inputs.batches.mapped(lambda leaf, i=index: cut(leaf)[i]),
            hyper=cut.part_of(dict(inputs.hyper), of_hyper, index),
            meta=cut.part_of(inputs.meta, of_meta, index),
            is_block=True,
            **new,
        )
        yield cut.part_of(state, of_state, index), given


class _Cut:
    """Cuts tensors into blocks of tasks, each once: tensors that are one object stay one."""

    def __init__(self, size: int, tasks: int) -> None:
        self._size, self._tasks = size, tasks
        self._known: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}

    def __call__(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Returns the blocks of a tensor that leads with the task."""
        if id(tensor) not in self._known:
            if tensor.shape[:1] != (self._tasks,):
                raise _other_count(tensor, self._tasks)
            self._known[id(tensor)] = tensor, tensor.unbind() if self._size == 1 else tensor.split(self._size)
        return self._known[id(tensor)][1]

    def part_of(self, tree: Any, dim: int | None, index: int) -> Any:
        """Returns a pytree's part in one block; what all tasks share as it is."""
        if dim is None:
            return tree
        return pytree.tree_map_only(Tensor, lambda tensor: self(tensor)[index], tree)


def _other_count(tensor: Tensor, tasks: int) -> InputError:
    return InputError(
        compose_message(
            f"a tensor of shape {tuple(tensor.shape)}, its tasks leading, among inputs of {tasks} tasks",
            None,
            "Whatever `tasks` gives a dimension for tasks has one entry there for each of them.",
            "Give all of them the same number of tasks, or say None in `tasks` for what all tasks share.",
        )
    )
