"""What code reads besides its arguments: programs are for what it is, and a change counts from the next call on."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import gimli_compile as gimli
from gimli_compile.errors import BakedValueWarning, RecaptureWarning

FACTOR = 1.0
TABLE: dict[str, Any] = {"deep": [{"factor": 1.0}]}
TENSOR = torch.ones((), dtype=torch.float64)
GATE = torch.ones((), dtype=torch.float64)


class Constants:
    factor = 1.0


@dataclasses.dataclass(slots=True)
class Slotted:
    factor: float = 1.0


class Weighing:
    """A loss with a weight, which calls may take as an object or as a method."""

    def __init__(self):
        self.factor, self.log = 1.0, []

    def __call__(self, model, batch):
        return self.factor * mean(model, batch)

    def method(self, model, batch):
        return self.factor * mean(model, batch)


class Holding(nn.Module):
    """Has attributes that are neither parameters nor numbers."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)
        self.table, self.options, self.tensors = {"factor": 1.0}, Weighing(), [torch.ones((), dtype=torch.float64)]
        self.tensor = torch.ones((), dtype=torch.float64)
        self.last: Any = None

    def forward(self, x):
        return self.inner(x)


SLOTTED, NAMESPACE, WEIGHING = Slotted(), argparse.Namespace(factor=1.0), Weighing()
CRITERION = nn.HuberLoss(delta=0.01)


class Doubling(nn.Module):
    """Gives twice what it takes, except in training."""

    def forward(self, x):
        return x if self.training else 2 * x


TEACHER = nn.Sequential(nn.Linear(3, 2), Doubling()).double()
SETTINGS: Any = types.ModuleType("settings_of_the_user")
SETTINGS.__file__, SETTINGS.factor = "settings_of_the_user.py", 1.0


