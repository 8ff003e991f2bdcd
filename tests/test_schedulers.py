"""Schedulers of learning rates: values, derivatives and the number of programs, against the live eager loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pytest
import pytorch_optimizer.lr_scheduler as third_party
import torch
from eager_reference import finite_difference, relative_error
from live_training import objective, regression, squared_error
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

import gimli_compile as gimli

STEPS = 13
VALUES = 1e-12
GRADIENTS = 1e-6


def sgd(groups):
    return torch.optim.SGD(groups, lr=0.07, momentum=0.8)


def adam(groups):
    """Adam with an eps that keeps its step smooth on the scale of finite differences."""
    return torch.optim.Adam(groups, lr=0.03, betas=(0.8, 0.9), eps=1e-2)


OPTIMIZERS = {"sgd": sgd, "adam": adam}


def make(kind, *args, **options):
    return lambda optimizer: kind(optimizer, *args, **options)


def decay_by(rate):
    return lambda epoch: rate**epoch / (1 + 0.1 * epoch)


class Decay:
    """A function with a number of its own."""

    def __init__(self, rate):
        self.rate = rate

    def __call__(self, epoch):
        return 1 / (1 + self.rate * epoch)


def sequential(optimizer):
    parts = [
        schedulers.ConstantLR(optimizer, factor=0.3, total_iters=3),
        schedulers.ExponentialLR(optimizer, gamma=0.9),
        schedulers.CosineAnnealingLR(optimizer, T_max=5, eta_min=0.01),
    ]
    return schedulers.SequentialLR(optimizer, parts, milestones=[4, 9])


def chained(optimizer):
    parts = [
        schedulers.LinearLR(optimizer, start_factor=0.2, total_iters=4),
        schedulers.MultiStepLR(optimizer, [3, 7], gamma=0.6),
    ]
    return schedulers.ChainedScheduler(parts, optimizer)


def several(optimizer):
    return [schedulers.ExponentialLR(optimizer, gamma=0.95), schedulers.StepLR(optimizer, 4, gamma=0.7)]


def proportion(optimizer):
    inner = third_party.CosineScheduler(optimizer, t_max=20, max_lr=0.1, min_lr=0.01, warmup_steps=3)
    return [
        inner,
        third_party.ProportionScheduler(cast(Any, inner), max_lr=0.1, min_lr=0.01, max_value=2.0, min_value=1),
    ]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "lambda": make(schedulers.LambdaLR, decay_by(0.95)),
    "lambda-object": lambda optimizer: schedulers.LambdaLR(optimizer, Decay(0.2)),
    "multiplicative": make(schedulers.MultiplicativeLR, lambda epoch: 0.9 + 0.05 / epoch),
    "step": make(schedulers.StepLR, 5, gamma=0.5),
    "multi-step": make(schedulers.MultiStepLR, [3, 4, 9, 9], gamma=0.5),
    "constant": make(schedulers.ConstantLR, factor=0.4, total_iters=6),
    "linear": make(schedulers.LinearLR, start_factor=0.3, end_factor=0.8, total_iters=7),
    "exponential": make(schedulers.ExponentialLR, gamma=0.9),
    "cosine": make(schedulers.CosineAnnealingLR, 5, eta_min=0.01),
    "polynomial": make(schedulers.PolynomialLR, total_iters=15, power=1.7),
    "cyclic": make(schedulers.CyclicLR, 0.02, 0.1, step_size_up=2.3, step_size_down=3.6),
    "cyclic-2": make(schedulers.CyclicLR, 0.02, 0.1, step_size_up=2.3, mode="triangular2"),
    "cyclic-exp": make(schedulers.CyclicLR, 0.02, 0.1, step_size_up=2.3, mode="exp_range", gamma=0.9),
    "cyclic-own": make(schedulers.CyclicLR, 0.02, 0.1, step_size_up=2.3, scale_fn=lambda x: 1 / (5 ** (x * 0.2))),
    "one-cycle": make(schedulers.OneCycleLR, 0.2, total_steps=20),
    "one-cycle-3": make(
        schedulers.OneCycleLR, 0.2, total_steps=17, three_phase=True, anneal_strategy="linear", pct_start=0.34
    ),
    "restarts": make(schedulers.CosineAnnealingWarmRestarts, 3, T_mult=2, eta_min=0.01),
    "sequential": sequential,
    "chained": chained,
    "swa": make(SWALR, 0.02, anneal_epochs=6),
    "swa-linear": make(SWALR, 0.02, anneal_epochs=20, anneal_strategy="linear"),
    "several": several,
    "warmup-restarts": make(
        third_party.CosineAnnealingWarmupRestarts, 5, 1.5, max_lr=0.1, min_lr=0.01, warmup_steps=2, gamma=0.8
    ),
    "rex": make(third_party.REXScheduler, 20, max_lr=0.1, min_lr=0.01),
    "warmup-linear": make(third_party.LinearScheduler, 20, 0.1, min_lr=0.01, init_lr=0.02, warmup_steps=4),
    "warmup-cosine": make(third_party.CosineScheduler, 20, 0.1, min_lr=0.01, init_lr=0.02, warmup_steps=4),
    "warmup-poly": make(third_party.PolyScheduler, poly_order=0.4, t_max=20, max_lr=0.1, min_lr=0.01, warmup_steps=4),
    "proportion": proportion,
    "stable-decay": make(third_party.get_wsd_schedule, 3, 3, 6, min_lr_ratio=0.1, cooldown_type="cosine"),
}


# ---------------------------------------------------------------------- the live loop


@dataclass(frozen=True)
class Live:
    """A model of two groups with its optimizer and scheduler."""

    model: Any
    optimizer: Any
    scheduler: Any

    def step(self, batch):
        self.optimizer.zero_grad()
        loss = squared_error(self.model, batch)
        loss.backward()
        self.optimizer.step()
        for one in self.scheduler if isinstance(self.scheduler, list) else [self.scheduler]:
            one.step()
        return loss.detach()


BATCHES = regression(70)


def start(optimizer, scheduler, warm=0):
    """Returns live objects, always with the same values, after some steps."""
    torch.manual_seed(1)
    model = torch.nn.Linear(3, 2).double()
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.05}]
    made = OPTIMIZERS[optimizer](groups)
    live = Live(model, made, SCHEDULERS[scheduler](made) if isinstance(scheduler, str) else scheduler(made))
    for batch in BATCHES[-warm:] if warm else ():
        live.step(batch)
    return live


def params_of(live):
    return {name: p.detach().clone() for name, p in live.model.named_parameters()}


def functional_of(live):
    return gimli.functionalize(live.model, live.optimizer, squared_error, scheduler=live.scheduler)


def run_live(live, steps=STEPS):
    losses, params = [], []
    for batch in BATCHES[:steps]:
        losses.append(live.step(batch))
        params.append(params_of(live))
    return losses, params


# ---------------------------------------------------------------------- numbers by path


def shifted(holder, keys, offset):
    """Moves the number that `keys` lead to in a live structure; returns what takes the structure's place."""
    if not keys:
        return holder + offset
    key, *rest = keys
    if isinstance(holder, dict):
        key = next(known for known in holder if str(known) == key)
        holder[key] = shifted(holder[key], rest, offset)
    elif isinstance(holder, list):
        holder[int(key)] = shifted(holder[int(key)], rest, offset)
    elif isinstance(holder, tuple):
        return tuple(shifted(item, rest, offset) if i == int(key) else item for i, item in enumerate(holder))
    elif isinstance(holder, partial) and key == "args":
        return partial(holder.func, *shifted(holder.args, rest, offset), **holder.keywords)
    elif isinstance(holder, partial):
        shifted(holder.keywords, rest, offset)
    else:
        setattr(holder, key, shifted(getattr(holder, key), rest, offset))
    return holder


