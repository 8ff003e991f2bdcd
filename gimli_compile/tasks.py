"""Many tasks at once: each step of a loop mapped over them, the loop outside."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.errors import InputError
from gimli_compile.loop_steps import LoopSteps
from gimli_compile.pulling_back import Values
from gimli_compile.records import opened, rebuilt
from gimli_compile.slot import Role, Slot
from gimli_compile.state import TrainState

Tasks = bool | tuple[int | None, int | None, int | None, int | None]

_VALUE = object()  # stands for a tensor among what a step returned


@dataclass(frozen=True)
class Loop:
    """What a loop starts from; hyperparameters by path."""

    state: TrainState
    batches: Any
    hyper: dict[str, torch.Tensor]
    meta: Any


def lead_with_tasks(loop: Loop, dims: tuple[int | None, ...]) -> Loop:
    """Returns the loop in which whatever differs between tasks leads with the task, every task with its own state."""
    parts = [loop.state, loop.batches, loop.hyper, loop.meta]
    state, batches, hyper, meta = (_lead(part, dim) for part, dim in zip(parts, dims, strict=True))
    if dims[0] is None:
        state = _shared_by(state, _task_count(batches, hyper, meta, dims))
    return Loop(state, batches, hyper, meta)


def state_of_one_task(state: TrainState, tasks: Tasks) -> TrainState:
    """Returns a state of the form that steps see: where each task has its own, that of the first."""
    dim = None if isinstance(tasks, bool) else tasks[0]
    if dim is None:
        return state
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.select(dim, 0), state)


class TaskSteps:
    """The steps of all tasks at once, each mapped over the tasks.

    The loop is outermost, so that a segment can be computed again as a whole.
    """

    task_dims = 1

    def __init__(self, steps: LoopSteps, dims: tuple[int | None, ...]) -> None:
        self.steps = steps
        self.trained = steps.trained
        self._inner = [0, *(None if dim is None else 0 for dim in dims[1:])]
        shared = zip((Role.BATCH, Role.HYPER, Role.META), dims[1:], strict=True)
        self._shared = {role for role, dim in shared if dim is None}

    def step(self, state: TrainState, batch: Any, hyper: Any, meta: Any, draws: Any) -> tuple[TrainState, Any]:
        """Returns the new states and the losses before the step."""
        return self._mapped(self.steps.step, state, batch, hyper, meta, draws)

    def step_with_gradient(self, state: TrainState, batch: Any, hyper: Any, meta: Any, draws: Any) -> Any:
        """Returns the new states, the losses before the step, and their gradients."""
        return self._mapped(self.steps.step_with_gradient, state, batch, hyper, meta, draws)

    def _mapped(
        self,
        take: Callable[..., Any],
        state: TrainState,
        batch: Any,
        hyper: Any,
        meta: Any,
        draws: dict[Any, Any] | None,
    ) -> Any:
        given: dict[Any, Any] = dict(draws or {})

        fixed: list[tuple[list[Any], pytree.TreeSpec]] = []

        def one(state: TrainState, batch: Any, hyper: Any, meta: Any, noise: dict[Any, Any]) -> Any:
            noise = dict(noise)
            leaves, structure = pytree.tree_flatten(opened(take(state, batch, hyper, meta, noise)))
            fixed.append(([_VALUE if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure))
            return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], noise

        dims = (*self._dims(state, batch, hyper, meta), dict.fromkeys(given, 0))
        values, made = torch.func.vmap(one, in_dims=dims, randomness="different")(state, batch, hyper, meta, given)
        if draws is not None:
            draws.update(made)
        return _with_tensors(*fixed[-1], values)

    def _dims(self, *parts: Any) -> list[Any]:
        return [dims_of(part, dim) for part, dim in zip(parts, self._inner, strict=True)]

    def carry_back(
        self,
        state: TrainState,
        batch: Any,
        hyper: Any,
        meta: Any,
        draws: Any,
        grads: Any,
        seeds: Values,
        *,
        wanted: Collection[Slot],
    ) -> dict[Slot, torch.Tensor]:
        """Returns the adjoints of what a step starts from; of what tasks share, their sum."""

        def one(*args: Any) -> dict[Slot, torch.Tensor]:
            return self.steps.carry_back(*args, wanted=wanted)

        given = dict(draws or {})
        dims = (*self._dims(state, batch, hyper, meta), dict.fromkeys(given, 0), 0, dict.fromkeys(seeds, 0))
        found = torch.func.vmap(one, in_dims=dims)(state, batch, hyper, meta, given, grads, seeds)
        return {slot: value.sum(0) if slot.role in self._shared else value for slot, value in found.items()}

    def push_forward(
        self, state: TrainState, batch: Any, hyper: Any, meta: Any, draws: Any, tangents: Values
    ) -> dict[int, torch.Tensor]:
        """Returns the tangents of the new states and the losses, which lead with direction and task."""
        given = dict(draws or {})
        along = {slot: None if slot.role in self._shared else 1 for slot in tangents}
        dims = (*self._dims(state, batch, hyper, meta), dict.fromkeys(given, 0), along)
        mapped = torch.func.vmap(self.steps.push_forward, in_dims=dims, out_dims=1)
        return mapped(state, batch, hyper, meta, given, tangents)

    def carried_buffers(self) -> frozenset[str]:
        """Returns the names of the buffers that carry derivatives from step to step."""
        return self.steps.carried_buffers()


def _with_tensors(leaves: list[Any], structure: pytree.TreeSpec, values: list[torch.Tensor]) -> Any:
    """Returns the pytree of these leaves, with tensors where a leaf is `_VALUE`."""
    tensors = iter(values)
    return rebuilt(pytree.tree_unflatten([next(tensors) if leaf is _VALUE else leaf for leaf in leaves], structure))


def dims_of(tree: Any, dim: int | None) -> Any:
    """Returns the dimension of the task for each tensor of a pytree; what is no tensor, all tasks share."""
    if dim is None or all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(tree)):
        return dim
    return pytree.tree_map(lambda leaf: dim if isinstance(leaf, torch.Tensor) else None, tree)


def _lead(tree: Any, dim: int | None) -> Any:
    if dim is None or dim == 0:
        return tree
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.movedim(dim, 0), tree)


def _task_count(batches: Any, hyper: Any, meta: Any, dims: tuple[int | None, ...]) -> int:
    for part, dim in zip((batches, hyper, meta), dims[1:], strict=True):
        leaves = [leaf for leaf in pytree.tree_leaves(part) if isinstance(leaf, torch.Tensor)]
        if dim is not None and leaves:
            return leaves[0].shape[0]
    raise InputError("`tasks` names no input with a task dimension. Give state, batches, hyper or meta one.")


def _shared_by(state: TrainState, count: int) -> TrainState:
    """Returns a state for each task, all views of one; tensors that are one object stay one."""
    known: dict[int, torch.Tensor] = {}

    def expand(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = tensor.expand(count, *tensor.shape)
        return known[id(tensor)]

    return pytree.tree_map_only(torch.Tensor, expand, state)
