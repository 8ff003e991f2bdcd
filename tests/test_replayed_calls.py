"""Calls that are replayed: what the call that was read gives, and never where something else was asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from buffered import Affine
from torch import nn
from torch.autograd import forward_ad

import gimli_compile as gimli
from gimli_compile.compiled import backends, replays
from gimli_compile.compiled.unrolling import LoopCompiler

pytestmark = pytest.mark.skipif(not backends.has_compiler(), reason="Inductor needs a C++ compiler")


def loss_fn(model, batch, meta):
    errors = (model(batch["x"]) - batch["y"]) ** 2
    return errors.mean() if meta is None else (errors * meta["weights"].exp()).mean() * meta["scale"]


def made(**options):
    torch.manual_seed(0)
    model = Affine().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    fn = gimli.functionalize(model, optimizer, loss_fn, **options)
    return optimizer, model, fn, fn.compile("inductor")


def batches(seed=0, *lead):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*(lead or (3,)), 4, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "y": x.sin()[..., :2].contiguous()}


def differentiated(fn, seed):
    """Returns a state and hyperparameters with leaves of their own, and these leaves."""
    state, hyper = fn.init(), fn.hyperparameters()
    shift = 0.01 * seed
    state.params = {name: (value + shift).requires_grad_() for name, value in state.params.items()}
    hyper[0]["lr"] = torch.tensor(0.1 + shift, dtype=torch.float64, requires_grad=True)
    return state, hyper, [*state.params.values(), hyper[0]["lr"]]


@pytest.fixture
def played(monkeypatch):
    """Counts the loops that are replayed."""
    count = {"played": 0}
    run = replays.Replay.__call__

    def counting(self, tensors):
        found = run(self, tensors)
        count["played"] += found is not None
        return found

    monkeypatch.setattr(replays.Replay, "__call__", counting)
    return count


def compare(found, expected, tolerance=1e-12):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


def outcome(fn, seed, *, hyper=True, given=None, **options):
    """Returns values and gradients of a loop with a loss at its end."""
    state, rates, leaves = differentiated(fn, seed)
    if "tasks" in options:
        given = batches(seed, 2, 3) if given is None else given
        held = batches(seed + 50, 2)
    else:
        given = batches(seed) if given is None else given
        held = {name: value[0] for name, value in batches(seed + 50).items()}
    last, losses = fn.unroll(state, given, rates if hyper else None, **options)
    loss = fn.loss(last, held, tasks="tasks" in options)
    leaves = leaves if hyper else leaves[:-1]
    found = torch.autograd.grad(loss.sum() + losses.sin().sum(), leaves)
    return [*last.params.values(), *last.buffers.values(), *last.opt_state.values(), losses, loss, *found]


VARIANTS = {
    "plain": {},
    "live hyperparameters": {"hyper": False},
    "list": {"given": [{name: value[step] for name, value in batches(9).items()} for step in range(3)]},
    "tasks": {"tasks": True},
    "tasks with states as named": {"tasks": (None, 0, None, None)},
    "recomputed": {"checkpoint": "sqrt"},
    "mixed": {"backward": "mixed"},
    "first order": {"order": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients(name, played):
    """Every call has other values; the last are replayed, and give what the uncompiled functions give."""
    _, _, fn, fast = made()
    for seed in range(5):
        compare(outcome(fast, seed, **VARIANTS[name]), outcome(fn, seed, **VARIANTS[name]))
        assert seed > 1 or not played["played"]
    assert played["played"] >= 4  # loop and loss, twice


def test_steps_and_forward_passes(played):
    """`step`, `loss` and the model's output, with and without gradients."""
    _, model, fn, fast = made()
    x = batches(1)

    def run(one, seed):
        state, hyper, leaves = differentiated(one, seed)
        batch = {key: value[seed % 3] for key, value in x.items()}
        last, loss = one.step(state, batch, hyper)
        out, buffers = one.forward(last.params, last.buffers, batch["x"])
        with torch.no_grad():
            alone = one.step(state, batch, hyper)[1]
        return [loss, alone, out, *buffers.values(), *torch.autograd.grad(out.square().sum() + loss, leaves)]

    for seed in range(4):
        compare(run(fast, seed), run(fn, seed))
    assert played["played"] >= 6
    assert torch.equal(model.seen, torch.zeros((), dtype=torch.float64))


