"""Unrolls steps into a loop: what is recorded, what is computed again, what is cut off."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.checkpointing import checkpointed
from gimli_compile.errors import InputError, compose_message
from gimli_compile.state import TrainState

Step = Callable[..., tuple[TrainState, torch.Tensor]]
_BACKWARD = ("reverse",)


def unroll_steps(
    step: Step,
    state: TrainState,
    batches: Any,
    hyper: dict[str, torch.Tensor],
    meta: Any,
    *,
    backward: str,
    checkpoint: str | int | None,
    order: int,
    truncate: int | None,
) -> tuple[TrainState, torch.Tensor]:
    """Runs `step` over the batches: see `Functional.unroll`."""
    steps = split_batches(batches)
    _check_options(backward, order, truncate)
    length = segment_length(checkpoint, len(steps))
    losses: list[torch.Tensor] = []
    cut = 0 if truncate is None else max(0, len(steps) - truncate)
    if cut:
        with torch.no_grad():
            state = _run(step, state, steps[:cut], hyper, meta, losses)
        state = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, state)
    if length is None:
        state = _run(step, state, steps[cut:], hyper, meta, losses)
    else:
        for start in range(cut, len(steps), length):
            segment = steps[start : start + length]
            state, segment_losses = checkpointed(_segment(step), state, segment, hyper, meta)
            losses += segment_losses
    return state, torch.stack(losses)


def _run(step: Step, state: TrainState, steps: Sequence[Any], hyper: Any, meta: Any, losses: list[Any]) -> TrainState:
    for batch in steps:
        state, loss = step(state, batch, hyper, meta, None)
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


def _check_options(backward: str, order: int, truncate: int | None) -> None:
    if backward not in _BACKWARD:
        raise InputError(f"backward={backward!r} is not an option. Use one of {', '.join(map(repr, _BACKWARD))}.")
    if order not in (1, 2):
        raise InputError(f"order={order!r} is not an option. Use 2 (exact) or 1 (first-order).")
    if truncate is not None and (isinstance(truncate, bool) or truncate < 1):
        raise InputError(f"truncate={truncate!r} is not an option. Use None or a positive number of steps.")


def split_batches(batches: Any) -> list[Any]:
    """Returns the list of batches: a list or iterator as it is, any other pytree cut along its leading dimension."""
    if isinstance(batches, (list, Iterator)):
        steps = list(batches)
    else:
        steps = _cut(batches)
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


def _cut(batches: Any) -> list[Any]:
    leaves, structure = pytree.tree_flatten(batches)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    sizes = {leaf.shape[0] if leaf.dim() else None for leaf in tensors}
    if len(sizes) != 1 or None in sizes:
        raise InputError(
            compose_message(
                f"the batches have leading dimensions {sorted(map(str, sizes))}",
                None,
                "A pytree of batches has one leading dimension, the number of steps, in every tensor.",
                "Stack the batches, or pass a list with one batch for each step.",
            )
        )
    count = sizes.pop()
    parts = [leaf.unbind(0) if isinstance(leaf, torch.Tensor) else [leaf] * count for leaf in leaves]
    return [pytree.tree_unflatten([part[index] for part in parts], structure) for index in range(count)]
