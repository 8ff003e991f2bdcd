"""Unrolls steps into a loop: what is recorded, what is computed again, what is cut off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.checkpointing import checkpointed
from gimli_compile.errors import InputError, compose_message
from gimli_compile.forward_mode import UncompiledSteps, unroll_forward
from gimli_compile.implicit_mode import Implicit, unroll_implicit
from gimli_compile.loop_options import LoopOptions
from gimli_compile.loop_plan import bytes_of_text, choose_plan
from gimli_compile.loop_steps import LoopSteps
from gimli_compile.mixed_mode import unroll_mixed
from gimli_compile.records import opened, rebuilt
from gimli_compile.state import TrainState
from gimli_compile.tasks import Loop, TaskSteps, lead_with_tasks

Step = Callable[..., tuple[TrainState, torch.Tensor]]


def unroll_steps(steps: LoopSteps, loop: Loop, options: LoopOptions) -> tuple[TrainState, Any]:
    """Takes the steps over the batches: see `Functional.unroll`."""
    if isinstance(loop.batches, Iterator):
        loop = replace(loop, batches=list(loop.batches))
    loop = replace(loop, batches=opened(loop.batches), meta=opened(loop.meta))
    step_dim, taken = 0, steps
    if options.tasks is not False:
        dims = (None, 0, None, None) if options.tasks is True else options.tasks
        loop, taken = lead_with_tasks(loop, dims), TaskSteps(steps, dims)
        step_dim = 0 if dims[1] is None else 1  # the task leads, unless all tasks share the batches
    batches = split_batches(loop.batches, step_dim)
    losses: list[Any] = []
    cut = 0 if options.truncate is None else max(0, len(batches) - options.truncate)
    if cut:
        with torch.no_grad():
            state = _run(taken.step, loop, batches[:cut], losses)
        loop = replace(loop, state=pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, state))
    loop = replace(loop, batches=batches[cut:])
    if options.backward == "auto":
        options = planned(steps, taken, loop, options)
        steps.recomputes = options.recomputes
    state, made = _differentiated(taken, loop, options, segment_length(options.checkpoint, len(batches)))
    return state, stack_losses(losses + made)


def planned(
    steps: LoopSteps, taken: LoopSteps | TaskSteps, loop: Loop, options: LoopOptions, together: int | None = None
) -> LoopOptions:
    """Returns the options of the way that "auto" chooses for a loop over batches; `steps` has the plan from then on.

    Of many tasks, so many run `together`; all by default.
    """
    steps.plan = plan = choose_plan(taken, loop, bytes_of_text(options.memory), together)
    return replace(options, backward=plan.backward, checkpoint=plan.checkpoint, memory=None)


def _differentiated(
    steps: LoopSteps | TaskSteps, loop: Loop, options: LoopOptions, length: int | None
) -> tuple[TrainState, list[Any]]:
    """Takes the steps that are differentiated, in one of the ways through the backward pass."""
    if options.backward == "mixed":
        return unroll_mixed(steps, loop, length or 1)
    if options.backward == "forward":
        return unroll_forward(partial(UncompiledSteps, steps), loop)
    if options.backward == "implicit":
        return unroll_implicit(steps, loop, options.implicit or Implicit())
    losses: list[Any] = []
    if length is None:
        return _run(steps.step, loop, loop.batches, losses), losses
    state = loop.state
    for start in range(0, len(loop.batches), length):
        segment = loop.batches[start : start + length]
        state, made = checkpointed(_segment(steps.step), state, segment, loop.hyper, loop.meta)
        losses += made
    return state, losses


def stack_losses(losses: list[Any]) -> Any:
    """Returns the losses of all steps as one pytree, their last dimension the step."""
    losses = list(map(opened, losses))
    leaves = [pytree.tree_leaves(loss) for loss in losses]
    made = [torch.stack(of, -1) if isinstance(of[0], torch.Tensor) else of[0] for of in zip(*leaves, strict=True)]
    return rebuilt(pytree.tree_unflatten(made, pytree.tree_structure(losses[0])))


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
            losses.append(opened(loss))
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
