"""Optimizers that select elements by masks which follow from values."""

import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from eager_reference import Case, functional_params, gradient_errors, projection, run_functional, worst_value_error
from torch import nn

import gimli_compile as gimli


class Masked(torch.optim.Optimizer):
    """Momentum, with a function of (parameter, gradient, momentum, group) that may change them by masks."""

    def __init__(self, params, change, lr=0.1, beta=0.8, threshold=0.7):
        super().__init__(params, {"lr": lr, "beta": beta, "threshold": threshold})
        self.change = change

    @torch.no_grad()
    def step(self, closure=None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.full_like(p, 0.5)
                momentum, grad = state["momentum"], p.grad.clone()
                scale = self.change(p, grad, momentum, group)
                momentum.mul_(group["beta"]).add_(grad, alpha=1 - group["beta"])
                p.sub_(group["lr"] * momentum * (1 if scale is None else scale))


def clip_spikes(p, grad, momentum, group):
    mask = grad.square() > group["threshold"] * momentum.abs()
    grad[mask] = grad[mask].sign() * torch.sqrt(group["threshold"] * momentum[mask].abs())


def clip_by_scatter(p, grad, momentum, group):
    mask = grad.abs() > group["threshold"]
    grad.masked_scatter_(mask, torch.masked_select(grad, mask) / torch.masked_select(momentum.abs() + 1, mask))


def reset_momentum(p, grad, momentum, group):
    against = grad * momentum < 0
    momentum[against] = group["beta"] * grad[against] ** 3
    momentum[~against] += grad[~against] * 0.1


def reset_to_a_number(p, grad, momentum, group):
    momentum[momentum.abs() > group["threshold"]] = 0.25
    grad[grad < 0] *= group["threshold"]


def of_leading_dimensions(p, grad, momentum, group):
    rows = grad.flatten(1).sum(1) > 0 if p.dim() > 1 else grad > 0
    chosen = grad[rows] * momentum[rows].exp()
    grad[rows] = chosen - chosen.sum() / (chosen.numel() + 1)
    if p.dim() > 1:
        scale = grad[rows].sum(-1, keepdim=True) * torch.linspace(0, 1, p.shape[-1], dtype=p.dtype)
        momentum[rows] += scale * 0.1 + grad[rows].mean(0)


def masked_reductions(p, grad, momentum, group):
    large = grad.abs() > 0.3
    chosen = grad[large]
    total = chosen.sum() + chosen.mean() + chosen.norm() + chosen.abs().max() + chosen.amin() + chosen.prod()
    total = total + torch.linalg.vector_norm(chosen, 3) + torch.linalg.vector_norm(chosen, float("inf"))
    share = chosen.numel() / p.numel() + (chosen > 0).sum() / p.numel()
    return torch.where((chosen > group["threshold"]).any() & (chosen < 2).all(), 1.0, 0.5) + 0.1 * total * share


def singular_elsewhere(p, grad, momentum, group):
    """Roots, logarithms and quotients that are not finite where nothing is selected."""
    mask = momentum * grad > 0
    root = torch.sqrt(momentum[mask] * grad[mask]) / (momentum[mask].abs() ** group["beta"] + group["threshold"] / 1e3)
    grad[mask] = root.log() * group["threshold"]


def roots_above(p, grad, momentum, group):
    mask = grad.abs() > group["threshold"]
    grad[mask] = (grad[mask].abs() / group["threshold"]).log().sqrt() / (grad[mask] - momentum[mask])


def counted(p, grad, momentum, group):
    """What needs the number of elements: sorting, other shapes."""
    mask = grad.abs() > group["threshold"]
    ordered = torch.sort(grad[mask]).values
    grad[mask] = ordered - torch.linspace(0, 1, len(ordered), dtype=p.dtype)
    momentum[mask.nonzero(as_tuple=True)] *= group["beta"]


def of_two_masks(p, grad, momentum, group):
    """Two masks with equally many elements."""
    above = grad > grad.median()
    below = momentum.flatten().argsort() < above.sum()
    grad[above] = grad[above] * p[below.view_as(p)]


def mask_of_a_selection(p, grad, momentum, group):
    mask = grad.abs() > 0.2
    chosen = grad[mask]
    chosen[chosen > group["threshold"]] *= 0.5
    momentum[mask] = chosen


MASKED = (
    clip_spikes, clip_by_scatter, reset_momentum, reset_to_a_number, of_leading_dimensions, masked_reductions,
    singular_elsewhere, roots_above,
)  # fmt: skip
COUNTED = (counted, of_two_masks, mask_of_a_selection)


def case_of(change, **options):
    return Case(lambda params: Masked(params, change), steps=8, **options)


@pytest.mark.parametrize("change", [*MASKED, *COUNTED])
def test_values_and_derivatives_equal_eager(change):
    case = case_of(change)
    assert worst_value_error(case) < 1e-12
    errors = gradient_errors(replace(case, steps=5))
    assert max(errors.values()) < 1e-6, errors


@pytest.mark.parametrize("change", [clip_spikes, masked_reductions, counted])
def test_each_parameter_with_its_own_numbers(change):
    errors = gradient_errors(case_of(change, per_parameter=True, shapes=((3, 2), (4,))))
    assert max(errors.values()) < 1e-6, errors
    assert "groups.1.threshold" in errors


@pytest.mark.parametrize("change", MASKED)
def test_no_number_of_elements_is_fixed(change):
    """One variant serves all steps, whatever the masks select."""
    case = case_of(change)
    fn, state, hyper = functional_params(case)
    run_functional(case, fn, state, hyper, case.gradients(12))
    variants = fn.programs["update"].variants
    assert len(variants) == 2
    assert not [guard for _, guards in variants for guard in guards if "any" not in guard]


@pytest.mark.parametrize("change", [clip_spikes, roots_above, clip_by_scatter])
@pytest.mark.parametrize("threshold", [1e-9, 1e9])
def test_masks_that_select_nothing_or_everything(change, threshold):
    case = Case(lambda params: Masked(params, change, threshold=threshold), steps=4, grad_scale=0.1)
    assert worst_value_error(case) < 1e-12
    errors = gradient_errors(case, skip=("groups.0.threshold",))
    assert max(errors.values()) < 1e-6, errors


def test_single_precision():
    for change in MASKED:
        assert worst_value_error(case_of(change, dtype=torch.float32)) < 2e-6


def test_parameters_without_dimensions():
    assert worst_value_error(case_of(reset_to_a_number, shapes=((), (3,)))) < 1e-12
    assert worst_value_error(case_of(clip_by_scatter, shapes=((), (3,)))) < 1e-12


# ---------------------------------------------------------------------- values that are not finite


def drop_what_is_not_finite(p, grad, momentum, group):
    finite = grad.isfinite()
    grad[finite] = grad[finite] / (1 + grad[finite].square().mean()) * group["threshold"]
    grad[~finite] = 0


def test_nan_and_infinity_where_nothing_is_selected():
    case = case_of(drop_what_is_not_finite)
    fn, state, hyper = functional_params(case)
    params, opt_state = state.params, state.opt_state
    steps = case.gradients(4)
    for step, value in ((1, float("nan")), (2, float("inf")), (3, float("-inf"))):
        for grad in steps[step].values():
            grad.flatten()[step - 1] = value
    lr, threshold = (hyper[0][key].requires_grad_() for key in ("lr", "threshold"))
    for grads in steps:
        params, opt_state = fn.update(params, grads, opt_state, hyper)
    total = projection(params)
    got = torch.autograd.grad(total, [lr, threshold])

    def live(**numbers):
        model, optimizer = case.start()
        optimizer.param_groups[0].update(numbers)
        for grads in steps:
            for name, parameter in model.named_parameters():
                parameter.grad = grads[name].clone()
            optimizer.step()
        return float(projection({name: p.detach() for name, p in model.named_parameters()}))

    assert float(total.detach()) == pytest.approx(live(), rel=1e-13)
    for value, key, at in ((got[0], "lr", 0.1), (got[1], "threshold", 0.7)):
        difference = (live(**{key: at + 1e-5}) - live(**{key: at - 1e-5})) / 2e-5
        assert float(value) == pytest.approx(difference, rel=1e-7)


# ---------------------------------------------------------------------- many tasks


def loss_fn(model, batch):
    x, y = batch
    return ((model(x) - y) ** 2).mean()


def training(change, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(3, 2, dtype=torch.float64)
    return gimli.functionalize(model, Masked(model.parameters(), change), loss_fn)


def batches(tasks, steps):
    generator = torch.Generator().manual_seed(3)
    shape = (tasks, steps, 5)
    x = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
    return x, 2 * torch.randn(*shape, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("change", [clip_spikes, clip_by_scatter, reset_momentum, of_leading_dimensions])
def test_every_task_has_a_mask_of_its_own(change):
    fn = training(change)
    x, y = batches(3, 4)
    hyper, alone = fn.hyperparameters(), fn.hyperparameters()
    together, losses = fn.unroll(fn.init(), (x, y), hyper_with_gradient(hyper), tasks=True)
    single = [fn.unroll(fn.init(), (x[i], y[i]), hyper_with_gradient(alone)) for i in range(3)]
    torch.testing.assert_close(losses, torch.stack([loss for _, loss in single]), rtol=1e-12, atol=1e-14)
    for name, value in together.params.items():
        expected = torch.stack([state.params[name] for state, _ in single])
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    got = torch.autograd.grad(losses.sum(), [hyper[0]["lr"], hyper[0]["threshold"]], allow_unused=True)
    expected = torch.autograd.grad(
        torch.stack([loss.sum() for _, loss in single]).sum(),
        [alone[0]["lr"], alone[0]["threshold"]],
        allow_unused=True,
    )
    assert [g is None for g in got] == [g is None for g in expected]
    for value, wanted in zip(got, expected, strict=True):
        if value is not None:
            torch.testing.assert_close(value, wanted, rtol=1e-10, atol=0)


def hyper_with_gradient(hyper):
    for key in ("lr", "threshold"):
        hyper[0][key].requires_grad_()
    return hyper


def test_tasks_that_select_different_numbers_of_elements_where_the_number_matters():
    fn = training(counted)
    with pytest.raises(gimli.CaptureError, match=r"do not settle[\s\S]*tasks"):
        fn.unroll(fn.init(), batches(3, 2), tasks=True)


# ---------------------------------------------------------------------- what the code learns of the number of elements


def by_shape(p, grad, momentum, group):
    chosen = grad[grad.abs() > group["threshold"]]
    return chosen.sum() / max(1, chosen.shape[0]) + chosen.sum() / max(1, chosen.size(0)) / (1 + len(chosen))


def by_unused_operator(p, grad, momentum, group):
    chosen = grad[grad.abs() > group["threshold"]]
    return 1 / (1 + torch.cat([chosen, chosen]).numel()) + len(chosen.unbind())


def by_comparison(p, grad, momentum, group):
    chosen = grad[grad.abs() > group["threshold"]]
    if chosen.numel() > p.numel() / 2:
        return chosen.mean()
    return chosen.numel() * 0.01


@pytest.mark.parametrize("change", [by_shape, by_unused_operator, by_comparison])
def test_a_number_of_elements_that_python_sees_is_a_condition(change):
    case = case_of(change, shapes=((3, 2),))
    assert worst_value_error(case) < 1e-12
    fn, state, hyper = functional_params(case)
    run_functional(case, fn, state, hyper, case.gradients(8))
    assert len(fn.programs["update"].variants) > 2


def test_no_warning_is_raised():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        worst_value_error(case_of(masked_reductions))


# ---------------------------------------------------------------------- a number for each element


def add_to_the_selected(p, grad, momentum, group):
    """As many are selected as the parameter has columns: shapes that fit by chance."""
    chosen = grad[grad >= grad.flatten().topk(4).values[-1]]
    return (chosen * group["threshold"]).sum()


def scale_by_position(p, grad, momentum, group):
    return (grad[(grad > 0).nonzero(as_tuple=True)] * group["threshold"]).sum()


def write_to_the_selected(p, grad, momentum, group):
    grad[grad > -100] = group["threshold"]


def write_through_a_tensor(p, grad, momentum, group):
    scale = torch.tensor(group["threshold"])
    chosen = grad[grad > 0]
    grad[grad > 0] = chosen * scale


def select_from_a_tensor(p, grad, momentum, group):
    """The right elements: what is filled with the number is selected by the same mask."""
    mask = grad > 0
    scale = torch.full_like(p, group["threshold"])
    grad[mask] = grad[mask] * scale[mask]


def by_where(p, grad, momentum, group):
    grad.copy_(torch.where(grad > 0, grad * group["threshold"], grad))


def with_a_threshold_for_each(change, threshold):
    model = Matrix()
    fn = gimli.functionalize(model, Masked(model.parameters(), change), per_parameter=True)
    state, hyper = fn.init(), fn.hyperparameters()
    hyper[0]["threshold"] = threshold
    grads = {"weight": torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)[:, [2, 0, 3, 1]]}
    return fn.update(state.params, grads, state.opt_state, hyper)[0]["weight"]


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4))


