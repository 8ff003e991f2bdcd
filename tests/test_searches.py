"""A step that finds a value by search is exact between the jumps of the live code, and says that it is no more."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import gimli_compile as gimli
from gimli_compile.searches import Search

WEIGHTS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
GRADS = [torch.tensor([0.5, 0.2, -0.4], dtype=torch.float64) * k for k in (1, 2, 3)]


class Stepping(Optimizer):
    """Steps by `find(sum of the gradient's squares, target)` times the gradient."""

    def __init__(self, params, lr=0.1, target=1.0):
        super().__init__(params, {"lr": lr, "target": target})

    @torch.no_grad()
    def step(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                self.change(group, p)

    def change(self, group, p):
        mean = self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.5)
        p.sub_(self.find((mean * mean).sum(), group["target"]) * p.grad, alpha=group["lr"])

    def excess(self, x, square, target):
        return x**3 + x * square - target

    def find(self, square, target):
        raise NotImplementedError


class Bisecting(Stepping):
    """Solves x^3 + x |g|^2 = target by halving an interval."""

    tolerance = 1e-8

    def find(self, square, target):
        low, middle, high = 0.0, 2.0, 4.0
        for _ in range(100):
            middle = 0.5 * (low + high)
            excess = self.excess(middle, square, target)
            if abs(excess) <= self.tolerance:
                break
            if excess < 0:
                low = middle
            else:
                high = middle
        return middle


class BisectingNumbers(Bisecting):
    """The same with what `item()` returns, and with ends of the interval that depend on the data."""

    def find(self, square, target):
        size = square.item()
        low, high = 0.0 * size, 2.0 + size
        while high - low > 1e-9:
            middle = 0.5 * (low + high)
            if self.excess(middle, size, target) < 0:
                low = middle
            else:
                high = middle
        return low


class Polished(Bisecting):
    """One step of Newton's method after the search."""

    def find(self, square, target):
        x = super().find(square, target)
        return x - self.excess(x, square, target) / (3 * x**2 + square)


class Newton(Stepping):
    """Solves the same equation by Newton's method, until it converges."""

    def find(self, square, target):
        x = 100.0
        while abs(self.excess(x, square, target)) > 1e-12:
            x = x - self.excess(x, square, target) / (3 * x**2 + square)
        return x


class Clipping(Stepping):
    """Holds each gradient and each of its elements against thresholds, in Python."""

    def change(self, group, p):
        scale = sum(x if x > 0.1 else -x if x < -0.1 else 0.0 for x in p.grad.tolist())
        for index in range(p.numel()):
            if p.grad[index] > 0.1:
                scale = scale + p.grad[index]
        if p.grad.norm() > group["target"]:
            scale = scale / p.grad.norm()
        p.sub_(scale * p.grad, alpha=group["lr"])


class Backtracking(Stepping):
    """Halves a step until it is short enough: one loop that ends, whose steps lie far apart."""

    def find(self, square, target):
        x = 1e4
        while self.excess(x, square, target) > 0:
            x = 0.5 * x
        return x


class Holder(nn.Module):
    def __init__(self, count=1, size=3):
        super().__init__()
        for index in range(count):
            self.register_parameter(f"p{index}", nn.Parameter(torch.linspace(0.3, -0.7, size, dtype=torch.float64)))


def functional(kind, **options):
    model = Holder()
    return gimli.functionalize(model, kind(model.parameters(), **options))


def live_result(kind, offset=0.0, target=1.0):
    """Returns a number that the last parameter of the live run gives, its gradients scaled by 1 + offset."""
    model = Holder()
    optimizer = kind(model.parameters(), target=target)
    for grad in GRADS:
        model.get_parameter("p0").grad = grad * (1 + offset)
        optimizer.step()
    return float((model.get_parameter("p0").detach() * WEIGHTS).sum())


