"""Copies that share memory until one side is written to."""

import pytest
import torch
from tensor_memory import peak_growth
from torch import nn

from gimli_compile.lazy_copies import lazy_copy

LARGE = 1 << 20


def values():
    return torch.arange(LARGE, dtype=torch.float32)


def test_a_copy_that_is_only_read_takes_no_memory():
    value = values()
    made = []

    def read():
        copied = lazy_copy(value)
        made.append(float(copied[::4096].sum()))

    assert peak_growth(read) < value.nbytes // 100
    assert made == [float(value[::4096].sum())]


WRITES = {
    "in place": lambda x: x.mul_(2),
    "through a view": lambda x: x.view(2, -1)[1].fill_(3.0),
    "foreach": lambda x: torch._foreach_add_([x], 1.0),  # pyright: ignore[reportPrivateImportUsage]
    "as a result": lambda x: torch.neg(torch.ones_like(x), out=x),
    "by numpy": lambda x: x.numpy().__setitem__(5, 7.0),
    "by data": lambda x: x.data.zero_(),
    "by an optimizer": lambda x: _train(x),
}


def _train(x):
    parameter = nn.Parameter(x)
    parameter.grad = torch.ones_like(x)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("to_copy", [True, False])
def test_what_is_written_to_one_is_not_seen_in_the_other(write, to_copy):
    value = values()
    copied = lazy_copy(value)
    written, other = (copied, value) if to_copy else (value, copied)
    WRITES[write](written)
    assert torch.equal(other, values())
    assert not torch.equal(written, values())


@pytest.mark.parametrize(
    "value",
    [
        values().view(1024, 1024).t(),
        torch.ones(1).expand(LARGE),
        torch.eye(300).to_sparse(),
        torch.ones(3),
        torch.ones(LARGE, requires_grad=True),
        nn.Parameter(torch.ones(LARGE)),
        torch.ones(LARGE, dtype=torch.bool),
    ],
    ids=["transposed", "expanded", "sparse", "small", "differentiated", "parameter", "flags"],
)
def test_tensors_of_other_kinds(value):
    copied = lazy_copy(value)
    assert not copied.requires_grad
    assert copied.layout is value.layout
    assert torch.equal(copied.to_dense(), value.detach().to_dense())


def test_shared_memory_is_copied():
    value = values().share_memory_()
    copied = lazy_copy(value)
    value.zero_()
    assert torch.equal(copied, values())
    assert value.is_shared()
