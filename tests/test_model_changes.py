"""What is changed in a model after `functionalize` counts from the next call on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gimli_compile as gimli


class Changeable(nn.Module):
    """Has attributes of many kinds, all of which its result depends on."""

    def __init__(self):
        super().__init__()
        self.inner, self.activation, self.function = nn.Linear(3, 2), nn.Tanh(), torch.tanh
        self.scale, self.sizes = torch.ones(1, dtype=torch.float64), (1, 2)
        self.register_buffer("buffer", torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.activation(self.inner(x) * self.scale)) * self.get_buffer("buffer") * self.sizes[0]


CHANGES = {
    "tensor in place": lambda model: model.scale.mul_(3),
    "module": lambda model: setattr(model, "activation", nn.ReLU()),
    "function": lambda model: setattr(model, "function", torch.sin),
    "buffer": lambda model: setattr(model, "buffer", model.get_buffer("buffer") * 3),
    "tuple": lambda model: setattr(model, "sizes", (3, 2)),
    "hook": lambda model: model.inner.register_forward_hook(lambda module, inputs, made: made * 3),
    "hook before": lambda model: model.inner.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
    "forward": lambda model: setattr(model.inner, "forward", lambda x: 3 * x @ model.inner.weight.T),
}


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_of_the_model_counts(kind, is_compiled):
    """Captured programs were used on: functions, hooks and tuples were not looked at."""
    torch.manual_seed(0)
    model = Changeable().double()
    batch = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn)
    one = fn.compile("eager") if is_compiled else fn
    for change in (lambda model: None, lambda model: None, CHANGES[kind]):
        before = loss_fn(model, batch).item()
        change(model)
        expected = loss_fn(model, batch).item()
        _, losses = one.unroll(fn.init(), [batch, batch])
        assert one.loss(fn.init(), batch).item() == pytest.approx(expected, abs=1e-12)
        assert losses[0].item() == pytest.approx(expected, abs=1e-12)
    assert abs(before - expected) > 1e-3
