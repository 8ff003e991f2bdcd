"""Checkpoints inside a model: what is computed again uses the same draws, and differentiates as if it were not."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from live_training import (
    Training,
    assert_close_gradients,
    check_gradients,
    check_values,
    regression,
    sgd,
    squared_error,
    unrolled_gradients,
)
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

HYPERS = ("groups.0.lr", "groups.0.momentum")


class Noisy(nn.Module):
    """Draws of every kind, normalization with running statistics, and if asked a detach, all inside two checkpoints."""

    def __init__(self, reentrant, *, detach=False):
        super().__init__()
        self.reentrant, self.detach = reentrant, detach
        self.first, self.hidden = nn.Linear(3, 3), nn.Linear(3, 4)
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, 2)

    def block(self, x):
        h = F.dropout(torch.tanh(self.hidden(x)), 0.3)
        h = h + torch.randn_like(h).mul_(0.1) * h.sin()
        h = h * (1 + torch.zeros_like(h).normal_())
        return self.norm(h) * (h.detach() if self.detach else h).exp()

    def forward(self, x):
        h = self.first(x)
        return self.out(self.run(h + self.run(h)[:, :3]))

    def run(self, h):
        return self.block(h) if self.reentrant is None else checkpoint(self.block, h, use_reentrant=self.reentrant)


class Sequential(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(4)))
        self.out = nn.Linear(3, 2)

    def forward(self, x):
        return self.out(checkpoint_sequential(self.layers, 2, x * self.out.weight.sum(), use_reentrant=True))


class WithoutInputGradient(nn.Module):
    """A reentrant checkpoint of data, inside which nothing gets a gradient."""

    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(checkpoint(self.hidden, x, use_reentrant=True) + self.hidden(x.sin()))


TRAININGS = {
    "noisy": Training(lambda: Noisy(False), sgd, squared_error, regression(3)),
    "noisy_reentrant": Training(lambda: Noisy(True), sgd, squared_error, regression(3)),
    "sequential": Training(Sequential, sgd, squared_error, regression(3)),
}
NO_INPUT_GRADIENT = "ignore:None of the inputs have requires_grad=True"


@pytest.mark.parametrize("name", TRAININGS)
def test_values_equal_the_live_loop(name):
    check_values(TRAININGS[name])


@pytest.mark.parametrize("name", TRAININGS)
def test_gradients_equal_differences_of_the_live_loop(name):
    check_gradients(TRAININGS[name], HYPERS)


@pytest.mark.filterwarnings(NO_INPUT_GRADIENT)
def test_a_reentrant_checkpoint_without_input_gradient():
    check_values(Training(WithoutInputGradient, sgd, squared_error, regression(3)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_detach_inside_stops_the_gradient(reentrant):
    training = Training(lambda: Noisy(reentrant, detach=True), sgd, squared_error, regression(3))
    plain = replace(training, model=lambda: Noisy(None, detach=True))
    _, got = unrolled_gradients(training, training.functionalized()[2])
    _, expected = unrolled_gradients(plain, plain.functionalized()[2])
    assert_close_gradients(got, expected, 1e-13)
