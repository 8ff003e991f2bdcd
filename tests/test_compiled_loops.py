"""Compiled loops: the values and gradients of the uncompiled ones, which are tested against the live code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_optimizer
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

import gimli_compile as gimli
from gimli_compile.compiled import backends, steps, verification
from gimli_compile.compiled.backends import run_in_python
from gimli_compile.compiled.binding import passed_through
from gimli_compile.compiled.halves import halves

STEPS = 5


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def normalized():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3))


class Pooled(nn.Module):
    """Convolution, batch norm, relu and max-pool: what Inductor got wrong when it was captured with its gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(3), nn.Linear(12, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.first(x.view(-1, 1, 8, 8)))), 2)
        return self.last(F.max_pool2d(F.relu(self.second(x)), 2).flatten(1))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def weighted(model, batch, meta):
    return (F.cross_entropy(model(batch[0]), batch[1], reduction="none") * meta["weights"].sigmoid()).mean()


def clipped(model, optimizer, batch):
    optimizer.zero_grad()
    loss = cross_entropy(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return {"loss": loss, "name": 3, "nothing": None}


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.1)


def lookahead(params):
    return pytorch_optimizer.Lookahead(torch.optim.SGD(params, lr=0.1), k=3)


def sam(params):
    return pytorch_optimizer.SAM(params, base_optimizer=torch.optim.SGD, lr=0.1)


@dataclass(frozen=True)
class Case:
    """A loop, and what of it is differentiated besides parameters and hyperparameters."""

    model: Callable[[], nn.Module] = mlp
    optimizer: Callable[..., Any] = sgd
    loss: Any = cross_entropy
    train_step: Any = None
    meta: Any = None
    inputs: int = 4
    tasks: int | None = None
    of_batches: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def functionalized(self, dtype=torch.float64):
        torch.manual_seed(1)
        model = self.model().to(dtype)
        optimizer = self.optimizer(model.parameters())
        if self.train_step is not None:
            return gimli.functionalize(model, optimizer, train_step=self.train_step)
        return gimli.functionalize(model, optimizer, self.loss)

    def batches(self, dtype=torch.float64):
        torch.manual_seed(2)
        lead = (STEPS,) if self.tasks is None else (self.tasks, STEPS)
        return torch.randn(*lead, 5, self.inputs, dtype=dtype), torch.randint(3, (*lead, 5))

    def run(self, fn, hyper, dtype=torch.float64, steps=slice(None)):
        """Returns the tensors that a loop gives, and their gradients in everything that is differentiated."""
        torch.manual_seed(3)
        state = pytree.tree_map(torch.clone, fn.init())
        state.params = {name: value.requires_grad_() for name, value in state.params.items()}
        x, y = self.batches(dtype)
        x.requires_grad_(self.of_batches)
        meta = pytree.tree_map_only(torch.Tensor, lambda leaf: leaf.clone().requires_grad_(), self.meta)
        leaves = [leaf for leaf in pytree.tree_leaves(hyper) if leaf is not None]
        options = {"tasks": True} if self.tasks is not None else {}
        batches = (x[steps], y[steps]) if self.tasks is None else (x, y)
        last, losses = fn.unroll(state, batches, hyper, meta, **self.options, **options)
        loss = losses["loss"] if isinstance(losses, dict) else losses
        outcome = sum(value.square().sum() for value in last.params.values()) + loss.sin().sum()
        for value in last.opt_state.values():
            outcome = outcome + (value.sum() if value.requires_grad else 0)
        sources = [*state.params.values(), *leaves, *pytree.tree_leaves(meta), *([x] if self.of_batches else [])]
        sources = [source for source in sources if source is not None]
        values = [*last.params.values(), *last.buffers.values(), *last.opt_state.values(), loss]
        return values, torch.autograd.grad(outcome, sources, allow_unused=True)