def mean(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def set_global(name, value):
    setattr(sys.modules[__name__], name, value)


def helper():
    return FACTOR


def enclosing():
    value = 1.0

    def loss(model, batch):
        return value * mean(model, batch)

    def change(new):
        nonlocal value
        value = new

    return loss, change


ENCLOSED, CHANGE_ENCLOSED = enclosing()


def with_default(model, batch, *, options=TABLE):
    return options["deep"][0]["factor"] * mean(model, batch)


def weighted(factor, model, batch):
    return factor["factor"] * mean(model, batch)


PARTIAL = {"factor": 1.0}


# By name: a loss, and a change of what it reads from 1 to another value.
READ = {
    "a global": (lambda m, b: FACTOR * mean(m, b), lambda m, to: set_global("FACTOR", to)),
    "a global of a function that is called": (
        lambda m, b: helper() * mean(m, b),
        lambda m, to: set_global("FACTOR", to),
    ),
    "what containers hold": (
        lambda m, b: TABLE["deep"][0]["factor"] * mean(m, b),
        lambda m, to: TABLE["deep"][0].update(factor=to),
    ),
    "a default": (with_default, lambda m, to: TABLE["deep"][0].update(factor=to)),
    "an argument of a partial function": (
        functools.partial(weighted, PARTIAL),
        lambda m, to: PARTIAL.update(factor=to),
    ),
    "an attribute of a class": (
        lambda m, b: Constants.factor * mean(m, b),
        lambda m, to: setattr(Constants, "factor", to),
    ),
    "a slot": (lambda m, b: SLOTTED.factor * mean(m, b), lambda m, to: setattr(SLOTTED, "factor", to)),
    "a namespace": (lambda m, b: NAMESPACE.factor * mean(m, b), lambda m, to: setattr(NAMESPACE, "factor", to)),
    "an attribute read by its name": (
        lambda m, b: getattr(NAMESPACE, "fac" + "tor") * mean(m, b),
        lambda m, to: setattr(NAMESPACE, "factor", to),
    ),
    "a name in a module": (lambda m, b: SETTINGS.factor * mean(m, b), lambda m, to: setattr(SETTINGS, "factor", to)),
    "an enclosed variable": (ENCLOSED, lambda m, to: CHANGE_ENCLOSED(to)),
    "an attribute of a callable": (WEIGHING, lambda m, to: setattr(WEIGHING, "factor", to)),
    "an attribute of a method's object": (WEIGHING.method, lambda m, to: setattr(WEIGHING, "factor", to)),
    "a tensor": (lambda m, b: TENSOR * mean(m, b), lambda m, to: set_global("TENSOR", TENSOR.new_tensor(to))),
    "an option of another module": (
        lambda m, b: CRITERION(m(b[0]), b[1]),
        lambda m, to: setattr(CRITERION, "delta", to),
    ),
    "whether another module trains": (
        lambda m, b: (m(b[0]) - TEACHER(b[0]).detach()).square().mean(),
        lambda m, to: TEACHER.train(to == 1.0),
    ),
    "a parameter of another module": (
        lambda m, b: (m(b[0]) - TEACHER[0](b[0]).detach()).square().mean(),
        lambda m, to: setattr(TEACHER[0], "bias", nn.Parameter(torch.full((2,), to, dtype=torch.float64))),
    ),
    "a dict of the model": (lambda m, b: m.table["factor"] * mean(m, b), lambda m, to: m.table.update(factor=to)),
    "an object of the model": (
        lambda m, b: m.options.factor * mean(m, b),
        lambda m, to: setattr(m.options, "factor", to),
    ),
    "a tensor of the model": (lambda m, b: m.tensor * mean(m, b), lambda m, to: setattr(m, "tensor", m.tensor * to)),
    "a tensor in a list of the model": (
        lambda m, b: m.tensors[0] * mean(m, b),
        lambda m, to: m.tensors.__setitem__(0, m.tensors[0] * to),
    ),
}
# A loss, and a change of the values of a tensor that it reads as numbers.
AS_NUMBERS = {
    "item": lambda m, b: TENSOR.item() * mean(m, b),
    "float": lambda m, b: float(TENSOR) * mean(m, b),
    "computed": lambda m, b: (TENSOR * 2 + 1).item() * mean(m, b),
    "list": lambda m, b: sum(TENSOR.view(1).tolist()) * mean(m, b),
    "array": lambda m, b: float(TENSOR.numpy()) * mean(m, b),
    "branch": lambda m, b: mean(m, b) if TENSOR < 2 else 3 * mean(m, b),
    "equality": lambda m, b: (2.0 if torch.equal(TENSOR, GATE) else 1.0) * mean(m, b),
    "selection": lambda m, b: b[0][torch.stack(4 * [TENSOR]) > 1.5].numel() + mean(m, b),
}


def data():
    torch.manual_seed(0)
    return torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _as_before():
    yield
    for name, value in (("FACTOR", 1.0), ("TENSOR", torch.ones((), dtype=torch.float64))):
        set_global(name, value)
    for one in (Constants, SLOTTED, NAMESPACE, WEIGHING, SETTINGS):
        one.factor = 1.0
    TABLE["deep"][0]["factor"] = PARTIAL["factor"] = 1.0
    CHANGE_ENCLOSED(1.0)
    CRITERION.delta = 0.01
    TEACHER.train()


def assert_live(one, model, loss, batch):
    """Compares the loss, and a step along its gradient, with the live code."""
    state = one.init()
    expected = loss(model, batch)
    grads = torch.autograd.grad(expected, list(model.parameters()))
    assert one.loss(state, batch).item() == pytest.approx(expected.item(), abs=1e-12)
    _, losses = one.unroll(state, [batch, batch])
    assert losses[0].item() == pytest.approx(expected.item(), abs=1e-12)
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        after, _ = one.step(state, batch)
        torch.testing.assert_close(after.params[name], (p - 0.1 * grad).detach(), rtol=0.0, atol=1e-12)
    return expected.item()


def functional(loss, model=None, **options):
    model = Holding().double() if model is None else model
    return model, gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss, **options)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", READ)
def test_a_change_of_what_the_loss_reads_counts(name, is_compiled):
    """A loss that names a coefficient was captured once, with what the coefficient was at that moment."""
    loss, change = READ[name]
    model, fn = functional(loss)
    one, batch = fn.compile("eager") if is_compiled else fn, data()
    before = assert_live(one, model, loss, batch)
    change(model, 2.5)
    after = assert_live(one, model, loss, batch)
    assert abs(before - after) > 1e-6
    change(model, 1.0)
    assert_live(one, model, loss, batch)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", AS_NUMBERS)
def test_values_that_the_loss_reads_as_numbers_count(name, is_compiled):
    """What was written into a tensor counted only where the program takes the tensor itself."""
    loss = AS_NUMBERS[name]
    model, fn = functional(loss)
    one, batch = fn.compile("eager") if is_compiled else fn, data()
    before = assert_live(one, model, loss, batch)
    TENSOR.fill_(2.5)
    after = assert_live(one, model, loss, batch)
    assert abs(before - after) > 1e-6
    TENSOR.fill_(1.0)
    assert_live(one, model, loss, batch)


def test_programs_come_back_with_what_they_were_captured_for():
    """Two captures serve a switch between two values; what the loss does not read costs none."""
    model, fn = functional(WEIGHING)
    batch = data()
    for factor in (1.0, 2.0, 1.0, 2.0):
        WEIGHING.factor = factor
        WEIGHING.log.append(factor)
        model.last = model(batch[0])
        fn.unroll(fn.init(), [batch])
    assert len(fn._losses.all_gradients) == 2


