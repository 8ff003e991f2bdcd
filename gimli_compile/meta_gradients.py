"""The meta-gradient: the loss on held-out data after a loop, and its gradient, in one call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils import _pytree as pytree

from gimli_compile.compiled.calls import Compiler
from gimli_compile.errors import InputError, compose_message
from gimli_compile.loop_options import loop_options

Tensor = torch.Tensor


class Functions(Protocol):
    """What a meta-gradient is made of: see `Functional`."""

    last_plan: Any

    def unroll(self, *given: Any, **options: Any) -> tuple[Any, Any]:
        """Takes inner steps."""
        ...

    def loss(self, *given: Any, **options: Any) -> Tensor:
        """Returns the loss."""
        ...


class Asked(NamedTuple):
    """The arguments of a meta-gradient: see `Functional.meta_gradient`."""

    state: Any
    batches: Any
    held_out: Any
    hyper: Any
    meta: Any
    inputs: Any
    allow_unused: bool
    options: dict[str, Any]


_OPTIONS = {  # of `unroll`, in the order of `LoopOptions`
    "backward": "reverse",
    "checkpoint": None,
    "order": 2,
    "truncate": None,
    "tasks": False,
    "implicit": None,
    "memory": None,
}


def meta_gradient(functions: Functions, compiler: Compiler | None, asked: Asked) -> tuple[Tensor, Any]:
    """Returns the loss after a loop, and its gradient in the structure of `inputs`: see `Functional.meta_gradient`."""
    tasks = asked.options.get("tasks", False)
    if isinstance(tasks, tuple) and any(dim is not None for dim in tasks[3:]) and asked.meta is not None:
        raise InputError(
            compose_message(
                "meta_gradient with a `meta` for each task",
                None,
                "The loss after the loop, `fn.loss`, takes one `meta` for all tasks.",
                "Use `fn.unroll`, and your own loss of what it returns.",
            )
        )
    if torch.is_inference_mode_enabled():
        raise InputError("meta_gradient under torch.inference_mode, which records no gradients. Call it outside.")
    inputs: list[Any] = []
    _collect(asked.inputs, inputs)
    _check_inputs(inputs, asked.inputs)
    with torch.enable_grad():
        loss, grads = _run(functions, compiler, asked, inputs)
    if not asked.allow_unused:
        _check_used([leaf for leaf, grad in zip(inputs, grads, strict=True) if grad is None], inputs, asked)
    made = (torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(inputs, grads, strict=True))
    return loss, _rebuilt(asked.inputs, made)


def _run(
    functions: Functions, compiler: Compiler | None, asked: Asked, inputs: list[Tensor]
) -> tuple[Tensor, list[Tensor | None]]:
    others, is_mapped = (asked.hyper, asked.meta), asked.options.get("tasks", False) is not False
    call = None
    if compiler is not None and asked.options.keys() <= _OPTIONS.keys():
        options = loop_options(*(_OPTIONS | asked.options).values())
        call = compiler.gradients.read(asked.state, asked.batches, asked.held_out, others, options)
        found = compiler.gradients.run(call)
        if found is not None:
            functions.last_plan = None
            return found[0].mean() if is_mapped else found[0], _through(found[1], inputs)
    state, _ = functions.unroll(asked.state, asked.batches, *others, **asked.options)
    losses = functions.loss(state, asked.held_out, asked.meta, tasks=is_mapped)
    loss = losses.mean() if is_mapped else losses
    if not loss.requires_grad:
        return loss, [None] * len(inputs)
    grads = torch.autograd.grad(loss, inputs, allow_unused=True)
    if compiler is not None:
        compiler.gradients.remember(call, state, asked.held_out, asked.meta, tasks=is_mapped)
    return loss.detach(), list(grads)


def _through(adjoints: list[tuple[Tensor, Tensor | None]], inputs: list[Tensor]) -> list[Tensor | None]:
    """Returns the gradient in the inputs, which what has these adjoints is, or is computed from."""
    total: dict[int, Tensor | None] = {}
    for tensor, adjoint in adjoints:
        before = total.get(id(tensor))
        total[id(tensor)] = before if adjoint is None else adjoint if before is None else before + adjoint
    if all(tensor.is_leaf for tensor, _ in adjoints):
        return [total.get(id(leaf)) for leaf in inputs]
    sources = {id(tensor): tensor for tensor, _ in adjoints if total[id(tensor)] is not None}
    if not sources:
        return [None] * len(inputs)
    found = [total[key] for key in sources]
    return list(torch.autograd.grad([*sources.values()], inputs, found, allow_unused=True))


# ------------------------------------------------------------------ pytrees, quickly


def _collect(tree: Any, found: list[Any]) -> None:
    """Adds the leaves of a pytree to a list, in an order that `_rebuilt` knows."""
    kind = type(tree)
    if kind is dict:
        tree = tree.values()
    elif kind is not list and kind is not tuple:
        found += [tree] if isinstance(tree, Tensor) else pytree.tree_leaves(tree)
        return
    for item in tree:
        _collect(item, found)


def _rebuilt(tree: Any, values: Iterator[Tensor]) -> Any:
    """Returns the pytree with other leaves."""
    kind = type(tree)
    if kind is dict:
        return {key: _rebuilt(item, values) for key, item in tree.items()}
    if kind is list or kind is tuple:
        return kind([_rebuilt(item, values) for item in tree])
    return next(values) if isinstance(tree, Tensor) else pytree.tree_map(lambda _: next(values), tree)


# ------------------------------------------------------------------ errors


def _check_inputs(inputs: list[Any], tree: Any) -> None:
    for index, leaf in enumerate(inputs):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            continue
        is_tensor = isinstance(leaf, Tensor)
        raise InputError(
            compose_message(
                f"{_name(tree, index)} of meta_gradient "
                + ("does not require a gradient" if is_tensor else f"is no tensor, but {type(leaf).__name__}"),
                None,
                "Gradients are of tensors that require one, and that state, hyper, meta or batches hold or come from.",
                "Call `requires_grad_()` on it before it is used." if is_tensor else "Leave it out.",
            )
        )
    if not inputs:
        raise InputError("meta_gradient has no `inputs`. Give the tensors to differentiate in, as a pytree.")


def _check_used(unused: list[Tensor], inputs: list[Tensor], asked: Asked) -> None:
    """Refuses inputs that no argument holds or comes from; nothing may depend on those that one does."""
    if not unused:
        return
    held, edges = _sources((asked.state, asked.batches, asked.held_out, asked.hyper, asked.meta))
    for leaf in unused:
        if id(leaf) not in held and (leaf.grad_fn, leaf.output_nr) not in edges:
            index = next(index for index, other in enumerate(inputs) if other is leaf)
            raise InputError(
                compose_message(
                    f"the loss after the loop does not depend on {_name(asked.inputs, index)}",
                    None,
                    "It is none of the tensors of state, hyper, meta and batches, and none of them comes from it.",
                    "Put it there before the call, or have zeros for it with `allow_unused=True`.",
                )
            )


def _sources(arguments: Any) -> tuple[set[int], set[tuple[Any, int]]]:
    """Returns what arguments are and come from: the identities of tensors, and results of nodes of the graph."""
    tensors = [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]
    held, nodes, edges = set(map(id, tensors)), set(), set()
    waiting = [(tensor.grad_fn, tensor.output_nr) for tensor in tensors]
    while waiting:
        edge = node, _ = waiting.pop()
        if node is None:
            continue
        edges.add(edge)
        if node not in nodes:
            nodes.add(node)
            held.add(id(getattr(node, "variable", None)))
            waiting += node.next_functions
    return held, edges


def _name(tree: Any, index: int) -> str:
    """Returns what a leaf of `inputs` is called."""
    paths: list[str] = []

    def visit(tree: Any, path: str) -> None:
        if type(tree) is dict:
            items = tree.items()
        elif type(tree) in (list, tuple):
            items = enumerate(tree)
        else:
            below = (
                [""] if isinstance(tree, Tensor) else [pytree.keystr(p) for p, _ in pytree.tree_leaves_with_path(tree)]
            )
            paths.extend(path + one for one in below)
            return
        for key, item in items:
            visit(item, f"{path}[{key!r}]")

    visit(tree, "inputs")
    return paths[index]