def differentiated(hyper):
    for leaf in pytree.tree_leaves(hyper):
        if isinstance(leaf, torch.Tensor):
            leaf.requires_grad_()
    return hyper


CASES = {
    "sgd": Case(),
    "adamw": Case(optimizer=adamw),
    "radam": Case(optimizer=lambda p: torch.optim.RAdam(p, lr=0.1)),
    "lookahead": Case(optimizer=lookahead),
    "prodigy": Case(optimizer=lambda p: pytorch_optimizer.Prodigy(p)),
    "sam": Case(optimizer=sam),
    "batch norm and dropout": Case(model=normalized),
    "batch norm and dropout, tasks": Case(model=normalized, tasks=3),
    "max-pool": Case(model=Pooled, inputs=64),
    "meta and batches": Case(
        optimizer=adamw, loss=weighted, meta={"weights": torch.randn(5).double()}, of_batches=True
    ),
    "meta and batches, tasks": Case(loss=weighted, meta={"weights": torch.randn(5).double()}, of_batches=True, tasks=2),
    "tasks": Case(optimizer=adamw, tasks=3),
    "train step": Case(train_step=clipped),
    "checkpoint step": Case(model=normalized, options={"checkpoint": "step"}),
    "checkpoint 2": Case(model=normalized, options={"checkpoint": 2}),
    "checkpoint sqrt, tasks": Case(optimizer=adamw, tasks=2, options={"checkpoint": "sqrt"}),
    "truncate": Case(options={"truncate": 2}),
    "first order": Case(options={"order": 1}),
}


