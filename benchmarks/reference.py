"""The reference: Algorithm 1 of Gimli by hand, in float64, one step in memory at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from benchmarks import torch_operators as ops
from benchmarks.meta_gradient import Outcome, Problem, Run
from benchmarks.update_rules import first_state, take_step


def inner_step(problem: Problem, params: Any, state: Any, hyper: Any, batch: Any, count: float) -> tuple[Any, Any]:
    """One step with its graph."""
    value = problem.loss_at(params, batch)
    found = torch.autograd.grad(value, list(params.values()), create_graph=torch.is_grad_enabled())
    grads = dict(zip(params, found, strict=True))
    return take_step(problem.workload.rule, ops, hyper, (params, grads, state), count)


def reference(problem: Problem) -> Outcome:
    """Returns the loss and its gradients; every step is computed again, from its stored inputs, for its derivative."""
    losses, totals = [], None
    for batches, held_out in problem.task_batches():
        loss, found = _of_task(problem, batches, held_out)
        losses.append(loss)
        totals = found if totals is None else [a + b for a, b in zip(totals, found, strict=True)]
    assert totals is not None
    means = [total / len(losses) for total in totals]
    params = dict(zip(problem.params, means, strict=False))
    hyper = dict(zip(problem.hyper, means[len(params) :], strict=True))
    outcome: Outcome = {"loss": torch.stack(losses).mean(), "params": params, "hyper": hyper}
    return {name: value for name, value in outcome.items() if name == "loss" or name in problem.workload.wanted}


def _of_task(problem: Problem, batches: Any, held_out: Any) -> tuple[Tensor, list[Tensor]]:
    params, state = problem.params, first_state(problem.workload.rule, ops, problem.params)
    hyper = {name: value.detach().requires_grad_() for name, value in problem.hyper.items()}
    boundaries = []
    for count, batch in enumerate(batches, 1):
        boundaries.append((params, state))
        leaves = _leaves(params)
        params, state = pytree.tree_map(
            torch.Tensor.detach, inner_step(problem, leaves, state, problem.hyper, batch, float(count))
        )
    last = _leaves(params)
    loss = problem.loss_at(last, held_out)
    adjoints = list(torch.autograd.grad(loss, list(last.values())))
    adjoints += [torch.zeros_like(leaf) for leaf in pytree.tree_leaves(state)]
    in_hyper = [torch.zeros_like(value) for value in hyper.values()]
    for count, batch in reversed(list(enumerate(batches, 1))):
        inputs, before = _leaves(boundaries[count - 1][0]), _leaves(boundaries[count - 1][1])
        outputs = pytree.tree_leaves(inner_step(problem, inputs, before, hyper, batch, float(count)))
        sources = [*inputs.values(), *pytree.tree_leaves(before), *hyper.values()]
        found = torch.autograd.grad(outputs, sources, adjoints, materialize_grads=True)
        adjoints = list(found[: len(adjoints)])
        in_hyper = [a + b for a, b in zip(in_hyper, found[len(adjoints) :], strict=True)]
    return loss.detach(), [*adjoints[: len(problem.params)], *in_hyper]


def _leaves(tree: Any) -> Any:
    return pytree.tree_map_only(torch.Tensor, lambda value: value.detach().requires_grad_(), tree)


def reference_run(problem: Problem) -> Run:
    """The reference as a contender."""
    return partial(reference, problem)
