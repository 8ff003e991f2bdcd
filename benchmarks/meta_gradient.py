"""A workload in torch: the model as a module, tensors, losses, and what a contender has to return."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import torch_operators as ops
from benchmarks.networks import Network
from benchmarks.workloads import Workload

Outcome = dict[str, Any]  # "loss", and gradients: "params" and "hyper", each by name
Run = Callable[[], Outcome]


class NotThereError(Exception):
    """A contender cannot do this workload, or this version of it cannot yet."""


class TorchNetwork(nn.Module):
    """A network as a module that holds its parameters."""

    def __init__(self, network: Network, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.network = network
        self.names = list(values)
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x: Tensor) -> Tensor:
        return self.network.apply(ops, {name: getattr(self, name) for name in self.names}, x)


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared error, written out: `mse_loss` has no forward-over-reverse derivative."""
    return ((outputs - targets) ** 2).mean()


LOSSES = {"cross_entropy": ops.cross_entropy, "squared": squared}


@dataclass(frozen=True)
class Setting:
    """In what precision and on which device contenders run."""

    dtype: str = "float32"
    device: str = "cpu"


@dataclass(frozen=True)
class Problem:
    """The tensors of a workload. Batches lead with [task, step] (or [step]), held-out data with [task]."""

    workload: Workload
    params: dict[str, Tensor]
    hyper: dict[str, Tensor]
    batches: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        return LOSSES[self.workload.loss]

    def module(self) -> TorchNetwork:
        """Makes the model, always with the same values."""
        return TorchNetwork(self.workload.network, self.params)

    def loss_at(self, params: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss of these parameters on a batch of one task."""
        return self.loss(self.workload.network.apply(ops, params, batch[0]), batch[1])

    def variables(self, *, only: tuple[str, ...] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Returns parameters and hyperparameters, those that are wanted as leaves that require gradients."""
        wanted = self.workload.wanted if only is None else only
        groups = {"params": self.params, "hyper": self.hyper}
        params, hyper = (
            {name: value.detach().clone().requires_grad_(group in wanted) for name, value in values.items()}
            for group, values in groups.items()
        )
        return params, hyper

    def task_batches(self) -> list[tuple[list[tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]]:
        """Returns for every task its batches and its held-out data."""
        if self.workload.tasks is None:
            return [(self.steps_of(self.batches), self.held_out)]
        return [
            (self.steps_of((x, y)), (held_x, held_y))
            for x, y, held_x, held_y in zip(*self.batches, *self.held_out, strict=True)
        ]

    @staticmethod
    def steps_of(batches: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Cuts batches [step, ...] into a list."""
        return list(zip(*(part.unbind(0) for part in batches), strict=True))


def problem_of(workload: Workload, setting: Setting) -> Problem:
    """Makes the tensors of a workload; hyperparameters that are numbers are float64, as numbers in torch are."""
    dtype = getattr(torch, setting.dtype)

    def tensor(values: np.ndarray, kind: torch.dtype) -> Tensor:
        made = torch.from_numpy(np.array(values))
        return made.to(setting.device, kind if made.is_floating_point() else made.dtype)

    data = workload.data()
    params = {name: tensor(value, dtype) for name, value in workload.params().items()}
    kind = dtype if workload.rule == "lstm" else torch.float64
    hyper = {name: tensor(value, kind) for name, value in workload.hyper().items()}
    parts = [tensor(part, dtype) for part in data]
    return Problem(workload, params, hyper, (parts[0], parts[1]), (parts[2], parts[3]))


def gradients(loss: Tensor, groups: Mapping[str, Mapping[str, Tensor]]) -> Outcome:
    """Differentiates in all of a mapping of groups of leaves; a leaf without influence has gradient zero."""
    leaves = [leaf for group in groups.values() for leaf in group.values()]
    found = iter(torch.autograd.grad(loss, leaves, materialize_grads=True))
    return {"loss": loss.detach()} | {name: {key: next(found) for key in group} for name, group in groups.items()}


def wanted_groups(problem: Problem, params: Any, hyper: Any) -> dict[str, dict[str, Tensor]]:
    """Returns the groups of leaves that the workload is differentiated in."""
    return {name: group for name, group in (("params", params), ("hyper", hyper)) if name in problem.workload.wanted}


def call(module: nn.Module, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Calls a module with other parameters."""
    return functional_call(module, dict(params), (x,))


def synchronized(run: Run, device: str) -> Run:
    """Makes a run wait for the device."""
    return run if device == "cpu" else partial(_wait_for, run)


def _wait_for(run: Run) -> Outcome:
    outcome = run()
    torch.cuda.synchronize()
    return outcome


def as_arrays(outcome: Outcome) -> dict[str, np.ndarray]:
    """Returns "loss", "params" (one vector) and "hyper.<name>", each in float64, of tensors or arrays."""
    if not outcome:
        return {}
    arrays = {"loss": _array(outcome["loss"])}
    if "params" in outcome:
        arrays["params"] = np.concatenate([_array(value).ravel() for _, value in sorted(outcome["params"].items())])
    return arrays | {f"hyper.{name}": _array(value) for name, value in outcome.get("hyper", {}).items()}


def _array(value: Any) -> np.ndarray:
    made = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
    return made.astype(np.float64)
