"""The libraries of PyTorch: higher and TorchOpt, used as their documentation says."""

from __future__ import annotations

from typing import Any

import higher
import torch
import torchopt
from torch import Tensor, nn

from benchmarks.contenders_stock import live_optimizer
from benchmarks.meta_gradient import NotThereError, Problem, Run, gradients, wanted_groups


def run_higher(problem: Problem) -> Run:
    """higher's `innerloop_ctx`, task after task; hyperparameters by `override`."""
    if problem.workload.rule == "lstm":
        raise NotThereError("higher knows torch's own optimizers only; another one is to be copied by hand")
    model = problem.module()
    optimizer = live_optimizer(problem, list(model.parameters()))
    tasks = problem.task_batches()

    def run() -> dict[str, Any]:
        _, hyper = problem.variables()
        override = _override(hyper) if "hyper" in problem.workload.wanted else None
        losses = []
        for batches, (x, y) in tasks:
            with higher.innerloop_ctx(model, optimizer, copy_initial_weights=False, override=override) as (net, steps):
                for inputs, targets in batches:
                    steps.step(problem.loss(net(inputs), targets))
                losses.append(problem.loss(net(x), y))
        start = dict(model.named_parameters())
        return gradients(torch.stack(losses).mean(), wanted_groups(problem, start, hyper))

    return run


def _override(hyper: dict[str, Tensor]) -> dict[str, list[Any]]:
    """Returns hyperparameters in higher's form: a list with an entry for each group."""
    if "rates" in hyper:
        return {"lr": list(hyper["rates"].unbind())}
    if "beta1" in hyper:
        return {"lr": [hyper["lr"]], "betas": [(hyper["beta1"], hyper["beta2"])], "eps": [hyper["eps"]]}
    return {"lr": [hyper["lr"]]}


def run_torchopt(problem: Problem) -> Run:
    """TorchOpt's differentiable optimizers, task after task; hyperparameters where they may be tensors (SGD)."""
    if problem.workload.rule == "lstm" or "rates" in problem.hyper:
        raise NotThereError("TorchOpt has neither learned optimizers nor groups of parameters")
    model = problem.module()
    tasks = problem.task_batches()

    def run() -> dict[str, Any]:
        _, hyper = problem.variables()
        start = torchopt.extract_state_dict(model, by="reference")
        leaves = dict(model.named_parameters())
        wanted = wanted_groups(problem, leaves, hyper)
        numbers: dict[str, Any] = dict(hyper)
        if "hyper" not in wanted or "beta1" in hyper:
            numbers = {name: value.item() for name, value in hyper.items()}
            wanted.pop("hyper", None)
        losses = []
        for batches, (x, y) in tasks:
            optimizer = _torchopt_optimizer(model, numbers)
            for inputs, targets in batches:
                optimizer.step(problem.loss(model(inputs), targets))
            losses.append(problem.loss(model(x), y))
            torchopt.recover_state_dict(model, start)
        return gradients(torch.stack(losses).mean(), wanted)

    return run


def _torchopt_optimizer(model: nn.Module, hyper: Any) -> Any:
    if "beta1" not in hyper:
        return torchopt.MetaSGD(model, lr=hyper["lr"])
    betas = hyper["beta1"], hyper["beta2"]
    return torchopt.MetaAdam(model, lr=hyper["lr"], betas=betas, eps=hyper["eps"])
