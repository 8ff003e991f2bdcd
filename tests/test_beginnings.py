"""Loops that begin with the program of later steps: when they may, and that nothing but the number of programs shows."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gimli_compile as gimli
from gimli_compile.compiled import backends, unrolling
from gimli_compile.compiled.backends import run_in_python
from gimli_compile.compiled.starting_values import starting_values
from gimli_compile.slot import Role

STEPS = 4


class Optimizer(torch.optim.Optimizer):
    """Makes its state in the first step; `begin` says what it is, `rate` what a step takes of what it makes of it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "decay": 0.9})

    def begin(self, p):
        return {"count": torch.tensor(0.0), "moment": torch.zeros_like(p)}

    def rate(self, group, p, state):
        return group["lr"] / (1 - group["decay"] ** state["count"])

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(self.begin(p))
                state["count"] += 1
                state["moment"].lerp_(p.grad, 0.1)
                p -= self.rate(group, p, state) * state["moment"]


class FromGradient(Optimizer):
    """Begins with something that is no constant."""

    def begin(self, p):
        return {**super().begin(p), "moment": p.grad.clone()}


class FirstTwice(Optimizer):
    """Takes a first step of another size."""

    def rate(self, group, p, state):
        return super().rate(group, p, state) * (2 if state["count"].item() == 1 else 1)


class Shrinking(Optimizer):
    """Makes parameters smaller before the first step."""

    def begin(self, p):
        p.mul_(0.5)
        return super().begin(p)


class FirstUnderCondition(Optimizer):
    """Takes another first step where gradients are large, and only the first step looks at them."""

    def begin(self, p):
        made = super().begin(p)
        return made if p.grad.norm() < 2 else {**made, "moment": torch.ones_like(p)}


class PassingOn(Optimizer):
    """Holds a value from the first step that no step changes."""

    def begin(self, p):
        return {**super().begin(p), "scale": torch.full_like(p, 0.5)}

    def rate(self, group, p, state):
        return super().rate(group, p, state) * state["scale"]


class Shared(Optimizer):
    """Holds one counter for all parameters."""

    def begin(self, p):
        if not hasattr(self, "counter"):
            self.counter = torch.tensor(0.0)
        return {"count": self.counter, "moment": torch.zeros_like(p)}


def loss_fn(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def functionalized(optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return gimli.functionalize(model, optimizer(model.parameters()), loss_fn)


def batches(tasks=None, scale=1.0):
    torch.manual_seed(1)
    lead = (STEPS,) if tasks is None else (tasks, STEPS)
    return scale * torch.randn(*lead, 5, 4, dtype=torch.float64), torch.randint(3, (*lead, 5))


def run(fn, given, **options):
    """Returns values and gradients of a loop."""
    state, hyper = fn.init(), fn.hyperparameters()
    state.params = {name: value.clone().requires_grad_() for name, value in state.params.items()}
    hyper[0]["lr"] = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    last, losses = fn.unroll(state, given, hyper, **options)
    outcome = losses.sin().sum() + sum(value.square().sum() for value in last.params.values())
    outcome = outcome + sum(value.sum() for value in last.opt_state.values() if value.requires_grad)
    grads = torch.autograd.grad(outcome, [*state.params.values(), hyper[0]["lr"]])
    return [*last.params.values(), *last.opt_state.values(), losses, *grads]


def assert_agree(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.fixture
def built(monkeypatch):
    """The programs that were built, as a list that grows."""
    found = []

    def count(module):
        found.append(module)
        return run_in_python(module)

    monkeypatch.setitem(backends.BACKENDS, "eager", count)
    return found


LIKE_LATER = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,  # has its state from the start
    "adadelta": torch.optim.Adadelta,
    "own": Optimizer,
    "shared": Shared,
}
OTHER = {
    "momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "from gradient": FromGradient,
    "twice": FirstTwice,
    "shrinking": Shrinking,
    "under condition": FirstUnderCondition,
    "passing on": PassingOn,
}
ALL = {**LIKE_LATER, **OTHER}
MODES = {"reverse": {}, "mixed": {"backward": "mixed"}, "segments": {"checkpoint": 2}}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore::gimli_compile.BakedValueWarning")
def test_the_first_step_takes_programs_of_its_own_only_where_it_does_something_else(name, mode, built, monkeypatch):
    fn = functionalized(ALL[name])
    expected = run(fn, batches())
    counts = []
    for find in (unrolling.find_beginning, lambda *_: None):
        built.clear()
        with monkeypatch.context() as patch:
            patch.setattr(unrolling, "find_beginning", find)
            fast = fn.compile("eager", verify=False)
            for _ in range(2):
                assert_agree(run(fast, batches(), **MODES[mode]), expected)
        counts.append(len(built))
    assert counts[0] * (2 if name in LIKE_LATER else 1) == counts[1]


def test_tasks_begin_alike(built):
    fn = functionalized(torch.optim.Adam)
    expected = run_tasks(fn)
    fast = fn.compile("eager", verify=False)
    for _ in range(2):
        assert_agree(run_tasks(fast), expected)
    assert len(built) == 2


def run_tasks(fn):
    state = fn.init()
    start = {name: value.clone().requires_grad_() for name, value in state.params.items()}
    state.params = start
    last, losses = fn.unroll(state, batches(tasks=3), tasks=True)
    outcome = losses.sum() + sum(value.square().sum() for value in last.params.values())
    return [*last.params.values(), losses, *torch.autograd.grad(outcome, list(start.values()))]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore::gimli_compile.BakedValueWarning")
def test_who_gets_the_last_state_may_write_to_it(name):
    fn = functionalized(ALL[name]).compile("eager")
    expected = run(fn, batches())
    with torch.no_grad():
        last, _ = fn.unroll(fn.init(), batches())
        for value in last.opt_state.values():
            value.add_(1)
    assert_agree(run(fn, batches()), expected)


def test_conditions_that_fail_lead_to_another_beginning():
    """With small gradients the first step is as the later ones could be, with large ones it is not."""
    fn = functionalized(FirstUnderCondition)
    fast = fn.compile("eager")
    for scale in (1.0, 30.0, 1.0):
        given = batches(scale=scale)
        assert_agree(run(fast, given), run(fn, given))


def test_one_step_begins_as_ever(built):
    fn = functionalized(torch.optim.Adam)
    fast = fn.compile("eager", verify=False)
    x, y = batches()
    assert_agree(run(fast, (x[:1], y[:1])), run(fn, (x[:1], y[:1])))
    assert len(built) == 2
    assert_agree(run(fast, (x, y)), run(fn, (x, y)))
    assert len(built) == 4


def variants(optimizer):
    fn = functionalized(optimizer)
    fn.unroll(fn.init(), batches())
    return [variant.program for variant in cast(Any, fn)._stepper.updates.variants]


def test_the_values_that_adam_begins_with():
    first, later = variants(torch.optim.Adam)
    found = starting_values(first, later, frozenset())
    assert found is not None and set(found) == {slot for slot in later.inputs if slot.role is Role.STATE}
    assert not any(value.any() for value in found.values())
    assert starting_values(later, first, frozenset()) is None


@pytest.mark.parametrize("name", ["momentum", "from gradient"])
def test_there_are_no_values_to_begin_with(name):
    first, later, *_ = variants(OTHER[name])
    assert starting_values(first, later, frozenset()) is None
