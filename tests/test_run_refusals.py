"""Forward-mode derivatives of programs: what has none is named, with the user's line."""

from typing import Any

import pytest
import torch
from live_training import Training, finite_difference, normal, plain_sgd, squared_error
from torch import nn
from torch.utils._pytree import tree_map

import gimli_compile as gimli


class Convolving(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(2, 3, 2) * 0.3), nn.Parameter(torch.randn(2) * 0.3)

    def forward(self, x):
        return torch.conv_tbc(x[:, None], self.weight, self.bias)[:, 0]  # the convolution


class Squaring(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        return 2 * x * grads[0]


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return Squaring.apply(self.layer(x))  # the custom function


def batches(shape):
    return [(normal(5, 3, seed=t), normal(*shape, seed=9 + t)) for t in range(3)]


TRAININGS = {
    "operator": Training(Convolving, plain_sgd, squared_error, batches((4, 2))),
    "custom function": Training(Custom, plain_sgd, squared_error, batches((5, 2))),
}
LINES = {"operator": r"`aten\.conv_tbc\S*` has no[\s\S]*# the convolution", "custom function": "# the custom function"}


def forward_over_unroll(training):
    _, _, fn = training.functionalized()
    start = fn.init()

    def run(params):
        state = gimli.TrainState(params, start.buffers, start.opt_state)
        return fn.unroll(state, training.batches)[1].sum()

    tangents = tree_map(torch.ones_like, start.params)
    return run, start.params, tangents


@pytest.mark.parametrize("name", TRAININGS)
def test_what_has_no_forward_mode_derivative_is_named(name):
    run, params, tangents = forward_over_unroll(TRAININGS[name])
    with pytest.raises(gimli.CaptureError, match=LINES[name]) as caught:
        torch.func.jvp(run, (params,), (tangents,))
    assert "torch.func.vjp" in str(caught.value)
    assert isinstance(caught.value.__cause__, (NotImplementedError, RuntimeError))


def test_backwards_it_is_differentiated():
    run, params, tangents = forward_over_unroll(TRAININGS["operator"])
    pull: Any = torch.func.vjp(run, params)[1]
    slope = sum(
        float((pull(torch.ones((), dtype=torch.float64))[0][name] * way).sum()) for name, way in tangents.items()
    )
    expected = finite_difference(
        lambda offset: float(run({name: value + offset * tangents[name] for name, value in params.items()})), 0.1
    )
    assert abs(slope - expected) <= 1e-6 * abs(expected)


def test_other_errors_stay_what_they_are():
    model = nn.Linear(3, 2).double()
    fn = gimli.functionalize(model, plain_sgd(model.parameters()), squared_error)
    fn.step(fn.init(), batches((5, 2))[0])
    program = fn.programs["grad"].latest
    values = {slot: torch.ones(7, dtype=torch.float64) for slot in program.inputs}
    with pytest.raises(RuntimeError, match="must be a matrix") as caught:
        program(values)
    assert not isinstance(caught.value, gimli.CaptureError)
