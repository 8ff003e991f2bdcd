"""Operators that torch cannot differentiate twice, in the forms that the programs hold."""

import pytest
import torch
import torch.nn.functional as F
from live_training import Training, check_gradients, check_values, normal, sgd
from torch import nn

OPERATORS = {
    "hardsigmoid": F.hardsigmoid,
    "hardsigmoid_in_place": lambda h: F.hardsigmoid(h * 1.0, inplace=True),
    "pdist": lambda h: F.pdist(h),
    "pdist_of_order_three": lambda h: torch.pdist(h, 3.0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_values_and_gradients_equal_the_live_loop(name):
    batches = [normal(4, 6, seed=t) for t in range(3)]
    training = Training(lambda: nn.Linear(6, 6), sgd, lambda m, x: (OPERATORS[name](m(x)) ** 2).sum(), batches)
    check_gradients(training, ("groups.0.lr",), fn=check_values(training))
