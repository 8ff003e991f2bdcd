"""Backward passes inside a captured train step: `loss.backward()` and `torch.autograd.grad`.

They run with a graph whatever the caller says, since the framework then chooses the derivatives that have derivatives
themselves. What the caller gets is what eager code gets: gradients in `param.grad`, without a graph unless it was asked
for.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from gimli_compile.recording import Recorder, Region

Tensor = torch.Tensor


@contextmanager
def backward_recorded(recorder: Recorder) -> Iterator[None]:
    """Makes the backward passes of the train step part of the program while the trace runs."""
    passes = _Passes(recorder, torch.autograd.grad)
    names = {"backward": passes.backward, "grad": passes.grad}
    before = {name: getattr(torch.autograd, name) for name in names}
    for name, form in names.items():
        setattr(torch.autograd, name, form)
    try:
        yield
    finally:
        for name, form in before.items():
            setattr(torch.autograd, name, form)


class _Passes:
    def __init__(self, recorder: Recorder, original: Callable[..., Any]) -> None:
        self.recorder = recorder
        self.original = original

    def grad(self, outputs: Any, inputs: Any, grad_outputs: Any = None, *rest: Any, **options: Any) -> Any:
        """`torch.autograd.grad`; inside the model or the loss it is the user's own, graph or not."""
        if self.recorder.region is Region.LOSS:
            return self.original(outputs, inputs, grad_outputs, *rest, **options)
        names = ("retain_graph", "create_graph", "only_inputs", "allow_unused", "is_grads_batched", "materialize_grads")
        options = {**dict(zip(names, rest, strict=False)), **options}
        keeps_graph = bool(options.pop("create_graph", False))
        options.pop("retain_graph", None)
        with self.recorder.in_region(Region.BACKWARD):
            grads = self.original(outputs, inputs, grad_outputs, create_graph=True, **options)
            return grads if keeps_graph else tuple(None if g is None else g.detach() for g in grads)

    def backward(
        self,
        tensors: Any,
        grad_tensors: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        grad_variables: Any = None,
        inputs: Any = None,
    ) -> None:
        """`torch.autograd.backward`: adds to the gradients of the leaves."""
        roots = (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)
        seeds = grad_variables if grad_tensors is None else grad_tensors
        seeds = (seeds,) if isinstance(seeds, Tensor) else seeds
        leaves = _leaves_of(roots) if inputs is None else ((inputs,) if isinstance(inputs, Tensor) else tuple(inputs))
        with self.recorder.in_region(Region.BACKWARD):
            grads = self.original(roots, leaves, seeds, create_graph=True, allow_unused=True) if leaves else ()
            with torch.set_grad_enabled(create_graph):
                for leaf, grad in zip(leaves, grads, strict=True):
                    if grad is not None:
                        _accumulate(leaf, self._marked(grad if create_graph else grad.detach()), create_graph)
        for leaf in leaves:
            for hook in (getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values():
                with torch.set_grad_enabled(create_graph):
                    hook(leaf)

    def _marked(self, grad: Tensor) -> Tensor:
        """Returns a copy that the program knows as an inner gradient: first-order programs take it as a constant."""
        sparse = self.recorder.sparse
        dense, rows = sparse.parts(grad) if sparse.knows(grad) else (grad, None)
        copied = dense.clone()
        self.recorder.mark_gradient(copied)
        return copied if rows is None else sparse.make(copied, rows)


def _accumulate(leaf: Tensor, grad: Tensor, create_graph: bool) -> None:
    if leaf.grad is None:
        leaf.grad = grad
    elif create_graph:
        leaf.grad = leaf.grad + grad
    else:
        leaf.grad.add_(grad)


def _leaves_of(roots: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Returns the leaves that the roots depend on, in the order in which a backward pass reaches them.

    The engine runs what is ready, the node made last first, and gives a leaf its gradient as soon as it is complete.
    """
    found: dict[int, Tensor] = {id(root): root for root in roots if root.grad_fn is None and root.requires_grad}
    starts = [root.grad_fn for root in roots if root.grad_fn is not None]
    waiting = _dependencies(starts)
    ready = [
        (-node._sequence_nr(), place, node) for place, node in enumerate(dict.fromkeys(starts)) if not waiting[node]
    ]
    heapq.heapify(ready)
    place = len(ready)
    while ready:
        node = heapq.heappop(ready)[-1]
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found.setdefault(id(leaf), leaf)
        for parent, _ in node.next_functions:
            if parent is not None:
                waiting[parent] -= 1
                if not waiting[parent]:
                    heapq.heappush(ready, (-parent._sequence_nr(), place, parent))
                    place += 1
    return tuple(found.values())


def _dependencies(starts: Sequence[Any]) -> dict[Any, int]:
    """Returns, for each node of the graph, how many edges lead to it."""
    counts: dict[Any, int] = dict.fromkeys(starts, 0)
    pending = list(counts)
    while pending:
        for parent, _ in pending.pop().next_functions:
            if parent is not None:
                if parent not in counts:
                    counts[parent] = 0
                    pending.append(parent)
                counts[parent] += 1
    return counts
