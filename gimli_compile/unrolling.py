"""Unrolls steps into a loop: what is recorded, what is computed again, what is cut off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.checkpointing import checkpointed
from gimli_compile.errors import InputError, compose_message
from gimli_compile.forward_mode import unroll_forward
from gimli_compile.implicit_mode import Implicit, unroll_implicit
from gimli_compile.loop_steps import LoopSteps
from gimli_compile.mixed_mode import unroll_mixed
from gimli_compile.state import TrainState
from gimli_compile.tasks import Loop, Tasks, TaskSteps, lead_with_tasks

Step = Callable[..., tuple[TrainState, torch.Tensor]]
BACKWARD = ("reverse", "mixed", "forward", "implicit")


def unroll_steps(
    steps: LoopSteps,
    loop: Loop,
    *,
    backward: str,
    checkpoint: str | int | None,
    truncate: int | None,
    tasks: Tasks,
    implicit: Implicit | None,
) -> tuple[TrainState, torch.Tensor]:
    """Takes the steps over the batches: see `Functional.unroll`."""
    if isinstance(loop.batches, Iterator):
        loop = replace(loop, batches=list(loop.batches))
    step_dim, taken = 0, steps
    if tasks is not False:
        dims = (None, 0, None, None) if tasks is True else tasks
        loop, taken = lead_with_tasks(loop, dims), TaskSteps(steps, dims)
        step_dim = 0 if dims[1] is None else 1  # the task leads, unless all tasks share the batches
    batches = split_batches(loop.batches, step_dim)
    losses: list[Any] = []
    cut = 0 if truncate is None else max(0, len(batches) - truncate)
    if cut:
        with torch.no_grad():
            state = _run(taken.step, loop, batches[:cut], losses)
        loop = replace(loop, state=pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, state))
    loop = replace(loop, batches=batches[cut:])
    state = _differentiated(taken, loop, segment_length(checkpoint, len(batches)), backward, implicit, losses)
    return state, _stacked(losses)


def _differentiated(
    steps: LoopSteps | TaskSteps,
    loop: Loop,
    length: int | None,
    backward: str,
    implicit: Implicit | None,
    losses: list[Any],
) -> TrainState:
    """Takes the steps that are differentiated, in one of the ways through the backward pass."""
    if backward == "mixed":
        state, made = unroll_mixed(steps, loop, length or 1)
        losses += made
        return state
    if backward == "forward":
        state, made = unroll_forward(steps, loop)
        losses += made
        return state
    if backward == "implicit":
        state, made = unroll_implicit(steps, loop, implicit or Implicit())
        losses += made
        return state
    if length is None:
        return _run(steps.step, loop, loop.batches, losses)
    state = loop.state
    for start in range(0, len(loop.batches), length):
        segment = loop.batches[start : start + length]
        state, made = checkpointed(_segment(steps.step), state, segment, loop.hyper, loop.meta)
        losses += made
    return state


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


def check_loop_options(
    backward: str, checkpoint: str | int | None, order: int, truncate: int | None, implicit: Implicit | None
) -> None:
    """Refuses options that `unroll` does not have, or not together."""
    if backward not in BACKWARD:
        raise InputError(f"backward={backward!r} is not an option. Use one of {', '.join(map(repr, BACKWARD))}.")
    if order not in (1, 2):
        raise InputError(f"order={order!r} is not an option. Use 2 (exact) or 1 (first-order).")
    if implicit is not None and backward != "implicit":
        raise InputError(f'implicit={implicit} is an option of backward="implicit", and backward is {backward!r}.')
    if order == 1 and backward in ("mixed", "implicit"):
        raise InputError(
            compose_message(
                f"order=1 with backward={backward!r}",
                None,
                "First order takes the inner gradients as constants: there is no second derivative to save memory on.",
                'Use `backward="reverse"`, or `order=2` for the exact gradient.',
            )
        )
    if backward in ("forward", "implicit") and checkpoint is not None:
        raise InputError(
            compose_message(
                f"checkpoint={checkpoint!r} with backward={backward!r}",
                None,
                "It keeps nothing of the steps: there is nothing to compute again.",
                "Leave `checkpoint` out.",
            )
        )
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
