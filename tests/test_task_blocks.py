"""Large tasks in blocks: what all tasks together give, and what the live code gives for each task alone."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

import gimli_compile as gimli
from gimli_compile.compiled import task_blocks
from gimli_compile.compiled.task_blocks import TaskBlocks
from tests.test_compiled_loops import (
    CASES,
    Case,
    adamw,
    assert_agree,
    check,
    clipped,
    cross_entropy,
    normalized,
    weighted,
)

META = {"weights": torch.randn(5).double()}
BLOCKED = {
    "adamw": Case(optimizer=adamw, tasks=3),
    "meta and batches": CASES["meta and batches, tasks"],
    "recomputed": CASES["checkpoint sqrt, tasks"],
    "mixed": Case(optimizer=adamw, tasks=3, options={"backward": "mixed"}),
    "mixed, sqrt, meta": Case(
        loss=weighted, meta=META, of_batches=True, tasks=2, options={"backward": "mixed", "checkpoint": "sqrt"}
    ),
    "truncate": Case(tasks=3, options={"truncate": 2}),
    "first order": Case(tasks=3, options={"order": 1}),
    "batch norm": Case(model=lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), tasks=3),
    "train step": Case(train_step=clipped, tasks=3),
}


@pytest.fixture
def of(monkeypatch):
    """Makes blocks of so many tasks, and returns a list of the sizes that loops chose."""
    chosen: list[int | None] = []
    size = TaskBlocks.size

    def watched(self, state, inputs):
        chosen.append(size(self, state, inputs))
        return chosen[-1]

    def choose(bytes_of_block):
        monkeypatch.setattr(task_blocks, "BLOCK_BYTES", bytes_of_block)
        monkeypatch.setattr(TaskBlocks, "size", watched)
        return chosen

    return choose


@pytest.mark.parametrize("name", BLOCKED)
def test_blocks_of_one_give_what_all_give(name, of):
    chosen = of(1)
    check(BLOCKED[name], "eager", 1e-12)
    assert {1} <= set(chosen) <= {1, None}  # the tasks of a block are asked about as well


def test_blocks_of_some_tasks(of, monkeypatch):
    chosen = of(1)
    monkeypatch.setattr(TaskBlocks, "_new_size", lambda *_: 2)
    for case in (Case(optimizer=adamw, tasks=4), replace(CASES["meta and batches, tasks"], tasks=6)):
        check(case, "eager", 1e-12)
    assert 2 in chosen


def test_the_size_divides_the_tasks_and_fits_the_bytes(of, monkeypatch):
    case = Case(tasks=12)
    fn = case.functionalized()
    chosen = of(task_blocks.BLOCK_BYTES)
    fn.compile("eager").unroll(fn.init(), case.batches(), tasks=True)
    assert chosen == [None]  # small tasks run together
    monkeypatch.setattr(task_blocks, "made_bytes", lambda _: 1000)
    for size, wanted in ((1, 1), (1000, 1), (2100, 2), (3900, 4), (5500, 6), (40000, None)):
        chosen.clear()
        of(size)
        fn.compile("eager").unroll(fn.init(), case.batches(), tasks=True)
        assert chosen[0] == wanted


def test_large_convolutions_run_one_task_at_a_time(of, monkeypatch):
    def convolving():
        return nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(4, 3))

    case = Case(model=convolving, tasks=4)
    chosen = of(1 << 30)
    check(case, "eager", 1e-12)
    assert set(chosen) == {None}
    monkeypatch.setattr(task_blocks, "ALONE_BYTES", 1)
    check(case, "eager", 1e-12)
    assert 1 in chosen


def live_training(case: Case, task: int) -> list[torch.Tensor]:
    """Trains on one task by the live objects; returns the parameters."""
    torch.manual_seed(1)
    model = copy.deepcopy(case.model().double())
    optimizer = case.optimizer(model.parameters())
    x, y = case.batches()
    for inputs, targets in zip(x[task], y[task], strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return [value.detach() for value in model.parameters()]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_every_task_ends_where_live_training_does(backend, of):
    of(1)
    case = Case(optimizer=adamw, tasks=3)
    fn = case.functionalized()
    fast = fn.compile(backend)
    for _ in range(2):
        state, losses = fast.unroll(fn.init(), case.batches(), tasks=True)
        assert losses.shape == (3, 5)
        for task in range(3):
            found = [value[task] for value in state.params.values()]
            assert_agree(found, live_training(case, task), 1e-10)


def test_the_gradient_is_that_of_finite_differences(of):
    of(1)
    case = Case(optimizer=adamw, tasks=3)
    fn = case.functionalized()
    fast, batches = fn.compile("eager"), case.batches()

    def outcome(rate):
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = rate
        state, _ = fast.unroll(fn.init(), batches, hyper, tasks=True)
        return fast.loss(state, (batches[0][:, 0], batches[1][:, 0]), tasks=True).sum()

    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(outcome(rate), rate)
    with torch.no_grad():
        step = 1e-6
        expected = (outcome(rate + step) - outcome(rate - step)) / (2 * step)
    assert abs(found - expected) <= 1e-6 * (1 + abs(expected)) and found != 0


def test_hyperparameters_and_states_of_their_own(of):
    """Each task has its learning rate and its start; lists of batches; a batch that all tasks share."""
    case = Case(tasks=3)
    fn = case.functionalized()
    x, y = case.batches()
    steps = [(x[0, step], y[0, step]) for step in range(3)]

    def run(one):
        rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = rates
        for name in ("momentum", "weight_decay", "dampening"):
            hyper[0][name] = torch.as_tensor(hyper[0][name], dtype=torch.float64).expand(3)
        start = {name: torch.stack([value, 2 * value, 3 * value]) for name, value in fn.init().params.items()}
        start = {name: value.detach().requires_grad_() for name, value in start.items()}
        state = gimli.TrainState(start, fn.init().buffers, fn.init().opt_state)
        last, losses = one.unroll(state, steps, hyper, tasks=(0, None, 0, None))
        outcome = losses.sum() + sum(value.sin().sum() for value in last.params.values())
        return [*last.params.values(), losses], torch.autograd.grad(outcome, [rates, *start.values()])

    expected = run(fn)
    chosen = of(1)
    fast = fn.compile("eager")
    for _ in range(2):
        for found, wanted in zip(run(fast), expected, strict=True):
            assert_agree(found, wanted, 1e-12)
    assert 1 in chosen


def test_steps_that_draw_run_together(of):
    """The noise of all tasks is drawn step by step, as uncompiled."""
    chosen = of(1)
    check(Case(model=normalized, tasks=3), "eager", 1e-12)
    assert set(chosen) == {None}


class DrawsOwn(nn.Module):
    """A model with a generator of its own."""

    def __init__(self):
        super().__init__()
        self.linear, self.generator = nn.Linear(4, 3), torch.Generator().manual_seed(5)

    def forward(self, x):
        return self.linear(x) + 0.1 * torch.randn(5, 3, dtype=x.dtype, generator=self.generator)


class StepsByOwn(torch.optim.Optimizer):
    """Adds noise of a generator of its own, from some step on."""

    def __init__(self, params, first=0):
        super().__init__(params, {"lr": 0.1, "steps": 0})
        self.first, self.generator = first, torch.Generator().manual_seed(5)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                p -= group["lr"] * p.grad
                if group["steps"] > self.first:
                    p += 0.01 * torch.randn(p.shape, dtype=p.dtype, generator=self.generator)


OWN = {
    "model": Case(model=DrawsOwn, tasks=3),
    "optimizer": Case(optimizer=StepsByOwn, tasks=3),
    "optimizer, later": Case(optimizer=lambda params: StepsByOwn(params, first=2), tasks=3),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("bytes_of_block", [1, 16 << 20])
def test_blocks_take_no_numbers_of_other_generators(name, bytes_of_block, of, monkeypatch):
    """Numbers that are drawn to find the size of blocks, or before a block gives up, are drawn again."""
    case, chosen = OWN[name], of(bytes_of_block)

    def run():
        fn = case.functionalized()
        fast = fn.compile("eager")
        return [fast.unroll(fn.init(), case.batches(), tasks=True)[1] for _ in range(2)]

    found = run()
    assert (1 in chosen) == (name == "optimizer, later" and bytes_of_block == 1)
    monkeypatch.setattr(TaskBlocks, "size", lambda *_: None)
    assert_agree(found, run(), 1e-12)
    fn = case.functionalized()
    assert_agree(found, [fn.unroll(fn.init(), case.batches(), tasks=True)[1] for _ in range(2)], 1e-12)


def train_live(case: Case) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model = case.model().double()
    optimizer = case.optimizer(model.parameters())
    return [clipped(model, optimizer, batch)["loss"].detach() for batch in zip(*case.batches(), strict=True)]


@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_capture_takes_no_numbers_of_other_generators(name):
    """All that the live code draws after capture is what it would have drawn without."""
    case = replace(OWN[name], tasks=None, train_step=clipped)
    expected = train_live(case)
    for compiles in (False, True):
        fn = case.functionalized()
        one = fn.compile("eager") if compiles else fn
        returned: Any = one.unroll(fn.init(), case.batches())[1]
        assert_agree([returned["loss"]], [torch.stack(expected)], 1e-12)


@pytest.mark.parametrize("compiles", [False, True])
def test_capture_of_a_loss_takes_no_numbers_of_other_generators(compiles):
    case = replace(OWN["model"], tasks=None)
    x, y = case.batches()
    torch.manual_seed(1)
    model = case.model().double()
    optimizer = case.optimizer(model.parameters())
    expected = []
    for batch in zip(x, y, strict=True):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        expected.append(loss.detach())
    fn = case.functionalized()
    one = fn.compile("eager") if compiles else fn
    assert_agree([one.unroll(fn.init(), (x, y))[1]], [torch.stack(expected)], 1e-12)


class DrawsLater(torch.optim.Optimizer):
    """Adds noise from the third step on."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                p -= group["lr"] * p.grad
                if group["steps"] > 2:
                    p += 0.01 * torch.randn_like(p)


