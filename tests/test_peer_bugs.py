"""Bugs that other libraries have or had, each by the number that `PEERS.md` and `PERFORMANCE.md` give it."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from eager_reference import Case, gradient_errors, projection
from live_training import (
    Training,
    Untouched,
    assert_equal_tensors,
    check_against_hand,
    check_gradients,
    check_values,
    normal,
    random_like,
    regression,
    relative_error,
    run_live,
    squared_error,
    unrolled_gradients,
)
from torch import nn

import gimli_compile as gimli

# ---------------------------------------------------------------------- F4: higher


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("warm", [0, 3])
def test_f4_gradient_of_adam_in_its_second_beta(kind, warm):
    """Was 220 times too large, with the wrong sign: the bias correction turned the tensor into a number."""
    errors = gradient_errors(Case(lambda params: kind(params, lr=0.01, betas=(0.9, 0.99)), warm=warm))
    assert errors["groups.0.betas.1"] <= 1e-6
    assert errors["groups.0.betas.0"] <= 1e-6
    assert errors["groups.0.lr"] <= 1e-6


@pytest.fixture
def default_float64():
    """Some optimizers keep rates and products in the default dtype; differences need them in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_float64")
def test_f4_gradient_of_asgd_in_lambd_and_alpha():
    errors = gradient_errors(Case(lambda params: torch.optim.ASGD(params, lr=0.05, lambd=0.1, alpha=0.6, t0=1.0)))
    assert errors["groups.0.lambd"] <= 1e-6
    assert errors["groups.0.alpha"] <= 1e-6


def test_f4_in_a_whole_loop():
    training = Training(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
        lambda params: torch.optim.Adam(params, lr=0.02, betas=(0.9, 0.95), eps=1e-3),
        squared_error,
        regression(5),
    )
    check_gradients(training, ("groups.0.betas.0", "groups.0.betas.1", "groups.0.lr", "groups.0.eps"))


# ---------------------------------------------------------------------- F5: torch.optim with differentiable=True


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("differentiable", [False, True])
@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"dampening": 0.3}, {"maximize": True}])
def test_f5_first_momentum_step_of_sgd_keeps_the_gradient(steps, differentiable, options):
    """Was off by 24 to 118 %: the first buffer is a detached copy of the gradient."""
    if differentiable:
        options = {**options, "differentiable": True}
    case = Case(lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, **options), steps=steps)
    if differentiable:
        eager = Case(lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9), steps=steps)
        assert set(functional_errors(case, eager, options)) == {"grads", "params"}
        return
    assert max(gradient_errors(case).values()) <= 1e-6


def functional_errors(case, eager, options):
    """Compares the gradients of a `differentiable=True` optimizer with those of the same one without the flag."""
    plain = {key: value for key, value in options.items() if key != "differentiable"}
    twin = replace(eager, make=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, **plain))
    got, expected = gradients_through_updates(case), gradients_through_updates(twin)
    for kind in got:
        for own, grad in zip(got[kind], expected[kind], strict=True):
            assert relative_error(own, grad) <= 1e-12
    return got


def gradients_through_updates(case):
    model, optimizer = case.start()
    fn = gimli.functionalize(model, optimizer)
    state = fn.init()
    grads = [{name: g.requires_grad_() for name, g in step.items()} for step in case.gradients(case.steps)]
    params, opt_state = {name: p.requires_grad_() for name, p in state.params.items()}, state.opt_state
    start = list(params.values())
    for step in grads:
        params, opt_state = fn.update(params, step, opt_state)
    leaves = [g for step in grads for g in step.values()]
    found = torch.autograd.grad(projection(params), [*start, *leaves])
    return {"params": found[: len(start)], "grads": found[len(start) :]}


# ---------------------------------------------------------------------- F6: functional_call


