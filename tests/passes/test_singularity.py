"""Derivatives at zero."""

from dataclasses import replace

import pytest
import torch
from expecttest import assert_expected_inline
from recorded import call, derivatives, record, text

from gimli_compile.passes.redundancy import merge_common_subexpressions
from gimli_compile.passes.singularity import guard_zeros
from gimli_compile.slot import Role, Slot

V = torch.tensor([0.25, 1.0, 2.0, 9.0], dtype=torch.float64)
WITH_ZEROS = torch.tensor([0.25, 0.0, 2.0, 0.0], dtype=torch.float64)


def test_square_roots(check_pass):
    program = record(lambda v, x: x / (torch.sqrt(v) + 1e-8), {"v": V, "x": V})
    assert_expected_inline(
        text(check_pass(guard_zeros, program, at={"v": V})),
        """\
# a recorded function
def function(
    state_v,  # f64[4]
    state_x,  # f64[4]
):
    # program = record(lambda v, x: x / (torch.sqrt(v) + 1e-8), {"v": V, "x": V})
    zero = aten.eq.Scalar(state_v, 0)  # bool[4]
    masked_fill = aten.masked_fill.Scalar(state_v, zero, 1)  # f64[4]
    sqrt_1 = aten.sqrt.default(masked_fill)  # f64[4]
    detach = aten.detach.default(state_v)  # f64[4]
    where = aten.where.self(zero, detach, sqrt_1)  # f64[4]
    add = aten.add.Tensor(where, 1e-08)  # f64[4]
    div = aten.div.Tensor(state_x, add)  # f64[4]
    return (
        div,
    )
""",
    )


def test_powers_with_a_number(check_pass):
    program = record(lambda v, n: v**n, {"v": V}, numbers={"n": 0.25})
    made = check_pass(guard_zeros, program, at={"v": V, "n": torch.tensor(0.25, dtype=torch.float64)})
    assert_expected_inline(
        text(made),
        """\
# a recorded function
def function(
    state_v,  # f64[4]
    hyper_n,  # f64[]
):
    # program = record(lambda v, n: v**n, {"v": V}, numbers={"n": 0.25})
    zero = aten.eq.Scalar(state_v, 0)  # bool[4]
    lt = aten.lt.Scalar(hyper_n, 1)  # bool[]
    gt = aten.gt.Scalar(hyper_n, 0)  # bool[]
    logical_and = aten.logical_and.default(lt, gt)  # bool[]
    zero_1 = aten.logical_and.default(zero, logical_and)  # bool[4]
    masked_fill = aten.masked_fill.Scalar(state_v, zero_1, 1)  # f64[4]
    pow_2 = aten.pow.Tensor_Tensor(masked_fill, hyper_n)  # f64[4]
    masked_fill_1 = aten.masked_fill.Scalar(pow_2, zero_1, 0)  # f64[4]
    return (
        masked_fill_1,
    )
""",
    )


def step(v, grad):
    """Adam's denominator without its eps inside the root."""
    mean = v * 0.9 + 0.1 * grad * grad
    return grad / (mean.sqrt() + 1e-8)


@pytest.mark.parametrize("exponent", [0.5, 0.25, 0.999])
def test_fractional_power_has_a_zero_derivative_at_zero(check_pass, exponent):
    made = check_pass(guard_zeros, record(lambda v: v**exponent, {"v": V}), at={"v": V})
    found = derivatives(lambda leaves: call(made, leaves), {"v": WITH_ZEROS})
    beside = derivatives(lambda leaves: call(made, leaves), {"v": WITH_ZEROS + (WITH_ZEROS == 0)})
    for name, value in found.items():
        assert torch.equal(value, torch.where(WITH_ZEROS == 0, 0.0, beside[name]))


def test_adam_at_a_gradient_of_zero(check_pass):
    program = record(step, {"v": V, "grad": V})
    zeros = {"v": WITH_ZEROS, "grad": torch.zeros_like(V)}
    made = check_pass(guard_zeros, program, at=zeros, same_derivatives=False)
    assert derivatives(lambda leaves: call(program, leaves), zeros)["first v"].isnan().any()
    found = derivatives(lambda leaves: call(made, leaves), zeros)
    assert set(found) == {"first v", "first grad", "second v", "second grad"}
    assert all(value.isfinite().all() for value in found.values())
    torch.manual_seed(0)
    weight = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(found["first grad"], weight / ((0.9 * WITH_ZEROS).sqrt() + 1e-8), rtol=1e-13, atol=0)


def test_derivatives_away_from_zero_are_the_same(check_pass):
    program = record(step, {"v": V, "grad": V})
    check_pass(guard_zeros, program, at={"v": V, "grad": -V})


def test_learned_exponent_at_zero(check_pass):
    program = record(lambda v, n: v**n, {"v": V}, numbers={"n": 0.5})
    made = check_pass(guard_zeros, program, at={"v": V, "n": torch.tensor(0.5, dtype=torch.float64)})
    values = {"v": WITH_ZEROS, "n": torch.tensor(0.5, dtype=torch.float64)}
    found = derivatives(lambda leaves: call(made, leaves), values)
    assert all(value.isfinite().all() for value in found.values())
    weight = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    beside = WITH_ZEROS != 0
    slope = (weight * WITH_ZEROS.sqrt() * WITH_ZEROS.log())[beside].sum()
    torch.testing.assert_close(found["first n"], slope, rtol=1e-13, atol=0)


