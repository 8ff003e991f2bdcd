"""How often Python looks for cycles while something is captured."""

import gc

import pytest
import torch
from torch import nn

import gimli_compile as gimli
from gimli_compile.collecting import rare_collections


@pytest.fixture
def threshold():
    """Sets the collector's thresholds and puts them back."""
    before = gc.get_threshold()
    yield gc.set_threshold
    gc.set_threshold(*before)


def test_rare_inside_and_as_before_outside(threshold):
    threshold(700, 11, 12)
    with pytest.raises(ValueError, match="inside"), rare_collections():
        assert gc.get_threshold() == (100_000, 11, 12)
        with rare_collections():
            assert gc.get_threshold() == (100_000, 11, 12)
        raise ValueError("inside")
    assert gc.get_threshold() == (700, 11, 12)


@pytest.mark.parametrize("first", [0, 500_000])
def test_one_who_wants_fewer_collections_keeps_them(threshold, first):
    threshold(first, 10, 10)
    with rare_collections():
        assert gc.get_threshold()[0] == first


def test_capture_leaves_the_collector_as_it_was(threshold):
    threshold(701, 10, 10)
    seen = []

    def loss(model, x):
        seen.append(gc.get_threshold()[0])
        return model(x).square().mean()

    model = nn.Linear(2, 1)
    fn = gimli.functionalize(model, torch.optim.Adam(model.parameters()), loss)
    fn.step(fn.init(), torch.ones(3, 2))
    assert 100_000 in seen and gc.get_threshold()[0] == 701
