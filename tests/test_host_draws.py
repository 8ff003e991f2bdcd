"""Optimizers that draw from the generators of Python and NumPy."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from eager_reference import Case, eager_params, functional_params, gradient_errors, run_functional, worst_value_error

import gimli_compile as gimli
from gimli_compile.host_draws import host_states


class Drawing(torch.optim.Optimizer):
    """Multiplies the gradient by a number that `draw` gives."""

    def __init__(self, params, draw, lr=0.1, p=0.5):
        super().__init__(params, {"lr": lr, "p": p})
        self.draw = draw

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad * self.draw(group), alpha=-group["lr"])


def skip_at_random(group):
    return 3.0 if random.random() < group["p"] else 1.0


def skip_at_random_in_numpy(group):
    return 3.0 * torch.randn(()) if np.random.rand() < group["p"] else torch.randn(())


def scaled(group):
    return random.gauss(1.0, 0.3) * group["p"] + np.random.uniform(0.0, 1.0)


@pytest.mark.parametrize("draw", [skip_at_random, skip_at_random_in_numpy, scaled])
def test_numbers_are_drawn_anew_in_every_step(draw):
    case = Case(lambda params: Drawing(params, draw), steps=8)
    assert worst_value_error(case) <= 1e-12
    assert max(gradient_errors(case, state_too=False).values()) <= 1e-6


@pytest.mark.parametrize("seed", range(6))
def test_known_variants_serve_other_draws(seed):
    case = Case(lambda params: Drawing(params, skip_at_random), steps=8)
    fn, state, hyper = functional_params(case)
    for _ in range(2):
        got = run_functional(case, fn, state, hyper, case.gradients(8, seed))[-1]
        expected = eager_params(case, grads=case.gradients(8, seed))[-1]
        assert all(torch.allclose(got[name], expected[name], rtol=1e-12, atol=0) for name in expected)


def test_capture_leaves_the_generators_alone():
    case = Case(lambda params: Drawing(params, scaled))
    before = str(host_states())
    fn, *_ = functional_params(case)
    assert fn.programs["update"].variants
    assert str(host_states()) == before


@pytest.mark.parametrize(
    "draw",
    [
        lambda group: len(random.choice(["a", "bc"])),
        lambda group: float(np.random.rand(2).sum()),
        lambda group: random.randint(1, 3),
    ],
    ids=["choice", "array", "whole"],
)
def test_what_is_no_number_is_refused(draw):
    with pytest.raises(gimli.CaptureError, match="the step draws from a generator of Python or NumPy: `"):
        functional_params(Case(lambda params: Drawing(params, draw)))


def test_a_loss_that_draws_is_refused():
    model = torch.nn.Linear(2, 1)
    fn = gimli.functionalize(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x).sum() * random.random()
    )
    with pytest.raises(gimli.CaptureError, match="the model or the loss draws from a generator of Python or NumPy"):
        fn.step(fn.init(), torch.ones(3, 2))
