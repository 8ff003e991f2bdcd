"""Other methods of optimizers than `step`: averaged weights for evaluation, and back."""

from typing import Any

import pytest
import pytorch_optimizer
import torch
from live_training import Training, copied, random_like, regression, run_live, run_steps, slope_error, squared_error
from torch import nn

import gimli_compile as gimli

po = pytorch_optimizer


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def schedule_free(params):
    optimizer = po.ScheduleFreeWrapper(torch.optim.SGD(params, lr=0.1), momentum=0.8)
    optimizer.train()
    return optimizer


class Averaging(torch.optim.Optimizer):
    """Keeps the mean of all iterates, and exchanges it with the weights on demand."""

    def __init__(self, params, lr=0.1, pull=0.3):
        super().__init__(params, {"lr": lr, "pull": pull})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["n"] = group.get("n", 0) + 1
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.add_((p - mean) / group["n"])

    @torch.no_grad()
    def swap(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p]["mean"]
                mixed = torch.lerp(p, mean, 1 - group["pull"])
                mean.copy_(p)
                p.copy_(mixed)


CASES = {
    "eval of the schedule-free wrapper": (schedule_free, "eval", "groups.0.lr"),
    "eval of schedule-free SGD": (lambda params: po.ScheduleFreeSGD(params, lr=0.1), "eval", "groups.0.lr"),
    "swap": (Averaging, "swap", "groups.0.pull"),
}


def live_params(training, method, change=lambda optimizer: None):
    model, optimizer = training.start()
    change(optimizer)
    for batch in training.batches:
        optimizer.zero_grad()
        squared_error(model, batch).backward()
        optimizer.step()
    getattr(optimizer, method)()
    return copied(model.named_parameters())


def projected(params):
    return sum((random_like(value, index) * value).sum() for index, value in enumerate(params.values()))


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_live_optimizer(name):
    make, method, path = CASES[name]
    training = Training(network, make, squared_error, regression(4))
    _, _, fn = training.functionalized()
    key = path.split(".")[-1]
    hyper = fn.hyperparameters()
    hyper[0][key].requires_grad_()
    state, _ = fn.unroll(fn.init(), training.batches, hyper)
    evaluated = fn.call_optimizer(method, state, hyper)
    for param, value in live_params(training, method).items():
        torch.testing.assert_close(evaluated.params[param].detach(), value, rtol=1e-12, atol=1e-14)
    total: Any = projected(evaluated.params)
    (slope,) = torch.autograd.grad(total, hyper[0][key])
    base = hyper[0][key].item()

    def function(offset):
        def change(optimizer):
            optimizer.param_groups[0][key] = base + offset

        return float(projected(live_params(training, method, change)))

    assert slope_error(float(slope), function, base) < 1e-6


def test_training_goes_on_after_evaluation():
    training = Training(network, schedule_free, squared_error, regression(4))
    _, _, fn = training.functionalized()
    state = fn.init()
    for batch in training.batches:
        state, _ = fn.step(state, batch)
        state = fn.call_optimizer("train", fn.call_optimizer("eval", state))
    for name, value in run_live(training).params[-1].items():
        torch.testing.assert_close(state.params[name], value, rtol=1e-10, atol=1e-12)


def test_nothing_but_the_method_runs():
    training = Training(network, Averaging, squared_error, regression(2))
    _, optimizer, fn = training.functionalized()
    run_steps(training, fn, fn.init())
    assert not optimizer.state
    with pytest.raises(gimli.InputError, match="`Averaging` has no method 'evaluate'"):
        fn.call_optimizer("evaluate", fn.init())
