"""What is taken for granted of torch is looked at: silence would be gradients through a `detach`."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import gimli_compile as gimli
from gimli_compile import torch_support


def functionalized():
    model = nn.Linear(2, 1)
    return gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.fixture(autouse=True)
def anew():
    torch_support.check_torch.cache_clear()
    yield
    torch_support.check_torch.cache_clear()


def test_this_torch():
    functionalized()


def test_a_torch_that_traces_detach_as_an_alias(monkeypatch):
    """As torch does since 2.14, where first-order gradients of compiled loops were those of second order."""

    def alias(function):
        def traced(tensor):
            return torch.ops.aten.alias.default(tensor)

        return make_fx(traced if function is torch.Tensor.detach else function)

    monkeypatch.setattr(torch_support, "make_fx", alias)
    for _ in range(2):
        with pytest.raises(gimli.CaptureError, match=r"not supported(.|\n)*torch>=2.11,<2.14"):
            functionalized()


def test_in_the_middle_of_a_transform():
    """The look is not part of what is differentiated."""

    def loss(x):
        torch_support.check_torch()
        return (x**2).sum()

    assert torch.equal(torch.func.grad(loss)(torch.ones(2)), 2 * torch.ones(2))
