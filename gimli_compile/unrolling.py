"""Unrolls steps into a loop: what is recorded, what is computed again, what is cut off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.checkpointing import checkpointed
from gimli_compile.errors import InputError, compose_message
from gimli_compile.state import TrainState
from gimli_compile.tasks import Dims, Tasks, lead_with_tasks, task_dims

Step = Callable[..., tuple[TrainState, torch.Tensor]]
_BACKWARD = ("reverse",)


@dataclass(frozen=True)
class Loop:
    """What a loop starts from; hyperparameters by path."""

    state: TrainState
    batches: Any
    hyper: dict[str, torch.Tensor]
    meta: Any


def unroll_steps(
    step: Step,
    loop: Loop,
    *,
    backward: str,
    checkpoint: str | int | None,
    order: int,
    truncate: int | None,
    tasks: Tasks,
) -> tuple[TrainState, torch.Tensor]:
    """Runs `step` over the batches: see `Functional.unroll`."""
    check_options(backward, order, truncate)
    if isinstance(loop.batches, Iterator):
        loop = replace(loop, batches=list(loop.batches))
    step_dim = 0
    dims = task_dims(tasks)
    if dims is not None:
        loop, step = _over_tasks(loop, step, dims)
        step_dim = 0 if dims[1] is None else 1  # the task leads, unless all tasks share the batches
    steps = split_batches(loop.batches, step_dim)
    state = loop.state
    length = segment_length(checkpoint, len(steps))
    losses: list[Any] = []
    cut = 0 if truncate is None else max(0, len(steps) - truncate)
    if cut:
        with torch.no_grad():
            state = _run(step, replace(loop, state=state), steps[:cut], losses)
        state = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, state)
    if length is None:
        state = _run(step, replace(loop, state=state), steps[cut:], losses)
    else:
        for start in range(cut, len(steps), length):
            segment = steps[start : start + length]
            state, segment_losses = checkpointed(_segment(step), state, segment, loop.hyper, loop.meta)
            losses += segment_losses
    return state, _stacked(losses)


def _stacked(losses: list[Any]) -> Any:
    """Returns the losses of all steps as one pytree, their last dimension the step."""
    leaves = [pytree.tree_leaves(loss) for loss in losses]
    made = [torch.stack(of, -1) if isinstance(of[0], torch.Tensor) else of[0] for of in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(made, pytree.tree_structure(losses[0]))


def _run(step: Step, loop: Loop, steps: Sequence[Any], losses: list[Any]) -> TrainState:
    state = loop.state
    for batch in steps:
        state, loss = step(state, batch, loop.hyper, loop.meta, None)
        losses.append(loss)
    return state


def _segment(step: Step) -> Callable[..., Any]:
    """Returns a function that runs several steps from the draws of each, which it records when there are none."""

    def run(state: TrainState, steps: Sequence[Any], hyper: Any, meta: Any, draws: list[dict[Any, Any]]) -> Any:
        losses = []
        fresh = not draws
        for index, batch in enumerate(steps):
            if fresh:
                draws.append({})
            state, loss = step(state, batch, hyper, meta, draws[index])
            losses.append(loss)
        return state, losses

    return run


def _over_tasks(loop: Loop, step: Step, dims: Dims) -> tuple[Loop, Step]:
    """Returns the loop in which whatever differs between tasks leads with the task, and the step for all tasks at once.

    The loop is outermost and each step is mapped over the tasks, so that a segment can be computed again as a whole.
    """
    (state, batches, hyper, meta), _ = lead_with_tasks(loop.state, loop.batches, loop.hyper, loop.meta, dims)
    inner = [0, None if dims[1] is None else 0, *(None if dim is None else 0 for dim in dims[2:])]

    def mapped(state: TrainState, batch: Any, hyper: Any, meta: Any, draws: dict[Any, Any] | None) -> Any:
        given = dict(draws or {})
        noise_dims = dict.fromkeys(given, 0)

        def one(state: TrainState, batch: Any, hyper: Any, meta: Any, noise: dict[Any, Any]) -> Any:
            noise = dict(noise)
            return *step(state, batch, hyper, meta, noise), noise

        run = torch.func.vmap(one, in_dims=(*inner, noise_dims), randomness="different")
        state, loss, made = run(state, batch, hyper, meta, given)
        if draws is not None:
            draws.update(made)
        return state, loss

    return Loop(state, batches, hyper, meta), mapped


def segment_length(checkpoint: str | int | None, steps: int) -> int | None:
    """Returns how many steps lie between two states that are kept; None keeps everything."""
    if checkpoint is None:
        return None
    if checkpoint == "step":
        return 1
    if checkpoint == "sqrt":
        return max(1, math.isqrt(steps))
    if isinstance(checkpoint, int) and not isinstance(checkpoint, bool) and checkpoint >= 1:
        return checkpoint
    raise InputError(f"checkpoint={checkpoint!r} is not an option. Use None, 'step', 'sqrt' or a positive int.")


def check_options(backward: str, order: int, truncate: int | None) -> None:
    """Refuses options that do not exist."""
    if backward not in _BACKWARD:
        raise InputError(f"backward={backward!r} is not an option. Use one of {', '.join(map(repr, _BACKWARD))}.")
    if order not in (1, 2):
        raise InputError(f"order={order!r} is not an option. Use 2 (exact) or 1 (first-order).")
    if truncate is not None and (not isinstance(truncate, int) or isinstance(truncate, bool) or truncate < 1):
        raise InputError(f"truncate={truncate!r} is not an option. Use None or a positive number of steps.")


def split_batches(batches: Any, dim: int = 0) -> list[Any]:
    """Returns the list of batches: a list as it is, any other pytree cut along its step dimension."""
    steps = batches if isinstance(batches, list) else _cut(batches, dim)
    if not steps:
        raise InputError(
            compose_message(
                "`unroll` was given no steps",
                None,
                "It needs at least one batch.",
                "Pass a list of batches, or tensors with a leading dimension of at least 1.",
            )
        )
    return steps


def _cut(batches: Any, dim: int) -> list[Any]:
    leaves, structure = pytree.tree_flatten(batches)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sizes = {leaf.shape[dim] if leaf.dim() > dim else None for leaf in tensors}
    if len(sizes) != 1 or None in sizes:
        raise InputError(
            compose_message(
                f"the batches have {', '.join(sorted(map(str, sizes))) or 'no'} steps in dimension {dim}",
                None,
                "A pytree of batches has the same number of steps in every tensor.",
                "Stack the batches, or pass a list with one batch for each step.",
            )
        )
    count = sizes.pop()
    assert count is not None
    parts = [leaf.unbind(dim) if isinstance(leaf, torch.Tensor) else [leaf] * count for leaf in leaves]
    return [pytree.tree_unflatten([part[index] for part in parts], structure) for index in range(count)]
