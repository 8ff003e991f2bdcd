"""Loops recorded as graphs of the device, on a CPU with a recorder that does what CUDA graphs do.

The recorder writes down every operator with the tensors that it takes and makes. It replays them into the same memory,
as a graph does: numbers that Python read are those of the recording, and what a run left is gone after the next one.
"""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import gimli_compile as gimli
from gimli_compile.compiled import device_graphs, unrolling
from gimli_compile.compiled.batches import Batches
from gimli_compile.compiled.choice import LoopInputs
from gimli_compile.compiled.device_graphs import numbers_on_device
from tests.test_compiled_loops import CASES, Case, adamw, assert_agree, differentiated, held

RECORDED = {
    "sgd": Case(),
    "adamw": Case(optimizer=adamw),
    "radam": CASES["radam"],
    "batch norm and dropout": CASES["batch norm and dropout"],
    "meta and batches": CASES["meta and batches"],
    "tasks": Case(optimizer=adamw, tasks=3),
    "batch norm and dropout, tasks": CASES["batch norm and dropout, tasks"],
    "checkpoint 2": CASES["checkpoint 2"],
    "checkpoint sqrt, tasks": CASES["checkpoint sqrt, tasks"],
    "mixed": Case(optimizer=adamw, options={"backward": "mixed"}),
    "mixed, sqrt": Case(options={"backward": "mixed", "checkpoint": "sqrt"}),
    "truncate": CASES["truncate"],
    "first order": CASES["first order"],
    "train step": CASES["train step"],
    "held gradients": Case(train_step=held, options={"checkpoint": "step"}),
    "lookahead": CASES["lookahead"],
}


class Written(TorchDispatchMode):
    """Writes down the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise RuntimeError("operation not permitted when stream is capturing\nand more of it")
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made


class Recorder:
    """Counts what it records, and what is replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, function, pool):
        self.recorded += 1
        with Written() as written:
            made = function()

        def replay():
            self.replayed += 1
            for func, args, kwargs, before in written.calls:
                after = func(*args, **kwargs)
                for old, new in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)

        for leaf in pytree.tree_leaves(made):  # recording computes nothing
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                leaf.fill_(float("nan"))
        return made, replay


@pytest.fixture
def recorder(monkeypatch):
    made = Recorder()
    monkeypatch.setitem(device_graphs.RECORDERS, "cpu", made)
    return made


def recording(fn):
    return fn.compile("eager", mode="reduce-overhead")


def compiled(case):
    fn = case.functionalized()
    tasks = {} if case.tasks is None else {"tasks": True}
    fn.unroll(fn.init(), case.batches(), meta=case.meta, **tasks)
    return fn, differentiated(fn.hyperparameters())


def moved(hyper, factor):
    """Returns hyperparameters with other values."""
    for leaf in pytree.tree_leaves(hyper):
        if isinstance(leaf, torch.Tensor):
            leaf.data.mul_(factor)
    return hyper


@pytest.mark.parametrize("name", RECORDED)
def test_replays_give_what_the_loop_gives(name, recorder):
    """Also for other numbers than those at which it was recorded."""
    case = RECORDED[name]
    fn, hyper = compiled(case)
    fast = recording(fn)
    for factor in (1, 1, 1, 0.9, 0.9):
        hyper = moved(hyper, factor)
        expected = case.run(fn, hyper)
        for found, wanted in zip(case.run(fast, hyper), expected, strict=True):
            assert_agree(found, wanted, 1e-12)
    loops = 2 if "truncate" in case.options else 1
    assert recorder.recorded == loops + 1  # there and, where it is differentiated, back
    assert recorder.replayed == 4 * loops + 3


