"""The learned optimizer as an ordinary `torch.optim.Optimizer` that owns its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import torch_operators as ops
from benchmarks.update_rules import LSTM_SCALE, RULE


class Rule(nn.Module):
    """The weights of the LSTM."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.names = list(values)
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, gradient: Tensor, memory: tuple[Tensor, Tensor]) -> Any:
        """Maps gradients [coordinate] to steps, and the memory to the next."""
        return RULE.apply(ops, {name: getattr(self, name) for name in self.names}, (gradient, *memory))


class LearnedOptimizer(torch.optim.Optimizer):
    """Steps as its LSTM says, coordinate by coordinate."""

    def __init__(self, params: Iterable[Tensor], values: Mapping[str, Tensor]) -> None:
        super().__init__(params, {})
        self.rule = Rule(values)

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes a step."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["hidden"] = param.new_zeros(param.numel(), RULE.hidden)
                    state["cell"] = param.new_zeros(param.numel(), RULE.hidden)
                step, state["hidden"], state["cell"] = self.rule(param.grad.flatten(), (state["hidden"], state["cell"]))
                param.sub_(step.view_as(param), alpha=LSTM_SCALE)