def assert_agree(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        if one is None or other is None:
            assert one is other or not any(part.any() for part in (one, other) if part is not None)
        else:
            difference = (one - other).abs().max() if one.numel() else torch.zeros(())
            assert difference <= tolerance * (1 + other.abs().max()), (difference, other)


def check(case, backend, tolerance):
    fn = case.functionalized()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gimli.BakedValueWarning)
        tasks = {} if case.tasks is None else {"tasks": True}
        fn.unroll(fn.init(), case.batches(), meta=case.meta, **tasks)  # from now on it is known which numbers count
        hyper = differentiated(fn.hyperparameters())
        expected = case.run(fn, hyper)
        fast = fn.compile(backend)
        for _ in range(2):  # while the plan is made, and by the plan
            found = case.run(fast, hyper)
            for one, other in zip(found, expected, strict=True):
                assert_agree(one, other, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_bound_loops_are_equal(name):
    check(CASES[name], "eager", 1e-12)


@pytest.mark.parametrize("name", ["adamw", "meta and batches, tasks", "checkpoint 2"])
def test_torchscript_is_equal(name):
    check(CASES[name], "torchscript", 1e-9)


@pytest.mark.skipif(not backends.has_compiler(), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("name", ["adamw", "tasks", "max-pool"])
def test_inductor_is_equal(name):
    check(CASES[name], "inductor", 1e-9)


def test_a_stateful_optimizer_goes_on_from_either_kind_of_loop():
    case = Case(optimizer=adamw)
    fn = case.functionalized()
    fast, batches = fn.compile("eager"), case.batches()
    halfway, _ = fast.unroll(fn.init(), batches)
    expected, _ = fn.unroll(fn.unroll(fn.init(), batches)[0], batches)
    for one in (fn, fast):
        found, _ = one.unroll(halfway, batches)
        assert_agree(pytree.tree_leaves(found), pytree.tree_leaves(expected), 0)


def test_one_step_is_a_loop_of_one():
    case = Case(model=normalized)
    fn = case.functionalized()
    x, y = case.batches()
    torch.manual_seed(5)
    expected, loss = fn.step(fn.init(), (x[0], y[0]))
    torch.manual_seed(5)
    found, found_loss = fn.compile("eager").step(fn.init(), (x[0], y[0]))
    assert found_loss.shape == loss.shape and torch.equal(found_loss, loss)
    assert_agree(pytree.tree_leaves(found), pytree.tree_leaves(expected), 0)


def test_nothing_is_built_again_for_other_numbers_or_more_steps(monkeypatch):
    built = []

    def count(module):
        built.append(module)
        return run_in_python(module)

    monkeypatch.setitem(backends.BACKENDS, "eager", count)
    case = Case(optimizer=adamw)
    fn = case.functionalized()
    fast, (x, y) = fn.compile("eager", verify=False), case.batches()

    def run(steps, rate):
        state, hyper = fn.init(), fn.hyperparameters()
        hyper[0]["lr"] = torch.tensor(rate, dtype=torch.float64, requires_grad=True)
        indices = torch.arange(steps) % STEPS
        last, _ = fast.unroll(state, (x[indices], y[indices]), hyper)
        (grad,) = torch.autograd.grad(last.params["0.weight"].sum(), hyper[0]["lr"])
        expected, _ = fn.unroll(state, (x[indices], y[indices]), hyper)
        assert_agree([grad], torch.autograd.grad(expected.params["0.weight"].sum(), hyper[0]["lr"]), 1e-12)

    run(4, 0.1)
    first = len(built)
    assert first
    run(4, 0.07)
    run(40, 0.03)
    assert len(built) == first


def test_a_plan_whose_conditions_fail_is_made_again():
    """A learned number that crosses a branch of the step takes other programs, and the loop's values stay right."""

    class Branching(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad.norm() > 0.3 and group["lr"] < 0.5:
                        p -= group["lr"] * p.grad / p.grad.norm()
                    else:
                        p -= 2 * group["lr"] * p.grad

    case = Case(optimizer=lambda params: Branching(params, 0.1))
    fn = case.functionalized()
    fast, (x, y) = fn.compile("eager"), case.batches()
    for rate, scale in [(0.1, 1), (0.1, 0.01), (0.9, 1), (0.1, 1), (0.3, 5)]:
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = torch.tensor(rate, dtype=torch.float64)
        found, losses = fast.unroll(fn.init(), (scale * x, y), hyper)
        expected, expected_losses = fn.unroll(fn.init(), (scale * x, y), hyper)
        assert_agree([*pytree.tree_leaves(found), losses], [*pytree.tree_leaves(expected), expected_losses], 1e-13)


class Exchanging(torch.optim.Optimizer):
    """Holds two directions, of which steps take one by turns, and one tensor that stays as it is."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {"now": torch.ones_like(p), "next": torch.full_like(p, 2.0), "still": torch.full_like(p, 3)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                p -= group["lr"] * (p.grad * state["now"] + state["still"])
                state["now"], state["next"] = state["next"], state["now"]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("steps", [3, 4])
@pytest.mark.parametrize("checkpoint", [None, "sqrt"])
def test_what_steps_only_pass_on_or_exchange_keeps_its_gradient(backend, steps, checkpoint):
    case = Case(optimizer=Exchanging)
    fn = case.functionalized()
    fast, (x, y) = fn.compile(backend), case.batches()

    def run(one):
        state = fn.init()
        start = {name: value.requires_grad_() for name, value in state.opt_state.items()}
        state = gimli.TrainState(state.params, state.buffers, gimli.OptState(state.opt_state.skeleton, start))
        last, losses = one.unroll(state, (x[:steps], y[:steps]), checkpoint=checkpoint)
        values = [*last.params.values(), *last.opt_state.values(), losses]
        weights = torch.arange(1.0, len(values) + 1, dtype=torch.float64)
        outcome = torch.stack([value.sin().sum() for value in values]) @ weights
        return values, torch.autograd.grad(outcome, list(start.values()))

    expected = run(fn)
    for _ in range(2):
        for found, wanted in zip(run(fast), expected, strict=True):
            assert_agree(found, wanted, 1e-12)


def test_what_is_passed_on_is_followed_through_every_step():
    """Of four places, two are exchanged by each step, one stays, and one is computed by the second step."""
    plan: Any = [
        SimpleNamespace(before=SimpleNamespace(slots="abcd"), carry=carry) for carry in ((1, 0, 2, 3), (1, 0, 2, 9))
    ]
    assert passed_through(plan[:1]) == {0: 1, 1: 0, 2: 2, 3: 3}
    assert passed_through(plan) == {0: 0, 1: 1, 2: 2}
    assert passed_through([*plan, plan[0]]) == {0: 1, 1: 0, 2: 2}


@pytest.mark.parametrize("checkpoint", [None, "sqrt"])
def test_a_parameter_that_no_step_changes_keeps_both_of_its_gradients(checkpoint):
    """That of the steps, and that of what is made of it after them."""
    model = mlp().double()
    fn = gimli.functionalize(model, sgd(list(model.parameters())[2:]), cross_entropy)

    def run(one):
        state = fn.init()
        state.params = {name: value.clone().requires_grad_() for name, value in fn.init().params.items()}
        last, losses = one.unroll(state, Case().batches(), checkpoint=checkpoint)
        outcome = losses.sin().sum() + last.params["0.weight"].square().sum()
        return torch.autograd.grad(outcome, list(state.params.values()))

    fast = fn.compile("eager")
    for found in (run(fast), run(fast)):
        assert_agree(found, run(fn), 1e-12)


def test_a_validation_loop_in_inference_mode_leaves_nothing_behind():
    """The live numbers are made tensors once, and a tensor of inference mode can never be differentiated through."""
    case = Case(optimizer=adamw)
    fn = case.functionalized()
    fn.unroll(fn.init(), case.batches())
    fn.optimizer.param_groups[0]["lr"] = 0.2
    with torch.inference_mode():
        fn.unroll(fn.init(), case.batches())
    state = fn.init()
    state.params = {name: value.requires_grad_() for name, value in state.params.items()}
    last, _ = fn.unroll(state, case.batches())
    grads = torch.autograd.grad(last.params["0.weight"].sum(), list(state.params.values()), allow_unused=True)
    assert grads[0] is not None and bool(grads[0].any())


def test_a_compiled_loop_differentiated_twice_is_refused():
    case = Case()
    fn = case.functionalized()
    hyper = differentiated(fn.hyperparameters())
    last, _ = fn.compile("eager").unroll(fn.init(), case.batches(), hyper)
    (grad,) = torch.autograd.grad(last.params["0.weight"].sum(), hyper[0]["lr"], create_graph=True)
    with pytest.raises(gimli.InputError, match="a compiled loop is differentiated twice"):
        torch.autograd.grad(grad, hyper[0]["lr"])


def test_a_compiled_loop_under_a_transform_is_refused():
    case = Case()
    fn = case.functionalized()
    fast, batches = fn.compile("eager"), case.batches()

    def outcome(rate):
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = rate
        return fast.unroll(fn.init(), batches, hyper)[1].sum()

    with pytest.raises(gimli.InputError, match=r"runs under a transform of torch\.func"):
        torch.func.grad(outcome)(torch.tensor(0.1, dtype=torch.float64))


def test_values_changed_before_the_backward_pass_are_noticed():
    case = Case()
    fn = case.functionalized()
    state = fn.init()
    state.params = {name: value.clone().requires_grad_() for name, value in state.params.items()}
    last, _ = fn.compile("eager").unroll(state, case.batches())
    with torch.no_grad():
        state.params["0.weight"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        last.params["0.weight"].sum().backward()


@pytest.mark.parametrize("half", ["step", "adjoint"])
def test_verify_finds_a_backend_that_computes_something_else(monkeypatch, half):
    """As Inductor did with a captured conv, relu and max-pool: one operator comes out wrong."""

    def miscompile(module):
        graph, copies = torch.fx.Graph(), {}
        for node in module.graph.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        is_adjoint = any("tangents" in node.name for node in graph.nodes)
        for node in graph.nodes:
            if node.target is torch.ops.aten.tanh.default and half == "step":
                node.target = torch.ops.aten.sin.default
            if node.target is torch.ops.aten.mm.default and half == "adjoint" and is_adjoint:
                with graph.inserting_after(node):
                    wrong = graph.call_function(torch.ops.aten.mul.Tensor, (node, 1.001))
                node.replace_all_uses_with(wrong, delete_user_cb=lambda user, wrong=wrong: user is not wrong)
        wrong_module = torch.fx.GraphModule(module, graph)
        return lambda inputs: wrong_module(*inputs)

    monkeypatch.setitem(backends.BACKENDS, "eager", miscompile)
    case = Case()
    fn = case.functionalized()
    hyper = differentiated(fn.hyperparameters())
    name = "tanh" if half == "step" else "mm"
    with pytest.raises(gimli.CompileError, match=rf"computes something else[\s\S]*{name}"):
        fn.compile("eager").unroll(fn.init(), case.batches(), hyper)[1].sum().backward()
    _, losses = fn.compile("eager", verify=False).unroll(fn.init(), case.batches(), hyper)
    expected = fn.unroll(fn.init(), case.batches(), hyper)[1]
    (wrong,) = torch.autograd.grad(losses.sum(), hyper[0]["lr"])
    (right,) = torch.autograd.grad(expected.sum(), hyper[0]["lr"])
    assert (wrong - right).abs() > 1e-6 * right.abs()


def test_verify_says_among_which_operators_the_wrong_one_is_when_time_runs_out(monkeypatch):
    monkeypatch.setattr(verification, "_PATIENCE", 0)
    graph = fx_of(lambda x: (x.tanh().sin().exp(),), torch.ones(3))
    wrong = verification.verified(lambda _: lambda inputs: [inputs[0] + 1], graph, "step")
    with pytest.raises(gimli.CompileError, match=r"is one of 3, from tanh = aten\.tanh\S* to exp = aten\.exp"):
        wrong([torch.randn(3)])


def fx_of(function, *examples):
    return make_fx(function, tracing_mode="fake")(*examples)


def test_verify_takes_what_is_left_of_a_cancellation_for_rounding():
    """The gradient of a bias before batch norm is zero; what is computed is noise, whatever the order of the sum."""

    def left_over(x):
        return [(x - x.mean(0)).sum(0)]

    x = torch.randn(37, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    module = fx_of(left_over, x)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(4))
    other = verification.verified(lambda module: lambda inputs: module(inputs[0][order]), module, "sum")
    assert not torch.equal(other([x])[0], module(x)[0])
    wrong = verification.verified(lambda module: lambda inputs: [module(*inputs)[0] + 1e-8], module, "sum")
    with pytest.raises(gimli.CompileError):
        wrong([x])


def test_verify_takes_a_crossed_kink_for_rounding():
    """A relu whose input rounds to the other side of zero changes the gradient by much more than rounding does.

    It was taken for a fault of the backend in a network of 10 million relus, of which one had crossed.
    """
    graph = fx_of(lambda x, seed: (torch.where(x.sum(-1) <= 0, 0, seed).sum(0),), torch.ones(64, 2), torch.ones(64))
    x = torch.linspace(-1, 1, 64)[:, None].repeat(1, 2)
    x[40:44] = torch.tensor([1.0, -1.0 + 2e-7])
    inputs, crossed = [x, torch.ones(64)], [x.clone(), torch.ones(64)]
    crossed[0][40, 1] = -1 - 2e-7
    found = graph(*crossed)
    assert found[0] == graph(*inputs)[0] - 1
    assert not verification._is_wrong(found, graph, inputs)
    assert verification._is_wrong([found[0] - 4], graph, inputs)


def test_a_double_that_floats_add_up_to_is_as_exact_as_they():
    """Learning rates are float64, and so are their adjoints, of float32 tensors."""
    graph = fx_of(lambda x, y: ((x * y).sum().double() + 0,), torch.ones(100), torch.ones(100))
    inputs = [torch.ones(100), torch.ones(100)]
    (expected,) = graph(*inputs)
    assert not verification._is_wrong([expected * (1 + 1e-7)], graph, inputs)
    assert verification._is_wrong([expected * (1 + 1e-2)], graph, inputs)
    exact = fx_of(lambda x: (x + 0,), torch.ones(3, dtype=torch.float64))
    value = torch.ones(3, dtype=torch.float64)
    assert verification._is_wrong([value * (1 + 1e-7)], exact, [value])


@pytest.mark.parametrize("outcomes", [(True,), (False,), (True, False, True, False, False)])
def test_conditions_hold_if_each_came_out_as_it_should(outcomes):
    def held(*values):
        conditions = steps._Conditions()
        for value, outcome in zip(values, outcomes, strict=True):
            conditions.add(value != 0, outcome)
        return [conditions.all()]

    values = [torch.full((), float(outcome)) for outcome in outcomes]
    assert held(*values)[0]
    for index, value in enumerate(values):
        assert not held(*values[:index], 1 - value, *values[index + 1 :])[0]
        row = torch.stack([value, 1 - value])
        assert not held(*values[:index], row, *values[index + 1 :])[0]
        assert held(*values[:index], row[[0, 0]], *values[index + 1 :])[0]


def test_each_condition_takes_one_operator():
    """Of the operators of a step with a learning rate for each of 119 tensors, two in five were conditions."""

    def held(*values):
        conditions = steps._Conditions()
        for index, value in enumerate(values):
            conditions.add(value != 0, index % 2 == 0)
        return [conditions.all()]

    graph = fx_of(held, *[torch.ones(())] * 100)
    assert len(list(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.ne.Scalar))) == 100
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert len(calls) == 200


def test_verify_takes_rounding_for_rounding(monkeypatch):
    """An ill-conditioned program in float32 may differ by much and is not wrong."""

    def rounded(module):
        return lambda inputs: [value * (1 + 1e-7) if value.is_floating_point() else value for value in module(*inputs)]

    graph = torch.fx.symbolic_trace(lambda x: (((x + 1e6) - 1e6).square(),))
    inputs = [torch.randn(100)]
    assert not verification._is_wrong(graph(inputs[0] * (1 + 1e-7)), graph, inputs)
    assert verification._is_wrong(graph(inputs[0] * 1.5 + 1), graph, inputs)
    monkeypatch.setitem(backends.BACKENDS, "eager", rounded)
    case = Case(optimizer=adamw)
    fn = case.functionalized(torch.float32)
    fn.compile("eager").unroll(fn.init(), case.batches(torch.float32))


def test_an_unknown_backend_is_refused():
    with pytest.raises(gimli.InputError, match="backend='nvfuser' is not an option"):
        Case().functionalized().compile("nvfuser")


def test_batches_of_several_structures_are_refused():
    case = Case()
    x, y = case.batches()
    fn = gimli.functionalize(
        *(lambda m: (m, sgd(m.parameters())))(mlp().double()), lambda m, b: cross_entropy(m, b[:2])
    )
    with pytest.raises(gimli.InputError, match="batch 1 has other tensors than batch 0"):
        fn.compile("eager").unroll(fn.init(), [(x[0], y[0]), (x[1], y[1], x[1])])


@pytest.mark.parametrize("backend", ["eager", "torchscript"])
def test_the_forward_pass_is_compiled_as_well(backend):
    case = Case(model=normalized)
    fn = case.functionalized()
    fast = fn.compile(backend)
    x, _ = case.batches()
    results = []
    for one in (fn, fast, fast):
        torch.manual_seed(7)
        state = fn.init()
        state.params = {name: value.requires_grad_() for name, value in state.params.items()}
        output, buffers = one.forward(state.params, state.buffers, x[0])
        grads = torch.autograd.grad(output.sin().sum(), list(state.params.values()), allow_unused=True)
        results.append(([output, *buffers.values()], grads))
    for found in results[1:]:
        assert_agree(found[0], results[0][0], 1e-13)
        assert_agree(found[1], results[0][1], 1e-11)


def test_the_forward_pass_of_many_tasks():
    case = Case(model=normalized, tasks=3)
    fn = case.functionalized()
    state, _ = fn.unroll(fn.init(), case.batches(), tasks=True)
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    torch.manual_seed(4)
    expected = fn(state, x, tasks=True)
    torch.manual_seed(4)
    assert_agree([fn.compile("eager")(state, x, tasks=True)], [expected], 1e-13)


def held(model, optimizer, batch):
    """Gradients add up over two calls: what is in `p.grad` goes from one to the next."""
    loss = cross_entropy(model, batch)
    loss.backward()
    optimizer.step()
    return loss


@pytest.mark.parametrize("options", [{}, {"checkpoint": "step"}], ids=["kept", "recomputed"])
def test_gradients_held_between_calls(options):
    check(Case(train_step=held, options=options), "eager", 1e-12)


def test_frozen_buffers_stay():
    torch.manual_seed(0)
    model = normalized().double()
    fn = gimli.functionalize(model, sgd(model.parameters()), cross_entropy, buffers="freeze")
    batches = Case().batches()
    torch.manual_seed(0)
    expected, losses = fn.unroll(fn.init(), batches)
    torch.manual_seed(0)
    found, found_losses = fn.compile("eager").unroll(fn.init(), batches)
    assert_agree([*pytree.tree_leaves(found), found_losses], [*pytree.tree_leaves(expected), losses], 1e-13)
    assert torch.equal(found.buffers["1.running_mean"], fn.init().buffers["1.running_mean"])


@pytest.mark.parametrize("backend", ["eager", "torchscript"])
def test_convolutions_of_many_tasks(backend):
    """Gradients of batched convolutions lie in memory otherwise than a trace without values says: views failed."""
    check(Case(model=Pooled, inputs=64, tasks=2), backend, 1e-9)


def test_tasks_with_states_of_their_own():
    """The form of such a state was compared with the model's, and refused."""
    fn = Case().functionalized()
    states = pytree.tree_map(lambda value: torch.stack([value, 0.5 * value]), fn.init())
    batches = Case(tasks=2).batches()
    expected, losses = fn.unroll(states, batches, tasks=(0, 0, None, None))
    found, found_losses = fn.compile("eager").unroll(states, batches, tasks=(0, 0, None, None))
    assert_agree([*pytree.tree_leaves(found), found_losses], [*pytree.tree_leaves(expected), losses], 1e-13)
    with pytest.raises(gimli.InputError, match="but the model's is"):
        fn.compile("eager").unroll(states, batches, tasks=True)


def test_accumulators_do_not_take_the_names_of_residuals():
    """A residual that was a sum, and the accumulator of an adjoint, were both named sum_2."""
    vectors = [torch.linspace(1, 2, 5, dtype=torch.float64) * scale for scale in (1, 2, 3)]

    def product(*values):
        first, second, third = (value.sum(0) for value in values)
        return [first * second * third]

    made = halves(product, vectors, range(3), frozenset(range(3)), None)
    assert made.backward is not None
    results = made.saving(*vectors)
    known = [*vectors, *results]
    sums = [torch.full((5,), float(index), dtype=torch.float64) for index in range(3)]
    found = made.backward(*(known[place] for place in made.residuals), torch.ones((), dtype=torch.float64), *sums)
    for index, adjoint in enumerate(found):
        others = [value.sum() for place, value in enumerate(vectors) if place != index]
        torch.testing.assert_close(adjoint, (others[0] * others[1] + index).expand(5))
