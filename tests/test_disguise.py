"""Counters that the step uses behind the capture's back: each step is right, and it is said that it has its own program."""

import math
from typing import Any

import numpy as np
import pytest
import torch

import gimli_compile as gimli

PLATEAUS = [0.05, 0.05, 0.05, 0.01, 0.01, 0.01, 0.03, 0.03, 0.03, 0.03]
TABLE = [0.05, 0.05, 0.05, 0.01, 0.01, 0.01, 0.03, 0.03, 0.03, 0.03]
ARRAY = np.array(PLATEAUS)


class Base(torch.optim.Optimizer):
    """Counts its steps and takes the learning rate from the count."""

    def __init__(self, params):
        super().__init__(params, {"scale": 1.0})
        self.count = 0
        self.table = list(PLATEAUS)

    def rate(self, count: Any) -> Any:
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        rate = self.rate(self.count)
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad * rate * group["scale"])


class ListThere(Base):
    def rate(self, count):
        return [0.05, 0.05, 0.05, 0.01, 0.01, 0.01, 0.03, 0.03, 0.03, 0.03][count]


class Array(Base):
    def rate(self, count):
        return ARRAY[count]


class Text(Base):
    def rate(self, count):
        return 0.01 * len(f"{count // 3}" * 2 + "x")


class Chosen(Base):
    def rate(self, count):
        return next(rate for place, rate in zip(range(100), PLATEAUS, strict=False) if place >= count)


class Held(Base):
    def rate(self, count):
        return self.table[count]


class Module(Base):
    def rate(self, count):
        return TABLE[count] + 0 * math.pi


def run(kind, steps=9):
    """Returns the largest difference to the live loop over all steps, and the object that ran."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).double()
    optimizer = kind(model.parameters())
    fn = gimli.functionalize(model, optimizer)
    state = fn.init()
    params, opt_state, worst = state.params, state.opt_state, 0.0
    for _ in range(steps):
        grads = {name: value.cos() for name, value in params.items()}
        params, opt_state = fn.update(params, grads, opt_state)
        for parameter in model.parameters():
            parameter.grad = parameter.detach().cos()
        optimizer.step()
        worst = max(worst, *(float((params[n] - p.detach()).abs().max()) for n, p in model.named_parameters()))
    return worst, fn


@pytest.mark.parametrize("kind", (ListThere, Array, Text))
def test_a_use_that_nobody_sees_is_exact_and_said(kind):
    with pytest.warns(gimli.BakedValueWarning, match=r"state\[count\]: constants of the program"):
        worst, fn = run(kind)
    assert worst <= 1e-12
    assert len(fn.programs["update"].variants) == 9


@pytest.mark.parametrize("kind", (Held, Module))
def test_tables_that_are_held_or_lie_in_the_module_need_one_program(kind):
    worst, fn = run(kind)
    assert worst <= 1e-12
    assert len(fn.programs["update"].variants) == 1


def test_what_asks_the_counter_is_seen_without_a_disguise():
    worst, fn = run(Chosen)
    assert worst <= 1e-12
    assert fn.report() == []
