"""Writes of a part into a whole."""

import pytest
import torch
from recorded import call, record

from gimli_compile.passes.mutation import functionalize
from gimli_compile.passes.scatters import lower_scatters

X = torch.arange(12, dtype=torch.float64).reshape(3, 4).cos()
Y = torch.arange(3, dtype=torch.float64).exp()


def written(x, y):
    whole = x * 2
    whole[:, -2] = y
    return whole.sin()


def written_slice(x, y):
    whole = torch.zeros_like(x)
    whole[:, 1:3] = y.unsqueeze(1) * x[:, :2]
    return whole


def lowered(function, **values):
    return lower_scatters(functionalize(record(function, values)))


@pytest.mark.parametrize("function", [written, written_slice])
def test_keeps_values_and_derivatives(check_pass, function):
    made = check_pass(lower_scatters, functionalize(record(function, {"x": X, "y": Y})))
    assert "select_scatter" not in made.code and "slice_scatter" in made.code


def test_the_gradient_of_a_mapped_write_is_that_of_a_loop():
    made = lowered(written, x=X, y=Y)

    def run(x, y):
        return call(made, {"x": x, "y": y})["output[0]"]

    several = torch.stack([X, X + 1]), torch.stack([Y, Y - 3]).requires_grad_()
    weights = torch.linspace(-1, 2, 24, dtype=torch.float64).reshape(2, 3, 4)
    (mapped,) = torch.autograd.grad((torch.func.vmap(run)(*several) * weights).sum(), several[1])
    looped = torch.stack([run(x, y) for x, y in zip(*several, strict=True)])
    (expected,) = torch.autograd.grad((looped * weights).sum(), several[1])
    assert torch.equal(mapped, expected)


@pytest.mark.parametrize("function", [written, written_slice])
def test_complex_numbers_are_written_with_gradients(function):
    values = {"x": torch.complex(X, X.sin()), "y": torch.complex(Y, Y.cos())}
    made = lowered(function, **values)
    assert "scatter" not in made.code.replace("_scatters", "")

    def gradients(run):
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        return torch.autograd.grad(torch.view_as_real(run(leaves)).sin().sum(), list(leaves.values()))

    got = gradients(lambda leaves: call(made, leaves)["output[0]"])
    for gradient, expected in zip(got, gradients(lambda leaves: function(**leaves)), strict=True):
        assert torch.allclose(gradient, expected, rtol=1e-12, atol=0)
