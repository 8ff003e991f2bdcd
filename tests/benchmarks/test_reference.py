"""The reference of the benchmarks has the derivatives of live training."""

from dataclasses import replace

import pytest
import torch

from benchmarks.contenders_gimli import meta_gradient
from benchmarks.contenders_stock import by_hand, func_loop, func_vmap, live_optimizer
from benchmarks.measuring import relative_error
from benchmarks.meta_gradient import Setting, as_arrays, problem_of
from benchmarks.networks import MLP
from benchmarks.reference import reference
from benchmarks.workloads import Points, workloads

KEYS = {"sgd": "W3-sgd-5", "adam": "W3-adam-5", "lstm": "W7", "tasks": "W2-adam-5", "rates": "W6-40"}
WIDTH = 1e-6


def problem(kind):
    """Returns a small workload in float64, with numbers that keep its loss smooth on the scale of differences."""
    workload = workloads(quick=True)[KEYS[kind]]
    if kind == "rates":
        workload = replace(workload, network=MLP((4, 6, 3)), draw=Points((8, 4), 3))
    made = problem_of(replace(workload, steps=4, wanted=("params", "hyper")), Setting("float64"))
    if "eps" in made.hyper:
        made.hyper.update(eps=torch.tensor(1e-2).double(), lr=torch.tensor(0.05).double())
    return made


def live_loss(problem):
    """Trains live, with the optimizer object, and returns the loss after it."""
    losses = []
    for batches, (x, y) in problem.task_batches():
        model = problem.module()
        optimizer = live_optimizer(problem, list(model.parameters()))
        for inputs, targets in batches:
            optimizer.zero_grad()
            problem.loss(model(inputs), targets).backward()
            optimizer.step()
        losses.append(problem.loss(model(x), y).detach())
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("kind", KEYS)
def test_the_reference_has_the_slopes_of_live_training(kind):
    made = problem(kind)
    found = reference(made)
    assert found["loss"].item() == pytest.approx(live_loss(made), rel=1e-12)
    for group, values in (("params", made.params), ("hyper", made.hyper)):
        for name, value in values.items():
            direction = torch.randn_like(value) * value.abs().clamp(min=1e-3)

            def moved(by, group=group, name=name, value=value, direction=direction):
                return replace(made, **{group: getattr(made, group) | {name: value + by * direction}})

            slope = (live_loss(moved(WIDTH)) - live_loss(moved(-WIDTH))) / (2 * WIDTH)
            expected = (found[group][name] * direction).sum().item()
            assert slope == pytest.approx(expected, rel=1e-5, abs=1e-8), name


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("contender", [by_hand, func_loop, func_vmap, meta_gradient])
def test_contenders_equal_the_reference(kind, contender):
    if contender is func_vmap and kind != "tasks":
        contender = func_loop
    made = problem(kind)
    assert relative_error(as_arrays(contender(made)()), as_arrays(reference(made))) < 1e-10
