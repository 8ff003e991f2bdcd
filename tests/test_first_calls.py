"""Models whose first call leaves something behind: what no program can take is refused, the rest goes on as it is."""

from dataclasses import replace

import pytest
import torch
from live_training import (
    Training,
    Untouched,
    check_gradients,
    check_values,
    plain_sgd,
    regression,
    squared_error,
    train_step,
)
from torch import nn

import gimli_compile as gimli
from gimli_compile import CaptureError

PLAIN = Training(lambda: nn.Linear(3, 2), plain_sgd, squared_error, regression(3))


class Layer(nn.Module):
    """Calls what a test wants made in the first call, and keeps it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.made = None

    def forward(self, x):
        h = self.layer(x)
        if self.made is None:
            self.made = self.make(h)
        return self.use(h)

    def use(self, h):
        return h * self.made

    def make(self, h):
        raise NotImplementedError


class GrowingLayer(Layer):
    def make(self, h):
        return nn.Linear(2, 2, dtype=h.dtype)

    def use(self, h):
        return self.made(h)  # pyright: ignore[reportOptionalCall]


class GrowingParameter(Layer):
    def make(self, h):
        return nn.Parameter(torch.randn(2, dtype=h.dtype))


class GrowingBuffer(Layer):
    """Standardizes by the first batch."""

    def __init__(self):
        super().__init__()
        del self.made
        self.register_buffer("made", None)

    def make(self, h):
        return h.detach().mean(0)


class Drawing(Layer):
    def make(self, h):
        return torch.randn(2, dtype=h.dtype)


class Centering(Layer):
    def make(self, h):
        return h.detach().mean(0)


class Table(Layer):
    """What is kept is the same in every call: it depends on shapes alone."""

    def make(self, h):
        return torch.arange(1.0, 1.0 + h.shape[1], dtype=h.dtype)


class Watched(Layer):
    """Keeps what nobody reads but the user."""

    def forward(self, x):
        self.made = self.layer(x)
        return self.made.tanh()


@pytest.mark.parametrize("model", [GrowingLayer, GrowingParameter, GrowingBuffer])
@pytest.mark.parametrize("step", [None, train_step])
def test_parameters_and_buffers_that_the_first_call_makes(model, step):
    training = replace(PLAIN, model=model, train_step=step)
    live, optimizer = training.start()
    untouched = Untouched(live, optimizer)
    fn = training.functionalize(live, optimizer)
    with pytest.raises(CaptureError, match=r"makes its (parameter|buffer) 'made[\s\S]*Call the model once on a batch"):
        fn.step(fn.init(), training.batches[0])
    untouched.check()


@pytest.mark.parametrize("model", [GrowingLayer, GrowingParameter, GrowingBuffer])
def test_the_cure_is_one(model):
    def called():
        made = model().double()
        made(PLAIN.batches[0][0])
        return made

    training = replace(PLAIN, model=called)
    check_values(training)
    check_gradients(training, ("groups.0.lr",))


@pytest.mark.parametrize("model", [Drawing, Centering])
def test_what_the_first_call_keeps_and_the_next_reads(model):
    """Live training keeps what the first step made; a program would make it anew in every step."""
    training = replace(PLAIN, model=model)
    _, _, fn = training.functionalized()
    with pytest.raises(CaptureError, match=r"reads its attribute `made`[\s\S]*call the model once on a batch"):
        fn.step(fn.init(), training.batches[0])
    with pytest.raises(CaptureError, match="reads its attribute `made`"):
        fn(fn.init(), training.batches[0][0])


@pytest.mark.parametrize("model", [Table, Watched])
def test_what_may_be_kept(model):
    training = replace(PLAIN, model=model)
    check_values(training)
    check_gradients(training, ("groups.0.lr",))
    live, optimizer = training.start()
    fn = gimli.functionalize(live, optimizer, squared_error)
    fn.step(fn.init(), training.batches[0])
    assert live.made is None
