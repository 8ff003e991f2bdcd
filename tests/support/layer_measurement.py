"""Measures one layer or loss: values, both orders of second derivatives, and tasks, against the live eager loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from eager_reference import relative_error
from live_training import (
    Training,
    copied,
    hyper_error,
    objective,
    params_error,
    plain_sgd,
    random_directions,
    run_live,
    run_steps,
    tree_error,
    unrolled_gradients,
)
from torch import nn
from torch.utils import _pytree as pytree

import gimli_compile as gimli

LR = "groups.0.lr"
LIMITS = {"values": 1e-12, "reverse": 1e-6, "forward": 1e-9, "tasks": 1e-9}


def plain_call(layer, x, *rest):
    return layer(x, *rest)


@dataclass(frozen=True)
class Case:
    """One layer with options: how it is made and called, and its batches, whose first tensor is scaled if floating."""

    make: Callable[[], Any]
    batches: list[Any]
    call: Callable[..., Any] = plain_call
    refused: str = ""
    draws: bool = False
    change: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda x: x)


class Wrapped(nn.Module):
    """A layer whose input is multiplied by a trained factor."""

    def __init__(self, case):
        super().__init__()
        self.layer = case.make()
        self.call, self.change = case.call, case.change
        first = case.batches[0][0]
        if first.is_floating_point():
            generator = torch.Generator().manual_seed(9)
            self.scale = nn.Parameter(1 + 0.2 * torch.randn(first.shape, generator=generator, dtype=torch.float64))

    def forward(self, x, *rest):
        if x.is_floating_point():
            x = self.change(x * self.scale)
        return self.call(self.layer, x, *rest)


def curved_loss(model, batch):
    """A loss with curvature in every element of what the model returns."""
    total = torch.zeros((), dtype=torch.float64)
    for out in pytree.tree_leaves(model(*batch)):
        if isinstance(out, torch.Tensor) and out.is_floating_point():
            weights = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).reshape(out.shape)
            total = total + ((out * weights) ** 2 + torch.sin(out * weights)).mean()
    return total


@dataclass
class Measured:
    """The errors of one case, relative; or why it was refused."""

    errors: dict[str, float] = field(default_factory=dict)
    refused: str = ""

    def beyond(self):
        """Returns the errors that are too large."""
        return {name: error for name, error in self.errors.items() if not error <= LIMITS[name]}


def training_of(case):
    return Training(lambda: Wrapped(case), plain_sgd, curved_loss, case.batches)


def measure(case):
    """Returns the errors of a case."""
    training = training_of(case)
    try:
        fn = training.functionalized()[2]
        fn.step(fn.init(), case.batches[0])
    except gimli.CaptureError as error:
        return Measured(refused=str(error))
    return Measured(
        {
            "values": values_error(training, fn),
            "reverse": reverse_error(training, fn),
            "forward": forward_error(training, fn),
            "tasks": tasks_error(training, fn, case),
        }
    )


def values_error(training, fn):
    """The largest relative error of parameters, buffers and losses in all steps."""
    expected, got = run_live(training), run_steps(training, fn, fn.init())
    error = max(map(relative_error, got.losses, expected.losses))
    for named, live in [
        *zip(got.params, expected.params, strict=True),
        *zip(got.buffers, expected.buffers, strict=True),
    ]:
        assert set(named) == set(live)
        error = max([error, *(relative_error(named[name], live[name]) for name in live)])
    return error


def reverse_error(training, fn):
    """The largest error of the meta-gradients against differences of the live loop."""
    inputs, grads = unrolled_gradients(training, fn)
    errors = [hyper_error(training, LR, grads), params_error(training, inputs, grads)]
    if any(name.startswith("batches") for name in grads):
        errors.append(tree_error(training, "batches", grads))
    return max(errors)


def leaves_of(fn, batches):
    """Returns what is differentiated, by pytrees: parameters, learning rate, floating tensors of the batches."""
    floating = [leaf.detach() for leaf in pytree.tree_leaves(batches) if leaf.is_floating_point()]
    return copied(fn.init().params.items()), fn.hyperparameters()[0]["lr"], floating


def with_leaves(batches, floating):
    """Returns the batches with other floating tensors."""
    given = iter(floating)
    return pytree.tree_map(lambda leaf: next(given) if leaf.is_floating_point() else leaf, batches)


def unrolled(training, fn, leaves, batches, **options):
    """Returns the objective of an unroll as a function of the leaves."""
    params, lr, floating = leaves
    state, hyper = fn.init(), fn.hyperparameters()
    state = type(state)(params, state.buffers, state.opt_state)
    hyper[0]["lr"] = lr
    torch.manual_seed(training.seed)
    return fn.unroll(state, with_leaves(batches, floating), hyper, **options)


def forward_error(training, fn):
    """The error of forward mode through the unroll against reverse mode."""
    leaves = leaves_of(fn, training.batches)
    along = random_directions(leaves, 400)

    def function(*leaves):
        state, losses = unrolled(training, fn, leaves, training.batches)
        return objective(state.params, losses)

    slope = torch.func.jvp(function, leaves, along)[1]
    flat = [leaf.requires_grad_() for leaf in pytree.tree_leaves(leaves)]
    grads = torch.autograd.grad(function(*leaves), flat, allow_unused=True, materialize_grads=True)
    products = [float((g * w).sum()) for g, w in zip(grads, pytree.tree_leaves(along), strict=True)]
    return abs(float(slope) - sum(products)) / max(sum(map(abs, products)), 1e-6)


def tasks_error(training, fn, case):
    """The largest relative error of values and gradients of an unroll over two tasks against a loop over them.

    Draws are made in the order of the tasks within a step, so what draws takes one step.
    """
    batches = case.batches[:1] if case.draws else case.batches
    tasks = [batches, pytree.tree_map(lambda leaf: 1.1 * leaf if leaf.is_floating_point() else leaf, batches)]
    stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *tasks)

    def result(run):
        leaves = leaves_of(fn, [])
        flat = [leaf.requires_grad_() for leaf in pytree.tree_leaves(leaves[:2])]
        torch.manual_seed(training.seed)
        params, losses = run(leaves)
        total = objective(params, losses.movedim(-1, 0).sum(-1))
        return [losses.detach(), *(p.detach() for p in params.values()), *torch.autograd.grad(total, flat)]

    def one_by_one(leaves):
        made = [run_task(fn, leaves, task) for task in tasks]
        return pytree.tree_map(lambda *parts: torch.stack(parts), *made)

    together = result(lambda leaves: run_task(fn, leaves, stacked, tasks=True))
    return max(map(relative_error, together, result(one_by_one)))


def run_task(fn, leaves, batches, **options):
    state, hyper = fn.init(), fn.hyperparameters()
    hyper[0]["lr"] = leaves[1]
    state, losses = fn.unroll(type(state)(leaves[0], state.buffers, state.opt_state), batches, hyper, **options)
    return state.params, losses
