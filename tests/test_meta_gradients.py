"""`meta_gradient`: what unroll, loss and autograd give, whether it runs at once or not."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from buffered import Affine
from torch import nn
from torch.utils import _pytree as pytree

import gimli_compile as gimli
from gimli_compile.compiled import backends, meta_gradients

needs_compiler = pytest.mark.skipif(not backends.has_compiler(), reason="Inductor needs a C++ compiler")
MODES = [pytest.param(None, id="uncompiled"), "eager", pytest.param("inductor", marks=needs_compiler)]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def loss_fn(model, batch, meta):
    errors = (model(batch[0]) - batch[1]) ** 2
    return errors.mean() if meta is None else (errors * meta.exp()).mean()


def made(kind: Any = torch.optim.SGD, loss: Any = loss_fn, **options):
    torch.manual_seed(0)
    model = Affine().double()
    optimizer = kind(model.parameters(), **(options or {"lr": 0.1, "momentum": 0.9}))
    return optimizer, model, gimli.functionalize(model, optimizer, loss)


def in_mode(fn, mode):
    return fn if mode is None else fn.compile(mode)


def batch(seed, *lead):
    x = torch.randn(*lead, 4, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, x.sin()[..., :2].contiguous()


def leaves_of(fn, seed):
    """Returns a state, hyperparameters and their leaves, others for each seed."""
    state, hyper = fn.init(), fn.hyperparameters()
    state.params = {name: (value + 0.01 * seed).requires_grad_() for name, value in state.params.items()}
    hyper[0]["lr"] = (hyper[0]["lr"] + 0.01 * seed).requires_grad_()
    return state, hyper, {"start": state.params, "lr": hyper[0]["lr"]}


def by_hand(fn, state, batches, held_out, hyper=None, meta=None, *, inputs, **options):
    """What `meta_gradient` stands for."""
    mapped = options.get("tasks", False) is not False
    last, _ = fn.unroll(state, batches, hyper, meta, **options)
    loss = fn.loss(last, held_out, meta, tasks=mapped).mean()
    flat, structure = pytree.tree_flatten(inputs)
    grads = torch.autograd.grad(loss, flat, allow_unused=True)
    return loss.detach(), pytree.tree_unflatten(list(grads), structure)


def compare(found, expected, tolerance=1e-12):
    found, expected = (pytree.tree_flatten(one) for one in (found, expected))
    assert found[1] == expected[1]
    for one, other in zip(found[0], expected[0], strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype and not one.requires_grad
        assert torch.allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.fixture
def at_once(monkeypatch):
    """Counts what runs at once."""
    count = {"calls": 0}
    run = meta_gradients.GradientReplay.__call__

    def counting(self, call):
        found = run(self, call)
        count["calls"] += found is not None
        return found

    monkeypatch.setattr(meta_gradients.GradientReplay, "__call__", counting)
    return count


VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {  # options, and whether it runs at once
    "plain": ({}, True),
    "tasks": ({"tasks": True}, True),
    "tasks as named": ({"tasks": (None, 0, None, None)}, True),
    "recomputed": ({"checkpoint": "sqrt"}, True),
    "mixed": ({"backward": "mixed"}, True),
    "first order": ({"order": 1}, True),
    "truncated": ({"truncate": 2}, False),
    "forward": ({"backward": "forward"}, False),
    "automatic": ({"backward": "auto", "memory": "1GiB"}, False),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", VARIANTS)
def test_what_the_parts_give(name, mode, at_once):
    """Every call has other values; the last run at once, where that is possible."""
    options, is_quick = VARIANTS[name]
    _, _, fn = made()
    fast = in_mode(fn, mode)
    lead = (2,) if "tasks" in options else ()
    for seed in range(4):
        state, hyper, inputs = leaves_of(fn, seed)
        given = (state, batch(seed, *lead, 3), batch(seed + 50, *lead), hyper)
        if name == "truncated":  # where training starts has no influence then
            inputs = {"lr": inputs["lr"]}
        compare(
            fast.meta_gradient(*given, inputs=inputs, **options), by_hand(fn, *given, inputs=inputs, **options), 1e-10
        )
    assert (at_once["calls"] >= 2) == (is_quick and mode == "inductor")


@needs_compiler
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.RAdam])
def test_equals_finite_differences_of_live_training(kind, at_once):
    """In the learning rate and along a direction of where training starts, RAdam's change of formula included."""
    _, model, fn = made(kind, lr=0.1)
    fast = fn.compile("inductor")
    batches, held_out = batch(1, 7), batch(2)
    direction = {name: torch.randn_like(value) for name, value in fast.init().params.items()}

    def live(rate, shift):
        net = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in net.named_parameters():
                value += shift * direction[name]
        optimizer = kind(net.parameters(), lr=rate)
        for x, y in zip(*batches, strict=True):
            optimizer.zero_grad()
            loss_fn(net, (x, y), None).backward()
            optimizer.step()
        return loss_fn(net, held_out, None).item()

    h = 1e-5
    rate_slope = (live(0.1 + h, 0.0) - live(0.1 - h, 0.0)) / (2 * h)
    start_slope = (live(0.1, h) - live(0.1, -h)) / (2 * h)
    for _ in range(4):
        state, hyper, inputs = leaves_of(fast, 0)
        loss, grads = fast.meta_gradient(state, batches, held_out, hyper, inputs=inputs)
        assert loss.item() == pytest.approx(live(0.1, 0.0), rel=1e-12)
        assert grads["lr"].item() == pytest.approx(rate_slope, rel=1e-6)
        along = sum((grads["start"][name] * direction[name]).sum().item() for name in direction)
        assert along == pytest.approx(start_slope, rel=1e-6)
    assert at_once["calls"] >= 2


