"""Stop-gradients that nobody asked for."""

import torch
from expecttest import assert_expected_inline
from recorded import call, derivatives, eager, record, text

from gimli_compile.passes.detachment import reconnect_gradients
from gimli_compile.passes.mutation import functionalize
from gimli_compile.recording import Region

X = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3)


def optimizer_code(x, y):
    buffer = torch.clone(x).detach()
    return buffer * y.detach(), y.clone()


def test_detach_of_an_optimizer_goes(check_pass):
    program = record(optimizer_code, {"x": X, "y": X + 1})
    made = check_pass(reconnect_gradients, program, same_derivatives=False)
    assert_expected_inline(
        text(made),
        """\
# a recorded function
def function(
    state_x,  # f64[2, 3]
    state_y,  # f64[2, 3]
):
    # return buffer * y.detach(), y.clone()
    mul = aten.mul.Tensor(state_x, state_y)  # f64[2, 3]
    return (
        mul,
        state_y,
    )
""",
    )


def test_derivatives_are_those_of_the_code_without_detach(check_pass):
    values = {"x": X, "y": X + 1}
    made = check_pass(reconnect_gradients, record(optimizer_code, values), same_derivatives=False)
    found = derivatives(lambda leaves: call(made, leaves), values)
    expected = derivatives(lambda leaves: eager(lambda x, y: (x * y, y.clone()), leaves), values)
    assert found.keys() == expected.keys() and len(found) == 4
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-14, atol=0)


def test_detach_of_the_users_loss_stays(check_pass):
    def loss(x):
        return (x.detach() * x).sum(), x.data * 2

    program = record(loss, {"x": X}, numbers={}, region=Region.LOSS)
    made = check_pass(reconnect_gradients, program)
    assert made.code == program.code
    assert text(made).count("aten.detach") == 2


def test_no_grad_of_the_users_loss_stays(check_pass):
    def loss(x):
        with torch.no_grad():
            weight = x.exp() + 1
        return (weight * x).sum()

    raw = record(loss, {"x": X}, numbers={}, region=Region.LOSS)
    made = check_pass(reconnect_gradients, functionalize(raw))
    found = derivatives(lambda leaves: call(made, leaves), {"x": X})
    expected = derivatives(lambda leaves: eager(loss, leaves), {"x": X})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_detach_of_the_framework_in_a_backward_pass_goes(check_pass):
    def backward(x):
        return x.detach() * x

    made = check_pass(
        reconnect_gradients,
        record(backward, {"x": X}, numbers={}, region=Region.BACKWARD),
        same_derivatives=False,
    )
    assert "aten.detach" not in made.code


def test_a_copy_to_another_form_stays(check_pass):
    def function(x):
        return x.t().clone(memory_format=torch.contiguous_format), x.expand(2, 2, 3).clone()

    program = record(function, {"x": X})
    assert check_pass(reconnect_gradients, program).code == program.code


def test_a_copy_of_the_same_form_goes(check_pass):
    made = check_pass(reconnect_gradients, record(lambda x: x.t().clone() * 2, {"x": X}))
    assert "aten.clone" not in made.code


def test_casts_stay(check_pass):
    program = record(lambda x: x.to(torch.float32).to(torch.float64), {"x": X})
    assert check_pass(reconnect_gradients, program).code == program.code


def test_a_chain_of_copies_ends_at_the_input(check_pass):
    made = check_pass(
        reconnect_gradients, record(lambda x: x.clone().detach().clone(), {"x": X}), same_derivatives=False
    )
    assert made.returned[0] is made.placeholders[0]