@pytest.mark.parametrize("exponent", [2, 3, 1.0, 1.5, -0.5, 0.0])
def test_other_powers_stay(check_pass, exponent):
    program = record(lambda v: v**exponent, {"v": V})
    assert check_pass(guard_zeros, program, at={"v": V}).code == program.code


def test_a_learned_exponent_above_one_keeps_its_derivative_at_zero(check_pass):
    two = torch.tensor(2.0, dtype=torch.float64)
    made = check_pass(guard_zeros, record(lambda v, n: v**n, {"v": V}, numbers={"n": 2.0}), at={"v": V, "n": two})
    weight = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = derivatives(lambda leaves: call(made, leaves), {"v": WITH_ZEROS, "n": two})
    torch.testing.assert_close(found["first v"], 2 * WITH_ZEROS * weight, rtol=1e-14, atol=0)


@pytest.mark.parametrize("special", [0.0, float("inf"), float("nan"), -1.0])
def test_special_values_stay(check_pass, special):
    value = torch.full((4,), special, dtype=torch.float64)
    for function in (lambda v: v.sqrt(), lambda v: v**0.5, lambda v: v**0.3):
        check_pass(guard_zeros, record(function, {"v": V}), at={"v": value}, same_derivatives=False)


def test_the_sign_of_zero_stays():
    negative = torch.full((4,), -0.0, dtype=torch.float64)
    made = guard_zeros(record(lambda v: 1 / v.sqrt(), {"v": V}))
    assert torch.equal(call(made, {"v": negative})["output[0]"], 1 / negative.sqrt())


def test_a_parameter_without_dimensions(check_pass):
    half, zero = torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    for function, numbers in ((lambda v: v.sqrt(), None), (lambda v: v**0.5, None), (lambda v, n: v**n, {"n": 0.5})):
        program = record(function, {"v": half}, numbers=numbers)
        program = replace(program, inputs=(Slot(Role.PARAM, "v"), *program.inputs[1:]))
        made = check_pass(guard_zeros, program, at={"v": half, "n": half})
        found = derivatives(lambda leaves, made=made: call(made, leaves), {"v": zero, "n": half})
        assert found["first v"] == 0


def test_roots_of_whole_numbers(check_pass):
    program = record(lambda v: v.sqrt(), {"v": torch.tensor([0, 1, 4])})
    check_pass(guard_zeros, program, at={"v": torch.tensor([0, 1, 4])})


def test_guards_survive_common_subexpressions(check_pass):
    program = record(lambda v: v.sqrt() + v.sqrt() * v, {"v": V})
    made = merge_common_subexpressions(guard_zeros(program))
    check_pass(guard_zeros, made, at={"v": WITH_ZEROS})
    assert guard_zeros(made).code == made.code
    assert text(made).count("aten.sqrt") == 1


def bounded(v, growth):
    """A growth that is unbounded unless a hyperparameter says otherwise."""
    return torch.minimum(v.sum(), v.mean() * growth) * v


def test_a_bound_that_is_infinite(check_pass):
    program = record(bounded, {"v": V}, numbers={"growth": 2.0})
    values = {"v": V, "growth": torch.tensor(float("inf"), dtype=torch.float64)}
    made = check_pass(guard_zeros, program, at=values, same_derivatives=False)
    assert derivatives(lambda leaves: call(program, leaves), values)["first v"].isnan().all()
    found = derivatives(lambda leaves: call(made, leaves), values)
    free = derivatives(lambda leaves: {"output[0]": leaves["v"].sum() * leaves["v"]}, {"v": V})
    assert found["first growth"] == 0
    torch.testing.assert_close(found["first v"], free["first v"], rtol=1e-14, atol=0)
    check_pass(guard_zeros, program, at={"v": V, "growth": torch.tensor(2.0, dtype=torch.float64)})


@pytest.mark.parametrize(("rows", "columns"), [(3, 3), (4, 2)])
def test_the_factors_of_a_matrix_of_zeros(check_pass, rows, columns):
    """A basis that starts at zero: the derivative was NaN."""
    torch.manual_seed(0)
    a = torch.randn(2, rows, rows, dtype=torch.float64)
    program = record(lambda a, u: torch.linalg.qr(a @ u), {"a": a, "u": torch.ones(rows, columns, dtype=torch.float64)})
    zeros = {"a": a, "u": torch.zeros(rows, columns, dtype=torch.float64)}
    made = check_pass(guard_zeros, program, at=zeros, same_derivatives=False)
    assert derivatives(lambda leaves: call(program, leaves), zeros)["first a"].isnan().any()
    found = derivatives(lambda leaves: call(made, leaves), zeros)
    assert all(not value.any() for value in found.values())
    beside = {"a": a, "u": torch.randn(rows, columns, dtype=torch.float64)}
    check_pass(guard_zeros, program, at=beside)