@pytest.mark.parametrize("mode", MODES)
def test_inputs_that_hyperparameters_and_meta_come_from(mode, at_once):
    """Gradients go on to what the arguments were computed from; meta is there in the steps and after them."""
    _, _, fn = made()
    fast = in_mode(fn, mode)
    for seed in range(4):
        found = []
        for one, way in ((fast, fast.meta_gradient), (fn, lambda *given, **more: by_hand(fn, *given, **more))):
            state, hyper, _ = leaves_of(one, seed)
            logarithm = torch.tensor(-2.0 - seed, dtype=torch.float64, requires_grad=True)
            weights = torch.linspace(-1, 1, 2, dtype=torch.float64).requires_grad_()
            hyper[0]["lr"] = logarithm.exp()
            meta = weights if seed % 2 else weights * 2
            inputs = [logarithm, (weights, state.params["layer.bias"]), hyper[0]["lr"]]
            found.append(way(state, batch(seed, 3), batch(9), hyper, meta, inputs=inputs))
        compare(*found)
    assert mode != "inductor" or at_once["calls"] >= 2


@needs_compiler
def test_results_stay_as_they_are(at_once):
    """What a call returned is not the memory of the next."""
    fast = made()[2].compile("inductor")
    kept = []
    for seed in range(6):
        state, hyper, inputs = leaves_of(fast, seed)
        found = fast.meta_gradient(state, batch(seed, 3), batch(seed), hyper, inputs=inputs)
        kept.append((found, copy.deepcopy(found)))
    for found, copied in kept:
        compare(found, copied, 0)
    assert at_once["calls"] >= 4


def _rate(optimizer, model, given):
    optimizer.param_groups[0]["lr"] = 0.3
    return given


def _evaluation(optimizer, model, given):
    model.eval()
    return given


def _held_out(optimizer, model, given):
    return given[0], tuple(part[:2].contiguous() for part in given[1])


def _steps(optimizer, model, given):
    return tuple(part[:2] for part in given[0]), given[1]


