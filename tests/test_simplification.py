"""Traced graphs made simpler: no in-place operators, equal values once, nothing that changes nothing; equal results."""

from __future__ import annotations

import pytest
import torch

from gimli_compile.compiled.halves import halves, trace
from gimli_compile.compiled.simplification import simplify
from gimli_compile.compiled.small_values import compute_small_values_first

aten = torch.ops.aten


def targets(module):
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def assert_same_results(function, *inputs):
    module = trace(function, inputs)
    expected = [value.clone() for value in module(*(value.clone() for value in inputs))]
    found = simplify(module)(*inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    return module


def test_operators_in_place_become_values_and_equal_ones_are_computed_once():
    def rest(weight):
        return aten.empty_like.default(weight).fill_(1).sub_(weight)

    module = assert_same_results(lambda a, w: [a * rest(w), (a + 1) * rest(w)], torch.randn(3), torch.randn(()))
    assert targets(module).count(aten.sub.Tensor) == 1
    assert not any(target._schema.is_mutable for target in targets(module))


def test_later_uses_see_what_was_written_and_earlier_ones_do_not():
    def function(a):
        b = a * 2
        before = b + 1
        b.mul_(3)
        return [before, b, b + 1]

    module = assert_same_results(function, torch.randn(3))
    assert not any(target._schema.is_mutable for target in targets(module))


@pytest.mark.parametrize("view", [lambda b: b.view(-1), lambda b: b[1], lambda b: b.t()])
def test_what_has_views_is_written_to_as_before(view):
    def function(a):
        b = a * 2
        part = view(b)
        b.mul_(3)
        part.add_(1)
        return [b, part + 1]

    module = assert_same_results(function, torch.randn(2, 2))
    assert aten.mul_.Tensor in targets(module)


def test_what_is_cast_in_place_stays():
    def function(a, wide):
        b = a * 2
        b.add_(wide)
        return [b + 1]

    module = assert_same_results(function, torch.randn(3), torch.randn(3, dtype=torch.float64))
    assert aten.add_.Tensor in targets(module)


def test_what_changes_nothing_is_dropped():
    def function(a):
        b = aten.mul.Scalar(a, 1).t().t() + torch.zeros_like(a)
        return [b * b.view(2, 3)]

    assert targets(assert_same_results(function, torch.randn(2, 3))) == [aten.mul.Tensor]


def test_zeros_that_widen_or_spread_stay():
    def function(a):
        wide = a + torch.zeros(2, 3, dtype=torch.float64)
        return [wide * 2, aten.mul.Scalar(a, 1)]

    module = assert_same_results(function, torch.randn(3))
    assert aten.add.Tensor in targets(module) and aten.mul.Scalar in targets(module)


def test_the_adjoint_of_lerp_keeps_no_copies_of_its_weight():
    def function(a, b, c, weight):
        return [torch.lerp(a, c, weight), torch.lerp(b, c, weight)]

    examples = [torch.randn(3), torch.randn(3), torch.randn(3), torch.randn(())]
    split = halves(function, examples, [0, 1, 2, 3], frozenset(), None)
    assert split.saving.graph.find_nodes(op="call_function", target=aten.sub_.Tensor) == []
    assert all(place < len(examples) for place in split.residuals)


def test_slow_functions_are_not_computed_again():
    def function(a, b):
        return [(a * b).tanh() * (a + b).tanh()]

    inputs = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    split = halves(function, inputs, [0, 1], frozenset(), None)
    assert split.backward is not None and split.found == (0, 1)
    assert targets(split.saving).count(aten.tanh.default) == 2
    assert aten.tanh.default not in targets(split.backward)
    everything = [*inputs, *split.saving(*inputs)]
    found = split.backward(*(everything[place] for place in split.residuals), torch.ones_like(inputs[0]))
    expected = torch.autograd.grad(function(*inputs)[0].sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-13)


def test_small_values_that_spread_are_marked():
    def function(beta, count, a):
        correction = 1 - beta**count
        return [a / correction, correction.view(1) * a, beta.exp()]

    module = trace(function, [torch.randn(()), torch.randn(()), torch.randn(64)])
    compute_small_values_first(module.graph)
    marked = [node.target for node in module.graph.nodes if node.meta.get("inductor_realize_to_strides")]
    assert marked == [aten.rsub.Scalar]
