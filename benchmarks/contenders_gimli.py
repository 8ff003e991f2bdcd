"""This project: every way through the backward pass, on every backend."""

from __future__ import annotations

from typing import Any

from torch import Tensor

import gimli_compile as gimli
from benchmarks.contenders_stock import live_optimizer
from benchmarks.meta_gradient import NotThereError, Problem, Run, gradients, wanted_groups

FEW = 8  # elements of all meta-parameters up to which forward mode is meant


def meta_gradient(
    problem: Problem,
    *,
    backend: str | None = None,
    mode: str | None = None,
    only: str | None = None,
    at_once: bool = False,
    **options: Any,
) -> Run:
    """Unrolls with the options, on the live objects' programs or on compiled ones.

    Args:
        problem: the workload.
        backend: that of `fn.compile`; None for the programs as they are.
        mode: that of `fn.compile`: "reduce-overhead" for CUDA graphs.
        only: differentiates in this group alone ("hyper" for forward mode).
        at_once: by `fn.meta_gradient`, instead of `unroll`, `loss` and autograd.
        options: those of `fn.unroll`.

    Raises:
        NotThereError: forward mode, and too many elements to differentiate in; CUDA graphs without a GPU.
    """
    wanted = problem.workload.wanted if only is None else (only,)
    if options.get("backward") == "forward":
        _check_few(problem, wanted)
    fn = _functional(problem)
    if mode is not None and not next(iter(problem.params.values())).is_cuda:
        raise NotThereError("CUDA graphs need a GPU")
    runner = fn if backend is None else fn.compile(backend=backend, mode=mode)
    buffers, opt_state = fn.init().buffers, fn.init().opt_state
    template = fn.hyperparameters()
    tasks = problem.workload.tasks is not None
    start, numbers = problem.variables(only=wanted)

    groups = {name: group for name, group in wanted_groups(problem, start, numbers).items() if name in wanted}

    def run() -> dict[str, Any]:
        given = gimli.TrainState(start, buffers, opt_state), problem.batches
        hyper = _with_numbers(template, numbers)
        try:
            if at_once:
                more: dict[str, Any] = {"inputs": groups, "allow_unused": True, "tasks": tasks, **options}
                loss, grads = runner.meta_gradient(*given, problem.held_out, hyper, **more)
                return {"loss": loss, **grads}
            state, _ = runner.unroll(*given, hyper, tasks=tasks, **options)
        except gimli.InputError as error:
            raise NotThereError(str(error)) from error
        return gradients(runner.loss(state, problem.held_out, tasks=tasks).mean(), groups)

    return run


def _check_few(problem: Problem, wanted: tuple[str, ...]) -> None:
    count = sum(value.numel() for name in wanted for value in getattr(problem, name).values())
    if any(name not in problem.workload.wanted for name in wanted) or count > FEW:
        raise NotThereError(f"forward mode is for up to {FEW} numbers")


def _functional(problem: Problem) -> gimli.Functional:
    model = problem.module()
    optimizer = live_optimizer(problem, list(model.parameters()))

    def loss_fn(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return problem.loss(model(batch[0]), batch[1])

    return gimli.functionalize(model, optimizer, loss_fn)


def _with_numbers(hyper: gimli.Hyperparameters, numbers: dict[str, Tensor]) -> gimli.Hyperparameters:
    """Returns the hyperparameters with these in their places."""
    hyper = gimli.Hyperparameters([dict(group) for group in hyper], dict(hyper.attributes), dict(hyper.modules))
    if "rates" in numbers:
        for group, rate in zip(hyper, numbers["rates"].unbind(), strict=True):
            group["lr"] = rate
    elif "lr" in numbers:
        hyper[0]["lr"] = numbers["lr"]
    else:
        hyper.modules.update({f"rule.{name}": value for name, value in numbers.items()})
    if "beta1" in numbers:
        hyper[0]["betas"] = (numbers["beta1"], numbers["beta2"])
        hyper[0]["eps"] = numbers["eps"]
    return hyper
