"""Selections by masks and counts that are no inputs: positions are part of the program, and of what is compiled."""

from __future__ import annotations

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
    train_step,
)
from torch import nn

import gimli_compile as gimli

HYPERS = ("groups.0.lr", "groups.0.weight_decay")
COLUMNS = torch.tensor([True, False, True])
BYTES = COLUMNS.to(torch.uint8)
PLACES = torch.tensor([[True, False], [True, True], [False, False], [True, False], [False, True]])
COUNTS = torch.tensor([1, 0, 2, 1, 1])
ALWAYS = torch.tensor(True)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)


class Columns(Layer):
    def forward(self, x):
        out = self.layer(x)
        return out * F.linear(x[:, COLUMNS].tanh(), self.layer.weight[:, COLUMNS])


class Bytes(Layer):
    def forward(self, x):
        return self.layer(x * F.linear(x, self.layer.weight)[:, :1]) * self.layer.weight[:, BYTES.bool()].prod()


class Places(Layer):
    def forward(self, x):
        out = self.layer(x)
        return out[PLACES].square().sum() * 0.1 * out + out.masked_select(PLACES[:, :1]).std() * out


class Found(Layer):
    def forward(self, x):
        out = self.layer(x)
        rows, columns = torch.where(PLACES)
        return out * out[rows, columns].tanh().sum() + out[PLACES.nonzero()[:, 0]].prod()


class Repeated(Layer):
    def forward(self, x):
        return self.layer(x.repeat_interleave(COUNTS, dim=0)).cumsum(0) * 0.3


class Made(Layer):
    """Masks that the code makes, one from the other."""

    def forward(self, x):
        out = self.layer(x)
        mask = torch.arange(5) > 1
        first = out[mask].prod()
        other = mask.clone()
        other[0] = True
        return out * first + out[other].square().sum()


class Written(Layer):
    def forward(self, x):
        out = self.layer(x)
        made = out.clone()
        made[PLACES] = out[PLACES].tanh() * 2
        return made * out[PLACES].sum()


class Always(Layer):
    """A mask without dimensions gives a dimension."""

    def forward(self, x):
        out = self.layer(x)
        return out[ALWAYS].sum(0) * out


class Mixed(Layer):
    """A mask of the batch beside one that is constant."""

    def forward(self, x):
        out = self.layer(x)
        return out * (out[x[:, 0] > 0].sum() + out[PLACES].prod())


TRAININGS = {
    module.__name__: Training(module, optimizer, squared_error, regression(4))
    for module, optimizer in (
        *((Columns, adamw), (Bytes, sgd), (Places, sgd), (Found, adamw), (Repeated, sgd)),
        *((Made, adamw), (Written, sgd), (Always, sgd), (Mixed, adamw)),
    )
}


@pytest.mark.parametrize("name", TRAININGS)
def test_values_equal_the_live_loop(name):
    check_values(TRAININGS[name])


@pytest.mark.parametrize("name", TRAININGS)
def test_gradients_equal_differences_of_the_live_loop(name):
    check_gradients(TRAININGS[name], HYPERS)


@pytest.mark.parametrize("name", sorted(TRAININGS))
def test_compiled_with_all_shapes_known(name):
    """Where shapes followed from constant masks, compilation ended in torch's error on dynamic shapes."""
    _, _, fn = TRAININGS[name].functionalized()
    fast, hyper = fn.compile("eager"), fn.hyperparameters()
    hyper[0]["lr"].requires_grad_()
    batches = TRAININGS[name].batches
    found = []
    for one in (fn, fast, fast):
        _, losses = one.unroll(one.init(), batches, hyper)
        found.append((losses, *torch.autograd.grad(losses.sum() + losses[-1].square(), [hyper[0]["lr"]])))
    for losses, gradient in found[1:]:
        assert torch.allclose(losses, found[0][0], rtol=1e-12, atol=0)
        assert torch.allclose(gradient, found[0][1], rtol=1e-10, atol=0)


def test_compiled_by_inductor():
    training = TRAININGS["Places"]
    _, _, fn = training.functionalized()
    state, _ = fn.compile("inductor", verify=True).unroll(fn.init(), training.batches)
    assert_equal_tensors(state.params, run_live(training).params[-1])


@pytest.mark.parametrize("name", ["Places", "Repeated", "Written"])
def test_in_a_whole_train_step(name):
    training = TRAININGS[name]
    check_values(Training(training.model, training.optimizer, training.loss, training.batches, train_step=train_step))


def test_tasks_equal_a_loop():
    _, _, fn = TRAININGS["Places"].functionalized()
    x, y = normal(2, 3, 5, 3), normal(2, 3, 5, 2, seed=5)
    _, losses = fn.unroll(fn.init(), (x, y), tasks=True)
    for task in range(2):
        assert torch.allclose(losses[task], fn.unroll(fn.init(), (x[task], y[task]))[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("by", ["mask", "counts"])
def test_what_is_written_into_the_constant_counts(backend, by):
    mask, counts = torch.tensor([True, False, True, False, False]), torch.tensor([1, 0, 2, 0, 0])

    def loss_fn(model, batch):
        x, y = batch
        out = model(x) - y
        chosen = out[mask] if by == "mask" else out.repeat_interleave(counts, dim=0)
        return chosen.square().sum()

    model = nn.Linear(3, 2).double()
    fn = gimli.functionalize(model, sgd(model.parameters()), loss_fn)
    fn, (batch, *_) = fn.compile(backend) if backend else fn, regression(1)
    assert torch.allclose(fn.loss(fn.init(), batch), loss_fn(model, batch), rtol=1e-12, atol=0)
    for change in (lambda: mask.fill_(True), lambda: counts.fill_(3), lambda: mask.fill_(False)):
        change()
        expected = loss_fn(model, batch)
        assert torch.allclose(fn.loss(fn.init(), batch), expected, rtol=1e-12, atol=0)
        _, loss = fn.step(fn.init(), batch)
        assert torch.allclose(loss, expected, rtol=1e-12, atol=0)


def test_a_mask_of_constants_that_changes_between_two_selections():
    """A tensor that is read, changed in place and read again holds by both of its values."""
    first, second = torch.tensor([True, False, True]), torch.tensor([False, True, True])

    def loss_fn(model, batch):
        out = model(batch).sum(0)
        mask = first.clone()
        once = out[mask].sum()
        mask.copy_(second)
        return once * 2 + out[mask].square().sum()

    model = nn.Linear(3, 3).double()
    fn = gimli.functionalize(model, sgd(model.parameters()), loss_fn)
    x = normal(5, 3)
    with torch.no_grad():  # torch refuses the gradient of a mask that changed
        for changed in (first, second, first, second):
            assert torch.allclose(fn.loss(fn.init(), x), loss_fn(model, x), rtol=1e-12, atol=0)
            changed.logical_not_()
        assert torch.allclose(fn.loss(fn.init(), x), loss_fn(model, x), rtol=1e-12, atol=0)
