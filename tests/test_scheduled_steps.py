"""Schedulers that need the loss, and schedulers that the user's own train step steps."""

from __future__ import annotations

import pytest
import torch
from eager_reference import finite_difference, relative_error
from live_training import objective, regression, squared_error
from torch.optim import lr_scheduler as schedulers

import gimli_compile as gimli

STEPS = 12
VALUES = 1e-12
GRADIENTS = 1e-6
BATCHES = regression(STEPS)


class Proportional:
    """A learning rate that follows the loss: its derivative goes through the number that the loss is."""

    def __init__(self, optimizer, rate=0.02):
        self.optimizer, self.rate, self.steps = optimizer, rate, 0

    def step(self, loss):
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * float(loss) / (1 + 0.1 * self.steps)


def plateau(optimizer):
    return schedulers.ReduceLROnPlateau(optimizer, factor=0.6, patience=0, threshold=0.2, cooldown=1, min_lr=1e-3)


def maximum(optimizer):
    return schedulers.ReduceLROnPlateau(optimizer, "max", factor=0.7, patience=1, threshold_mode="abs")


def mixed(optimizer):
    return [schedulers.ExponentialLR(optimizer, 0.97), plateau(optimizer)]


SCHEDULERS = {"plateau": plateau, "maximum": maximum, "mixed": mixed, "proportional": Proportional}


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.8)


def adam(params):
    return torch.optim.Adam(params, lr=0.03, betas=(0.8, 0.9), eps=1e-2)


OPTIMIZERS = {"sgd": sgd, "adam": adam}


class Live:
    """A model with its optimizer and schedulers, and the loop body of a user."""

    def __init__(self, optimizer, scheduler):
        torch.manual_seed(1)
        self.model = torch.nn.Linear(3, 2).double()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.scheduler = SCHEDULERS[scheduler](self.optimizer)

    def step(self, batch):
        self.optimizer.zero_grad()
        loss = squared_error(self.model, batch)
        loss.backward()
        self.optimizer.step()
        for one in self.scheduler if isinstance(self.scheduler, list) else [self.scheduler]:
            one.step() if isinstance(one, schedulers.ExponentialLR) else one.step(loss.detach())
        return loss.detach()

    def run(self):
        losses = [self.step(batch) for batch in BATCHES]
        return losses, {name: p.detach() for name, p in self.model.named_parameters()}

    def own_step(self):
        """The loop body as a function of a train step's form."""
        scheduler = self.scheduler

        def train_step(model, optimizer, batch):
            optimizer.zero_grad()
            loss = squared_error(model, batch)
            loss.backward()
            optimizer.step()
            for one in scheduler if isinstance(scheduler, list) else [scheduler]:
                one.step() if isinstance(one, schedulers.ExponentialLR) else one.step(loss.detach())
            return loss

        return train_step


def functional_of(live, whole):
    if whole:
        step = live.own_step()
        return gimli.functionalize(live.model, live.optimizer, train_step=step, scheduler=live.scheduler)
    return gimli.functionalize(live.model, live.optimizer, squared_error, scheduler=live.scheduler)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_values_equal_the_live_loop(scheduler, optimizer, whole):
    eager, live = Live(optimizer, scheduler), Live(optimizer, scheduler)
    losses, params = eager.run()
    fn = functional_of(live, whole)
    state, got = fn.unroll(fn.init(), BATCHES)
    assert relative_error(got, torch.stack(losses)) <= VALUES
    assert max(relative_error(state.params[name], value) for name, value in params.items()) <= VALUES
    rate = eager.optimizer.param_groups[0]["lr"]
    assert rate != live.optimizer.param_groups[0]["lr"]
    assert abs(state.opt_state["groups.0.lr"].item() - rate) <= VALUES * rate
    untouched = live.scheduler[-1] if isinstance(live.scheduler, list) else live.scheduler
    assert getattr(untouched, "last_epoch" if scheduler != "proportional" else "steps") == 0


def shifted(live, path, offset):
    *keys, last = path.split(".")
    holder = {"groups": live.optimizer.param_groups, "scheduler": live.scheduler}[keys[0]]
    for key in keys[1:]:
        holder = holder[int(key)] if isinstance(holder, list) else getattr(holder, key)
    if isinstance(holder, dict):
        holder[last] += offset
    else:
        setattr(holder, last, getattr(holder, last) + offset)


