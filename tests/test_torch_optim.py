"""Every optimizer of torch.optim that takes no closure, with its options: values, and derivatives against live eager."""

import warnings

import pytest
import torch
from eager_reference import (
    Case,
    eager_params,
    eager_step,
    functional_params,
    gradient_errors,
    projection,
    run_functional,
    set_number,
    worst_value_error,
)
from torch import optim
from trials import same_facts

import gimli_compile as gimli

MATRICES = ((3, 2), (2, 4))


def make(kind, **options):
    return lambda params: kind(params, **options)


def two_groups(params):
    return [{"params": params[:1], "lr": 0.03, "weight_decay": 0.2}, {"params": params[1:]}]


OPTIONS = {
    "sgd": Case(make(optim.SGD, lr=0.1)),
    "sgd-weight-decay": Case(make(optim.SGD, lr=0.1, weight_decay=0.1)),
    "sgd-momentum": Case(make(optim.SGD, lr=0.1, momentum=0.9)),
    "sgd-dampening": Case(make(optim.SGD, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01)),
    "sgd-nesterov": Case(make(optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)),
    "sgd-maximize": Case(make(optim.SGD, lr=0.1, momentum=0.9, maximize=True)),
    "sgd-foreach": Case(make(optim.SGD, lr=0.1, momentum=0.9, foreach=True, weight_decay=0.01)),
    "sgd-fused": Case(make(optim.SGD, lr=0.1, momentum=0.9, fused=True, weight_decay=0.01)),
    "sgd-tensor-lr": Case(make(optim.SGD, lr=torch.tensor(0.1, dtype=torch.float64))),
    "sgd-groups": Case(make(optim.SGD, lr=0.1, momentum=0.9), groups=two_groups),
    "sgd-per-parameter": Case(make(optim.SGD, lr=0.1, momentum=0.9), per_parameter=True),
    "adadelta": Case(make(optim.Adadelta, lr=0.5)),
    "adadelta-weight-decay": Case(make(optim.Adadelta, lr=0.5, weight_decay=0.1, rho=0.8, eps=1e-3)),
    "adadelta-foreach": Case(make(optim.Adadelta, lr=0.5, foreach=True, maximize=True)),
    "adafactor": Case(make(optim.Adafactor, lr=0.05)),
    "adafactor-options": Case(make(optim.Adafactor, lr=0.05, weight_decay=0.1, beta2_decay=-0.6, d=1.5)),
    "adafactor-foreach": Case(make(optim.Adafactor, lr=0.05, foreach=True, maximize=True)),
    "adagrad": Case(make(optim.Adagrad, lr=0.05)),
    "adagrad-options": Case(
        make(optim.Adagrad, lr=0.05, lr_decay=0.1, weight_decay=0.1, initial_accumulator_value=0.1)
    ),
    "adagrad-foreach": Case(make(optim.Adagrad, lr=0.05, foreach=True, maximize=True, lr_decay=0.1)),
    "adagrad-fused": Case(make(optim.Adagrad, lr=0.05, fused=True)),
    "adam": Case(make(optim.Adam, lr=0.01)),
    "adam-amsgrad": Case(make(optim.Adam, lr=0.01, amsgrad=True, weight_decay=0.1)),
    "adam-maximize": Case(make(optim.Adam, lr=0.01, maximize=True, betas=(0.7, 0.9))),
    "adam-foreach": Case(make(optim.Adam, lr=0.01, foreach=True, amsgrad=True)),
    "adam-fused": Case(make(optim.Adam, lr=0.01, fused=True)),
    "adam-tensor-lr": Case(make(optim.Adam, lr=torch.tensor(0.01, dtype=torch.float64))),
    "adam-decoupled": Case(make(optim.Adam, lr=0.01, weight_decay=0.1, decoupled_weight_decay=True)),
    "adam-groups": Case(make(optim.Adam, lr=0.01), groups=two_groups),
    "adam-per-parameter": Case(make(optim.Adam, lr=0.01), per_parameter=True),
    "adam-unused": Case(make(optim.Adam, lr=0.01, weight_decay=0.1), without_grad=(1,)),
    "adam-frozen": Case(make(optim.Adam, lr=0.01, weight_decay=0.1), frozen=(0,)),
    "adamw": Case(make(optim.AdamW, lr=0.01)),
    "adamw-options": Case(make(optim.AdamW, lr=0.01, amsgrad=True, maximize=True, weight_decay=0.3)),
    "adamw-foreach": Case(make(optim.AdamW, lr=0.01, foreach=True)),
    "adamw-fused": Case(make(optim.AdamW, lr=0.01, fused=True)),
    "adamax": Case(make(optim.Adamax, lr=0.05)),
    "adamax-options": Case(make(optim.Adamax, lr=0.05, weight_decay=0.1, maximize=True)),
    "adamax-foreach": Case(make(optim.Adamax, lr=0.05, weight_decay=0.1, foreach=True)),
    "asgd": Case(make(optim.ASGD, lr=0.05, t0=2)),
    "asgd-options": Case(make(optim.ASGD, lr=0.05, weight_decay=0.1, t0=2, lambd=0.01, alpha=0.6, maximize=True)),
    "asgd-foreach": Case(make(optim.ASGD, lr=0.05, t0=2, foreach=True)),
    "muon": Case(make(optim.Muon, lr=0.05), shapes=MATRICES),
    "nadam": Case(make(optim.NAdam, lr=0.05)),
    "nadam-decoupled": Case(make(optim.NAdam, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True)),
    "nadam-foreach": Case(make(optim.NAdam, lr=0.05, weight_decay=0.1, foreach=True, maximize=True)),
    "radam": Case(make(optim.RAdam, lr=0.05), steps=7),
    "radam-decoupled": Case(make(optim.RAdam, lr=0.05, weight_decay=0.1, decoupled_weight_decay=True), steps=7),
    "radam-foreach": Case(make(optim.RAdam, lr=0.05, foreach=True, maximize=True), steps=7),
    "rmsprop": Case(make(optim.RMSprop, lr=0.05)),
    "rmsprop-centered": Case(make(optim.RMSprop, lr=0.05, weight_decay=0.1, momentum=0.5, centered=True)),
    "rmsprop-foreach": Case(make(optim.RMSprop, lr=0.05, momentum=0.5, centered=True, foreach=True, maximize=True)),
    "rprop": Case(make(optim.Rprop, lr=0.05)),
    "rprop-options": Case(make(optim.Rprop, lr=0.05, etas=(0.6, 1.1), step_sizes=(1e-3, 0.2), maximize=True)),
    "rprop-foreach": Case(make(optim.Rprop, lr=0.05, foreach=True)),
}
# Muon orthogonalizes in bfloat16: its values are exact, but differences of them see only bfloat16's grid.
NO_DIFFERENCES = {"muon"}
WARM = (0, 1, 3)
# They read values.
TRIED_ON_COPIES = {"adafactor", "adafactor-options", "adafactor-foreach"}


