"""What one does with torch alone: plain training, the loop by hand, `torch.func`, `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import torch_operators as ops
from benchmarks.learned_optimizer import LearnedOptimizer
from benchmarks.meta_gradient import NotThereError, Problem, Run, gradients, wanted_groups
from benchmarks.reference import inner_step
from benchmarks.update_rules import first_state, take_step


def live_optimizer(problem: Problem, params: list[Tensor]) -> torch.optim.Optimizer:
    """Makes the optimizer that a training loop would use."""
    hyper = problem.hyper
    if problem.workload.rule == "lstm":
        return LearnedOptimizer(params, hyper)
    if "rates" in hyper:
        return torch.optim.SGD([{"params": [p], "lr": r} for p, r in zip(params, hyper["rates"].tolist(), strict=True)])
    if problem.workload.rule == "sgd":
        return torch.optim.SGD(params, lr=hyper["lr"].item())
    betas = hyper["beta1"].item(), hyper["beta2"].item()
    options = {"betas": betas, "eps": hyper["eps"].item(), "capturable": params[0].is_cuda}
    return torch.optim.Adam(params, lr=hyper["lr"].item(), **options)


def plain_training(problem: Problem) -> Run:
    """The same steps without any meta-gradient: live eager training, task after task."""
    model = problem.module()
    params = list(model.parameters())
    tasks = problem.task_batches()

    def run() -> dict[str, Any]:
        for batches, _ in tasks:
            with torch.no_grad():
                for p, start in zip(params, problem.params.values(), strict=True):
                    p.copy_(start)
            optimizer = live_optimizer(problem, params)
            for x, y in batches:
                optimizer.zero_grad()
                problem.loss(model(x), y).backward()
                optimizer.step()
        return {}

    return run


def plain_compiled(problem: Problem) -> Run:
    """The same steps, each by one program of `torch.compile`; all tasks at once."""
    return _plain(problem, torch.compile)


def plain_vmap(problem: Problem) -> Run:
    """The same steps, all tasks at once."""
    if problem.workload.tasks is None:
        raise NotThereError("there is one task")
    return _plain(problem, lambda step: step)


def _plain(problem: Problem, executor: Callable[[Any], Any]) -> Run:
    def step(params: Any, state: Any, batch: Any, count: Tensor) -> Any:
        grads = torch.func.grad(problem.loss_at)(params, batch)
        return take_step(problem.workload.rule, ops, problem.hyper, (params, grads, state), count)

    tasks = problem.workload.tasks
    run_step = executor(step if tasks is None else torch.func.vmap(step, in_dims=(0, 0, 0, None)))
    batches = problem.steps_of(problem.batches if tasks is None else _steps_first(problem.batches))
    state = first_state(problem.workload.rule, ops, problem.params)
    first = problem.params, state
    if tasks is not None:
        first = torch.utils._pytree.tree_map(lambda part: part.expand(tasks, *part.shape).contiguous(), first)
    counts = [torch.tensor(float(count), dtype=torch.float64) for count in range(1, len(batches) + 1)]

    @torch.no_grad()
    def run() -> dict[str, Any]:
        params, state = first
        for batch, count in zip(batches, counts, strict=True):
            params, state = run_step(params, state, batch, count)
        return {}

    return run


def _steps_first(batches: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batches[0].transpose(0, 1), batches[1].transpose(0, 1)


def by_hand(problem: Problem) -> Run:
    """The optimizer copied by hand, and `autograd.grad` with `create_graph`: what one writes without a library."""
    tasks = problem.task_batches()
    start, hyper = problem.variables(only=("params", *problem.workload.wanted))  # inner gradients need leaves

    def run() -> dict[str, Any]:
        losses = [_loss_of_task(problem, (start, hyper), batches, held_out) for batches, held_out in tasks]
        return gradients(torch.stack(losses).mean(), wanted_groups(problem, start, hyper))

    return run


def _loss_of_task(problem: Problem, start: Any, batches: Any, held_out: Any) -> Tensor:
    params, hyper = start
    state = first_state(problem.workload.rule, ops, params)
    for count, batch in enumerate(batches, 1):
        params, state = inner_step(problem, params, state, hyper, batch, float(count))
    return problem.loss_at(params, held_out)


# ---------------------------------------------------------------------- torch.func


def functional_loss(problem: Problem) -> Callable[..., Tensor]:
    """The loss after the loop of one task as a function of what is wanted; inner gradients by `torch.func.grad`."""
    rule = problem.workload.rule

    def loss(wanted: Any, batches: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> Tensor:
        params, hyper = wanted.get("params", problem.params), wanted.get("hyper", problem.hyper)
        state = first_state(rule, ops, params)
        for count, batch in enumerate(zip(*batches, strict=True), 1):
            grads = torch.func.grad(problem.loss_at)(params, batch)
            params, state = take_step(rule, ops, hyper, (params, grads, state), float(count))
        return problem.loss_at(params, held_out)

    return loss


def _wanted(problem: Problem) -> dict[str, dict[str, Tensor]]:
    return wanted_groups(problem, problem.params, problem.hyper)


def func_loop(problem: Problem) -> Run:
    """`torch.func.grad` of `torch.func.grad`, task after task."""
    gradient = torch.func.grad_and_value(functional_loss(problem))
    wanted = _wanted(problem)
    every = [(problem.batches, problem.held_out)]
    if problem.workload.tasks is not None:
        parts = zip(*problem.batches, *problem.held_out, strict=True)
        every = [((x, y), (held_x, held_y)) for x, y, held_x, held_y in parts]

    def run() -> dict[str, Any]:
        found = [gradient(wanted, batches, held_out) for batches, held_out in every]
        return _mean_of([grads for grads, _ in found], torch.stack([value for _, value in found]))

    return run


def _mean_of(found: list[Any], losses: Tensor) -> dict[str, Any]:
    names = {group: list(values) for group, values in found[0].items()}
    means = {
        group: {name: torch.stack([one[group][name] for one in found]).mean(0) for name in names[group]}
        for group in names
    }
    return {"loss": losses.mean()} | means


def _batched(problem: Problem) -> Callable[..., Any]:
    """The function of all tasks at once: the loss and its gradients. vmap is outermost, inside it is inexact."""
    gradient = torch.func.grad_and_value(functional_loss(problem))
    if problem.workload.tasks is None:
        return gradient
    mapped = torch.func.vmap(gradient, in_dims=(None, 0, 0))

    def mean_gradient(wanted: Any, batches: Any, held_out: Any) -> Any:
        grads, value = mapped(wanted, batches, held_out)
        return {group: {name: g.mean(0) for name, g in of.items()} for group, of in grads.items()}, value.mean()

    return mean_gradient


def _run_batched(problem: Problem, function: Callable[..., Any]) -> Run:
    wanted = _wanted(problem)

    def run() -> dict[str, Any]:
        grads, value = function(wanted, problem.batches, problem.held_out)
        return {"loss": value} | grads

    return run


def func_vmap(problem: Problem) -> Run:
    """`torch.func`, all tasks at once."""
    if problem.workload.tasks is None:
        raise NotThereError("there is one task")
    return _run_batched(problem, _batched(problem))


# ---------------------------------------------------------------------- torch.compile


def compile_func(problem: Problem) -> Run:
    """`torch.compile` of the whole `torch.func` meta-gradient, all tasks at once."""
    return _run_batched(problem, torch.compile(_batched(problem), fullgraph=True))


def compile_autograd(problem: Problem) -> Run:
    """`torch.compile` of the unrolled loop with `autograd.grad` inside, differentiated from outside."""
    torch._dynamo.config.trace_autograd_ops = True
    torch._dynamo.config.recompile_limit = 64

    def loss(start: Any, hyper: Any, batches: Any, held_out: Any) -> Tensor:
        return _loss_of_task(problem, (start, hyper), batches, held_out)

    compiled = torch.compile(loss, fullgraph=True)
    tasks = problem.task_batches()
    start, hyper = problem.variables(only=("params", *problem.workload.wanted))

    def run() -> dict[str, Any]:
        losses = [compiled(start, hyper, batches, held_out) for batches, held_out in tasks]
        return gradients(torch.stack(losses).mean(), wanted_groups(problem, start, hyper))

    return run


def compile_step(problem: Problem) -> Run:
    """`torch.compile` of one inner step, called J times, differentiated from outside."""

    def step(params: Any, state: Any, hyper: Any, batch: Any, count: Tensor) -> Any:
        grads = torch.func.grad(problem.loss_at)(params, batch)
        return take_step(problem.workload.rule, ops, hyper, (params, grads, state), count)

    tasks = problem.workload.tasks
    compiled = torch.compile(
        step if tasks is None else torch.func.vmap(step, in_dims=(0, 0, None, 0, None)), fullgraph=True
    )
    outer = problem.loss_at if tasks is None else torch.func.vmap(problem.loss_at)
    batches = problem.steps_of(problem.batches if tasks is None else _steps_first(problem.batches))
    counts = [torch.tensor(float(count), dtype=torch.float64) for count in range(1, len(batches) + 1)]
    start, hyper = problem.variables()

    def run() -> dict[str, Any]:
        params, state = start, first_state(problem.workload.rule, ops, start)
        if tasks is not None:
            params, state = torch.utils._pytree.tree_map(lambda p: p.expand(tasks, *p.shape), (params, state))
        for batch, count in zip(batches, counts, strict=True):
            params, state = compiled(params, state, hyper, batch, count)
        return gradients(outer(params, problem.held_out).mean(), wanted_groups(problem, start, hyper))

    return run
