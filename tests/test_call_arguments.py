"""Nested arguments of calls, walked as torch's pytrees walk them."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from gimli_compile.call_arguments import holds, map_tensors, tensors_of

A, B, C = torch.ones(2), torch.zeros(3), torch.ones(())
Pair = namedtuple("Pair", "first second")
NESTED = [
    A,
    ((A, 2.0, [B, None]), {"alpha": C, "out": (A, torch.float32)}),
    [Pair(A, [B, 1]), OrderedDict(x=C), "text", slice(1, 2), torch.Size([3])],
    torch.max(torch.ones(2, 3), dim=0),
    torch.nn.Parameter(torch.ones(1)),
    (),
]


@pytest.mark.parametrize("nested", NESTED, ids=range(len(NESTED)))
def test_the_tensors_are_those_of_a_pytree(nested):
    expected = [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]
    assert list(map(id, tensors_of(nested))) == list(map(id, expected))
    assert holds(nested, torch.Tensor) == bool(expected)


@pytest.mark.parametrize("nested", NESTED, ids=range(len(NESTED)))
def test_what_is_mapped_keeps_its_form(nested):
    made = map_tensors(nested, lambda tensor: str(tuple(tensor.shape)))
    expected = tree_map_only(torch.Tensor, lambda tensor: str(tuple(tensor.shape)), nested)
    assert made == expected and type(made) is type(expected)


def test_numbers_are_found_by_kind():
    class Own(float):
        """A number of a kind of its own."""

    assert holds((A, {"value": [Own(2.0)]}), Own) and not holds((A, {"value": [2.0, True]}), Own)