@pytest.mark.parametrize(
    ("change", "line"),
    (
        (clip_spikes, r"torch.sqrt\(group"),
        (reset_to_a_number, r"\*= group"),
        (masked_reductions, r"chosen > group"),
        (scale_by_position, r"nonzero\(as_tuple=True\)\] \* group"),
        (add_to_the_selected, r"\(chosen \* group"),
        (write_to_the_selected, r"= group"),
        (write_through_a_tensor, r"chosen \* scale"),
    ),
)
def test_a_number_for_each_element_does_not_meet_selected_ones(change, line):
    with pytest.raises(gimli.CaptureError, match="value for each element of its parameter meets") as caught:
        with_a_threshold_for_each(change, torch.full((3, 4), 0.7, dtype=torch.float64))
    assert re.search(f"test_selections.py:.*{line}", str(caught.value)) and "torch.where" in str(caught.value)


@pytest.mark.parametrize("change", (select_from_a_tensor, by_where))
def test_a_number_for_each_element_is_selected_with_them(change):
    """Of elements with different numbers, each goes as if the number were that of all."""
    low, high = torch.tensor(0.3, dtype=torch.float64), torch.tensor(0.9, dtype=torch.float64)
    mixed = torch.where(torch.arange(12).view(3, 4) % 2 == 0, low, high)
    found = with_a_threshold_for_each(change, mixed)
    expected = [with_a_threshold_for_each(change, number.expand(3, 4).clone()) for number in (low, high)]
    assert torch.equal(found, torch.where(mixed == low, *expected))
    assert not torch.equal(*expected)


def test_the_line_of_an_error_is_the_optimizers():
    def mismatched(p, grad, momentum, group):
        return grad + torch.ones(7)

    model = Matrix()
    with pytest.raises(
        gimli.CaptureError, match=r"test_selections.py:\d+ in mismatched: return grad \+ torch.ones\(7\)"
    ):
        gimli.functionalize(model, Masked(model.parameters(), mismatched))
