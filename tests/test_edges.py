"""Hyperparameters on the edge of a condition, in optimizers that branch on several of them."""

from typing import Any

import pytest
import torch
from eager_reference import (
    Case,
    eager_params,
    functional_params,
    gradient_errors,
    projection,
    run_functional,
    set_number,
)
from torch import nn

import gimli_compile as gimli


class Written(torch.optim.Optimizer):
    """An optimizer whose subclasses say how a parameter is updated."""

    def __init__(self, params, **options):
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                self.update(p, p.grad, self.state[p], group)

    def update(self, p, grad, state, group):
        raise NotImplementedError


class ClippedOrNot(Written):
    """A clipping norm of zero means none: beside zero, the step jumps. A weight decay of zero is no such edge."""

    def update(self, p, grad, state, group):
        if group["clip"] > 0:
            grad = grad * (group["clip"] / grad.norm()).clamp(max=1)
        if group["weight_decay"] != 0:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(grad, alpha=-group["lr"])


class KeyedByNumber(Written):
    """Keeps one buffer for each decay rate, under that rate."""

    def update(self, p, grad, state, group):
        if not state:
            state["buffers"] = {beta: torch.zeros_like(p) for beta in group["betas"]}
        if group["weight_decay"] != 0:
            grad = grad + group["weight_decay"] * p
        for beta in group["betas"]:
            p.add_(state["buffers"][beta].mul_(beta).add_(grad), alpha=-group["lr"])


def test_an_edge_that_jumps_does_not_hide_one_that_does_not():
    case = Case(lambda params: ClippedOrNot(params, lr=0.1, clip=0.0, weight_decay=0.0))
    with pytest.warns(
        gimli.BakedValueWarning, match=r"hyper\[groups.0.clip\] is 0, where the step takes a branch"
    ) as seen:
        errors = gradient_errors(case, skip=("groups.0.clip",))
        assert not any("branch" in str(warning.message) for warning in seen)
        errors = gradient_errors(case)
    assert not any("weight_decay" in str(warning.message) for warning in seen)
    assert max(error for path, error in errors.items() if path != "groups.0.clip") <= 1e-6


def test_state_under_a_number_keeps_its_key():
    """A decay rate of zero is an edge; the branch beside it would keep its buffer under another key."""
    case = Case(lambda params: KeyedByNumber(params, lr=0.1, betas=(0.0, 0.9), weight_decay=0.0))
    with pytest.warns(gimli.BakedValueWarning, match=r"hyper\[groups.0.betas.\d\] is 0"):
        errors = gradient_errors(case)
    assert max(errors.values()) <= 1e-6


class Noting(Written):
    """Notes an option that is a whole number in its state, and takes another path if it is none."""

    def update(self, p, grad, state, group):
        if not state:
            state["rank"] = group["rank"]
        if group["weight_decay"] > 0:
            grad = grad + group["weight_decay"] * p
        if not isinstance(state["rank"], int):
            grad = grad * 2
        p.add_(grad, alpha=-group["lr"] / state["rank"])


def test_a_whole_number_in_the_state_does_not_hold_another_number_on_its_edge():
    case = Case(lambda params: Noting(params, lr=0.1, rank=1, weight_decay=0.0))
    fn, state, hyper = functional_params(case)
    weight_decay = hyper[0]["weight_decay"].requires_grad_()
    final = run_functional(case, fn, state, hyper, case.gradients(case.steps))[-1]
    (found,) = torch.autograd.grad(projection(final), weight_decay)

    def live(value):
        return float(projection(eager_params(case, lambda _, o: set_number(o, "groups.0.weight_decay", value))[-1]))

    h = 1e-4
    right = (-11 * live(0) + 18 * live(h) - 9 * live(2 * h) + 2 * live(3 * h)) / (6 * h)
    assert abs(found - right) <= 1e-6 * abs(right)


class Estimated(Written):
    """A step size that may grow by a factor at most, by default an infinite one."""

    def update(self, p, grad, state, group):
        found = (p.abs().sum() / (grad.abs().sum() + 1)).item()
        group["d"] = max(group["d"], min(found, group["d"] * group["growth_rate"]))
        p.add_(grad, alpha=-group["lr"] * group["d"])


@pytest.mark.parametrize("growth_rate", [float("inf"), 1.2])
def test_a_bound_that_a_hyperparameter_makes_infinite(growth_rate):
    """The derivative was NaN: zero times the factor."""
    case = Case(lambda params: Estimated(params, lr=0.1, d=0.3, growth_rate=growth_rate), grad_scale=0.5)
    errors = gradient_errors(case, skip=("groups.0.growth_rate",) if growth_rate > 2 else ())
    assert max(errors.values()) <= 1e-6


class LargestRate(torch.optim.Optimizer):
    """Keeps the largest learning rate so far, which at first is the learning rate itself."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "largest": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["largest"] = max(group["lr"], group["largest"])
            for p in group["params"]:
                p.sub_(group["largest"] * p.grad)


def test_the_first_of_equal_numbers_has_the_whole_derivative():
    """That is the choice of Python's `max`; halves for each would be no slope of anything once steps compound."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    model = nn.ParameterList([weight])
    fn = gimli.functionalize(model, LargestRate([weight]))
    state, hyper = fn.init(), fn.hyperparameters()
    hyper[0]["lr"].requires_grad_()
    params, opt_state = state.params, state.opt_state
    for _ in range(3):
        params, opt_state = fn.update(params, {"0": torch.ones(3, dtype=torch.float64)}, opt_state, hyper)
    (slope,) = torch.autograd.grad(params["0"].sum(), hyper[0]["lr"])
    assert float(slope) == pytest.approx(-9.0, abs=1e-12)