def shift(live, path, offset):
    root, *keys = path.split(".")
    shifted({"groups": live.optimizer.param_groups, "scheduler": live.scheduler}[root], keys, offset)


def floats_of(fn, state, hyper):
    """Returns the floating numbers of groups and schedulers, wherever they are, by path."""
    _, values = fn._view.read()
    wanted = {p for p, v in values.items() if isinstance(v, float) and p.startswith(("groups.", "scheduler."))}
    found = {**hyper.by_path(), **state.opt_state}
    return {path: found[path] for path in sorted(wanted)}


def live_objective(live, path, offset, steps):
    shift(live, path, offset)
    losses, params = run_live(live, steps)
    return float(objective(params[-1], losses))


def derivative_errors(optimizer, scheduler, warm=0, steps=STEPS, **options):
    live = start(optimizer, scheduler, warm)
    fn = functional_of(live)
    state, hyper = fn.init(), fn.hyperparameters()
    leaves = floats_of(fn, state, hyper)
    for leaf in leaves.values():
        leaf.requires_grad_()
    last, losses = fn.unroll(state, BATCHES[:steps], hyper, **options)
    total = objective(last.params, losses)
    got = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    errors = {}
    for (path, leaf), value in zip(leaves.items(), got, strict=True):
        room = 0.1 * max(abs(leaf.item()), 1e-2)
        expected = finite_difference(
            lambda offset, path=path: live_objective(start(optimizer, scheduler, warm), path, offset, steps), room
        )
        errors[path] = abs(value.item() - expected) / max(abs(value.item()), abs(expected), 1e-3)
    return errors


# ---------------------------------------------------------------------- values and derivatives


@pytest.mark.parametrize("warm", (0, 7))
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_values_equal_eager(scheduler, optimizer, warm):
    if scheduler == "one-cycle-3" and warm:
        warm = 3  # a schedule that ends
    losses, params = run_live(start(optimizer, scheduler, warm))
    live = start(optimizer, scheduler, warm)
    fn = functional_of(live)
    state = fn.init()
    for batch, loss, expected in zip(BATCHES, losses, params, strict=False):
        state, got = fn.step(state, batch)
        assert relative_error(got, loss) <= VALUES
        assert max(relative_error(state.params[name], value) for name, value in expected.items()) <= VALUES


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_derivatives_equal_differences_of_eager(scheduler, optimizer):
    errors = derivative_errors(optimizer, scheduler)
    assert "groups.0.lr" in errors
    assert {path: error for path, error in errors.items() if not error <= GRADIENTS} == {}
