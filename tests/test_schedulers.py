"""Schedulers of learning rates: values, derivatives and the number of programs, against the live eager loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import pytest
import pytorch_optimizer.lr_scheduler as third_party
import torch
from eager_reference import finite_difference, relative_error
from live_training import Untouched, objective, regression, squared_error
from pytorch_optimizer import Lookahead
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


@pytest.mark.parametrize("scheduler", ("step", "cosine", "one-cycle", "restarts"))
def test_derivatives_from_the_middle_of_training(scheduler):
    errors = derivative_errors("adam", scheduler, warm=7, steps=8)
    assert {path: error for path, error in errors.items() if not error <= GRADIENTS} == {}


@pytest.mark.parametrize("checkpoint", ("step", "sqrt"))
def test_derivatives_with_recomputation(checkpoint):
    errors = derivative_errors("sgd", "sequential", checkpoint=checkpoint)
    assert {path: error for path, error in errors.items() if not error <= GRADIENTS} == {}


def test_a_state_read_in_the_middle_of_training():
    """`functionalize` saw the fresh objects; `init` reads them as they are seven steps later."""
    for scheduler in ("step", "sequential", "one-cycle"):
        live = start("adam", scheduler)
        fn = functional_of(live)
        for batch in BATCHES[:7]:
            live.step(batch)
        state, losses = fn.unroll(fn.init(), BATCHES[7:15])
        expected = torch.stack([live.step(batch) for batch in BATCHES[7:15]])
        assert relative_error(losses, expected) <= VALUES
        assert relative_error(state.params["weight"], live.model.weight) <= VALUES
        rate = live.optimizer.param_groups[0]["lr"]
        assert abs(state.opt_state["groups.0.lr"].item() - rate) <= VALUES * rate


def test_a_scheduler_of_a_wrapped_optimizer():
    def begin():
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2).double()
        inner = sgd(model.parameters())
        scheduler = schedulers.StepLR(inner, 3, gamma=0.5)
        return Live(model, Lookahead(inner, k=2), scheduler)

    losses, params = run_live(begin())
    fn = functional_of(begin())
    state, got = fn.unroll(fn.init(), BATCHES[:STEPS])
    assert relative_error(got, torch.stack(losses)) <= VALUES
    assert relative_error(state.params["weight"], params[-1]["weight"]) <= VALUES


# ---------------------------------------------------------------------- how many programs

# The first step has no momentum yet; then one program for each branch of the schedule, however long it runs.
PROGRAMS = {
    "step": 3,
    "multi-step": 3,
    "cosine": 3,
    "cyclic": 3,
    "exponential": 2,
    "restarts": 3,
    "lambda": 2,
    "swa": 3,
}
PROGRAMS |= {"linear": 3, "polynomial": 3, "constant": 3, "warmup-cosine": 4, "stable-decay": 5}


@pytest.mark.parametrize("scheduler", PROGRAMS)
def test_the_number_of_programs_does_not_grow_with_the_number_of_steps(scheduler):
    live = start("sgd", scheduler)
    fn = functional_of(live)
    fn.unroll(fn.init(), BATCHES[:60])
    assert len(fn.programs["update"].variants) == PROGRAMS[scheduler]


def test_a_schedule_longer_than_the_loop_takes_two_programs():
    live = start("adam", make(schedulers.OneCycleLR, 0.2, total_steps=1000))
    fn = functional_of(live)
    fn.unroll(fn.init(), BATCHES[:60])
    assert len(fn.programs["update"].variants) == 2


# ---------------------------------------------------------------------- what is state, what is a hyperparameter


def test_what_a_scheduler_assigns_is_state_from_the_start():
    """The learning rate changes at step 30 only, and is state all the same: the scheduler writes it at every step."""
    fn = functional_of(start("sgd", make(schedulers.StepLR, 30, gamma=0.1)))
    assert {"groups.0.lr", "groups.1.lr", "scheduler.last_epoch"} <= set(fn.init().opt_state)
    hyper = fn.hyperparameters()
    assert "lr" not in hyper[0]
    assert {"scheduler.gamma", "scheduler.step_size", "scheduler.base_lrs.0"} <= set(hyper.attributes)
    assert not [path for path in hyper.attributes if "last" in path]


def test_momentum_that_a_scheduler_writes_is_state_and_its_neighbour_is_not():
    fn = functional_of(start("adam", "cyclic"))
    assert {"groups.0.lr", "groups.0.betas.0", "groups.1.betas.0"} <= set(fn.init().opt_state)
    assert "groups.0.betas.1" in fn.hyperparameters().by_path()


def test_equal_learning_rates_of_two_groups_are_differentiated_apart():
    model = torch.nn.Linear(3, 2).double()
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}], lr=0.1)
    scheduler = schedulers.ExponentialLR(optimizer, 0.9)
    fn = gimli.functionalize(model, optimizer, squared_error, scheduler=scheduler)
    state = fn.init().opt_state
    assert state["groups.0.lr"] is not state["groups.1.lr"]


def test_a_tensor_learning_rate_is_scheduled_in_place():
    def optimizer(groups):
        return torch.optim.SGD(groups, lr=torch.tensor(0.1, dtype=torch.float64))

    def begin():
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2).double()
        made = optimizer(model.parameters())
        return Live(model, made, schedulers.StepLR(made, 4, gamma=0.5))

    losses, params = run_live(begin())
    fn = functional_of(begin())
    state = fn.init()
    assert "groups.0.lr" in state.opt_state
    state.opt_state["groups.0.lr"].requires_grad_()
    last, got = fn.unroll(state, BATCHES[:STEPS])
    assert relative_error(got, torch.stack(losses)) <= VALUES
    assert relative_error(last.params["weight"], params[-1]["weight"]) <= VALUES
    (slope,) = torch.autograd.grad(objective(last.params, got), state.opt_state["groups.0.lr"])

    def function(offset):
        live = begin()
        live.optimizer.param_groups[0]["lr"] += offset
        history = run_live(live)
        return float(objective(history[1][-1], history[0]))

    expected = finite_difference(function, 0.01)
    assert abs(slope.item() - expected) <= GRADIENTS * abs(expected)


class Late:
    """Overwrites a number of the group from step 5 on; a setter that no assignment to the group shows before."""

    def __init__(self, optimizer):
        self.optimizer, self.count, self.factor = optimizer, 0, 0.5

    def step(self):
        self.count += 1
        if self.count >= 5:
            for group in self.optimizer.param_groups:
                group["momentum"] = group["momentum"] * self.factor


def test_a_hyperparameter_that_turns_into_state_midway():
    """It acts as a hyperparameter until the first change, and as state from then on: as in the live loop."""
    SCHEDULERS["late"] = Late
    errors = derivative_errors("sgd", "late", steps=9)
    del SCHEDULERS["late"]
    assert "groups.0.momentum" in errors
    assert {path: error for path, error in errors.items() if not error <= GRADIENTS} == {}
    live = start("sgd", Late)
    fn = functional_of(live)
    state, hyper = fn.init(), fn.hyperparameters()
    for batch in BATCHES[:6]:
        state, _ = fn.step(state, batch, hyper)
    assert state.opt_state["groups.0.momentum"] == hyper[0]["momentum"] * 0.25


# ---------------------------------------------------------------------- live objects


def test_nothing_live_is_changed():
    for scheduler in ("multi-step", "sequential", "one-cycle", "lambda-object"):
        live = start("adam", scheduler, warm=2)
        before = copy.deepcopy(vars(live.scheduler)["_last_lr"]), list(vars(live.scheduler).items())
        untouched = Untouched(live.model, live.optimizer)
        attributes = list(vars(live.optimizer).items())
        groups = live.optimizer.param_groups[0]
        fn = functional_of(live)
        fn.unroll(fn.init(), BATCHES[:6])
        untouched.check()
        assert (live.scheduler._last_lr, list(vars(live.scheduler).items())) == before
        assert list(vars(live.optimizer).items()) == attributes
        assert live.optimizer.param_groups[0] is groups
        assert live.scheduler.optimizer is live.optimizer
        losses, _ = run_live(live)
        assert torch.equal(torch.stack(losses), torch.stack(run_live(start("adam", scheduler, warm=2))[0]))


def test_an_optimizer_with_a_scheduler_that_is_not_passed_keeps_its_learning_rate():
    live = start("sgd", "exponential")
    fn = gimli.functionalize(live.model, live.optimizer, squared_error)
    assert "lr" in fn.hyperparameters()[0]
    expected = start("sgd", "exponential")
    for batch in BATCHES[:3]:
        expected.optimizer.zero_grad()
        squared_error(expected.model, batch).backward()
        expected.optimizer.step()
    state, _ = fn.unroll(fn.init(), BATCHES[:3])
    assert relative_error(state.params["weight"], expected.model.weight) <= VALUES


@pytest.mark.parametrize("scheduler", ("step", "cosine", "sequential", "cyclic", "several", "lambda-object"))
@pytest.mark.parametrize("other", (False, True))
def test_live_training_continues_from_what_load_into_wrote(scheduler, other):
    live = start("adam", scheduler)
    fn = functional_of(live)
    state, _ = fn.unroll(fn.init(), BATCHES[:6])
    target = start("adam", scheduler) if other else live
    if other:
        fn.load_into(target.model, target.optimizer, state, target.scheduler)
    else:
        fn.load_into(target.model, target.optimizer, state)
    _, expected = run_live(start("adam", scheduler))
    for batch, params in zip(BATCHES[6:STEPS], expected[6:], strict=True):
        target.step(batch)
        assert relative_error(target.model.weight, params["weight"]) <= VALUES
        assert relative_error(target.model.bias, params["bias"]) <= VALUES
    if other:
        assert float(live.optimizer.param_groups[0]["lr"]) == float(
            start("adam", scheduler).optimizer.param_groups[0]["lr"]
        )


def test_load_into_another_optimizer_asks_for_its_scheduler():
    live, other = start("adam", "step"), start("adam", "step")
    fn = functional_of(live)
    with pytest.raises(gimli.InputError, match="the scheduler passed is none"):
        fn.load_into(other.model, other.optimizer, fn.init())
    with pytest.raises(gimli.InputError, match="the scheduler passed is a ExponentialLR"):
        fn.load_into(other.model, other.optimizer, fn.init(), schedulers.ExponentialLR(other.optimizer, 0.9))


def test_many_tasks_at_once():
    live = start("sgd", "multi-step")
    fn = functional_of(live)
    tasks = [torch.stack([torch.stack([b[i] * (1 + task) for b in BATCHES[:6]]) for task in range(3)]) for i in (0, 1)]
    state, losses = fn.unroll(fn.init(), tuple(tasks), tasks=True)
    for task in range(3):
        alone, expected = fn.unroll(fn.init(), tuple(part[task] for part in tasks))
        assert relative_error(losses[task], expected) <= VALUES
        assert relative_error(state.params["weight"][task], alone.params["weight"]) <= VALUES
        assert relative_error(state.opt_state["groups.0.lr"][task], alone.opt_state["groups.0.lr"]) <= VALUES


# ---------------------------------------------------------------------- what is refused


class Demanding:
    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, metric, epoch):
        self.optimizer.param_groups[0]["lr"] = metric / epoch


def test_a_scheduler_that_needs_more_than_the_loss_is_refused():
    with pytest.raises(gimli.InputError, match=r"`Demanding.step` needs 2 arguments: metric, epoch"):
        functional_of(start("sgd", Demanding))


def test_what_is_no_scheduler_is_refused():
    with pytest.raises(gimli.InputError, match="the scheduler is a float, which has no `step`"):
        functional_of(start("sgd", lambda optimizer: 0.1))


def test_a_scheduler_of_another_optimizer_is_refused():
    other = start("sgd", "step")
    with pytest.raises(gimli.InputError, match="the StepLR is that of another SGD"):
        functional_of(start("sgd", lambda optimizer: other.scheduler))


def test_a_group_for_each_parameter_does_not_go_with_a_scheduler():
    live = start("sgd", "step")
    with pytest.raises(gimli.InputError, match="does not go with a scheduler"):
        gimli.functionalize(live.model, live.optimizer, per_parameter=True, scheduler=live.scheduler)


def test_the_end_of_a_schedule_is_that_of_eager():
    live = start("sgd", make(schedulers.OneCycleLR, 0.2, total_steps=5), warm=3)
    fn = functional_of(live)  # the three steps that are observed do not fit
    state, _ = fn.unroll(fn.init(), BATCHES[:2])
    with pytest.raises(gimli.CaptureError, match="Tried to step 6 times"):
        fn.step(state, BATCHES[2])