class Shared(nn.Module):
    """One submodule under two names, and one tensor under two names."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
        self.decoder = nn.Sequential(self.encoder, nn.Linear(3, 2))

    def forward(self, x):
        return self.decoder(self.encoder(x))


def test_f6_a_submodule_reached_by_two_paths_keeps_its_parameters():
    """pytorch#164759: the real parameters were overwritten."""
    training = Training(
        Shared, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), squared_error, regression(3)
    )
    model, optimizer = training.start()
    untouched = Untouched(model, optimizer)
    fn = gimli.functionalize(model, optimizer, squared_error)
    moved = fn.init()
    for value in moved.params.values():
        value.add_(1.0)
    out = fn(moved, training.batches[0][0])
    fn.unroll(moved, training.batches)
    untouched.check()
    assert model.decoder[0] is model.encoder
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert_equal_tensors({"out": out}, {"out": model(training.batches[0][0])})
    check_values(training)
    check_gradients(training, ("groups.0.lr", "groups.0.momentum"))


# ---------------------------------------------------------------------- F7: TorchOpt


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.middle.weight = self.first.weight

    def forward(self, x):
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_f7_tied_parameters_stay_tied(momentum):
    """Came apart, and trained to other weights than torch.optim.SGD."""
    training = Training(
        Tied, lambda params: torch.optim.SGD(params, lr=0.1, momentum=momentum), squared_error, regression(4)
    )
    model, optimizer, fn = training.functionalized()
    state, _ = fn.unroll(fn.init(), training.batches)
    assert sorted(state.params) == sorted(name for name, _ in model.named_parameters())
    assert_equal_tensors(state.params, run_live(training).params[-1])
    fn.load_into(model, optimizer, state)
    assert model.middle.weight is model.first.weight
    check_gradients(training, ("groups.0.lr", "groups.0.momentum"))


def test_f7_frozen_parameters_are_accepted():
    def freeze(model):
        model.first.requires_grad_(False)

    training = Training(
        Tied, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), squared_error, regression(4), prepare=freeze
    )
    check_values(training)
    check_gradients(training, ("groups.0.lr", "groups.0.momentum"))


# ---------------------------------------------------------------------- F8: gradients that are exactly zero

ADAPTIVE = {
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "Adam_amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "RMSprop_centered": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.01}),
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.5}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
}


def adaptive(name, **more):
    kind, options = ADAPTIVE[name]
    return lambda params: kind(params, **options, **more)


BETAS = ("groups.0.lr", "groups.0.betas.0", "groups.0.betas.1")
CHECKED = {
    **dict.fromkeys(("Adam", "Adam_amsgrad", "AdamW", "NAdam", "RAdam", "Adamax"), BETAS),
    "RMSprop": ("groups.0.lr", "groups.0.alpha"),
    "RMSprop_centered": ("groups.0.lr", "groups.0.alpha", "groups.0.momentum"),
    "Adagrad": ("groups.0.lr",),
    "Adadelta": ("groups.0.lr", "groups.0.rho"),
}