def _layout(optimizer, model, given):
    return given[0], (given[1][0].t().contiguous().t(), given[1][1])


def _differentiated(optimizer, model, given):
    return given[0], (given[1][0], given[1][1].clone().requires_grad_())


@needs_compiler
@pytest.mark.parametrize("change", [_rate, _evaluation, _held_out, _steps, _layout, _differentiated])
def test_what_changes_is_noticed(change, at_once):
    optimizer, model, first = made()
    fast, given = first.compile("inductor"), (batch(1, 3), batch(2))
    for count in range(7):
        if count == 4:
            assert at_once["calls"] >= 2
            given = change(optimizer, model, given)
        fn = gimli.functionalize(model, optimizer, loss_fn)
        state, _, inputs = leaves_of(fn, 0)
        inputs = {"start": inputs["start"]} | ({"held": given[1][1]} if given[1][1].requires_grad else {})
        found = fast.meta_gradient(state, given[0], given[1], inputs=inputs)
        compare(found, by_hand(fn, state, *given, inputs=inputs))


class Threshold(torch.optim.Optimizer):
    """Steps of twice the length where the gradient is large: a condition on values."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                factor = 2.0 if p.grad.norm() > 1.0 else 1.0
                p.add_(p.grad, alpha=-factor * group["lr"])


@needs_compiler
def test_conditions_on_values():
    """A call in which a step takes the other branch goes its own way."""
    _, _, fn = made(Threshold, lr=0.1)
    fast = fn.compile("inductor")
    for factor in (1.0, 1.0, 1.0, 30.0, 1.0, 30.0, 30.0):
        state, hyper, inputs = leaves_of(fn, 0)
        x, y = batch(1, 3)
        given = (state, (x, y * factor), batch(2), hyper)
        compare(fast.meta_gradient(*given, inputs=inputs), by_hand(fn, *given, inputs=inputs))


@needs_compiler
@pytest.mark.parametrize("tasks", [False, True])
def test_what_the_loop_passes_on(tasks, at_once):
    """The loss depends on a parameter that no step changes, and on a buffer; both are differentiated (as in ANIL)."""
    _, model, _ = made()
    model.layer.bias.requires_grad_(False)
    fn = gimli.functionalize(model, torch.optim.SGD([model.layer.weight], lr=0.1), loss_fn)
    fast, lead = fn.compile("inductor"), (2,) if tasks else ()
    for seed in range(4):
        state, hyper, inputs = leaves_of(fn, seed)
        inputs["scale"] = state.buffers["scale"] = state.buffers["scale"].clone().requires_grad_()
        given = (state, batch(seed, *lead, 3), batch(9, *lead), hyper)
        compare(fast.meta_gradient(*given, inputs=inputs, tasks=tasks), by_hand(fn, *given, inputs=inputs, tasks=tasks))
    assert at_once["calls"] >= 2


class Turned(nn.Module):
    """Its parameter lies in memory by columns."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.float64).t())

    def forward(self, x):
        return x @ self.weight


@needs_compiler
@pytest.mark.parametrize("tasks", [False, True])
def test_parameters_by_columns(tasks):
    torch.manual_seed(0)
    model = Turned()

    def loss(model, batch):
        return ((model(batch[0]) - batch[1]) ** 2).mean()

    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    fast = fn.compile("inductor")
    lead = (2,) if tasks else ()
    for seed in range(4):
        state, hyper, inputs = leaves_of(fn, seed)
        given = (state, batch(seed, *lead, 3), batch(9, *lead), hyper)
        found = fast.meta_gradient(*given, inputs=inputs, tasks=tasks)
        compare(found, by_hand(fn, *given, inputs=inputs, tasks=tasks))