class Scaled(torch.optim.SGD):
    """An optimizer whose code names a global."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * FACTOR)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_a_change_of_what_the_optimizer_reads_counts(is_compiled):
    """The update, too, is code of the user's."""
    model = Holding().double()
    fn = gimli.functionalize(model, Scaled(model.parameters(), lr=0.1), mean)
    one, batch = fn.compile("eager") if is_compiled else fn, data()
    state = one.init()
    moved = []
    for factor in (1.0, 3.0, 1.0):
        set_global("FACTOR", factor)
        name = "inner.weight"
        moved.append(one.unroll(state, [batch])[0].params[name] - state.params[name])
    torch.testing.assert_close(moved[1], 3 * moved[0])
    torch.testing.assert_close(moved[2], moved[0])


def test_a_change_of_what_a_schedule_reads_counts():
    """A lambda of a scheduler is code as well."""
    model = Holding().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: FACTOR**epoch)
    fn = gimli.functionalize(model, optimizer, mean, scheduler=scheduler)
    batch, state = data(), fn.init()
    moved = []
    for factor in (1.0, 0.5):
        set_global("FACTOR", factor)
        first, _ = fn.unroll(state, [batch])
        second, _ = fn.unroll(first, [batch])
        moved.append(second.params["inner.weight"] - first.params["inner.weight"])
    torch.testing.assert_close(moved[1], 0.5 * moved[0])


def test_a_change_of_what_a_train_step_reads_counts():
    """The same holds for whole steps."""
    model = Holding().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = TABLE["deep"][0]["factor"] * mean(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    fn = gimli.functionalize(model, optimizer, train_step=step)
    batch = data()
    _, first = fn.unroll(fn.init(), [batch])
    TABLE["deep"][0]["factor"] = 2.0
    _, second = fn.unroll(fn.init(), [batch])
    torch.testing.assert_close(second, 2 * first)


def test_hooks_of_parameters_that_are_added_count():
    """A hook that halves a gradient was not called if it came after the capture."""
    model, fn = functional(mean)
    batch = data()
    before, _ = fn.step(fn.init(), batch)
    model.inner.weight.register_hook(lambda grad: 0.5 * grad)
    after, _ = fn.step(fn.init(), batch)
    start = model.inner.weight.detach()
    torch.testing.assert_close(after.params["inner.weight"] - start, 0.5 * (before.params["inner.weight"] - start))


def test_numbers_that_are_inputs_are_not_looked_at():
    """Numbers of `objects` and of the optimizer are inputs of programs: a change of them captures nothing."""
    model, own = Holding().double(), Weighing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = own.factor * mean(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    fn = gimli.functionalize(model, optimizer, train_step=step, objects={"own": own})
    batch = data()
    _, first = fn.unroll(fn.init(), [batch])
    number = fn._model_view.environment.read()
    own.factor, optimizer.param_groups[0]["lr"] = 2.0, 0.2
    _, second = fn.unroll(fn.init(), [batch])
    torch.testing.assert_close(second, 2 * first)
    assert fn._model_view.environment.read() == number


def test_a_counter_of_the_loss_itself_is_told():
    """It is no part of the state: the program has what it was at capture, and does not capture again for it."""
    counts = {"calls": 0}

    def loss(model, batch):
        counts["calls"] += 1
        return mean(model, batch) / counts["calls"]

    _, fn = functional(loss)
    batch = data()
    with pytest.warns(BakedValueWarning, match="the code changes `calls` while it runs"):
        fn.unroll(fn.init(), [batch, batch])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn.unroll(fn.init(), [batch, batch])
    assert len(fn._losses.all_gradients) == 1


def test_logs_of_the_loss_are_left_alone():
    """What only grows is nothing that later steps read."""
    log = []

    def loss(model, batch):
        log.append("called")
        return mean(model, batch)

    _, fn = functional(loss)
    batch = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            fn.unroll(fn.init(), [batch, batch])
    assert len(fn._losses.all_gradients) == 1


def test_batches_that_the_loss_reads_as_globals_are_told():
    """Each is captured anew, which is right and slow."""
    held = {}

    def loss(model, _):
        return mean(model, held["batch"])

    model, fn = functional(loss)
    with pytest.warns(RecaptureWarning, match="values that change from call to call, in this one `batch`"):
        for _ in range(20):
            held["batch"] = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
            assert fn.loss(fn.init(), None).item() == pytest.approx(loss(model, None).item(), abs=1e-12)