def dead():
    """A network with a dead ReLU: one row of the first layer has gradients of exactly zero in every step."""
    first = nn.Linear(3, 4)
    with torch.no_grad():
        first.bias[1] = -9.0
    return nn.Sequential(first, nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.usefixtures("default_float64")
@pytest.mark.parametrize("name", ADAPTIVE)
def test_f8_zero_gradients_of_a_dead_unit(name):
    """The meta-gradient was NaN: the square root of zero has an infinite derivative.

    A parameter with gradients of exactly zero goes on unchanged (up to decay), whatever the betas: derivatives of its
    path are those of the others.
    """
    training = Training(dead, adaptive(name), squared_error, regression(6))
    _model, _, fn = training.functionalized()
    expected = run_live(training)
    torch.manual_seed(training.seed)
    state, _ = fn.unroll(fn.init(), training.batches)
    assert_equal_tensors(state.params, expected.params[-1], tolerance=0.0)
    _, grads = unrolled_gradients(training, fn)
    assert [path for path, grad in grads.items() if not bool(grad.isfinite().all())] == []
    more = {"betas": (0.9, 0.99)} if "groups.0.betas.1" in CHECKED[name] else {}
    smooth = replace(training, optimizer=adaptive(name, eps=1e-4, **more))  # differences need an eps that shows
    check_gradients(smooth, CHECKED[name], skip=("params", "batches"))
    assert grads["params.0.weight"][1].abs().sum() > 0  # the unit's own weights reach the objective, by themselves


@pytest.mark.parametrize("name", ADAPTIVE)
def test_f8_all_gradients_zero(name):
    """Nothing moves, and the derivative in the start is the identity (times the decay)."""
    case = Case(adaptive(name), steps=4, grad_scale=0.0)
    model, optimizer = case.start()
    fn = gimli.functionalize(model, optimizer)
    state, hyper = fn.init(), fn.hyperparameters()
    leaves = {**state.params, "lr": hyper[0]["lr"]}
    for leaf in leaves.values():
        leaf.requires_grad_()
    params, opt_state = state.params, state.opt_state
    for grads in case.gradients(case.steps):
        params, opt_state = fn.update(params, grads, opt_state, hyper)
    decay = float(optimizer.param_groups[0].get("weight_decay") or 0.0)
    factor = (1 - float(optimizer.param_groups[0]["lr"]) * decay) ** case.steps
    found = torch.autograd.grad(projection(params), list(leaves.values()), allow_unused=True, materialize_grads=True)
    twin = case.start()[0]
    expected = torch.autograd.grad(projection(dict(twin.named_parameters())), list(twin.parameters()))
    for own, grad in zip(found, expected, strict=False):
        assert relative_error(own, factor * grad) <= 1e-12
    if decay == 0.0:
        assert float(found[-1]) == 0.0
        assert_equal_tensors(params, dict(twin.named_parameters()), tolerance=0.0)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_f8_forward_is_bit_identical_at_zero(name):
    """The guard against the infinite derivative changes no value, at zero or beside it; in float32, where eps shows."""
    case = Case(adaptive(name), dtype=torch.float32, steps=1)
    grads = case.gradients(6)
    for index, step in enumerate(grads):
        for value in step.values():
            value.view(-1)[index % value.numel()] = 0.0
            value.view(-1)[-1] = 0.0
            value.view(-1)[0] = 1e-30
    model, optimizer = case.start()
    fn = gimli.functionalize(model, optimizer)
    for step in grads:
        state = fn.init()  # from eager's own values: every single step is compared
        params, opt_state = fn.update(state.params, step, state.opt_state)
        for parameter_name, parameter in model.named_parameters():
            parameter.grad = step[parameter_name].clone()
        optimizer.step()
        fn_state = fn.init()
        for parameter_name, value in fn_state.params.items():
            assert torch.equal(params[parameter_name], value), parameter_name
        for path, value in fn_state.opt_state.items():
            assert torch.equal(opt_state[path], value), path


# ---------------------------------------------------------------------- F11: captured detach


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}, {"momentum": 0.0}])
def test_f11_first_step_depends_on_the_gradient(options):
    """The captured first step held a `detach`: the derivative of the new parameters in the gradient was None."""
    case = Case(lambda params: torch.optim.SGD(params, lr=0.05, **options), steps=1)
    model, optimizer = case.start()
    fn = gimli.functionalize(model, optimizer)
    grads = {name: g.requires_grad_() for name, g in case.gradients(1)[0].items()}
    params, _ = fn.update(fn.init().params, grads, fn.init().opt_state)
    for name, value in params.items():
        way = random_like(value, 5)
        (got,) = torch.autograd.grad((way * value).sum(), grads[name])
        factor = -0.05 * (1.9 if options.get("nesterov") else 1.0)
        assert relative_error(got, factor * way) <= 1e-12
    assert "detach" not in fn.programs["update"].code
    assert "profiler" not in fn.programs["update"].code


def test_f11_first_step_in_a_loop():
    training = Training(
        lambda: nn.Linear(3, 2),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        squared_error,
        regression(1),
    )
    check_against_hand(training)


# ---------------------------------------------------------------------- one tensor object for two inputs