@needs_compiler
def test_programs_that_lie_otherwise_in_memory(monkeypatch):
    """Where the driver cannot hand on what the loop made, the parts run as ever, and it is not tried again."""
    _, _, fn = made()
    fast = fn.compile("inductor")
    tried = []

    def refuse(self, given):
        tried.append(given)
        raise meta_gradients.OtherFormsError

    monkeypatch.setattr(meta_gradients.GradientReplay, "_play", refuse)
    for seed in range(5):
        state, hyper, inputs = leaves_of(fn, seed)
        given = (state, batch(seed, 3), batch(9), hyper)
        compare(fast.meta_gradient(*given, inputs=inputs), by_hand(fn, *given, inputs=inputs))
    assert len(tried) == 1


@pytest.mark.parametrize("mode", MODES)
def test_hooks_on_leaves_are_called(mode):
    """A hook that changes the gradient does so each time."""
    _, _, fn = made()
    fast = in_mode(fn, mode)
    for _ in range(4):
        state, hyper, inputs = leaves_of(fn, 0)
        expected = by_hand(fn, state, batch(1, 3), batch(2), hyper, inputs=inputs)[1]["lr"]
        state, hyper, inputs = leaves_of(fn, 0)
        inputs["lr"].register_hook(lambda grad: 2 * grad)
        found = fast.meta_gradient(state, batch(1, 3), batch(2), hyper, inputs=inputs)[1]["lr"]
        assert found.item() == pytest.approx(2 * expected.item(), rel=1e-12)


@needs_compiler
def test_hooks_on_saved_tensors_are_called(at_once):
    """A hook sees what is kept for the way back, and what it gives instead is what counts, whatever ran before."""
    _, _, fn = made()
    fast, packed = fn.compile("inductor"), []

    def pack(tensor):
        packed.append(tensor)
        return tensor

    for seed in range(7):
        before = at_once["calls"], len(packed)
        state, hyper, inputs = leaves_of(fn, seed)
        given = (state, batch(seed, 3), batch(seed + 9), hyper)
        expected = by_hand(fn, *given, inputs=inputs)
        if seed < 4:
            compare(fast.meta_gradient(*given, inputs=inputs), expected)
            continue
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            compare(fast.meta_gradient(*given, inputs=inputs), expected)
        assert at_once["calls"] == before[0] >= 2 and len(packed) > before[1]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["autocast", "default dtype"])
def test_what_surrounds_a_call_counts(kind, mode, at_once):
    """Autocast and the default dtype around a call change what the model and the loss compute, in every call."""

    def surrounded(factor):
        if kind == "autocast":
            return torch.autocast("cpu", dtype=torch.bfloat16, enabled=factor == 1)
        return default_dtype(torch.float64 if factor else torch.float32)

    def loss(model, batch):  # what autocast makes of a parameter has a dtype of its own
        product = batch[0] @ (model[0].weight.T * 1.0)
        return ((product.double() - batch[1]) ** 2).mean() * torch.tensor(1 / 3).double()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fast = in_mode(gimli.functionalize(model, optimizer, loss), mode)
    found, expected = [], []
    x, y = batch(1, 3)
    for factor in (0, 0, 0, 1, 1, 1, 0):
        with surrounded(factor):
            fresh = gimli.functionalize(model, optimizer, loss)
            for fn, made in ((fast, found), (fresh, expected)):
                state = fn.init()
                state.params = {name: value.requires_grad_() for name, value in state.params.items()}
                given = ((x.float(), y), (x[0].float(), y[0]))
                made.append(fn.meta_gradient(state, *given, inputs=state.params))
    for one, other in zip(found, expected, strict=True):
        compare(one, other, 1e-6)
    assert found[0][0] != found[3][0] != found[6][0] == found[0][0]
    assert mode != "inductor" or at_once["calls"] >= 2


