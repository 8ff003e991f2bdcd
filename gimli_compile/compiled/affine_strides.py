"""The strides of indices in kernels that Inductor writes for the CPU, without sympy's simplification."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import sympy
from torch._inductor.codegen import cpp

_general = getattr(cpp, "stride_at_vec_range", None)


@contextmanager
def affine_strides() -> Iterator[None]:
    """Within this, Inductor reads the stride of an index off its text, where that is a sum of multiples of variables.

    It simplifies each index of each kernel with sympy, a sixth of the time that it takes to write a program.
    """
    if _general is None:
        yield
        return
    with mock.patch.object(cpp, "stride_at_vec_range", stride):
        yield


def stride(index: sympy.Expr, var: sympy.Symbol, vec_length: int | None = None) -> sympy.Expr:
    """Returns what `index` grows by with each step of `var`: what Inductor's own function returns."""
    assert _general is not None
    found = sympy.S.Zero
    for term in sympy.Add.make_args(index):
        if var not in term.free_symbols:
            continue
        factor = term.as_coeff_Mul()
        if factor[1] != var or not factor[0].is_Integer:
            return _general(index, var, vec_length)
        found += factor[0]
    return found