@pytest.fixture(autouse=True)
def double_precision():
    """Keeps the counters that torch.optim creates in float64, so that finite differences are not of rounded numbers."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def warmed(case, warm):
    return Case(**{**vars(case), "warm": warm})


@pytest.mark.parametrize("warm", WARM)
@pytest.mark.parametrize("name", OPTIONS)
def test_values_equal_eager(name, warm):
    assert worst_value_error(warmed(OPTIONS[name], warm)) < 1e-12


@pytest.mark.parametrize("warm", WARM)
@pytest.mark.parametrize("name", OPTIONS)
def test_trials_without_memory_find_the_same(name, warm, monkeypatch):
    hollow = same_facts(monkeypatch, warmed(OPTIONS[name], warm).start)
    assert hollow == (name not in TRIED_ON_COPIES)


@pytest.mark.parametrize("kind", (optim.LBFGS, optim.SparseAdam))
def test_trials_of_other_protocols_find_the_same(kind, monkeypatch):
    assert not same_facts(monkeypatch, Case(make(kind)).start)


@pytest.mark.parametrize("warm", (0, 3))
@pytest.mark.parametrize("name", sorted(set(OPTIONS) - NO_DIFFERENCES))
def test_derivatives_equal_differences_of_eager(name, warm):
    skip = ("groups.0.momentum",) if name == "rmsprop" else ()  # see test_momentum_from_zero_has_a_one_sided_derivative
    errors = gradient_errors(warmed(OPTIONS[name], warm), skip=skip)
    assert {path: error for path, error in errors.items() if not error < 1e-6} == {}


def test_momentum_from_zero_has_a_one_sided_derivative():
    """RMSprop asks for `momentum > 0`, so that the live step has a derivative to the right of zero only."""
    case = OPTIONS["rmsprop"]
    fn, state, hyper = functional_params(case)
    momentum = hyper[0]["momentum"].requires_grad_()
    final = run_functional(case, fn, state, hyper, case.gradients(case.steps))[-1]
    (got,) = torch.autograd.grad(projection(final), momentum)

    def live(value):
        return float(projection(eager_params(case, lambda m, o: set_number(o, "groups.0.momentum", value))[-1]))

    h = 1e-4
    right = (-11 * live(0) + 18 * live(h) - 9 * live(2 * h) + 2 * live(3 * h)) / (6 * h)
    assert float(got) == pytest.approx(right, rel=1e-6)


def test_momentum_from_zero_without_a_buffer_warns():
    """After steps without momentum the live state has no buffer, and eager itself cannot start to use one."""
    case = warmed(OPTIONS["rmsprop"], 3)
    fn, state, hyper = functional_params(case)
    hyper[0]["momentum"].requires_grad_()
    with pytest.warns(gimli.BakedValueWarning, match=r"hyper\[groups.0.momentum\] is 0, where the step takes a branch"):
        fn.update(state.params, case.gradients(1)[0], state.opt_state, hyper)
    assert any("groups.0.momentum" in str(entry) for entry in fn.report())


def test_muon_differentiates_what_its_bfloat16_products_round():
    """Muon's learning rate and weight decay act outside of the bfloat16 part: they have exact derivatives."""
    errors = gradient_errors(
        Case(make(optim.Muon, lr=0.05, momentum=0.9), shapes=MATRICES, steps=1),
        skip=("groups.0.momentum", "groups.0.eps", "groups.0.ns_coefficients.0", "groups.0.ns_coefficients.1",
              "groups.0.ns_coefficients.2", "groups.0.ns_steps"),
        state_too=False,
    )  # fmt: skip
    assert errors["groups.0.lr"] < 1e-6
    assert errors["groups.0.weight_decay"] < 1e-6


