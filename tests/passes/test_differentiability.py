"""Operators without a derivative are refused where they are called."""

import pytest
import torch
from live_training import Training, plain_sgd, regression
from torch import nn

import gimli_compile as gimli
from gimli_compile.passes.differentiability import refuse_missing_derivatives

aten = torch.ops.aten


def distances(model, batch):
    return aten._pdist_forward(model(batch[0]), 2.0).mean()


def distances_of_the_batch(model, batch):
    return (aten._pdist_forward(batch[0], 2.0).mean() - model(batch[0])).square().mean()


def detached_distances(model, batch):
    return (aten._pdist_forward(model(batch[0]).detach(), 2.0).mean() - model(batch[0])).square().mean()


def started(loss):
    training = Training(lambda: nn.Linear(3, 2), plain_sgd, loss, regression(1))
    return training.functionalized()[2]


def test_the_gradient_of_an_operator_without_a_second_derivative_is_refused():
    fn = started(distances)
    with pytest.raises(gimli.CaptureError, match=r"`aten._pdist_backward.default` has no derivative") as caught:
        fn.step(fn.init(), regression(1)[0])
    assert "in distances: return aten._pdist_forward(model(batch[0]), 2.0).mean()" in str(caught.value)


@pytest.mark.parametrize("loss", [distances_of_the_batch, detached_distances])
def test_what_no_parameter_reaches_needs_no_derivative(loss):
    fn = started(loss)
    fn.step(fn.init(), regression(1)[0])
    ((program, _),) = fn.programs["grad"].variants
    assert "_pdist_forward" in program.code
    assert refuse_missing_derivatives(program) is program


def test_a_forward_pass_needs_first_derivatives_only():
    class Distances(nn.Linear):
        def forward(self, input):
            return aten._pdist_forward(super().forward(input), 2.0)

    training = Training(lambda: Distances(3, 2), plain_sgd, distances, regression(1))
    fn = training.functionalized()[2]
    state = fn.init()
    weight = state.params["weight"].requires_grad_()
    (gradient,) = torch.autograd.grad(fn(state, regression(1)[0][0]).sum(), weight)
    assert gradient.any()
