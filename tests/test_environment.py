"""What code reads besides its arguments: programs are for what it is, and a change counts from the next call on."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import sys
import types
import warnings
from typing import Any

import numpy as np
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


class Hard:
    """Does not let itself be looked at."""

    __slots__ = ("unset",)

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __len__(self):
        raise RuntimeError


class Endless(list):
    """A list that does not say what it holds."""

    def __iter__(self):
        raise RuntimeError


class Broken(dict):
    """A dict that does not know how long it is."""

    def __len__(self):
        raise RuntimeError


class Inheriting(Constants):
    """Has the factor of its base until it is given one of its own."""


class Dispatching:
    """Finds its method by a name that it puts together."""

    kind = "plain"

    def __call__(self, model, batch):
        return getattr(self, f"_{self.kind}_loss")(model, batch)

    def _plain_loss(self, model, batch):
        return FACTOR * mean(model, batch)


class Steered(torch.autograd.Function):
    """Scales the gradient by a global; torch calls what code never names."""

    @staticmethod
    def forward(ctx, x):
        """Leaves the value alone."""
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scales what comes back."""
        return FACTOR * grad


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
sys.modules["settings_of_the_user"] = SETTINGS


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
SHARED = collections.UserDict(factor=1.0)
ARRAY = np.ones(2)


@functools.lru_cache
def cached():
    return FACTOR


def importing(model, batch):
    import settings_of_the_user  # pyright: ignore[reportMissingImports]  # noqa: PLC0415

    return settings_of_the_user.factor * mean(model, batch)


def with_code(model, batch, *, scale=1.0):
    return scale * mean(model, batch)


