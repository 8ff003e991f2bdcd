"""What a class needs that cannot be made from its parameters alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Shapes = tuple[tuple[int, ...], ...]
LossFunction = Callable[[nn.Module, Any], torch.Tensor]
TrainStep = Callable[[nn.Module, Any, Any, Any], torch.Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to make and to drive one optimizer class. An empty recipe takes the class's own defaults."""

    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the constructor."""

    shapes: Shapes | None = None
    """Shapes of the parameters; by default the first of a short list that the class runs on."""

    groups: Callable[[list[nn.Parameter]], Any] | None = None
    """Returns the constructor's first argument for a list of parameters, such as groups with `use_muon`."""

    model: Callable[[], nn.Module] | None = None
    """Makes the model, in place of one that only holds parameters of `shapes`."""

    make: Callable[[nn.Module], Any] | None = None
    """Makes the optimizer for a model, in place of the class with `groups` and `arguments`."""

    loss: LossFunction | None = None
    """Trains on this loss, `loss(model, batch)`, in place of gradients that are drawn; see `ParameterHolder`."""

    train_step: TrainStep | None = None
    """Trains by this step, `train_step(model, optimizer, batch, meta)`, which returns the loss."""

    steps: int = 8
    """How many steps are compared."""
