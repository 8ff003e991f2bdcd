"""Floats on the left of a counter: the guards and the derivatives that Python would lose."""

import math
import sys
from typing import Any

import pytest
import torch
from torch import nn

import gimli_compile as gimli
from gimli_compile.literals import Literal, held_functions, literals_marked
from gimli_compile.lookups import AnsweringList, AnsweringTuple

LIMIT = 5.0


class Counting(torch.optim.Optimizer):
    """Divides and compares with the counter on the right of plain floats."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None, late: Any = 2.5) -> Any:
        for group in self.param_groups:
            group["n"] = group.get("n", 0) + 1
            lr = 1.0 / (1.0 + group["n"]) * group["lr"] * 0.9 ** group["n"]
            if LIMIT < group["n"]:
                lr = lr * 2
            if late * 2.0 - 1.0 <= group["n"]:
                lr = lr * 3
            for p in group["params"]:
                p.sub_(p.grad * lr)


def test_a_counter_on_the_right_of_a_float_is_followed():
    """Every step is right, without a warning and without a variant for each step."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = Counting(model.parameters())
    fn = gimli.functionalize(model, optimizer, lambda model, x: model(x).square().mean())
    batches = [torch.randn(4, 3, dtype=torch.float64) for _ in range(9)]
    state, _ = fn.unroll(fn.init(), batches)
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(state.params["weight"], model.weight.detach(), rtol=1e-12, atol=0)
    assert fn.report() == []
    assert len(fn.programs["update"]) == 4  # the first step, and three outcomes of the two comparisons


def test_everything_is_put_back():
    module = sys.modules[__name__]
    step: Any = Counting.step
    code = step.__wrapped__.__code__
    with pytest.raises(ZeroDivisionError), literals_marked([module]):
        assert isinstance(LIMIT, Literal)
        assert 1 / 0
    assert type(LIMIT) is float and step.__wrapped__.__code__ is code


def test_literals_stay_literals_among_themselves():
    made = -((Literal(2.0) * 3 - 1.0) ** 2) / Literal(5.0)
    assert type(made) is Literal and made == -5.0 and hash(made) == hash(-5.0)
    assert Literal(2.0) < 3 and divmod(Literal(7.0), 2) == (3.0, 1.0)


def test_constants_and_what_functions_enclose_are_marked():
    """`math.pi`, a class's constant, what a function encloses and what that calls: all of them let a counter answer."""
    rate, table, hidden = 0.5, [0.1, 0.2], (1.5, 2.5)

    def inner(x):
        return hidden[x] * rate

    def outer(x):
        return inner(x) + table[x]

    functions = held_functions([outer, len, None])
    assert functions == [outer, inner]
    seen = {}

    def look():
        cells = [cell.cell_contents for function in functions for cell in function.__closure__ or ()]
        seen.update(kinds=[type(value) for value in cells], pi=type(math.pi), own=type(Holder.rate))

    with literals_marked([sys.modules[__name__]], functions):
        look()
    assert {Literal, AnsweringList, AnsweringTuple} < set(seen["kinds"])
    assert seen["pi"] is seen["own"] is Literal
    look()
    assert {float, list, tuple} < set(seen["kinds"]) and seen["pi"] is seen["own"] is float


class Holder:
    """A class with a constant."""

    rate = 0.25
