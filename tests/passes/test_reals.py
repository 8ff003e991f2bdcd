"""The real sign."""

import torch
from recorded import call, record

from gimli_compile.passes.reals import use_real_signs

X = torch.tensor([[-2.0, 0.0, 3.0]], dtype=torch.float64)


def test_a_real_sgn_becomes_a_sign(check_pass):
    program = record(lambda x: torch.sgn(x) * x, {"x": X})
    made = check_pass(use_real_signs, program)
    assert "aten.sign.default" in made.code and "sgn.default" not in made.code
    assert torch.equal(call(made, {"x": X})["output[0]"], X.abs())


def test_a_complex_sgn_stays():
    program = record(lambda x: torch.sgn(x), {"x": torch.complex(X, X)})
    assert use_real_signs(program).code == program.code
