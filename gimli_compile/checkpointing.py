"""Recomputation: a segment of a loop that keeps its inputs only, and runs again when its gradient is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._C._functorch as _functorch
from torch.utils import _pytree as pytree

from gimli_compile.errors import InputError, compose_message
from gimli_compile.metadata import is_differentiable

Tensor = torch.Tensor


def checkpointed(function: Callable[..., Any], *args: Any) -> Any:
    """Returns `function(*args, draws)` and keeps only `args` and the draws for the backward pass.

    `function` takes, last, a list: empty at first, filled with its random draws, and given back for the second run. The
    result is differentiable to any order, each order at the price of one more run.
    """
    leaves, structure = pytree.tree_flatten(args)
    tensors, places = distinct(leaves)
    draws: list[Any] = []
    form: list[Any] = []

    def flat(*values: Tensor) -> tuple[Tensor, ...]:
        rebuilt = [leaf if place is None else values[place] for leaf, place in zip(leaves, places, strict=True)]
        out = function(*pytree.tree_unflatten(rebuilt, structure), draws)
        out_leaves, out_structure = pytree.tree_flatten(out)
        results, out_places = distinct(out_leaves)
        others = [leaf if place is None else None for leaf, place in zip(out_leaves, out_places, strict=True)]
        form[:] = [out_structure, out_places, others]
        return tuple(results)

    results = _Segment.apply(flat, *tensors)
    _refuse_wrapped(draws)
    out_structure, out_places, others = form
    pairs = zip(out_places, others, strict=True)
    return pytree.tree_unflatten([leaf if place is None else results[place] for place, leaf in pairs], out_structure)


def _refuse_wrapped(draws: list[Any]) -> None:
    if any(map(_functorch.is_functorch_wrapped_tensor, pytree.tree_leaves(draws))):
        raise InputError(
            compose_message(
                "`checkpoint` under a torch.func transform cannot keep the random draws of a step",
                None,
                "They belong to a transform that has ended when the step is computed again.",
                "Use `unroll(..., tasks=True)` for many tasks, and `backward()` outside.",
            )
        )


def distinct(leaves: list[Any]) -> tuple[list[Tensor], list[int | None]]:
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
    """One node of the autograd graph for a whole segment; works under torch.func transforms as well."""

    generate_vmap_rule = True

    @staticmethod
    def forward(flat: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Runs the segment without recording it."""
        with torch.no_grad():
            results = flat(*tensors)
        given = {id(tensor) for tensor in tensors}
        return tuple(result.clone() if id(result) in given else result for result in results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keeps the inputs."""
        ctx.flat = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.mark_non_differentiable(*(result for result in output if not is_differentiable(result)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Runs the segment again and differentiates it."""
        saved = ctx.saved_tensors
        wanted = [index for index, needs in enumerate(ctx.needs_input_grad[1:]) if needs]
        found: list[Tensor | None] = [None] * len(saved)
        for index, grad in zip(wanted, pull(ctx.flat, saved, wanted, grads), strict=True):
            found[index] = grad
        return (None, *found)


def pull(flat: Callable[..., Any], tensors: Any, wanted: list[int], grads: Any) -> Any:
    """Returns the gradients of `flat(*tensors)`, seeded by `grads`, in the tensors at the places `wanted`.

    They are None where there is none, and differentiable if gradients are recorded; works under torch.func transforms.
    """
    transformed = any(map(_functorch.is_functorch_wrapped_tensor, (*tensors, *grads)))
    return (_pull_transformed if transformed else _pull)(flat, tensors, wanted, grads)


def _pull(flat: Callable[..., Any], saved: Any, wanted: list[int], grads: Any) -> Any:
    """Returns the gradients in the wanted inputs, themselves differentiable if gradients are recorded."""
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [tensor.view_as(tensor) if again else tensor.detach() for tensor in saved]
        for index in wanted:
            if not inputs[index].requires_grad:
                inputs[index].requires_grad_()
        results = flat(*inputs)
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if result.requires_grad]
    if not pairs or not wanted:
        return [None] * len(wanted)
    outputs, seeds = zip(*pairs, strict=True)
    sources = [inputs[index] for index in wanted]
    return torch.autograd.grad(outputs, sources, seeds, allow_unused=True, create_graph=again)


def _pull_transformed(flat: Callable[..., Any], saved: Any, wanted: list[int], grads: Any) -> Any:
    """The same for torch.func, which has no `autograd.grad`."""

    def run(*chosen: Tensor) -> tuple[Tensor, ...]:
        inputs = list(saved)
        for index, value in zip(wanted, chosen, strict=True):
            inputs[index] = value
        return tuple(result for result in flat(*inputs) if is_differentiable(result))

    with torch.enable_grad():
        pull = torch.func.vjp(run, *(saved[index] for index in wanted))[1]
    return pull(tuple(grad for grad in grads if is_differentiable(grad)))
