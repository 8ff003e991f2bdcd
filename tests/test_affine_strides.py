"""Strides that are read off an index are those that Inductor finds by simplifying it."""

import pytest
import sympy
import torch
from torch._inductor.codegen import cpp
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from gimli_compile.compiled import affine_strides
from gimli_compile.compiled.backends import compile_with_inductor
from gimli_compile.compiled.halves import trace

stride_at_vec_range = vars(cpp)["stride_at_vec_range"]  # defined in another module from torch 2.13 on
X, Y, SIZE = sympy.symbols("d0 d1 s0", integer=True, nonnegative=True)
INDICES = {
    "affine": (X + 64 * Y + 3, False),
    "a constant": (sympy.Integer(5), False),
    "not of the variable": (7 * Y, False),
    "a product of variables": (X * (Y + 1), True),
    "a negative stride": (63 - X, False),
    "a floor": (FloorDiv(X, 4) + 8 * Y, True),
    "a floor of another": (X + FloorDiv(Y, 4), False),
    "a remainder": (ModularIndexing(X, 1, 32) + 32 * Y, True),
    "a size": (X * SIZE + Y, True),
}


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("length", [None, 16])
def test_strides(name, length, monkeypatch):
    index, is_general = INDICES[name]
    asked = []

    def general(*given):
        asked.append(given)
        return stride_at_vec_range(*given)

    monkeypatch.setattr(affine_strides, "_general", general)
    assert affine_strides.stride(index, X, length) == stride_at_vec_range(index, X, length)
    assert bool(asked) == is_general


def test_inductor_asks_for_them_while_it_builds(monkeypatch):
    asked = []

    def counted(*given):
        asked.append(given)
        return stride_at_vec_range(*given)

    monkeypatch.setattr(affine_strides, "stride", counted)
    x = torch.randn(5, 8, 8)
    program = compile_with_inductor(trace(lambda x: [x.mean(-1) + x.exp().sum(-1)], [x]))
    torch.testing.assert_close(program([x.clone()])[0], x.mean(-1) + x.exp().sum(-1))
    assert asked
    assert vars(cpp)["stride_at_vec_range"] is stride_at_vec_range