def test_the_live_code_s_values_after_five_runs(recorder):
    case = Case(optimizer=adamw)
    fn = case.functionalized()
    fast, (x, y) = recording(fn), case.batches()
    state, _ = [fast.unroll(fn.init(), (x, y)) for _ in range(5)][-1]
    torch.manual_seed(1)
    model = case.model().double()
    optimizer = adamw(model.parameters())
    for inputs, targets in zip(x, y, strict=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    assert_agree([*state.params.values()], [value.detach() for value in model.parameters()], 1e-12)
    assert recorder.replayed == 4


def test_two_runs_before_their_gradients(recorder):
    """What the first left for its way back must not be overwritten by the second: that one runs without a graph."""
    case = Case()
    fn, hyper = compiled(case)
    fast, (x, y) = recording(fn), case.batches()
    rate = hyper[0]["lr"]

    def outcome(one, scale):
        state, losses = one.unroll(fn.init(), (scale * x, y), hyper)
        return losses.sin().sum() + state.params["0.weight"].square().sum()

    for _ in range(3):
        (outcome(fast, 1.0)).backward()
    rate.grad = None
    before = recorder.replayed
    first, second = outcome(fast, 1.0), outcome(fast, 2.0)
    assert recorder.replayed == before + 1
    found = torch.autograd.grad(first, rate)[0], torch.autograd.grad(second, rate)[0]
    expected = [torch.autograd.grad(outcome(fn, scale), rate)[0] for scale in (1.0, 2.0)]
    assert_agree(found, expected, 1e-12)
    outcome(fast, 1.0)
    assert recorder.replayed == before + 3  # there and back the first time, and again now


def test_gradients_asked_for_twice(recorder):
    case = Case()
    fn, hyper = compiled(case)
    fast, rate = recording(fn), hyper[0]["lr"]
    for _ in range(3):
        _, losses = fast.unroll(fn.init(), case.batches(), hyper)
        first, second = (torch.autograd.grad(losses[-1], rate, retain_graph=True)[0] for _ in range(2))
        _, losses = fn.unroll(fn.init(), case.batches(), hyper)
        expected = torch.autograd.grad(losses[-1], rate)[0]
        assert_agree([first, second], [expected, expected], 1e-12)


def test_results_are_no_part_of_the_graph(recorder):
    """What a run gave stays as it is when the loop runs again."""
    case = Case(optimizer=adamw)
    fn = case.functionalized()
    fast, (x, y) = recording(fn), case.batches()
    runs = [fast.unroll(fn.init(), (scale * x, y)) for scale in (1.0, 1.0, 2.0, 3.0)]
    for scale, run in zip((1.0, 1.0, 2.0, 3.0), runs, strict=True):
        expected = fn.unroll(fn.init(), (scale * x, y))
        assert_agree(pytree.tree_leaves(run), pytree.tree_leaves(expected), 1e-12)


def test_a_condition_that_fails_is_found(recorder):
    class Branching(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {"lr": 0.1})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p -= group["lr"] * p.grad * (1 if p.grad.norm() > 0.3 else 2)

    case = Case(optimizer=Branching)
    fn = case.functionalized()
    fast, (x, y) = recording(fn), case.batches()
    for scale in (1, 1, 1, 0.01, 0.01, 0.01, 1, 1):
        found, expected = (one.unroll(fn.init(), (scale * x, y)) for one in (fast, fn))
        assert_agree(pytree.tree_leaves(found), pytree.tree_leaves(expected), 1e-12)
    assert recorder.replayed


def test_what_cannot_be_recorded_says_so_and_runs(recorder, monkeypatch, caplog):
    def refused(function, pool):
        with Written():
            torch.ones(()).item()

    monkeypatch.setitem(device_graphs.RECORDERS, "cpu", refused)
    case = Case()
    fn, hyper = compiled(case)
    fast = recording(fn)
    expected = case.run(fn, hyper)
    with caplog.at_level(logging.WARNING, logger="gimli_compile"):
        for _ in range(3):
            for found, wanted in zip(case.run(fast, hyper), expected, strict=True):
                assert_agree(found, wanted, 1e-12)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "a loop runs without a graph of the device: operation not permitted when stream is capturing",
    ]


def test_a_way_back_that_cannot_be_recorded_runs_step_by_step(recorder, monkeypatch, caplog):
    def forward_only(function, pool):
        if recorder.recorded:
            raise RuntimeError("not on the way back")
        return recorder(function, pool)

    monkeypatch.setitem(device_graphs.RECORDERS, "cpu", forward_only)
    case = Case()
    fn, hyper = compiled(case)
    fast, expected = recording(fn), case.run(fn, hyper)
    with caplog.at_level(logging.WARNING, logger="gimli_compile"):
        for _ in range(4):
            for found, wanted in zip(case.run(fast, hyper), expected, strict=True):
                assert_agree(found, wanted, 1e-12)
    assert recorder.replayed == 3 and len(caplog.records) == 1


