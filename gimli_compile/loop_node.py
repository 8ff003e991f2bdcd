"""One autograd node for a whole loop, which decides itself what it keeps and how its gradient comes about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch._C._functorch as _functorch
from torch.utils import _pytree as pytree

from gimli_compile.checkpointing import distinct
from gimli_compile.errors import CaptureError, InputError, compose_message

Tensor = torch.Tensor


class Recipe(Protocol):
    """How a loop runs and how adjoints go back through it; runs without recording for autograd.

    `name` is the option of `unroll` that chooses it.
    """

    name: str

    def forward(self, inputs: Any, needed: Sequence[bool]) -> tuple[Any, Any, Sequence[Tensor]]:
        """Returns the results, a pytree of what to keep for the backward pass, and the results without a derivative.

        `needed` tells of every leaf of the inputs whether its adjoint will be.
        """
        ...

    def backward(self, inputs: Any, kept: Any, grads: Any, needed: Sequence[bool]) -> Sequence[Tensor | None]:
        """Returns the adjoint of every leaf of the inputs, None where there is none or none is needed.

        `grads` are the adjoints of the results, in their structure, None where there are none.
        """
        ...


def run_as_node(recipe: Recipe, inputs: Any) -> Any:
    """Runs a recipe on a pytree; what it returns is differentiable once, by what the recipe says.

    Raises:
        InputError: a torch.func transform is active; or, later, the gradient is differentiated.
    """
    leaves, structure = pytree.tree_flatten(inputs)
    if any(map(_functorch.is_functorch_wrapped_tensor, (leaf for leaf in leaves if isinstance(leaf, Tensor)))):
        raise _transformed(recipe.name)
    tensors, places = distinct(leaves)
    call = _Call(recipe, leaves, places, structure)
    results = _Node.apply(call, *tensors)
    return pytree.tree_unflatten([leaf if place is None else results[place] for leaf, place in call.form], call.made)


class _Call:
    """One run: how the flat tensors of the node make up its inputs, results and what it keeps."""

    def __init__(self, recipe: Recipe, leaves: list[Any], places: list[int | None], structure: Any) -> None:
        self.recipe = recipe
        self.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.places = places
        self.structure = structure
        self.form: list[tuple[Any, int | None]] = []
        self.made: Any = None
        self.is_recorded = torch.is_grad_enabled()

    def needed(self, needs: Sequence[bool]) -> list[bool]:
        return [self.is_recorded and place is not None and needs[place] for place in self.places]

    def inputs(self, tensors: Sequence[Tensor]) -> Any:
        pairs = zip(self.others, self.places, strict=True)
        return pytree.tree_unflatten([leaf if p is None else tensors[p] for leaf, p in pairs], self.structure)

    def results(self, made: Any, tensors: Sequence[Tensor], constant: set[int]) -> tuple[list[Tensor], list[Tensor]]:
        leaves, self.made = pytree.tree_flatten(made)
        found, places = distinct(leaves)
        self.form = [(None if p is not None else leaf, p) for leaf, p in zip(leaves, places, strict=True)]
        given = {id(tensor) for tensor in tensors}
        results = [result.clone() if id(result) in given else result for result in found]
        pairs = zip(found, results, strict=True)
        return results, [own for of, own in pairs if id(of) in constant or not of.is_floating_point()]

    def grads(self, grads: Sequence[Tensor | None]) -> Any:
        """Returns the adjoints in the structure of the results; of a tensor that occurs twice, at its first place."""
        seen: set[int] = set()
        leaves = []
        for _, place in self.form:
            leaves.append(None if place is None or place in seen else grads[place])
            if place is not None:
                seen.add(place)
        return pytree.tree_unflatten(leaves, self.made)


class _Node(torch.autograd.Function):
    """The node."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> tuple[Tensor, ...]:
        needed = call.needed(ctx.needs_input_grad[1:])
        made, kept, constant = call.recipe.forward(call.inputs(tensors), needed)
        if any(needed):
            _refuse_complex(call.recipe.name, tensors, ctx.needs_input_grad[1:], made)
        results, fixed = call.results(made, tensors, {id(tensor) for tensor in constant})
        leaves, ctx.kept_structure = pytree.tree_flatten(kept)
        saved, ctx.kept_places = distinct([*tensors, *leaves])
        ctx.kept_others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.kept_places = ctx.kept_places[len(tensors) :]
        ctx.call, ctx.count = call, len(tensors)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*fixed)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call, saved = ctx.call, ctx.saved_tensors
        tensors = saved[: ctx.count]
        pairs = zip(ctx.kept_others, ctx.kept_places, strict=True)
        kept = pytree.tree_unflatten([leaf if p is None else saved[p] for leaf, p in pairs], ctx.kept_structure)
        needed = call.needed(ctx.needs_input_grad[1:])
        with torch.no_grad():
            found = call.recipe.backward(call.inputs(tensors), kept, call.grads(grads), needed)
        total: list[Tensor | None] = [None] * ctx.count
        for place, is_needed, grad in zip(call.places, needed, found, strict=True):
            if grad is not None and is_needed:
                before = total[place]
                total[place] = grad if before is None else before + grad
        return (None, *_closed(call.recipe.name, total, tensors))


def _refuse_complex(name: str, tensors: Sequence[Tensor], needs: Sequence[bool], made: Any) -> None:
    """Refuses complex numbers that are differentiated, or that the loop computes from what is."""
    given = set(map(id, tensors))
    found = [tensor for tensor, is_needed in zip(tensors, needs, strict=True) if is_needed]
    found += [leaf for leaf in pytree.tree_leaves(made) if isinstance(leaf, Tensor) and id(leaf) not in given]
    if any(map(torch.is_complex, found)):
        raise CaptureError(
            compose_message(
                f"a loop with backward={name!r} cannot differentiate in complex numbers",
                None,
                "What it keeps of the steps are derivatives in real numbers.",
                'Use backward="reverse", which differentiates in complex numbers as PyTorch does.',
            )
        )


def _closed(name: str, grads: list[Tensor | None], sources: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns gradients that refuse to be differentiated, if somebody records them."""
    if not torch.is_grad_enabled():
        return grads
    present = [grad for grad in grads if grad is not None]
    closed = iter(_Once.apply(name, len(present), *present, *sources))
    return [None if grad is None else next(closed) for grad in grads]


class _Once(torch.autograd.Function):
    """Passes gradients on and raises when they are differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise InputError(
            compose_message(
                f"the gradient of a loop with backward={ctx.name!r} is differentiated",
                None,
                "Such a loop is differentiable once: its gradient is computed by programs that nothing records.",
                'Use `backward="reverse"`, with or without `checkpoint`, which is differentiable to any order.',
            )
        )


def _transformed(name: str) -> InputError:
    return InputError(
        compose_message(
            f"backward={name!r} under a torch.func transform",
            None,
            "The loop is one node of an ordinary autograd graph, which keeps what the transform would take away.",
            'Use `unroll(..., tasks=True)` for many tasks and `backward()` outside, or `backward="reverse"`.',
        )
    )