def distinct(tree):
    return {name: value.clone() for name, value in tree.items()}


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_one_tensor_as_two_gradients(kind):
    """`make_fx` knows inputs by identity: with one object for two of them the program is silently wrong."""
    case = Case(lambda params: kind(params, lr=0.1), shapes=((3,), (3,), (3,)))
    model, optimizer = case.start()
    shared = normal(3, seed=9)
    same: dict[str, Any] = dict.fromkeys(("p0", "p1", "p2"), shared)
    for first, second in ((same, distinct(same)), (distinct(same), same)):
        fn = gimli.functionalize(model, optimizer)
        state = fn.init()
        for grads in (first, second):
            params, _ = fn.update(state.params, grads, state.opt_state)
            expected = case.start()[0]
            live = case.make(list(expected.parameters()))
            for name, p in expected.named_parameters():
                p.grad = grads[name].clone()
            live.step()
            assert_equal_tensors(params, dict(expected.named_parameters()))
        different = {name: (index + 1.0) * shared for index, name in enumerate(same)}
        params, _ = fn.update(state.params, different, state.opt_state)
        expected = case.start()[0]
        live = case.make(list(expected.parameters()))
        for name, p in expected.named_parameters():
            p.grad = different[name].clone()
        live.step()
        assert_equal_tensors(params, dict(expected.named_parameters()))


def test_one_tensor_as_two_parameters():
    """Two parameters that start as one tensor object go their own ways."""
    training = Training(lambda: nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(2)]), None, None, [])
    model = training.model().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def loss(model, batch):
        return ((model[1](torch.tanh(model[0](batch))) - 1.0) ** 2).mean()

    fn = gimli.functionalize(model, optimizer, loss)
    shared, x = normal(2, 2, seed=4), normal(5, 2, seed=5)
    state = fn.init()
    names = list(state.params)
    results = []
    for params in (dict.fromkeys(names, shared), {name: shared.clone() for name in names}):
        start = gimli.TrainState(params, state.buffers, state.opt_state)
        results.append(fn.unroll(start, [x] * 3)[0].params)
    assert_equal_tensors(results[0], results[1], tolerance=0.0)
    assert not torch.equal(*results[0].values())


def test_one_tensor_twice_in_a_batch():
    """An autoencoder's batch: input and target are one object at capture, and two later."""

    def loss(model, batch):
        x, y = batch
        return ((model(x) - y) ** 2).mean()

    model = nn.Linear(3, 3).double()
    x, y = normal(5, 3, seed=1), normal(5, 3, seed=2)
    for first in ((x, x), (x, y)):
        fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
        state = fn.init()
        fn.step(state, first)
        for batch in ((x, x), (x, y), (y, x)):
            _, got = fn.step(state, batch)
            assert relative_error(got, loss(model, batch)) <= 1e-14


def test_one_tensor_as_batch_and_meta():
    def loss(model, batch, meta):
        return ((model(batch) - meta) ** 2).mean()

    model = nn.Linear(3, 3).double()
    x, y = normal(5, 3, seed=1), normal(5, 3, seed=2)
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    state = fn.init()
    fn.step(state, x, None, x)
    _, got = fn.step(state, x, None, y)
    assert relative_error(got, loss(model, x, y)) <= 1e-14


def test_one_tensor_as_two_hyperparameters():
    """One learned number as the learning rate of two groups, and later two numbers."""
    case = Case(
        lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        groups=lambda params: [{"params": params[:1]}, {"params": params[1:]}],
        steps=3,
    )
    results = {}
    for order in (("one", "two"), ("two", "one")):
        model, optimizer = case.start()
        fn = gimli.functionalize(model, optimizer)
        for kind in order:
            hyper, state = fn.hyperparameters(), fn.init()
            first = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
            second = first if kind == "one" else torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
            hyper[0]["lr"], hyper[1]["lr"] = first, second
            params, opt_state = state.params, state.opt_state
            for grads in case.gradients(3):
                params, opt_state = fn.update(params, grads, opt_state, hyper)
            values = {name: p.detach() for name, p in params.items()}
            (grad,) = torch.autograd.grad(projection(params), first)
            if kind in results:
                assert_equal_tensors(values, results[kind][0], tolerance=0.0)
                assert torch.equal(grad, results[kind][1])
            results[kind] = (values, grad)
    moved = {name: results["one"][0][name] - results["two"][0][name] for name in results["one"][0]}
    assert not moved["p0"].any()
    assert moved["p1"].all()


