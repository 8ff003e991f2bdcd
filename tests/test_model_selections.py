"""Models and losses that select elements by masks: values and gradients against the live loop."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_training import (
    Training,
    adamw,
    assert_equal_tensors,
    check_gradients,
    check_values,
    normal,
    regression,
    run_live,
    sgd,
    squared_error,
    tokens,
    train_step,
)
from torch import nn

import gimli_compile as gimli

HYPERS = ("groups.0.lr", "groups.0.weight_decay")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)


class Masking(Layer):
    def forward(self, x):
        out = self.layer(x)
        return out[out > 0].sum() * out + out


class Finding(Layer):
    def forward(self, x):
        out = self.layer(x)
        return out[torch.nonzero(out[:, 0] > 0)[:, 0]].sum() + out * out


class Selecting(Layer):
    def forward(self, x):
        out = self.layer(x)
        return torch.masked_select(out.tanh(), out > 0).sum() * 0.1 + out


class Writing(Layer):
    """Some rows of a copy are replaced by what is computed of these rows alone."""

    def forward(self, x):
        out = self.layer(x)
        rows = out[:, 0] > 0
        made = out * 0.5
        made[rows] = out[rows].flip(1).tanh()
        return made


class Searching(Layer):
    def forward(self, x):
        out = self.layer(x)
        (rows,) = torch.where(out.sum(1) > 0)
        return torch.zeros_like(out).index_add(0, rows, out[rows] ** 2) + out


class Dropping(Layer):
    """What is drawn has the shape of what is selected."""

    def forward(self, x):
        out = self.layer(x)
        chosen = out[:, 0] > 0
        return out * 0.3 + F.dropout(out[chosen], 0.4).sum(0)


class Distinct(nn.Module):
    """Embeds each token once, and weighs it by how often it occurs in the batch."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(6, 2)

    def forward(self, tokens):
        values, place, counts = torch.unique(tokens, return_inverse=True, return_counts=True)
        often = torch.bincount(tokens.flatten(), minlength=4)
        return self.embedding(values)[place] / counts[place].unsqueeze(-1) + often[tokens].unsqueeze(-1) * 0.1


class Rounding(Layer):
    """Counts what it computed."""

    def forward(self, x):
        out = self.layer(x)
        steps = (out.detach() * 2).round()
        return out * (1 + 0.1 * steps.unique().numel()) + 0.01 * torch.unique(steps).sum()


class Repeating(Layer):
    def forward(self, batch):
        x, counts = batch
        again = self.layer(x[torch.repeat_interleave(counts)])
        return (again + self.layer(x).repeat_interleave(counts, dim=0).tanh()).cumsum(0) * 0.3


def documents(steps):
    return [(sequence, normal(*sequence.shape, 2, seed=t)) for t, sequence in enumerate(tokens(steps))]


def repeated(steps):
    counts = torch.tensor([[1, 2, 2], [2, 2, 1], [0, 4, 1]])
    return [((normal(3, 3, seed=t), counts[t % 3]), normal(5, 2, seed=5 + t)) for t in range(steps)]


