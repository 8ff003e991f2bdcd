"""What a node's value looks like, inferred once for calls of one form."""

import torch
from torch import fx

from gimli_compile.metadata import FAKE, fake_like, frozen, infer, insert_call

aten = torch.ops.aten


def placeholder(graph, name, value):
    node = graph.placeholder(name)
    node.meta.update(val=fake_like(value), source=None)
    return node


def test_values_of_one_form_are_inferred_once(monkeypatch):
    graph = fx.Graph()
    a, b = (placeholder(graph, name, torch.ones(5, 3, 7)) for name in "ab")
    made = insert_call(graph, aten.sinh.default, (a,), like=a)

    def fail(*_):
        raise AssertionError("inferred twice")

    monkeypatch.setattr(type(FAKE), "__torch_dispatch__", fail)
    again = insert_call(graph, aten.sinh.default, (b,), like=b)
    assert again.meta["val"].shape == made.meta["val"].shape == (5, 3, 7)


def test_numbers_of_other_kinds_are_other_calls():
    x = placeholder(fx.Graph(), "x", torch.ones(3, dtype=torch.int64))
    dtypes = [infer(aten.mul.Tensor, (x, number), {}).dtype for number in (True, 1, 1.0, 1j)]
    assert dtypes == [torch.int64, torch.int64, torch.float32, torch.complex64]
    assert len({frozen(number, str) for number in (True, 1, 1.0, 0.0, -0.0)}) == 5


def test_values_of_other_forms_are_other_calls():
    forms = [torch.ones(2, 3), torch.ones(3, 2).t(), torch.ones(2, 3, dtype=torch.float64), torch.ones(1, 3)]
    nodes = [placeholder(fx.Graph(), "x", form) for form in forms]
    made = [infer(aten.neg.default, (node,), {}) for node in nodes]
    assert [(v.dtype, v.shape, v.stride()) for v in made] == [(v.dtype, v.shape, v.stride()) for v in forms]


def test_a_conjugate_is_another_form():
    node = placeholder(fx.Graph(), "x", torch.ones(2, dtype=torch.complex64))
    plain = infer(aten.clone.default, (node,), {})
    node.meta["val"] = infer(aten._conj.default, (node,), {})
    assert node.meta["val"].is_conj() and not plain.is_conj()
    assert infer(aten._conj.default, (node,), {}).is_conj() is False