def test_one_number_in_both_betas():
    """Adam with one tensor for both betas has the sum of the two derivatives."""
    case = Case(lambda params: torch.optim.Adam(params, lr=0.1, betas=(0.9, 0.9)), steps=3)

    def run(shared):
        model, optimizer = case.start()
        fn = gimli.functionalize(model, optimizer)
        hyper, state = fn.hyperparameters(), fn.init()
        first, second = (torch.tensor(0.9, dtype=torch.float64, requires_grad=True) for _ in range(2))
        hyper[0]["betas"] = (first, first if shared else second)
        params, opt_state = state.params, state.opt_state
        for grads in case.gradients(3):
            params, opt_state = fn.update(params, grads, opt_state, hyper)
        found = torch.autograd.grad(projection(params), (first,) if shared else (first, second))
        return sum(found), params

    (together, values), (apart, other) = run(True), run(False)
    assert relative_error(together, apart) <= 1e-12
    assert_equal_tensors(values, other)


# ---------------------------------------------------------------------- silently wrong in stock torch


def test_weight_norm_has_a_second_derivative():
    """`torch._weight_norm` was wrong under double backward."""
    training = Training(
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        squared_error,
        regression(4),
    )
    check_values(training)
    check_gradients(training, ("groups.0.lr", "groups.0.momentum"))


@pytest.mark.parametrize(
    "layer",
    [lambda: nn.LayerNorm(4), lambda: nn.BatchNorm1d(4), lambda: nn.GroupNorm(2, 4)],
    ids=["layer", "batch", "group"],
)
def test_grad_of_vmap_through_normalization(layer):
    """functorch#534: `grad(vmap(meta))` with normalization was off by up to 1.2 %."""
    training = Training(
        lambda: nn.Sequential(nn.Linear(3, 4), layer(), nn.Tanh(), nn.Linear(4, 2)),
        lambda params: torch.optim.SGD(params, lr=0.1),
        squared_error,
        [],
    )
    _, _, fn = training.functionalized()
    xs, ys = normal(3, 2, 5, 3, seed=1), normal(3, 2, 5, 2, seed=2)
    start = fn.init()
    ways = {name: random_like(p, 7) for name, p in start.params.items()}

    def outer(params, x, y):
        state, losses = fn.unroll(gimli.TrainState(params, start.buffers, start.opt_state), (x, y))
        return sum((ways[name] * p).sum() for name, p in state.params.items()) + losses.sum()

    def mean(params):
        return torch.func.vmap(outer, in_dims=(None, 0, 0))(params, xs, ys).mean()

    got = torch.func.grad(mean)(start.params)
    inside = torch.func.vmap(torch.func.grad(outer), in_dims=(None, 0, 0))(start.params, xs, ys)
    for name in got:
        leaves = {n: p.clone().requires_grad_() for n, p in start.params.items()}
        total = cast(Any, sum(outer(leaves, x, y) for x, y in zip(xs, ys, strict=True))) / 3
        (expected,) = torch.autograd.grad(total, leaves[name])
        scale = max(float(expected.abs().max()), 1e-3)
        assert float((got[name] - expected).abs().max()) <= 1e-9 * scale, name
        assert float((inside[name].mean(0) - expected).abs().max()) <= 1e-9 * scale, name


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch's own jvp rules
def test_mse_under_forward_over_reverse():
    """pytorch#123996: `jvp(grad(F.mse_loss))` raised, and crashed when traced."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def loss(model, batch):
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
    batches, start = regression(3), fn.init()

    def outer(rate):
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = rate
        return fn.unroll(start, batches, hyper)[1].sum()

    rate = torch.tensor(0.1, dtype=torch.float64)
    tangent = torch.func.jvp(outer, (rate,), (torch.ones_like(rate),))[1]
    assert relative_error(tangent, torch.func.grad(outer)(rate)) <= 1e-12