def test_draws_that_begin_later_are_those_of_all_tasks_together(of):
    chosen = of(1)
    check(Case(optimizer=DrawsLater, tasks=3), "eager", 1e-12)
    assert 1 in chosen  # blocks were tried


class Remembers(torch.optim.Optimizer):
    """Makes a state for what has a large gradient only."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad.norm() > 1.0:
                    self.state[p]["large"] = p.grad.clone()
                p -= group["lr"] * p.grad


def test_tasks_that_end_with_other_states_are_refused_as_ever(of):
    chosen = of(1)
    case = Case(optimizer=Remembers, tasks=2)
    fn = case.functionalized()
    x, y = case.batches()
    x = torch.stack([10 * x[0], 0.001 * x[1]])
    for _ in range(2):
        with pytest.raises(gimli.GimliError):
            fn.compile("eager").unroll(fn.init(), (x, y), tasks=True)
    assert 1 in chosen


def test_one_tensor_for_two_hyperparameters_stays_one(of):
    case = Case(optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.1), tasks=2)
    fn = case.functionalized()
    fast = fn.compile("eager")

    def run(one):
        both = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = hyper[0]["momentum"] = both
        _, losses = one.unroll(fn.init(), case.batches(), hyper, tasks=True)
        return [losses], torch.autograd.grad(losses.sum(), both)

    expected = run(fn)
    of(1)
    for found, wanted in zip(run(fast), expected, strict=True):
        assert_agree(found, wanted, 1e-12)


def test_the_loss_of_large_tasks_runs_in_blocks(of):
    chosen = of(1)
    fn = Case(tasks=3).functionalized()
    x, y = Case(tasks=3).batches()
    start = {name: value.expand(3, *value.shape) for name, value in fn.init().params.items()}
    state = gimli.TrainState(start, fn.init().buffers, fn.init().opt_state)
    batch = (x[:, 0], y[:, 0])
    expected, found = fn.loss(state, batch, tasks=True), fn.compile("eager").loss(state, batch, tasks=True)
    assert found.shape == (3,) and 1 in chosen
    assert_agree([found], [expected], 1e-12)


def test_auto_counts_the_memory_of_one_block(of):
    """In mixed mode, which keeps states, the values of a step are those of the tasks that run together."""
    case = Case(tasks=8)
    fn = case.functionalized()
    fast = fn.compile("eager")

    def chosen(memory):
        fast.unroll(fn.init(), case.batches(), tasks=True, backward="auto", memory=memory)
        assert fast.last_plan is not None
        return fast.last_plan

    generous = chosen("1GB")
    assert generous.backward == "reverse"
    together = chosen(generous.bytes - 1)
    of(1)
    fast = fn.compile("eager")
    alone = chosen(generous.bytes - 1)
    assert alone.bytes < together.bytes
    assert chosen("1GB").bytes == generous.bytes


def uneven(fn):
    """Returns calls of which not all inputs have the same number of tasks."""
    x, y = Case(tasks=3).batches()
    start = {name: torch.stack([value, value]) for name, value in fn.init().params.items()}
    two = gimli.TrainState(start, fn.init().buffers, fn.init().opt_state)
    rates = fn.hyperparameters()
    for name, value in rates[0].items():
        if value is not None:
            rates[0][name] = torch.as_tensor(value, dtype=torch.float64).expand(4)
    yield lambda one: one.unroll(fn.init(), (x, torch.cat([y, y])), tasks=True)
    yield lambda one: one.unroll(two, (x, y), tasks=(0, 0, None, None))
    yield lambda one: one.unroll(fn.init(), (x, y), rates, tasks=(None, 0, 0, None))
    yield lambda one: one.loss(two, (x[:, 0], y[:, 0]), tasks=True)


@pytest.mark.parametrize("index", range(4))
def test_inputs_of_different_numbers_of_tasks_are_refused(index, of):
    fn = Case(tasks=3).functionalized()
    call = list(uneven(fn))[index]
    with pytest.raises(ValueError, match="same size"):
        call(fn)
    of(1)
    fast = fn.compile("eager")
    for _ in range(2):
        with pytest.raises(gimli.InputError, match="tasks"):
            call(fast)


def returning(kind):
    """Returns a train step that returns something else, by `kind`, where the loss is large: in the first of three."""

    def step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = cross_entropy(model, batch)
        loss.backward()
        optimizer.step()
        return {"loss": loss, "found": kind(loss, loss > 1.25)}

    return step


KINDS = {
    "text": lambda loss, is_large: "large" if is_large else "small",
    "nothing": lambda loss, is_large: None if is_large else loss,
    "precision": lambda loss, is_large: loss.float() if is_large else loss,
}


@pytest.mark.parametrize("name", KINDS)
def test_tasks_that_return_other_things_are_refused_as_ever(name, of):
    chosen = of(1)
    case = Case(train_step=returning(KINDS[name]), tasks=3)
    fn = case.functionalized()
    x, y = case.batches()
    for one in (fn, fn.compile("eager")):
        with pytest.raises(gimli.CaptureError, match="do not settle"):
            one.unroll(fn.init(), (x[:, :1], y[:, :1]), tasks=True)
    assert 1 in chosen


@dataclass
class Out:
    """What a step, or a model, returns."""

    value: torch.Tensor
    name: str


def described(model, optimizer, batch):
    optimizer.zero_grad()
    loss = cross_entropy(model, batch)
    loss.backward()
    optimizer.step()
    return Out(loss, "loss")


def test_dataclasses_hold_the_values_of_all_tasks(of):
    plain, case = Case(tasks=3).functionalized(), Case(train_step=described, tasks=3)
    _, expected = plain.unroll(plain.init(), case.batches(), tasks=True)
    chosen = of(1)
    fn = case.functionalized()
    _, found = fn.compile("eager").unroll(fn.init(), case.batches(), tasks=True)
    assert isinstance(found, Out) and found.name == "loss" and 1 in chosen
    assert_agree([found.value], [expected], 1e-12)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(
    "options",
    [{}, {"truncate": 2}, {"tasks": True}, {"checkpoint": 2}, {"backward": "forward"}],
    ids=["reverse", "truncate", "tasks", "checkpoint", "forward"],
)
def test_dataclasses_hold_the_values_of_all_steps(compiles, options):
    """And carry their gradients."""
    case = Case(train_step=described, tasks=3 if "tasks" in options else None)
    plain, fn = replace(case, train_step=None).functionalized(), case.functionalized()

    def run(one):
        hyper = plain.hyperparameters()
        rate = hyper[0]["lr"].requires_grad_()
        return one.unroll(one.init(), case.batches(), hyper, **options)[1], rate

    (expected, rate), (found, other) = run(plain), run(fn.compile("eager") if compiles else fn)
    assert isinstance(found, Out) and found.name == "loss"
    grads = [torch.autograd.grad(value.sum(), leaf)[0] for value, leaf in ((expected, rate), (found.value, other))]
    assert_agree([found.value, grads[1]], [expected, grads[0]], 1e-12)


class Describing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return Out(self.linear(x), "output")


def test_dataclasses_of_a_model_hold_the_values_of_all_tasks(of):
    chosen = of(1)
    fn = Case(model=Describing, loss=lambda model, batch: model(batch).value.sum()).functionalized()
    start = {name: torch.stack([value, 2 * value, 3 * value]) for name, value in fn.init().params.items()}
    state = gimli.TrainState(start, fn.init().buffers, fn.init().opt_state)
    x = torch.randn(3, 5, 4).double()
    found = fn.compile("eager")(state, x, tasks=True)
    expected = torch.einsum("tbi,toi->tbo", x, start["linear.weight"]) + start["linear.bias"][:, None]
    assert found.name == "output" and 1 in chosen
    assert_agree([found.value], [expected], 1e-12)