class Third(torch.optim.Optimizer):
    """Steps by a third of a product with its gradient: autocast and the default dtype decide how that is rounded."""

    def __init__(self, params):
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            p.sub_((p.grad @ torch.eye(3, dtype=p.dtype)).double() * torch.tensor(1 / 3))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("is_autocast", [True, False])
def test_what_surrounds_a_step_counts(is_autocast, mode):
    """Steps of the optimizer are captured for what is around them as well."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    optimizer = Third(model.parameters())

    def loss(model, batch):
        return ((model.weight.double() * batch) ** 2).sum()

    fast = in_mode(gimli.functionalize(model, optimizer, loss), mode)
    found, expected = [], []
    for is_other in (False, False, True, True, False):
        with (
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_other and is_autocast),
            default_dtype(torch.float64 if is_other and not is_autocast else torch.float32),
        ):
            fresh = gimli.functionalize(model, optimizer, loss)
            for fn, made in ((fast, found), (fresh, expected)):
                factors = torch.linspace(0.1, 0.9, 3, dtype=torch.float64)
                made.append(fn.unroll(fn.init(), factors.expand(2, 3))[0].params["weight"].double())
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not is_autocast or not torch.equal(found[0], found[2])


@pytest.mark.parametrize("mode", MODES)
def test_without_recording_around_it(mode):
    """Gradients are what it is for: `no_grad` outside changes nothing, `inference_mode` is refused."""
    fast = in_mode(made()[2], mode)
    for _ in range(3):
        state, hyper, inputs = leaves_of(fast, 0)
        given = (state, batch(1, 3), batch(2), hyper)
        expected = by_hand(fast, *given, inputs=inputs)
        with torch.no_grad():
            compare(fast.meta_gradient(*given, inputs=inputs), expected)
        with torch.inference_mode(), pytest.raises(gimli.InputError, match="inference_mode"):
            fast.meta_gradient(*given, inputs=inputs)


@pytest.mark.parametrize("mode", MODES)
def test_an_input_without_influence(mode):
    """It is refused by name: a learning rate that was left out of `hyper` would silently learn nothing."""
    fast = in_mode(made()[2], mode)
    for _ in range(3):
        state, hyper, inputs = leaves_of(fast, 0)
        inputs["other"] = [torch.zeros(2, requires_grad=True)]
        given = (state, batch(1, 3), batch(2), hyper)
        with pytest.raises(gimli.InputError, match=r"does not depend on inputs\['other'\]\[0\]"):
            fast.meta_gradient(*given, inputs=inputs)
        grads = fast.meta_gradient(*given, inputs=inputs, allow_unused=True)[1]
        assert torch.equal(grads["other"][0], torch.zeros(2)) and grads["lr"].abs() > 0
        with pytest.raises(gimli.InputError, match="does not depend on inputs"):
            fast.meta_gradient(fast.init(), batch(1, 3), batch(2), inputs=inputs["other"])


@pytest.mark.parametrize("mode", MODES)
def test_inputs_that_the_arguments_hold_in_vain(mode):
    """Nothing depends on them, and their gradient is zero, the same in all modes."""
    fast = in_mode(made()[2], mode)
    for _ in range(3):
        state, hyper, inputs = leaves_of(fast, 0)
        inputs["doubled"] = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        state.buffers["seen"] = inputs["seen"] = inputs["doubled"] * 2
        grads = fast.meta_gradient(state, batch(1, 3), batch(2), hyper, inputs=inputs, truncate=2)[1]
        assert grads["lr"].abs() > 0
        zeros = [grads["seen"], grads["doubled"], *grads["start"].values()]
        assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in zeros)


@needs_compiler
def test_anomalies_are_detected(at_once):
    """Where autograd is asked to look for NaN, it does."""
    fast = made()[2].compile("inductor")
    counts = []
    for count in range(5):
        state, hyper, inputs = leaves_of(fast, 0)
        with torch.autograd.set_detect_anomaly(count == 4):
            fast.meta_gradient(state, batch(1, 3), batch(2), hyper, inputs=inputs)
        counts.append(at_once["calls"])
    assert counts[4] == counts[3] >= 2


MISTAKES = {
    "no gradient": (lambda fn: {"inputs": {"a": torch.zeros(2)}}, r"inputs\['a'\].* does not require a gradient"),
    "no tensor": (lambda fn: {"inputs": [0.1]}, r"inputs\[0\].* is no tensor, but float"),
    "within a state": (lambda fn: {"inputs": fn.init()}, r"inputs\.params\[.*does not require a gradient"),
    "nothing": (lambda fn: {"inputs": {}}, "has no `inputs`"),
    "meta of each task": (
        lambda fn: {"inputs": {}, "tasks": (None, 0, None, 0), "meta": torch.zeros(2, 2)},
        "a `meta` for each task",
    ),
    "tasks that are none": (
        lambda fn: {"inputs": leaves_of(fn, 0)[2], "tasks": (None, 0)},
        r"tasks=\(None, 0\) is not",
    ),
    "tasks in a list": (lambda fn: {"inputs": leaves_of(fn, 0)[2], "tasks": [None, 0, None, None]}, "is not an option"),
    "an option that does not exist": (lambda fn: {"inputs": {}, "backward": "upward"}, "is not an option"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    given, message = MISTAKES[name]
    _, _, fn = made()
    options = given(fn)
    if name == "an option that does not exist":
        options["inputs"] = leaves_of(fn, 0)[2]
    with pytest.raises(gimli.InputError, match=message):
        fn.meta_gradient(fn.init(), batch(1, 3), batch(2), **options)


def test_without_a_loss():
    fn = made(loss=None)[2]
    with pytest.raises(gimli.InputError, match="needs a loss function"):
        fn.meta_gradient(fn.init(), batch(1, 3), batch(2), inputs=torch.zeros(1, requires_grad=True))


@needs_compiler
def test_noise_of_dropout():
    """Draws are made anew in each call, the same as the parts make."""

    class Dropped(Affine):
        def forward(self, x):
            return torch.nn.functional.dropout(super().forward(x), 0.5)

    torch.manual_seed(0)
    model = Dropped().double()
    fast = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn).compile("inductor")
    losses = set()
    for seed in range(4):
        state, hyper, inputs = leaves_of(fast, 0)
        given = (state, batch(1, 3), batch(2), hyper)
        torch.manual_seed(seed)
        found = fast.meta_gradient(*given, inputs=inputs)
        torch.manual_seed(seed)
        compare(found, by_hand(fast, *given, inputs=inputs))
        losses.add(found[0].item())
    assert len(losses) == 4


@needs_compiler
def test_calls_are_bounded(monkeypatch):
    monkeypatch.setattr(meta_gradients, "_KNOWN", 2)
    fast = made()[2].compile("inductor")
    for segment in range(1, 5):
        for _ in range(3):
            state, hyper, inputs = leaves_of(fast, 0)
            fast.meta_gradient(state, batch(1, 3), batch(2), hyper, inputs=inputs, checkpoint=segment)
    assert fast._compiler is not None and len(fast._compiler.gradients._known) == 2


@pytest.mark.parametrize("is_compiled", [False, True])
def test_another_result_of_the_same_operator_is_no_input(is_compiled):
    """Both come from one node of the graph, and the loop depends on the first alone."""
    model = nn.Linear(3, 1)
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, b: m(b).square().mean())
    one = fn.compile("eager") if is_compiled else fn
    used, other = torch.tensor([0.1, 0.2], requires_grad=True).unbind()
    hyper = fn.hyperparameters()
    hyper[0]["lr"] = used
    given = fn.init(), [torch.ones(4, 3)] * 2, torch.ones(4, 3), hyper
    with pytest.raises(gimli.InputError, match="does not depend on inputs"):
        one.meta_gradient(*given, inputs=[other])
    assert float(one.meta_gradient(*given, inputs=[used])[1][0]) != 0
