"""Draws from distributions that follow from hyperparameters: the number is a condition, the draw is new in each step."""

import warnings
from typing import Any

import pytest
import torch
from eager_reference import Case, eager_params, functional_params, run_functional, worst_value_error

import gimli_compile as gimli


class Masked(torch.optim.Optimizer):
    """Steps along a random part of the gradients; the part is drawn by a hyperparameter."""

    def __init__(self, params, lr=0.1, keep=0.5, whole=True):
        super().__init__(params, {"lr": lr, "keep": keep})
        self.whole = whole

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            targets = torch.stack([p.grad.norm() for p in group["params"]])
            masks: Any = torch.bernoulli(torch.full_like(targets, group["keep"]))
            if not self.whole:
                probability = torch.tensor(group["keep"])
                masks = [torch.bernoulli(probability) for _ in group["params"]]
            for p, mask in zip(group["params"], masks, strict=True):
                p.sub_(group["lr"] * mask * p.grad)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_seed_draws_what_eager_draws(whole, dtype):
    case = Case(lambda params: Masked(params, whole=whole), dtype=dtype, steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gimli.BakedValueWarning)
        assert worst_value_error(case) == 0.0


def test_a_probability_that_is_differentiated_stays_what_it_is():
    """No other branch lies beside it: a program for a probability beside it would draw other masks now and then."""
    case = Case(Masked, steps=60)
    expected = eager_params(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gimli.BakedValueWarning)
        fn, state, hyper = functional_params(case)
        for value in hyper[0].values():
            value.requires_grad_()
        got = run_functional(case, fn, state, hyper, case.gradients(60))
    for name, value in expected[-1].items():
        torch.testing.assert_close(got[-1][name].detach(), value, rtol=1e-12, atol=0)


def test_another_probability_is_captured_anew_and_the_constant_is_reported():
    case = Case(Masked, steps=3)
    with pytest.warns(gimli.BakedValueWarning, match="what `bernoulli` draws from is a constant"):
        fn, state, hyper = functional_params(case)
        run_functional(case, fn, state, hyper, case.gradients(3))
        hyper[0]["keep"] = torch.tensor(0.9, dtype=torch.float64)
        got = run_functional(case, fn, state, hyper, case.gradients(3))
    expected = eager_params(Case(lambda params: Masked(params, keep=0.9), steps=3))
    for name, value in expected[-1].items():
        torch.testing.assert_close(got[-1][name], value, rtol=1e-12, atol=0)