def test_saved_tensor_hooks_see_the_loop_in_python(recorder):
    case = Case()
    fn, hyper = compiled(case)
    fast = recording(fn)
    seen = []
    for _ in range(3):
        with torch.autograd.graph.saved_tensors_hooks(lambda value: seen.append(value) or value, lambda value: value):
            case.run(fast, hyper)
    assert seen and not recorder.recorded


def test_recorded_in_inference_mode(recorder):
    """What was recorded there is written to in other modes as well."""
    case = Case()
    fn = case.functionalized()
    fast, batches = recording(fn), case.batches()
    expected = pytree.tree_leaves(fn.unroll(fn.init(), batches))
    for mode in (torch.inference_mode, torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            found = pytree.tree_leaves(fast.unroll(fn.init(), batches))
        assert_agree(found, expected, 1e-12)
    assert recorder.recorded == 1 and recorder.replayed == 4


def test_threads_do_not_write_over_each_other_s_values(recorder, monkeypatch):
    """A thread that comes while another one replays waits for it."""
    case = Case()
    fn = case.functionalized()
    fast, (x, y) = recording(fn), case.batches()
    for _ in range(2):
        fast.unroll(fn.init(), (x, y))
    copy, entered, found = device_graphs._copy_all, threading.Event(), {}

    def slowly(targets, sources):
        copy(targets, sources)
        if not entered.is_set():
            entered.set()
            other.join(0.5)

    def run(scale):
        found[scale] = pytree.tree_leaves(fast.unroll(fn.init(), (scale * x, y)))

    monkeypatch.setattr(device_graphs, "_copy_all", slowly)
    other = threading.Thread(target=lambda: entered.wait() and run(3.0))
    other.start()
    run(2.0)
    other.join()
    for scale, values in found.items():
        assert_agree(values, pytree.tree_leaves(fn.unroll(fn.init(), (scale * x, y))), 1e-12)
    assert len(found) == 2


class Counting(torch.optim.Optimizer):
    """Counts its steps in a number, and keeps a tensor of its own."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "steps": 0})
        self.state[self.param_groups[0]["params"][0]]["tensor"] = torch.zeros(())

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                p -= group["lr"] / group["steps"] * p.grad
                if "tensor" in self.state[p]:
                    self.state[p]["tensor"] += 1


def test_numbers_go_to_the_device(monkeypatch):
    """Those of the hyperparameters and of the state, differentiably; a tensor stays where the optimizer keeps it."""
    monkeypatch.setitem(device_graphs.RECORDERS, "meta", None)
    fn = Case(optimizer=Counting).functionalized()
    fn.unroll(fn.init(), Case().batches())
    state, rate = fn.init(), torch.tensor(0.1, requires_grad=True)
    inputs = LoopInputs(Batches([torch.zeros(1)], 0), {"groups.0.lr": rate}, None, 2, None)
    assert numbers_on_device(state, inputs) == (state, inputs)
    state.params = {name: value.to("meta") for name, value in state.params.items()}
    moved_state, found = numbers_on_device(state, inputs)
    assert found.hyper["groups.0.lr"].device.type == "meta" and found.hyper["groups.0.lr"].requires_grad
    devices = {path: value.device.type for path, value in moved_state.opt_state.items()}
    assert devices == {"groups.0.steps": "meta", "0.weight.tensor": "cpu"}


def test_another_mode_is_refused():
    with pytest.raises(gimli.InputError, match="mode='fast' is not an option"):
        Case().functionalized().compile(mode="fast")


def test_on_a_cpu_the_mode_changes_nothing():
    case = Case()
    fn, hyper = compiled(case)
    fast = recording(fn)
    for found, wanted in zip(case.run(fast, hyper), case.run(fn, hyper), strict=True):
        assert_agree(found, wanted, 1e-12)


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_every_compiled_loop_moves_numbers_to_the_device(mode, monkeypatch):
    """Without that, the adjoints of a loop would wait for the device at every step."""
    moved = []

    def spy(state, inputs):
        moved.append(inputs)
        return numbers_on_device(state, inputs)

    monkeypatch.setattr(unrolling, "numbers_on_device", spy)
    model = nn.Linear(2, 1)
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b).square().mean())
    fn.compile("eager", mode=mode).unroll(fn.init(), [torch.ones(3, 2)] * 2)
    assert len(moved) == 1
