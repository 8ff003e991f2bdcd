"""Recomputation: a segment of a loop that keeps its inputs only, and runs again when its gradient is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

Tensor = torch.Tensor


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args, draws)` and keeps only `args` and the draws for the backward pass.

    `function` takes, last, a list: empty at first, filled with its random draws, and given back for the second run. The
    result is differentiable to any order, each order at the price of one more run.
    """
    leaves, structure = pytree.tree_flatten(args)
    tensors, places = _distinct(leaves)
    draws: list[Any] = []
    form: list[Any] = []

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        rebuilt = [leaf if place is None else values[place] for leaf, place in zip(leaves, places, strict=True)]
        out = function(*pytree.tree_unflatten(rebuilt, structure), draws)
        out_leaves, out_structure = pytree.tree_flatten(out)
        results, out_places = _distinct(out_leaves)
        form[:] = [out_structure, out_places]
        return tuple(results)

    results = _Segment.apply(flat, *tensors)
    return pytree.tree_unflatten([results[place] for place in form[1]], form[0])


def _distinct(leaves: list[Any]) -> tuple[list[Tensor], list[int | None]]:
    """Returns the tensors among the leaves, each object once, and for each leaf its place among them."""
    tensors: list[Tensor] = []
    known: dict[int, int] = {}
    places: list[int | None] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            places.append(None)
            continue
        if id(leaf) not in known:
            known[id(leaf)] = len(tensors)
            tensors.append(leaf)
        places.append(known[id(leaf)])
    return tensors, places


class _Segment(torch.autograd.Function):
    """One node of the autograd graph for a whole segment."""

    @staticmethod
    def forward(ctx: Any, flat: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the segment without recording it."""
        ctx.flat = flat
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            results = flat(*tensors)
        given = {id(tensor) for tensor in tensors}
        results = tuple(result.clone() if id(result) in given else result for result in results)
        ctx.mark_non_differentiable(*(result for result in results if not result.is_floating_point()))
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the segment again and differentiates it."""
        again = torch.is_grad_enabled()
        saved = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [tensor.view_as(tensor) if again else tensor.detach() for tensor in saved]
            wanted = [index for index, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
            for index in wanted:
                if not inputs[index].requires_grad:
                    inputs[index].requires_grad_()
            results = ctx.flat(*inputs)
        pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
        found: list[Tensor | None] = [None] * len(saved)
        if pairs and wanted:
            outputs, seeds = zip(*pairs, strict=True)
            sources = [inputs[index] for index in wanted]
            computed = torch.autograd.grad(outputs, sources, seeds, allow_unused=True, create_graph=again)
            for index, grad in zip(wanted, computed, strict=True):
                found[index] = grad
        return (None, *found)