def test_equals_finite_differences(played):
    _, _, _, fast = made()

    def value(rate):
        hyper = fast.hyperparameters()
        hyper[0]["lr"] = rate
        last, losses = fast.unroll(fast.init(), batches(3), hyper)
        return fast.loss(last, {name: part[0] for name, part in batches(4).items()}) + losses.sum()

    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    found = [torch.autograd.grad(value(rate), rate)[0] for _ in range(4)]
    before = played["played"]
    with torch.no_grad():
        differences = [(value(rate + 1e-5) - value(rate - 1e-5)) / 2e-5 for _ in range(3)]
    assert before and played["played"] > before
    for one, other in zip(found[1:], differences, strict=True):
        assert abs(one - other) < 1e-7 * abs(other)


CHANGES = {
    "learning rate": lambda optimizer, model: optimizer.param_groups[0].update(lr=0.3),
    "batch size": None,
    "training": lambda optimizer, model: model.eval(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_is_noticed(name, played):
    optimizer, model, fn, fast = made()
    given = batches(5)
    for _ in range(4):
        outcome(fast, 0, hyper=False, given=given)
    assert played["played"]
    if CHANGES[name] is None:
        given = {key: value[:, :2].contiguous() for key, value in given.items()}
    else:
        CHANGES[name](optimizer, model)
    for _ in range(3):
        compare(outcome(fast, 0, hyper=False, given=given), outcome(fn, 0, hyper=False, given=given))


def test_meta_that_is_a_number_or_a_tensor(played):
    """A number is part of the program; a tensor is one of its inputs, differentiated or not."""
    _, _, fn, fast = made()
    weights = torch.linspace(-1, 1, 2, dtype=torch.float64)
    for round in range(4):
        for scale in (1.0, 2.0):
            for wanted in (False, True):
                found = []
                for one in (fast, fn):
                    meta = {"weights": (weights + round).requires_grad_(wanted), "scale": scale}
                    state, hyper, leaves = differentiated(one, round)
                    last, losses = one.unroll(state, batches(round), hyper, meta)
                    leaves += [meta["weights"]] if wanted else []
                    found.append([losses, *torch.autograd.grad(last.params["layer.bias"].sum(), leaves)])
                compare(*found)
    assert played["played"] >= 4


@pytest.mark.parametrize("compiled", [False, True])
def test_the_sign_of_a_zero_counts(compiled):
    """A number of the batch or of meta is part of the program: 0.0 and -0.0 are equal, and two numbers."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()

    def signed(model, batch, meta):
        return model(batch[0]).sum() * math.copysign(1.0, batch[1]) * math.copysign(2.0, meta)

    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), signed)
    fn = fn.compile("inductor") if compiled else fn
    x = torch.ones(1, 3, dtype=torch.float64)
    expected = model(x).sum().item() * 2
    for _ in range(3):
        for first in (0.0, -0.0):
            for second in (-0.0, 0.0):
                sign = math.copysign(1.0, first) * math.copysign(1.0, second)
                assert fn.loss(fn.init(), (x, first), second).item() == pytest.approx(sign * expected, rel=1e-12)
                loss = fn.unroll(fn.init(), [(x, first)], meta=second)[1]
                assert loss[0].item() == pytest.approx(sign * expected, rel=1e-12)


def test_one_tensor_for_two_inputs(played):
    """Where the next call has two tensors, none is taken for the other."""
    _, _, fn, fast = made()

    def run(one, first, second):
        hyper = one.hyperparameters()
        hyper[0]["lr"], hyper[0]["momentum"] = first, second
        return one.unroll(one.init(), batches(1), hyper)[1]

    same = torch.tensor(0.2, dtype=torch.float64)
    for _ in range(4):
        compare([run(fast, same, same)], [run(fn, same, same)])
    for momentum in (0.5, 0.7, 0.9):
        other = torch.tensor(momentum, dtype=torch.float64)
        compare([run(fast, same, other)], [run(made()[2], same, other)])
    assert played["played"]


@pytest.mark.parametrize("way", ["replayed", "read"])
def test_strange_tensors(way, monkeypatch, played):
    """Negative and transposed views, other dtypes: what they hold counts."""
    _, _, fn, fast = made()
    if way == "read":
        monkeypatch.setattr(LoopCompiler, "replay", lambda *_: None)
    x = batches(1)["x"]
    state, y = fn.init(), x.sin()[..., :2]
    for _ in range(3):
        fast.unroll(state, {"x": x, "y": y.contiguous()})
    assert bool(played["played"]) == (way == "replayed")
    strange = [
        vars(torch)["_neg_view"](x),
        torch.complex(x, x).conj().imag,
        x.transpose(1, 2).contiguous().transpose(1, 2),
        x.flip(0)[[2, 1, 0]],
        nn.Parameter(x, requires_grad=False),
    ]
    for value in strange:
        given = {"x": value, "y": y.contiguous()}
        plain = {"x": value.clone().resolve_neg().contiguous(), "y": y.contiguous()}
        compare([fast.unroll(state, given)[1]], [fn.unroll(state, plain)[1]])


def test_tangents_are_refused_in_replays_too(played):
    """A compiled program carries no tangents: silence would be a derivative of zero."""
    _, _, fn, fast = made()
    state, _, _ = differentiated(fn, 0)
    params = {name: value.detach() for name, value in state.params.items()}
    plain = gimli.TrainState(params, state.buffers, state.opt_state)
    for _ in range(3):
        fast.unroll(plain, batches(1))
    assert played["played"]
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(value, torch.ones_like(value)) for name, value in params.items()}
        with pytest.raises(gimli.InputError, match=r"torch.func|tangent"):
            fast.unroll(gimli.TrainState(dual, state.buffers, state.opt_state), batches(1))


def test_differentiated_twice_is_refused(played):
    _, _, _, fast = made()
    for count in range(4):
        state, hyper, leaves = differentiated(fast, 0)
        last, _ = fast.unroll(state, batches(1), hyper)
        value = last.params["layer.weight"].square().sum()
        found = torch.autograd.grad(value, leaves, create_graph=True)
        with pytest.raises(gimli.InputError, match="differentiated twice"):
            torch.autograd.grad(found[-1], leaves)
        assert bool(played["played"]) == (count > 1)


def test_part_of_the_results_is_differentiated(played):
    """Gradients of what nobody asked for are zero, and what the loop passes on goes around it."""
    _, _, fn, fast = made()
    for pick in ("losses", "state", "buffer"):
        for seed in range(3):
            found = []
            for one in (fast, fn):
                state, hyper, leaves = differentiated(one, seed)
                scale = state.buffers["scale"] = state.buffers["scale"].clone().requires_grad_()
                last, losses = one.unroll(state, batches(seed), hyper)
                value = {"losses": losses[1], "state": sum(v.sum() for v in last.opt_state.values() if v.requires_grad)}
                total = value.get(pick, last.buffers["scale"].sum())
                found.append(torch.autograd.grad(total, [*leaves, scale], materialize_grads=True))
            compare(*found)
    assert played["played"] >= 3


def test_inference_mode(played):
    """Tensors of inference mode are taken, and give what others give."""
    _, _, _, fast = made()
    for _ in range(3):
        expected = fast.unroll(fast.init(), batches(1))[1]
        with torch.inference_mode():
            found = fast.unroll(fast.init(), batches(1))[1]
        compare([found], [expected])
    assert played["played"]


def test_replays_are_bounded(monkeypatch):
    """A number that is another one in every call does not fill the memory."""
    monkeypatch.setattr("gimli_compile.compiled.unrolling._REPLAYS", 2)
    _, _, _, fast = made()
    weights = torch.zeros(2, dtype=torch.float64)
    for scale in range(4):
        for _ in range(2):
            fast.unroll(fast.init(), batches(1), meta={"weights": weights, "scale": float(scale)})
    compiler = fast._compiler
    assert compiler is not None
    assert len(compiler.loops._replays) == 2


def test_gradients_along_many_directions_are_refused(played):
    _, _, _, fast = made()
    for count in range(4):
        state, hyper, leaves = differentiated(fast, 0)
        last, _ = fast.unroll(state, batches(1), hyper)
        value = last.params["layer.bias"]
        torch.autograd.grad(value.sum(), leaves, retain_graph=True)
        with pytest.raises(gimli.InputError, match="along several directions at once"):
            torch.autograd.grad(value, leaves, torch.eye(2, dtype=torch.float64), is_grads_batched=True)
        assert bool(played["played"]) == (count > 1)


def test_relu_at_a_kink_of_another_branch(played):
    """Conditions of the programs are looked at in replays as well."""

    class Branch(torch.optim.Optimizer):
        def __init__(self, params: Any):
            super().__init__(params, {"lr": 0.1})

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    rate = group["lr"] if p.grad.norm() > 1 else 10 * group["lr"]
                    p.data.add_(p.grad, alpha=-rate)

    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    optimizer = Branch(model.parameters())
    fn = gimli.functionalize(model, optimizer, lambda m, b: F.mse_loss(m(b[0]), b[1]), branches="guard")
    fast = fn.compile("inductor")
    x = batches(1)["x"]
    for factor in (1.0, 1.0, 1.0, 100.0, 1.0, 100.0, 0.01, 1.0):
        given = (x, factor * x[..., :2])
        compare([fast.unroll(fast.init(), given)[1]], [fn.unroll(fn.init(), given)[1]])
    assert played["played"]