def change_cached(to):
    set_global("FACTOR", to)
    cached.cache_clear()


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
    "an attribute that a class inherits": (
        lambda m, b: Inheriting.factor * mean(m, b),
        lambda m, to: setattr(Inheriting, "factor", to),
    ),
    "a method found by a name": (Dispatching(), lambda m, to: set_global("FACTOR", to)),
    "a module that a function imports": (importing, lambda m, to: setattr(SETTINGS, "factor", to)),
    "a mapping that is no dict": (
        lambda m, b: SHARED["factor"] * mean(m, b),
        lambda m, to: SHARED.update(factor=to),
    ),
    "a cached function": (lambda m, b: cached() * mean(m, b), lambda m, to: change_cached(to)),
    "defaults that are others": (with_code, lambda m, to: setattr(with_code, "__kwdefaults__", {"scale": to})),
    "an entry of an array": (lambda m, b: ARRAY[1] * mean(m, b), lambda m, to: ARRAY.__setitem__(1, to)),
    "an array taken as a tensor": (
        lambda m, b: torch.from_numpy(ARRAY).sum() * mean(m, b),
        lambda m, to: ARRAY.__setitem__(1, to),
    ),
    "a tensor that is read as a number": (
        lambda m, b: TENSOR.item() * mean(m, b),
        lambda m, to: set_global("TENSOR", TENSOR.new_tensor(to)),
    ),
    "a shape": (
        lambda m, b: m.tensors[0].numel() * mean(m, b),
        lambda m, to: m.tensors.__setitem__(0, m.tensors[0].new_ones(3 if to != 1.0 else 1)),
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
    TABLE["deep"][0]["factor"] = PARTIAL["factor"] = SHARED["factor"] = ARRAY[1] = 1.0
    if "factor" in vars(Inheriting):
        del Inheriting.factor
    with_code.__kwdefaults__ = {"scale": 1.0}
    cached.cache_clear()
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


def test_a_change_of_what_a_custom_backward_reads_counts():
    """Only torch calls `backward` of an autograd function."""
    _, fn = functional(lambda m, b: Steered.apply(mean(m, b)))
    batch, state = data(), fn.init()
    moved = []
    for factor in (1.0, 3.0):
        set_global("FACTOR", factor)
        moved.append(fn.step(state, batch)[0].params["inner.weight"] - state.params["inner.weight"])
    torch.testing.assert_close(moved[1], 3 * moved[0])


def test_a_scheduler_that_runs_outside_captures_nothing():
    """It wraps the step of the optimizer in a function that holds the optimizer: its rate is an input all the same."""
    model = Holding().double()
    optimizer = Scaled(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    fn = gimli.functionalize(model, optimizer, mean)
    batch, numbers = data(), set()
    for _ in range(3):
        fn.unroll(fn.init(), [batch])
        numbers.add(fn._model_view.environment.read())
        optimizer.step()
        scheduler.step()
    assert len(numbers) == len(fn._losses.all_gradients) == 1


def test_a_learning_rate_that_the_loss_itself_reads_counts():
    """To a step it is an input, to a loss it is not."""
    model = Holding().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(model, batch):
        return optimizer.param_groups[0]["lr"] * mean(model, batch)

    fn = gimli.functionalize(model, optimizer, loss)
    batch = data()
    first = fn.loss(fn.init(), batch)
    optimizer.param_groups[0]["lr"] = 0.3
    torch.testing.assert_close(fn.loss(fn.init(), batch), 3 * first)


def test_hooks_of_the_optimizer_that_are_added_count():
    """So do global ones."""
    _, fn = functional(mean)
    batch, state = data(), fn.init()

    def halve(optimizer, args, kwargs):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad.mul_(0.5)

    before = fn.step(state, batch)[0].params["inner.weight"] - state.params["inner.weight"]
    handle = fn.optimizer.register_step_pre_hook(halve)
    after = fn.step(state, batch)[0].params["inner.weight"] - state.params["inner.weight"]
    torch.testing.assert_close(after, 0.5 * before)
    handle.remove()
    again = fn.step(state, batch)[0].params["inner.weight"] - state.params["inner.weight"]
    torch.testing.assert_close(again, before)


def test_what_the_code_changed_and_the_user_sets_later_counts():
    """A mode that a capture left behind was taken for the one that it had found."""
    held = {"mode": 0}

    def loss(model, batch):
        weight = 1.0 + held["mode"]
        held["mode"] = 1
        return weight * mean(model, batch)

    _, fn = functional(loss)
    batch = data()
    with pytest.warns(BakedValueWarning):
        first = fn.loss(fn.init(), batch)
    held["mode"] = 0
    torch.testing.assert_close(fn.loss(fn.init(), batch), first)
    held["mode"] = 1
    torch.testing.assert_close(fn.loss(fn.init(), batch), 2 * first)


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


class Decaying:
    """Gives the rates of a schedule by a method."""

    def rate(self, epoch):
        return FACTOR**epoch


@pytest.mark.parametrize("kind", ["function", "method"])
def test_a_change_of_what_a_schedule_reads_counts(kind):
    """A lambda of a scheduler is code as well."""
    rates = {"function": lambda epoch: FACTOR**epoch, "method": Decaying().rate}
    model = Holding().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rates[kind])
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


class Linked:
    """A list of objects, one behind the other."""

    def __init__(self, length):
        self.factor = 1.0
        self.next: Any = Linked(length - 1) if length else None


CHAIN, LONG = Linked(200), list(range(5000))


HARD, BROKEN, ENDLESS = Hard(), Broken(a=1), Endless([1])


def test_objects_that_do_not_let_themselves_be_looked_at_are_no_error():
    """They count as the objects that they are."""

    def loss(model, batch):
        known = HARD is not None and dict.__contains__(BROKEN, "a") and list.__getitem__(ENDLESS, 0) == 1
        return mean(model, batch) * (1.0 if known else 2.0)

    model, fn = functional(loss)
    assert_live(fn, model, loss, data())


def test_long_chains_and_lists_are_looked_at_in_part():
    """What looks at everything must end: of a list of thousands, only another list counts."""

    def loss(model, batch):
        return CHAIN.next.next.factor * LONG[0] * mean(model, batch) if CHAIN.next else mean(model, batch)

    model, fn = functional(loss)
    batch, environment = data(), fn._model_view.environment
    assert_live(fn, model, loss, batch)
    before = environment.read()
    CHAIN.next.next.factor = 2.0
    changed = environment.read()
    assert changed != before
    LONG[1] = 7
    assert environment.read() == changed
