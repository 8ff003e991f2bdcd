"""Autocast, models in bfloat16, and gradient scalers."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_reference import projection
from live_training import GRADIENTS, assert_equal_tensors, copied, normal, slope_error
from torch import nn

import gimli_compile as gimli
from gimli_compile.compiled.backends import compile_with_inductor, has_compiler
from gimli_compile.compiled.halves import trace


def multilayer():
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


def bilinear():
    return nn.Sequential(nn.Linear(3, 8, bias=False), nn.Tanh(), nn.Linear(8, 2, bias=False))


def layer_normed():
    return nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 2))


def batch_normed():
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 2))


def convolutional():
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv1d(1, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)
    )


def batches_of(steps, dtype=torch.float32):
    return [(normal(6, 3, seed=2 * t).to(dtype), normal(6, 2, seed=2 * t + 1).to(dtype)) for t in range(steps)]


def mean_squares(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def mixed_loss(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.mse_loss(model(batch[0]), batch[1])


def mixed_step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = mixed_loss(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss


def live_step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = mixed_loss(model, batch)
    loss.backward()
    optimizer.step()
    return loss


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adam(params):
    return torch.optim.Adam(params, lr=0.01, eps=1e-3)


def make(kind, optimizer, dtype=torch.float32):
    torch.manual_seed(1)
    model = kind().to(dtype)
    return model, optimizer(model.parameters())


ROUNDINGS = 0.02  # some of bfloat16, whose eps is 0.008: normalizations are written out


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("kind", [multilayer, layer_normed, batch_normed, convolutional])
def test_autocast_equals_the_live_loop(kind, optimizer, is_whole):
    model, live = make(kind, optimizer)
    fn = gimli.functionalize(model, live, None if is_whole else mixed_loss, train_step=mixed_step if is_whole else None)
    state = fn.init()
    for batch in batches_of(4):
        state, loss = fn.step(state, batch)
        expected = (mixed_step if is_whole else live_step)(model, live, batch)
        tolerance = 0.0 if kind is multilayer else ROUNDINGS
        assert loss.dtype == expected.dtype
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=0)
        for name, p in model.named_parameters():
            torch.testing.assert_close(state.params[name], p.detach(), rtol=tolerance, atol=tolerance * 0.1)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", [multilayer, layer_normed, batch_normed])
def test_a_model_in_low_precision_equals_the_live_loop(kind):
    # Adam would blow up the bias before a batch norm, whose gradient is nothing but rounding
    model, live = make(kind, sgd if kind is batch_normed else adam, torch.bfloat16)
    fn = gimli.functionalize(model, live, mean_squares)
    state = fn.init()
    for batch in batches_of(4, torch.bfloat16):
        state, _ = fn.step(state, batch)
        live.zero_grad()
        mean_squares(model, batch).backward()
        live.step()
        for name, p in model.named_parameters():
            tolerance = 0.0 if kind is multilayer else ROUNDINGS
            torch.testing.assert_close(state.params[name], p.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [multilayer, layer_normed])
def test_the_gradient_through_autocast_is_that_of_eager_autograd(kind):
    """The same loop by hand, with a graph: finite differences of roundings would say nothing."""
    model, live = make(kind, lambda params: torch.optim.SGD(params, lr=0.1))
    fn = gimli.functionalize(model, live, mixed_loss)
    state, hyper = fn.init(), fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    start = [p.requires_grad_() for p in state.params.values()]
    after, losses = fn.unroll(state, batches_of(3), hyper)
    got = torch.autograd.grad(losses.sum() + projection(after.params).float(), [rate, *start])

    again = torch.tensor(0.1, requires_grad=True)
    first = [p.detach().clone().requires_grad_() for p in state.params.values()]
    params, total = dict(zip(state.params, first, strict=True)), torch.zeros(())
    for batch in batches_of(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            loss = F.mse_loss(torch.func.functional_call(model, params, (batch[0],)), batch[1])
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: p - again * g for (name, p), g in zip(params.items(), grads, strict=True)}
        total = total + loss
    expected = torch.autograd.grad(total + projection(params).float(), [again, *first])
    for value, other in zip(got, expected, strict=True):
        scale = float(other.abs().max())
        torch.testing.assert_close(value.float(), other, rtol=0.03, atol=0.03 * scale)


@pytest.mark.skipif(not has_compiler(), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (multilayer, None),
        (layer_normed, None),
        (batch_normed, None),
        (convolutional, None),
        (multilayer, torch.bfloat16),
    ],
)
@pytest.mark.parametrize("backward", ["reverse", "mixed"])
def test_compiled_loops_in_low_precision_are_as_exact_as_it_is(kind, backward, dtype):
    """Programs compare themselves with what they were compiled from, by what such values can be expected to agree in."""

    def loss_fn(model, batch):
        return mixed_loss(model, batch) if dtype is None else F.mse_loss(model(batch[0]).float(), batch[1].float())

    def gradients(one, start, dtype):
        state, hyper = one.init(), one.hyperparameters()
        state.params = {name: value.detach().to(dtype).requires_grad_() for name, value in start.items()}
        rate = hyper[0]["lr"].requires_grad_()
        _, losses = one.unroll(state, batches_of(3, dtype), hyper, backward=backward)
        return [losses.detach(), *torch.autograd.grad(losses[-1], [rate, *state.params.values()])]

    low = torch.float32 if dtype is None else dtype
    fn = gimli.functionalize(*make(kind, sgd, low), loss_fn)
    start = fn.init().params
    exact = gimli.functionalize(*make(kind, sgd, torch.float64), mean_squares)
    expected, rounded = gradients(exact, start, torch.float64), gradients(fn, start, low)
    fast = fn.compile("inductor")
    for _ in range(2):
        for value, other, truth in zip(gradients(fast, start, low), rounded, expected, strict=True):
            assert value.dtype == other.dtype
            errors = [float((one.detach().double() - truth).norm() / truth.norm()) for one in (value, other)]
            assert errors[0] <= 2 * errors[1] + 0.01


# ---------------------------------------------------------------------- scaled losses


def scaled_step(scaler, *, loss_fn=mixed_loss, unscales=True):
    def step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        scaler.scale(loss).backward()
        if unscales:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step


def scaler_of(**options):
    return torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, "growth_interval": 2, **options})


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("warm", [0, 3])
def test_a_scaler_equals_the_live_loop(unscales, warm):
    model, live = make(multilayer, sgd)
    scaler = scaler_of()
    step = scaled_step(scaler, unscales=unscales)
    for batch in batches_of(warm):
        step(model, live, batch)
    before = scaler.state_dict()
    fn = gimli.functionalize(model, live, train_step=step, objects={"scaler": scaler})
    state = fn.init()
    history = []
    for batch in batches_of(5):
        state, loss = fn.step(state, batch)
        history.append((loss, state))
    assert scaler.state_dict() == before
    for batch, (loss, after) in zip(batches_of(5), history, strict=True):
        assert torch.equal(step(model, live, batch), loss)
        assert_equal_tensors(after.params, copied(model.named_parameters()), 0.0)
        assert float(after.opt_state["scaler._scale"]) == scaler.get_scale()
        assert int(after.opt_state["scaler._growth_tracker"]) == scaler.state_dict()["_growth_tracker"]


def test_a_step_whose_gradients_are_infinite_is_skipped():
    """Whether they are is decided anew in every step."""
    model, live = make(multilayer, sgd)
    scaler = scaler_of()
    step = scaled_step(scaler)
    fn = gimli.functionalize(model, live, train_step=step, objects={"scaler": scaler})
    state = fn.init()
    batches = batches_of(6)
    for t in (2, 3):
        batches[t] = (batches[t][0], batches[t][1] * 1e37)
    for batch in batches:
        state, _ = fn.step(state, batch)
        step(model, live, batch)
        assert_equal_tensors(state.params, copied(model.named_parameters()), 0.0)
        assert float(state.opt_state["scaler._scale"]) == scaler.get_scale()
    assert scaler.get_scale() == 2.0**10


def test_the_gradient_through_a_scaler_equals_finite_differences():
    """In double precision, where scales are exact powers of two."""

    def squared(model, batch):
        return F.mse_loss(model(batch[0]), batch[1])

    def start():
        model, live = make(multilayer, sgd, torch.float64)
        scaler = scaler_of(growth_factor=2.5)
        return model, live, scaler, scaled_step(scaler, loss_fn=squared)

    batches = batches_of(4, torch.float64)

    def trained(offset):
        model, live, _, step = start()
        live.param_groups[0]["lr"] += offset
        for batch in batches:
            step(model, live, batch)
        return float(projection(copied(model.named_parameters())))

    model, live, scaler, step = start()
    fn = gimli.functionalize(model, live, train_step=step, objects={"scaler": scaler})
    hyper = fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    state, _ = fn.unroll(fn.init(), batches, hyper)
    total = projection(state.params)
    assert abs(float(total.detach()) - trained(0.0)) <= 1e-6  # its float32 factor rounds
    (slope,) = torch.autograd.grad(total, rate)
    assert slope_error(float(slope), trained) <= GRADIENTS


def test_a_scaler_that_nobody_passed_is_refused_and_left_alone():
    model, live = make(multilayer, sgd)
    scaler = scaler_of()
    before = scaler.state_dict()
    fn = gimli.functionalize(model, live, train_step=scaled_step(scaler))
    with pytest.raises(gimli.CaptureError, match=r"of a GradScaler that has a `state_dict`[\s\S]*objects="):
        fn.step(fn.init(), batches_of(1)[0])
    assert scaler.state_dict() == before
    assert scaler._scale is None


def test_a_scaler_that_is_turned_off_needs_no_mention():
    model, live = make(multilayer, sgd)
    step = scaled_step(scaler_of(enabled=False))
    fn = gimli.functionalize(model, live, train_step=step)
    state, _ = fn.step(fn.init(), batches_of(1)[0])
    step(model, live, batches_of(1)[0])
    assert_equal_tensors(state.params, copied(model.named_parameters()), 0.0)


# ---------------------------------------------------------------------- other objects of a train step


class Average:
    """An average of the weights beside the training, and a count of what it saw."""

    def __init__(self, model, rate=0.75):
        self.rate, self.count = rate, 0
        self.kept = [p.detach().clone() for p in model.parameters()]

    def update(self, model):
        self.count += 1
        with torch.no_grad():
            for slow, p in zip(self.kept, model.parameters(), strict=True):
                slow.lerp_(p, (1 - self.rate) / self.count)


def averaged(average):
    def step(model, optimizer, batch):
        optimizer.zero_grad()
        pull = sum(((p - slow) ** 2).sum() for p, slow in zip(model.parameters(), average.kept, strict=True))
        loss = F.mse_loss(model(batch[0]), batch[1]) + 0.1 * pull
        loss.backward()
        optimizer.step()
        average.update(model)
        return loss

    return step


def test_an_average_of_the_weights_is_state():
    def start():
        model, live = make(multilayer, sgd, torch.float64)
        average = Average(model)
        return model, live, average, averaged(average)

    batches = batches_of(4, torch.float64)

    def trained(offset):
        model, live, average, step = start()
        average.rate += offset
        for batch in batches:
            step(model, live, batch)
        return model, live, average

    model, live, average, step = start()
    fn = gimli.functionalize(model, live, train_step=step, objects={"average": average})
    hyper = fn.hyperparameters()
    rate = hyper.attributes["average.rate"].requires_grad_()
    state, _ = fn.unroll(fn.init(), batches, hyper)
    expected, _, kept = trained(0.0)
    assert_equal_tensors(state.params, copied(expected.named_parameters()))
    assert_equal_tensors({str(i): state.opt_state[f"average.kept.{i}"] for i in range(4)}, dict(copied(
        (str(i), slow) for i, slow in enumerate(kept.kept)
    )))  # fmt: skip
    assert int(state.opt_state["average.count"]) == kept.count == 4
    assert average.count == 0
    (slope,) = torch.autograd.grad(projection(state.params), rate)
    live_value: Any = lambda offset: float(projection(copied(trained(offset)[0].named_parameters())))  # noqa: E731
    assert slope_error(float(slope), live_value) <= GRADIENTS

    other, its, beside, again = start()
    with pytest.raises(gimli.InputError, match=r"Average 'average'[\s\S]*load_into\(model, optimizer, state, sch"):
        fn.load_into(other, its, state)
    fn.load_into(other, its, state, objects={"average": beside})
    assert beside.count == 4
    again(other, its, batches[0])
    more, _ = fn.step(state, batches[0])
    assert_equal_tensors(more.params, copied(other.named_parameters()))


def test_objects_that_are_not_passed_are_left_alone_and_said():
    model, live = make(multilayer, sgd, torch.float64)
    average = Average(model)

    def step(model, optimizer, batch):
        average.count += 1
        return live_step(model, optimizer, batch)

    fn = gimli.functionalize(model, live, train_step=step)
    with pytest.warns(gimli.BakedValueWarning, match=r"changes `Average.count`[\s\S]*objects="):
        fn.step(fn.init(), batches_of(1, torch.float64)[0])
    assert average.count == 0


def test_things_that_are_no_objects_are_refused():
    model, live = make(multilayer, sgd)
    for objects, word in (
        ([scaler_of()], "`objects` is a list"),
        ({"count": 3}, "objects\\['count'\\] is a int"),
        ({"net": multilayer()}, "Pass modules with the model"),
        ({"state": scaler_of()}, "a name that nothing else has"),
    ):
        with pytest.raises(gimli.InputError, match=word):
            gimli.functionalize(model, live, train_step=mixed_step, objects=objects)  # pyright: ignore
    with pytest.raises(gimli.InputError, match="pass `train_step=` as well"):
        gimli.functionalize(model, live, mixed_loss, objects={"scaler": scaler_of()})


@pytest.mark.skipif(not has_compiler(), reason="Inductor needs a C++ compiler")
def test_compiled_programs_round_where_the_code_rounds():
    """Inductor keeps what it fuses in float32, conversions that the user wrote included, unless it is told to round."""

    def rounded(x, w):
        a = torch.tanh(x * w + 1) * w
        coarse = (a * 1.37).bfloat16().float() * 3.1 - x / 3
        low = x.bfloat16()
        return coarse, low * 0.9 + torch.exp(-low * low), (coarse.half() * 1.1 - 1).float().abs()

    examples = torch.randn(64, 37), torch.randn(37)
    expected = rounded(*examples)
    found = compile_with_inductor(trace(rounded, examples))([value.clone() for value in examples])
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=2e-7 if value.dtype == torch.float32 else 0.0, atol=1e-7)


def assert_compiled_steps_are_live(kind, optimizer, dtype, steps, tolerance):
    model, live = make(kind, optimizer, dtype)
    fn = gimli.functionalize(model, live, mean_squares).compile("inductor")
    batches = batches_of(steps, dtype)
    state, losses = fn.unroll(fn.init(), batches)
    for batch, loss in zip(batches, losses, strict=True):
        live.zero_grad()
        expected = mean_squares(model, batch)
        expected.backward()
        live.step()
        torch.testing.assert_close(loss, expected.detach(), rtol=tolerance, atol=0.0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(state.params[name], p.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.skipif(not has_compiler(), reason="Inductor needs a C++ compiler")
def test_compiled_muon_takes_the_steps_of_the_live_one():
    """It orthogonalizes float32 gradients in bfloat16: kept in float32, five steps were off by three thousandths."""
    assert_compiled_steps_are_live(bilinear, lambda params: torch.optim.Muon(params, lr=0.02), torch.float32, 5, 1e-6)


BESIDE_NUMBERS = {
    "sub": lambda x: x - 1.3,
    "rsub": lambda x: 1.3 - x,
    "mul": lambda x: x * 0.998,
    "div": lambda x: x / 3.7,
    "divided": lambda x: 3.7 / (x + 9),
    "add, alpha": lambda x: torch.add(x, x.flip(0), alpha=-0.3),
    "pow": lambda x: x.abs() ** 1.7,
    "cube": lambda x: x**3,
    "remainder": lambda x: torch.remainder(x, 0.3),
    "fmod": lambda x: torch.fmod(x, 0.3),
    "lerp": lambda x: torch.lerp(x, x.flip(0), 0.3),
    "clamp": lambda x: x.clamp(-0.3, 0.7),
    "addcmul": lambda x: torch.addcmul(x, x, x.flip(0), value=0.3),
    "logit": lambda x: torch.logit(x.sigmoid(), eps=0.01),
    "branch": lambda x: torch.where(x - 1.3 == 0, 1.0, 0.0),
    "to integers": lambda x: ((x - 1.3) * 1000).long(),
    "full": lambda x: torch.full_like(x, 0.1).float(),
    "full, small": lambda x: torch.full_like(x, 1e-8).float() * 1e8,
    "number of a tensor": lambda x: x * torch.tensor(0.998),
    "number in double": lambda x: x * torch.tensor(1.5e-7, dtype=torch.float64),
    "large number": lambda x: x * torch.tensor(131072.0) / 131072.0,
    "comparison": lambda x: x > torch.tensor(1.298),
    "logsumexp": lambda x: x.logsumexp(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "softmax": lambda x: x.softmax(-1),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "layer_norm": lambda x: F.layer_norm(x, (16,)),
    "prod": lambda x: x.prod(-1),
    "var": lambda x: x.var(-1),
    "glu": lambda x: F.glu(x),
    "silu": lambda x: F.silu(x),
    "rsqrt": lambda x: (x.abs() + 0.1).rsqrt() * 0.3,
}


@pytest.mark.skipif(not has_compiler(), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_compiled_programs_take_numbers_in_the_precision_in_which_torch_does(dtype):
    """Inductor rounded numbers that torch does not round, and kept others: 0.998 was 0.996, and a `full` of 0 was 1."""
    x = normal(24, 16, seed=3).float()
    x[0, :5] = torch.tensor([0.3, 1.3, 2.6, 0.09, 1.7])

    def run(x):
        return [one(x.to(dtype)) for one in BESIDE_NUMBERS.values()]

    found = compile_with_inductor(trace(run, [x]))([x.clone()])
    for name, value, other in zip(BESIDE_NUMBERS, found, run(x), strict=True):
        assert value.dtype == other.dtype and torch.equal(value, other), name


@pytest.mark.skipif(not has_compiler(), reason="Inductor needs a C++ compiler")
def test_a_learning_rate_beside_half_precision_is_not_rounded():
    """The first call is compared with the uncompiled program; later values of a hyperparameter are not."""

    class Descent(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(p.grad * group["lr"])

    model = nn.Linear(4, 1, bias=False).half()
    fn = gimli.functionalize(model, Descent(model.parameters(), 0.5), lambda m, b: (m.weight.float() * b).sum())
    fast = fn.compile("inductor")
    for rate, scale in ((0.5, 1.0), (0.5, 1.0), (1e-2 / 65536, 3e4), (131072.0, 1e-4), (1e-8, 6e4)):
        batch, hyper = scale * torch.tensor([[1.0, 0.5, 0.25, 0.77]]), fn.hyperparameters()
        hyper[0]["lr"] = torch.tensor(rate, dtype=torch.float64)
        start = fn.init()
        found, wanted = (one.unroll(start, [batch], hyper)[0].params["weight"] for one in (fast, fn))
        assert torch.equal(found, wanted)
        assert torch.equal(wanted, start.params["weight"] - batch.half() * rate)


@pytest.mark.skipif(not has_compiler(), reason="Inductor needs a C++ compiler")
def test_compiled_weight_decay_in_bfloat16_is_that_of_the_live_optimizer():
    """A factor of 0.998 decays; as 0.996 it took twice as much away."""
    decayed = functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=2.0)
    assert_compiled_steps_are_live(multilayer, decayed, torch.bfloat16, 40, 0.0)