def program_result(fn, offset):
    hyper, state = fn.hyperparameters(), fn.init()
    params, opt_state = state.params, state.opt_state
    for grad in GRADS:
        params, opt_state = fn.update(params, {"p0": grad * (1 + offset)}, opt_state, hyper)
    return (params["p0"] * WEIGHTS).sum()


def slope_of_program(fn):
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    result = program_result(fn, offset)
    return result.item(), float(torch.autograd.grad(result, offset)[0])


def difference(kind, width):
    return (live_result(kind, width) - live_result(kind, -width)) / (2 * width)


@pytest.mark.parametrize("kind", (Bisecting, BisectingNumbers))
def test_a_search_is_said_with_its_line_and_count(kind):
    fn = functional(kind)
    with pytest.warns(gimli.BakedValueWarning, match=r"decided \d\d times in one step") as caught:
        program_result(fn, 0.0)
    found = fn.report()
    assert sorted(str(warning.message) for warning in caught) == sorted(map(str, found))
    assert len(found) == len(fn.programs["update"]) and all(isinstance(entry, Search) for entry in found)
    text = str(found[0])
    assert "test_searches.py" in text and "< 0:" in text and "Newton" in text


@pytest.mark.filterwarnings("ignore:a value is found by a search")
def test_a_program_of_a_search_has_the_slope_between_the_jumps_of_the_live_code():
    value, slope = slope_of_program(functional(Bisecting))
    assert value == pytest.approx(live_result(Bisecting), rel=1e-12)
    assert slope == pytest.approx(difference(Bisecting, 3e-10), rel=1e-4)
    assert abs(slope - difference(Bisecting, 1e-4)) > 0.05


@pytest.mark.filterwarnings("ignore:a value is found by a search")
def test_a_step_of_newton_after_the_search_gives_the_derivative_of_the_solution():
    value, slope = slope_of_program(functional(Polished))
    assert value == pytest.approx(live_result(Polished), rel=1e-12)
    assert slope == pytest.approx(difference(Polished, 1e-5), rel=1e-6)


def test_newton_alone_has_the_derivative_of_the_solution_and_is_no_search():
    fn = functional(Newton)
    _, slope = slope_of_program(fn)
    assert slope == pytest.approx(difference(Newton, 1e-5), rel=1e-6)
    assert len(fn._updates.variants[0].after) > 8 and fn.report() == []


@pytest.mark.parametrize("kind", (Clipping, Backtracking))
def test_thresholds_and_loops_that_end_are_no_searches(kind):
    torch.manual_seed(0)
    model = Holder(12, 12)
    fn = gimli.functionalize(model, kind(model.parameters()))
    state = fn.init()
    grads = {name: torch.randn_like(p) for name, p in state.params.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn.update(state.params, grads, state.opt_state)
    assert len(fn._updates.variants[0].after) > 100 and fn.report() == []


def test_a_search_inside_a_whole_step_is_said():
    model = Holder()

    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = ((model.p0 - batch) ** 2).sum()
        loss.backward()
        optimizer.step()
        return loss

    fn = gimli.functionalize(model, Bisecting(model.parameters()), train_step=train_step)
    with pytest.warns(gimli.BakedValueWarning, match="found by a search"):
        fn.step(fn.init(), WEIGHTS)
    assert len(fn.report()) == 1


@pytest.mark.filterwarnings("ignore:a value is found by a search")
def test_a_target_that_decides_alone_has_no_slope_between_the_jumps():
    fn = functional(Bisecting)
    hyper, state = fn.hyperparameters(), fn.init()
    hyper[0]["target"].requires_grad_()
    params, _ = fn.update(state.params, {"p0": GRADS[0]}, state.opt_state, hyper)
    assert not params["p0"].requires_grad
    assert live_result(Bisecting, target=1 + 1e-10) == live_result(Bisecting)
    assert math.isclose(live_result(Bisecting, target=1.01), live_result(Bisecting), abs_tol=1e-2)