PATHS = {
    "plateau": ["groups.0.lr", "scheduler.factor"],
    "maximum": ["groups.0.lr", "scheduler.factor"],
    "mixed": ["groups.0.lr", "scheduler.1.factor", "scheduler.0.gamma"],
    "proportional": ["groups.0.lr", "scheduler.rate"],
}


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_derivatives_equal_differences_of_eager(scheduler, optimizer, whole):
    live = Live(optimizer, scheduler)
    fn = functional_of(live, whole)
    state, hyper = fn.init(), fn.hyperparameters()
    numbers = {**hyper.by_path(), **state.opt_state}
    leaves = {path: numbers[path].requires_grad_() for path in PATHS[scheduler]}
    last, losses = fn.unroll(state, BATCHES, hyper)
    got = torch.autograd.grad(objective(last.params, losses), list(leaves.values()))

    def function(path, offset):
        other = Live(optimizer, scheduler)
        shifted(other, path, offset)
        losses, params = other.run()
        return float(objective(params, losses))

    for (path, leaf), value in zip(leaves.items(), got, strict=True):
        assert value != 0
        expected = finite_difference(lambda offset, path=path: function(path, offset), 0.01 * abs(leaf.item()))
        assert abs(value.item() - expected) <= GRADIENTS * max(abs(expected), 1e-3), path


def test_an_update_alone_is_refused_where_a_scheduler_needs_the_loss():
    fn = functional_of(Live("sgd", "plateau"), whole=False)
    state = fn.init()
    with pytest.raises(gimli.InputError, match="a scheduler needs the loss"):
        fn.update(state.params, {}, state.opt_state)


def test_a_declared_scheduler_is_not_stepped_by_an_update():
    live = Live("sgd", "proportional")
    fn = functional_of(live, whole=True)
    state = fn.init()
    grads = {name: torch.ones_like(value) for name, value in state.params.items()}
    _, after = fn.update(state.params, grads, state.opt_state)
    assert after["scheduler.steps"] == 0
    assert after["groups.0.lr"] == 0.05


# ---------------------------------------------------------------------- live objects that nobody passed


def enclosing(live):
    return live.own_step()


def as_default(live):
    enclosed = live.own_step()

    def train_step(model, optimizer, batch, *, own=enclosed):
        return own(model, optimizer, batch)

    return train_step


def as_method(live):
    def train_step(model, optimizer, batch):
        return live.step(batch)

    return train_step


GLOBAL = {}


def by_global_name(model, optimizer, batch):
    return GLOBAL["live"].own_step()(model, optimizer, batch)


def through_a_global(live):
    GLOBAL["live"] = live
    return by_global_name


@pytest.mark.parametrize("make", [enclosing, as_default, as_method, through_a_global])
def test_a_scheduler_inside_a_train_step_that_was_not_passed_is_refused(make):
    for kind in (schedulers.StepLR, schedulers.CosineAnnealingLR):
        live = Live("sgd", "plateau")
        live.scheduler = [Counting(kind(live.optimizer, 30))]
        before = [vars(live.scheduler[0].inner).copy(), live.optimizer.param_groups[0]["lr"]]
        fn = gimli.functionalize(live.model, live.optimizer, train_step=make(live))
        with pytest.raises(gimli.CaptureError, match=rf"`last_epoch` of a {kind.__name__}[\s\S]*scheduler=\.\.\."):
            fn.step(fn.init(), BATCHES[0])
        assert [vars(live.scheduler[0].inner), live.optimizer.param_groups[0]["lr"]] == before
    GLOBAL.clear()


class Counting:
    """Takes the loss that its scheduler has no use for."""

    def __init__(self, inner):
        self.inner = inner

    def step(self, loss):
        self.inner.step()


def test_what_holds_the_optimizer_and_does_not_change_is_no_matter():
    live = Live("sgd", "plateau")

    def train_step(model, optimizer, batch):
        assert live.scheduler.patience == 0
        optimizer.zero_grad()
        loss = squared_error(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    fn = gimli.functionalize(live.model, live.optimizer, train_step=train_step)
    state, losses = fn.unroll(fn.init(), BATCHES[:3])
    expected = [train_step(live.model, live.optimizer, batch).detach() for batch in BATCHES[:3]]
    assert relative_error(losses, torch.stack(expected)) <= VALUES
    assert relative_error(state.params["weight"], live.model.weight) <= VALUES
