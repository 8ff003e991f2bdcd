"""The ways to a meta-gradient that are compared: the same model, loss, batches and hyperparameters for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import gimli_compile as gimli

LEARNING_RATE, BETAS, EPS = 0.01, (0.9, 0.999), 1e-8
MetaGradient = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Task:
    """An unroll of inner steps, and the loss on `held_out` after it, differentiated in the initial values."""

    make: Callable[[], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    batches: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    optimizer: str

    @property
    def steps(self) -> int:
        """The number of inner steps."""
        return len(self.batches[0])


def model_of(task: Task, dtype: torch.dtype) -> nn.Module:
    """Returns the model, always with the same values."""
    torch.manual_seed(0)
    return task.make().to(dtype)


def cast(batch: Any, dtype: torch.dtype) -> Any:
    """Casts what is floating in a batch."""
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in batch)


def compiled_program(task: Task, dtype: torch.dtype, **options: Any) -> MetaGradient:
    """This project: the programs of each step, differentiated by autograd."""
    model = model_of(task, dtype)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    optimizer = kinds[task.optimizer](model.parameters(), lr=LEARNING_RATE)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return task.loss(model(batch[0]), batch[1])

    fn = gimli.functionalize(model, optimizer, loss_fn)
    start, hyper = fn.init(), fn.hyperparameters()
    batches, (x, y) = cast(task.batches, dtype), cast(task.held_out, dtype)

    def run() -> tuple[Tensor, ...]:
        params = {name: value.detach().requires_grad_() for name, value in start.params.items()}
        state, _ = fn.unroll(gimli.TrainState(params, start.buffers, start.opt_state), batches, hyper, **options)
        return torch.autograd.grad(task.loss(fn(state, x), y), list(params.values()))

    return run


def by_hand(task: Task, dtype: torch.dtype) -> MetaGradient:
    """The optimizer copied by hand, `functional_call` and `create_graph`: what one writes without a library."""
    model = model_of(task, dtype)
    batches, (x, y) = cast(task.batches, dtype), cast(task.held_out, dtype)

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return task.loss(functional_call(model, params, (x,)), y)

    def run() -> tuple[Tensor, ...]:
        start = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        params, moments = dict(start), {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in start.items()}
        for step in range(task.steps):
            value = loss(params, batches[0][step], batches[1][step])
            grads = torch.autograd.grad(value, list(params.values()), create_graph=True)
            for (name, p), grad in zip(list(params.items()), grads, strict=True):
                params[name], moments[name] = RULES[task.optimizer](p, grad, moments[name], step + 1)
        return torch.autograd.grad(loss(params, x, y), list(start.values()))

    return run


def _sgd(p: Tensor, grad: Tensor, moments: Any, step: int) -> Any:
    return p - LEARNING_RATE * grad, moments


def _adam(p: Tensor, grad: Tensor, moments: Any, step: int) -> Any:
    mean, square = moments
    mean = BETAS[0] * mean + (1 - BETAS[0]) * grad
    square = BETAS[1] * square + (1 - BETAS[1]) * grad * grad
    root = (square / (1 - BETAS[1] ** step)).sqrt()
    return p - LEARNING_RATE * mean / (1 - BETAS[0] ** step) / (root + EPS), (mean, square)


RULES = {"sgd": _sgd, "adam": _adam}


def plain_training(task: Task, dtype: torch.dtype) -> MetaGradient:
    """The same steps without any meta-gradient: live eager training, the yardstick of the ratios."""
    model = model_of(task, dtype)
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}
    batches = cast(task.batches, dtype)

    def run() -> tuple[Tensor, ...]:
        optimizer = kinds[task.optimizer](model.parameters(), lr=LEARNING_RATE)
        for step in range(task.steps):
            optimizer.zero_grad()
            task.loss(model(batches[0][step]), batches[1][step]).backward()
            optimizer.step()
        return ()

    return run