class Gathering(nn.Module):
    """A graph convolution that first replaces the self-loops of its edges, which are integers of the batch."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def convolve(self, h, edges):
        source, target = edges
        degree = torch.zeros(len(h), dtype=h.dtype).scatter_add_(0, target, torch.ones(len(target), dtype=h.dtype))
        messages = h[source] / degree[target, None]
        return torch.zeros_like(h).index_add(0, target, messages)

    def forward(self, graph):
        edges = graph["edges"][:, graph["edges"][0] != graph["edges"][1]]
        loops = torch.arange(5)
        edges = torch.cat((edges, torch.stack((loops, loops))), 1)
        return self.convolve(self.out(torch.tanh(self.convolve(self.layer(graph["x"]), edges))), edges)


def graphs(steps):
    made = []
    for t in range(steps):
        edges = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, t % 3, 4, 0, 0, 4]])
        made.append(({"x": normal(5, 3, seed=t), "edges": edges}, normal(5, 2, seed=9 + t)))
    return made


def masked_error(model, batch):
    x, y = batch
    mask = y[:, 0] > 0
    return F.mse_loss(model(x)[mask], y[mask]) + model(x).square().mean()


def linear():
    return nn.Linear(3, 2)


TRAININGS = {
    "mask": Training(Masking, sgd, squared_error, regression(4)),
    "nonzero": Training(Finding, adamw, squared_error, regression(4)),
    "masked_select": Training(Selecting, sgd, squared_error, regression(4)),
    "write": Training(Writing, adamw, squared_error, regression(4)),
    "where": Training(Searching, sgd, squared_error, regression(4)),
    "dropout": Training(Dropping, sgd, squared_error, regression(5)),
    "distinct": Training(Distinct, sgd, squared_error, documents(4)),
    "rounding": Training(Rounding, adamw, squared_error, regression(4)),
    "repeat": Training(Repeating, sgd, squared_error, repeated(4)),
    "self_loops": Training(Gathering, sgd, squared_error, graphs(4)),
    "loss": Training(linear, adamw, masked_error, regression(4)),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_values_equal_the_live_loop(name):
    check_values(TRAININGS[name])


@pytest.mark.parametrize("name", TRAININGS)
def test_gradients_equal_differences_of_the_live_loop(name):
    check_gradients(TRAININGS[name], HYPERS)


@pytest.mark.parametrize("name", ["mask", "dropout"])
@pytest.mark.parametrize("checkpoint", ["step", 2])
def test_steps_that_are_computed_again(name, checkpoint):
    check_gradients(TRAININGS[name], HYPERS, checkpoint=checkpoint)


@pytest.mark.parametrize("name", ["mask", "write", "where"])
def test_in_a_whole_train_step(name):
    training = replace(TRAININGS[name], train_step=train_step)
    check_values(training)
    check_gradients(training, HYPERS)


def test_each_number_of_elements_has_one_program():
    """A number seen before is not captured again; one that follows from the batch is decided before a program runs."""
    training = TRAININGS["loss"]
    _, _, fn = training.functionalized()
    counts = {int((y[:, 0] > 0).sum()) for _, y in training.batches}
    fn.unroll(fn.init(), training.batches)
    state, _ = fn.unroll(fn.init(), training.batches)
    assert len(fn.programs["grad"]) == len(counts) > 1
    assert_equal_tensors(state.params, run_live(training).params[-1])
    assert "holds when sum(" in str(fn.programs["grad"])
    ran = []
    for gradient in fn._losses.all_gradients:
        ran.append(gradient.exact.function)
        gradient.exact.__dict__["function"] = lambda *args, run=ran[-1]: calls.append(run) or run(*args)
    calls: list[Any] = []
    fn.unroll(fn.init(), training.batches)
    assert len(calls) == len(training.batches)


def test_nothing_is_selected():
    """The mean of no elements is not a number, here as in eager training; sums are zero."""
    model = Masking().double()
    fn = gimli.functionalize(model, sgd(model.parameters()))
    x = normal(5, 3)
    state = fn.init()
    with torch.no_grad():
        state.params["layer.weight"].zero_()
        state.params["layer.bias"].fill_(-1.0)
    assert torch.equal(fn(state, x), torch.full((5, 2), -1.0, dtype=torch.float64))


def test_tasks_that_select_different_numbers():
    """Tasks of one number run together; others are refused, not padded in silence."""
    training = replace(TRAININGS["loss"], batches=regression(3))
    _, _, fn = training.functionalized()
    x, y = normal(2, 3, 5, 3), normal(2, 3, 5, 2, seed=5)
    alike = y.abs() * torch.tensor([1.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None]
    got, losses = fn.unroll(fn.init(), (x, alike), tasks=True)
    for task in range(2):
        own, own_losses = fn.unroll(fn.init(), (x[task], alike[task]))
        assert torch.allclose(losses[task], own_losses, rtol=1e-12, atol=0)
        for name, value in own.params.items():
            assert torch.allclose(got.params[name][task], value, rtol=1e-10, atol=1e-14)
    with pytest.raises(gimli.CaptureError, match=r"how many elements its masks select[\s\S]*one task at a time"):
        fn.unroll(fn.init(), (x, torch.stack((y[0].abs(), -y[0].abs() + 2 * alike[0]))), tasks=True)