SINGLE_STEPS = [
    name
    for name, case in OPTIONS.items()
    if "fused" not in name and "tensor-lr" not in name and case.groups is not two_groups
]


def units_in_last_place(value, expected):
    """Returns the largest difference in units of the last place of the largest number of the tensor."""
    scale = expected.detach().double().abs().max().clamp(min=1e-30)
    unit = torch.finfo(expected.dtype).eps * 2.0 ** torch.floor(torch.log2(scale))
    return float((value.detach().double() - expected.detach().double()).abs().max() / unit)


def worst_single_step(case):
    """Compares each step, from the live state before it, with the live step: parameters and state."""
    model, optimizer = case.start()
    worst = 0.0
    for grads in case.gradients(4):
        fn = gimli.functionalize(model, optimizer)
        state = fn.init()
        params, opt_state = fn.update(state.params, grads, state.opt_state)
        eager_step(model, optimizer, grads)
        for name, parameter in model.named_parameters():
            assert params[name].dtype == parameter.dtype
            worst = max(worst, units_in_last_place(params[name], parameter))
            for key, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor):
                    assert opt_state[f"{name}.{key}"].dtype == value.dtype
                    worst = max(worst, units_in_last_place(opt_state[f"{name}.{key}"], value))
    return worst


@pytest.mark.parametrize("name", SINGLE_STEPS)
def test_float32_steps_are_bit_equal(name):
    torch.set_default_dtype(torch.float32)
    case = OPTIONS[name]
    shapes = ((7, 5), (3, 50)) if case.shapes is MATRICES else ((37,), (3, 50), (2, 2, 2))
    assert worst_single_step(Case(**{**vars(case), "dtype": torch.float32, "shapes": shapes})) == 0


