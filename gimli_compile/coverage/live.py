"""The yardstick: the live eager optimizer, made anew for every question and trained by its own code."""

from __future__ import annotations

import inspect
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from gimli_compile.coverage.recipe import LossFunction, Recipe, Shapes, TrainStep

Drive = dict[
    str, torch.Tensor
]  # what one step is driven by: a gradient, or the batch of a loss, by name of a parameter
Prepare = Callable[[nn.Module, Any], None]


class ParameterHolder(nn.Module):
    """A model that only holds parameters, `p0`, `p1`..., and returns them by name when it is called."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for index, shape in enumerate(shapes):
            self.register_parameter(f"p{index}", nn.Parameter(_normal(shape, generator)))

    def forward(self, *inputs: Any) -> dict[str, torch.Tensor]:
        """Returns the parameters by name, whatever it is called with."""
        return dict(self.named_parameters())


def default_loss(model: nn.Module, batch: Drive) -> torch.Tensor:
    """Returns a quadratic of each parameter and a logistic function of all: its Hessian is full."""
    params = dict(model.named_parameters())
    squares = torch.stack([((params[name] - wanted) ** 2).sum() for name, wanted in batch.items()])
    scores = torch.stack([(params[name] * wanted).sum() for name, wanted in batch.items()])
    return squares.sum() / 2 + torch.nn.functional.softplus(scores.sum())


@dataclass(frozen=True)
class Trial:
    """One way to train an optimizer of a class: its recipe, shapes, and by what steps it is driven.

    Without a loss, each step is given gradients that are drawn. With one, `train_step` is the whole step, and by
    default the loss's gradient and `optimizer.step()`, with a closure where `closure` says so.
    """

    kind: type
    recipe: Recipe
    shapes: Shapes
    loss: LossFunction | None = None
    train_step: TrainStep | None = None
    closure: bool = False
    deadline: float = math.inf

    @property
    def is_late(self) -> bool:
        """Whether the time for this trial is up; `history` then raises TimeoutError."""
        return time.monotonic() > self.deadline

    @property
    def driven_by_loss(self) -> bool:
        """Whether each step evaluates a loss, rather than being given gradients."""
        return self.loss is not None or self.train_step is not None

    @property
    def driven_by(self) -> str:
        """By what its steps are driven, in words."""
        if self.train_step is not None:
            return "a train step"
        return "gradients" if self.loss is None else "a closure" if self.closure else "a loss"

    def start(self, warm: int) -> tuple[nn.Module, Any]:
        """Returns a new model and optimizer, trained for `warm` steps."""
        seed_everything(29)
        model = ParameterHolder(self.shapes) if self.recipe.model is None else self.recipe.model().double()
        optimizer = self.make(model)
        for drive in self.drives(warm, seed=5):
            self.step(model, optimizer, drive)
        return model, optimizer

    def make(self, model: nn.Module, **changes: Any) -> Any:
        """Returns the optimizer of a model; `changes` replace arguments of the constructor."""
        if self.recipe.make is not None:
            return self.recipe.make(model)
        params = list(model.parameters())
        given = params if self.recipe.groups is None else self.recipe.groups(params)
        return self.kind(given, **{**self.recipe.arguments, **changes})

    def drives(self, count: int, seed: int = 7) -> list[Drive]:
        """Returns what drives each of `count` steps."""
        model = ParameterHolder(self.shapes) if self.recipe.model is None else self.recipe.model()
        forms = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        generator = torch.Generator().manual_seed(seed)
        return [{name: _normal(shape, generator) for name, shape in forms.items()} for _ in range(count)]

    def step(self, model: nn.Module, optimizer: Any, drive: Drive) -> None:
        """Takes one live step."""
        if self.train_step is not None:
            self.train_step(model, optimizer, drive, None)
        elif self.loss is None:
            for name, parameter in model.named_parameters():
                parameter.grad = drive[name].detach().clone() if name in drive else None
            optimizer.step()
        else:
            _step_on_loss(self.loss, model, optimizer, drive, closure=self.closure)

    def history(self, warm: int, prepare: Prepare | None = None, drives: list[Drive] | None = None) -> list[Drive]:
        """Trains live objects, changed by `prepare` after the warm-up; returns the parameters after each step."""
        if self.is_late:
            raise TimeoutError("the time for this class is up")
        model, optimizer = self.start(warm)
        if prepare is not None:
            with torch.no_grad():
                prepare(model, optimizer)
        seed_everything(23)
        found = []
        for drive in self.drives(self.recipe.steps) if drives is None else drives:
            self.step(model, optimizer, drive)
            found.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return found


def _step_on_loss(loss: LossFunction, model: nn.Module, optimizer: Any, drive: Drive, *, closure: bool) -> None:
    def evaluate() -> torch.Tensor:
        with torch.enable_grad():
            optimizer.zero_grad()
            value = loss(model, drive)
            value.backward()
        return value

    if closure:
        optimizer.step(evaluate)
    else:
        evaluate()
        optimizer.step()


def step_for_second_derivatives(model: nn.Module, optimizer: Any, batch: Drive, meta: Any) -> torch.Tensor:
    """Takes a step along gradients that can be differentiated again, as estimates of a Hessian want them."""
    optimizer.zero_grad()
    loss = default_loss(model, batch)
    loss.backward(create_graph=True)
    optimizer.step()
    return loss.detach()


def needs_closure(optimizer: Any) -> bool:
    """Tells whether `step` cannot be called without arguments."""
    try:
        parameters = inspect.signature(optimizer.step).parameters.values()
    except (TypeError, ValueError):
        return False
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is inspect.Parameter.empty and p.kind not in starred for p in parameters)


def seed_everything(seed: int) -> None:
    """Seeds torch, NumPy and Python: an eager step and its program then draw the same noise."""
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` formats the stack, for devices that are not used
    np.random.seed(seed)
    random.seed(seed)


@contextmanager
def double_precision() -> Iterator[None]:
    """Makes float64 the default dtype, so that the counters that optimizers create are exact, and keeps all seeds."""
    before = torch.get_default_dtype()
    numpy_state, python_state = np.random.get_state(), random.getstate()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_default_dtype(before)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def projection(params: Drive) -> torch.Tensor:
    """Returns a fixed random linear function of the parameters: the number whose derivatives are compared."""
    generator = torch.Generator().manual_seed(11)
    parts = [(_normal(tuple(value.shape), generator) * value).sum() for value in params.values()]
    return torch.stack(parts).sum()


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)
