"""Whole numbers that are quantities: `beta=50` of a softplus has a derivative like `beta=50.0`, or is reported."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_reference import Case, functional_params, gradient_errors, run_functional, worst_value_error

import gimli_compile as gimli


class Smoothed(torch.optim.Optimizer):
    """Divides by a softplus of the root of the second moment."""

    def __init__(self, params, lr=0.1, smooth=5):
        super().__init__(params, {"lr": lr, "smooth": smooth})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                square = self.state[p].setdefault("square", torch.zeros_like(p)).mul_(0.9).addcmul_(p.grad, p.grad)
                p.addcdiv_(p.grad, F.softplus(square.sqrt(), group["smooth"]), value=-group["lr"])


class Shrunk(torch.optim.Optimizer):
    """Uses an operator without a form for numbers."""

    def __init__(self, params, bound=1):
        super().__init__(params, {"bound": bound})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(F.softshrink(p.grad, group["bound"]))


@pytest.mark.parametrize("smooth", [5, 5.0, 0.7])
def test_the_slope_of_a_softplus(smooth):
    case = Case(lambda params: Smoothed(params, smooth=smooth), steps=4)
    assert worst_value_error(case) < 1e-12
    errors = gradient_errors(case, state_too=False)
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("bound", [1, 0.5])
def test_a_quantity_without_a_form_is_reported(bound):
    case = Case(lambda params: Shrunk(params, bound=bound), steps=2)
    with pytest.warns(gimli.BakedValueWarning, match="a number passed to `softshrink` is a constant"):
        fn, state, hyper = functional_params(case)
        run_functional(case, fn, state, hyper, case.gradients(2))
