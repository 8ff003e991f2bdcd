"""First-order programs."""

from dataclasses import replace

import torch
from expecttest import assert_expected_inline
from recorded import call, record, text

from gimli_compile.passes.order import stop_inner_gradients
from gimli_compile.slot import Role, Slot

X = torch.linspace(0.5, 2.0, 3, dtype=torch.float64)
ROLES = (Slot(Role.LOSS), Slot(Role.GRAD, "x"))


def gradient_program():
    """The program of `loss = sum(x ** 3)` and its gradient."""
    program = record(lambda x: ((x * x * x).sum(), 3 * x * x), {"x": X})
    return replace(program, results=ROLES)


def test_gradients_are_constants(check_pass):
    made = check_pass(stop_inner_gradients, gradient_program(), same_derivatives=False)
    assert_expected_inline(
        text(made),
        """\
# a recorded function
def function(
    state_x,  # f64[3]
):
    # program = record(lambda x: ((x * x * x).sum(), 3 * x * x), {"x": X})
    mul = aten.mul.Tensor(state_x, state_x)  # f64[3]
    mul_1 = aten.mul.Tensor(mul, state_x)  # f64[3]
    sum_1 = aten.sum.default(mul_1)  # f64[]
    mul_2 = aten.mul.Tensor(state_x, 3)  # f64[3]
    mul_3 = aten.mul.Tensor(mul_2, state_x)  # f64[3]
    detach = aten.detach.default(mul_3)  # f64[3]
    return (
        sum_1,
        detach,
    )
""",
    )


def test_the_loss_keeps_its_derivatives(check_pass):
    made = check_pass(stop_inner_gradients, gradient_program(), same_derivatives=False)
    x = X.clone().requires_grad_()
    results = call(made, {"x": x})
    (slope,) = torch.autograd.grad(results["loss"], x, create_graph=True)
    torch.testing.assert_close(slope, 3 * x * x, rtol=1e-14, atol=0)
    (curvature,) = torch.autograd.grad(slope.sum(), x)
    torch.testing.assert_close(curvature, 6 * X, rtol=1e-14, atol=0)
    assert not results["grads[x]"].requires_grad


def test_programs_without_gradients_stay(check_pass):
    program = record(lambda x: ((x * x).sum(), x * x), {"x": X})
    assert check_pass(stop_inner_gradients, program).code == program.code


def test_a_gradient_that_is_an_input_is_stopped_at_the_result_only(check_pass):
    program = replace(record(lambda x: ((x * x).sum(), x), {"x": X}), results=ROLES)
    made = check_pass(stop_inner_gradients, program, same_derivatives=False)
    x = X.clone().requires_grad_()
    results = call(made, {"x": x})
    assert not results["grads[x]"].requires_grad
    assert torch.equal(torch.autograd.grad(results["loss"], x)[0], 2 * X)
