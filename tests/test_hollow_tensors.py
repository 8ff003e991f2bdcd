"""Trials on tensors without memory: they tell what a trial on copies tells, or that it is to be made."""

import warnings

import pytest
import torch
from torch import nn
from trials import same_facts

from gimli_compile.hollow_tensors import HollowTensors


class Stepping(torch.optim.Optimizer):
    """An optimizer that does what a test wants with each gradient."""

    def __init__(self, params, how, lr=0.1):
        super().__init__(params, {"lr": lr, "seen": 0, "decay": 0.5})
        self.how = how
        self.total = torch.zeros(3)
        self.count = 0

    def step(self, closure=None):  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    self.how(self, group, p)


def counting(optimizer, group, p):
    group["seen"] += 1
    optimizer.state[p]["mean"] = 0.9 * optimizer.state[p].get("mean", 0) + p.grad.mean()
    p.sub_(group["lr"] * p.grad * group["decay"])


def tensor_rate(optimizer, group, p):
    group["rate"] = group.get("rate", torch.ones(())) * 0.9
    p.sub_(group["rate"] * p.grad)


def transposing(optimizer, group, p):
    if p.dim() == 2 and p.shape[0] > p.shape[1]:
        group["seen"] += 1
    p.sub_(p.grad.flatten().view_as(p))


FORM = {"counting": counting, "tensor rate": tensor_rate, "transposing": transposing}


def reading(optimizer, group, p):
    group["decay"] = float(p.grad.norm())


def reading_and_hiding(optimizer, group, p):
    try:
        group["seen"] += int(p.grad.sum() > -1e9)
    except Exception:
        group["decay"] += 1


def branching(optimizer, group, p):
    if (p.grad.abs() >= 0).all():
        group["seen"] += 1


def comparing(optimizer, group, p):
    if not torch.equal(p.grad, p):
        group["seen"] += 1


def numpy(optimizer, group, p):
    try:
        group["seen"] += int(p.grad.numpy().size)
    except RuntimeError:
        group["decay"] += 1


def selecting(optimizer, group, p):
    group["seen"] += p.grad[p.grad.isfinite()].numel()


def accumulating(optimizer, group, p):
    """Fills a tensor of its own, and reads it."""
    optimizer.total.add_(p.grad.abs().sum() + 1)
    group["seen"] += int(float(optimizer.total[0]) > 0)


def drawing(optimizer, group, p):
    p.add_(torch.randn_like(p))


def listing(optimizer, group, p):
    group["decay"] = sum(p.grad.flatten().tolist())


def into_a_result(optimizer, group, p):
    made = torch.zeros(p.shape)
    torch.mul(p.grad, 2, out=made)
    group["seen"] += int(bool(made.any()))


VALUES = {
    one.__name__: one
    for one in (
        reading,
        reading_and_hiding,
        branching,
        comparing,
        numpy,
        selecting,
        accumulating,
        drawing,
        listing,
        into_a_result,
    )
}


def maker(how):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(2, 3)
        return model, Stepping(model.parameters(), how)

    return make


@pytest.mark.parametrize("how", FORM)
def test_steps_that_ask_for_forms(how, monkeypatch):
    assert same_facts(monkeypatch, maker(FORM[how]))


@pytest.mark.parametrize("how", VALUES)
def test_steps_that_ask_for_values_are_tried_on_copies(how, monkeypatch):
    assert not same_facts(monkeypatch, maker(VALUES[how]))


def test_a_step_that_raises_is_tried_on_copies(monkeypatch):
    def raising(optimizer, group, p):
        if type(p) is not nn.Parameter:
            raise TypeError("not what it seems")
        group["seen"] += 1

    assert not same_facts(monkeypatch, maker(raising))


SCHEDULERS = {
    "steps": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    "cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
    "list": lambda optimizer: [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for _ in range(2)],
}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, kind, monkeypatch):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(2, 3)
        optimizer = kind(model.parameters(), lr=0.1)
        return model, optimizer, SCHEDULERS[name](optimizer)

    assert same_facts(monkeypatch, make)


def test_an_end_of_a_schedule(monkeypatch):
    def make():
        model = nn.Linear(2, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return model, optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=2)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not same_facts(monkeypatch, make)


def test_nothing_is_written_and_nothing_takes_memory():
    hollow = HollowTensors()
    with hollow:
        weights = hollow.like(nn.Parameter(torch.zeros(4, 2).t()))
        weights.mul_(2).add_(torch.ones(2, 4))
        made = torch.ones(3) + 1
    assert not hollow.failed
    assert weights.stride() == (1, 2)
    assert torch.equal(made, torch.full((3,), 2.0))
