"""Many tasks at once: what differs between tasks leads with the task."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.errors import InputError
from gimli_compile.state import TrainState

Tasks = bool | tuple[int | None, int | None, int | None, int | None]
Dims = tuple[int | None, int | None, int | None, int | None]  # of state, batches, hyper and meta, as for torch.vmap


def task_dims(tasks: Tasks) -> Dims | None:
    """Returns which dimension of state, batches, hyper and meta is the task's; None if there are no tasks."""
    if tasks is False:
        return None
    return (None, 0, None, None) if tasks is True else tasks


def lead_with_tasks(state: TrainState, batches: Any, hyper: Any, meta: Any, dims: Dims) -> tuple[Any, int]:
    """Returns state, batches, hyper and meta with the task first where they have one, and the number of tasks.

    A shared state becomes one for each task, all views of one.
    """
    parts = [state, batches, hyper, meta]
    led = [_lead(part, dim) for part, dim in zip(parts, dims, strict=True)]
    count = _count(led, dims)
    if dims[0] is None:
        led[0] = _shared_by(state, count)
    return tuple(led), count


def _lead(tree: Any, dim: int | None) -> Any:
    if dim is None or dim == 0:
        return tree
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.movedim(dim, 0), tree)


def _count(parts: list[Any], dims: Dims) -> int:
    for part, dim in zip(parts, dims, strict=True):
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