@pytest.mark.parametrize("name", sorted(name for name in OPTIONS if "fused" in name))
def test_float32_steps_of_fused_kernels_are_within_two_roundings(name):
    """A fused kernel rounds in an order of its own; the program is that of the step without it."""
    torch.set_default_dtype(torch.float32)
    shapes = ((37,), (3, 50), (2, 2, 2))
    assert worst_single_step(Case(**{**vars(OPTIONS[name]), "dtype": torch.float32, "shapes": shapes})) <= 2


@pytest.mark.parametrize("kind", (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop))
def test_float32_steps_with_a_tensor_learning_rate_are_within_two_roundings(kind):
    torch.set_default_dtype(torch.float32)
    shapes = ((37,), (3, 50), (2, 2, 2))
    assert worst_single_step(Case(make(kind, lr=torch.tensor(0.01)), dtype=torch.float32, shapes=shapes)) <= 2


@pytest.mark.parametrize("name", SINGLE_STEPS)
def test_bfloat16_steps_are_within_a_rounding(name):
    """`add` with `alpha` rounds once or twice in eager's vectorized loop, depending on the place in the tensor."""
    torch.set_default_dtype(torch.float32)
    case = OPTIONS[name]
    shapes = ((7, 5), (3, 50)) if case.shapes is MATRICES else ((37,), (3, 50), (2, 2, 2))
    assert worst_single_step(Case(**{**vars(case), "dtype": torch.bfloat16, "shapes": shapes})) <= 2


@pytest.mark.parametrize(
    "kind",
    (
        optim.Adam,
        optim.AdamW,
        optim.NAdam,
        optim.RAdam,
        optim.Adamax,
        optim.Adadelta,
        optim.RMSprop,
        optim.Rprop,
        optim.ASGD,
    ),
)
def test_capturable_on_a_cpu_raises_what_eager_raises(kind):
    case = Case(make(kind, capturable=True))
    with pytest.raises(AssertionError, match="capturable"):
        eager_params(case)
    with pytest.raises(gimli.CaptureError, match=r"AssertionError: If capturable=True[\s\S]*Check that the same step"):
        functional_params(case)


@pytest.mark.parametrize("kind", (optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad))
def test_differentiable_flag_does_not_change_the_program(kind):
    """Eager with differentiable=True refuses leaves; without the flag it is the same function."""
    plain, flagged = Case(make(kind, lr=0.1)), Case(make(kind, lr=0.1, differentiable=True))
    fn, state, hyper = functional_params(flagged)
    grads = flagged.gradients(1)[0]
    params, _ = fn.update(state.params, grads, state.opt_state, hyper)
    for name, value in eager_params(plain)[0].items():
        torch.testing.assert_close(params[name], value, rtol=1e-12, atol=0)


def test_nothing_live_changes():
    model, optimizer = Case(make(optim.AdamW, lr=0.1), warm=2).start()
    before = [p.detach().clone() for p in model.parameters()]
    state_before = {k: {n: v.clone() for n, v in s.items()} for k, s in optimizer.state.items()}
    groups_before = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    fn = gimli.functionalize(model, optimizer)
    state = fn.init()
    with warnings.catch_warnings():
        fn.update(state.params, Case(make(optim.AdamW)).gradients(1)[0], state.opt_state)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups_before
    for parameter, entries in state_before.items():
        assert set(optimizer.state[parameter]) == set(entries)
        assert all(torch.equal(optimizer.state[parameter][n], v) for n, v in entries.items())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
