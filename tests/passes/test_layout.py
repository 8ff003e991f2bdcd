"""Views that depend on strides."""

import torch
from recorded import call, record

from gimli_compile.passes.layout import relax_views
from gimli_compile.passes.mutation import functionalize

X = torch.arange(24, dtype=torch.float64).reshape(4, 6).sin()


def strided(x):
    return (x * 2).as_strided((2, 3), (6, 2), 7) ** 2


def test_a_strided_view_becomes_a_look_up(check_pass):
    made = check_pass(relax_views, functionalize(record(strided, {"x": X})))
    assert "as_strided.default" not in made.code and "aten.index.Tensor" in made.code


def test_a_strided_view_takes_other_strides():
    made = relax_views(functionalize(record(strided, {"x": X})))
    turned = X.t().contiguous().t()
    assert torch.equal(call(made, {"x": turned})["output[0]"], strided(X))


def test_a_strided_view_is_mapped():
    made = relax_views(functionalize(record(strided, {"x": X})))
    several = torch.stack([X, X + 1], -1)
    mapped = torch.func.vmap(lambda x: call(made, {"x": x})["output[0]"], in_dims=-1)(several)
    assert torch.equal(mapped, torch.stack([strided(X), strided(X + 1)]))


def test_a_view_becomes_a_reshape(check_pass):
    made = check_pass(relax_views, functionalize(record(lambda x: x.view(6, 4).sin(), {"x": X})))
    assert "aten.reshape.default" in made.code and "aten.view" not in made.code
