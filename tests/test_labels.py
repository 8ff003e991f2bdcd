"""Code that looks at the integers and flags of a batch: its branches become conditions of the program."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from live_training import (
    Training,
    check_gradients,
    check_values,
    images,
    normal,
    regression,
    sgd,
    squared_error,
    tokens,
)
from torch import nn

import gimli_compile as gimli

HYPERS = ("groups.0.lr",)
LENGTHS = [torch.tensor(lengths) for lengths in ([5, 3, 2], [5, 5, 5], [4, 3, 1], [5, 3, 2])]


class Sequence(nn.Module):
    """Cuts, masks and weighs a batch of sequences by their lengths, all in Python."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(6, 4), nn.Linear(4, 6)

    def forward(self, sequence, lengths):
        longest = int(lengths.max())
        mask = torch.arange(longest) < lengths[:, None]
        h = torch.tanh(self.embedding(sequence[:, :longest]))
        if not mask.all():
            h = h * mask.unsqueeze(-1)
        for index, length in enumerate(lengths.tolist()):
            if length > 4:
                h = h * (1.0 + 0.1 * index)
        return self.out(h).square().sum() / mask.sum().item()


def sequence_loss(model, batch):
    return model(*batch)


SEQUENCES = list(zip(tokens(4, length=5), LENGTHS, strict=True))


def one_hot_error(model, batch):
    x, y = batch
    assert (y >= 0).all()
    return ((model(x.flatten(1)) - F.one_hot(y, 2)) ** 2).mean() + (
        (model(x.flatten(1))[:, 0] - F.one_hot(y)[:, 0]) ** 2
    ).mean()


class Ordered(nn.Module):
    """Branches on a buffer of integers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.layer: Any = nn.Linear(3, 2)
        self.order: torch.Tensor

    def forward(self, x):
        return self.layer(x[:, self.order]) * (2.0 if self.order.max() > 1 else 1.0)


class Converting(nn.Module):
    """Converts its layer to the dtype that it has already."""

    def __init__(self):
        super().__init__()
        self.layer: Any = nn.Linear(3, 2)

    def forward(self, x):
        self.layer = self.layer.to(x.dtype)
        return self.layer(x)


TRAININGS = {
    "lengths": Training(Sequence, sgd, sequence_loss, SEQUENCES),
    "one_hot": Training(lambda: nn.Linear(36, 2), sgd, one_hot_error, images(4)),
    "integer_buffer": Training(Ordered, sgd, squared_error, regression(4)),
    "converting": Training(Converting, sgd, squared_error, regression(4)),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_values_equal_the_live_loop(name):
    check_values(TRAININGS[name])


@pytest.mark.parametrize("name", TRAININGS)
def test_gradients_equal_differences_of_the_live_loop(name):
    check_gradients(TRAININGS[name], HYPERS)


def test_a_program_for_each_outcome():
    training = TRAININGS["lengths"]
    _, _, fn = training.functionalized()
    state = fn.init()
    for batch in SEQUENCES:
        state, _ = fn.step(state, batch)
    assert len(fn._losses.all_gradients) == 3  # the last lengths are those of the first batch


def test_a_branch_on_what_has_derivatives_is_refused():
    def loss(model, batch):
        x, y = batch
        return (model(x) ** 2).mean() * (2.0 if (y > 0).all() else 1.0)

    model = nn.Linear(3, 2).double()
    fn = gimli.functionalize(model, sgd(model.parameters()), loss)
    with pytest.raises(gimli.CaptureError, match="turns the value of a tensor into a Python value"):
        fn.step(fn.init(), (normal(4, 3), normal(4, 2)))


def test_labels_out_of_range_are_an_error():
    model = nn.Linear(36, 2).double()
    fn = gimli.functionalize(
        model, sgd(model.parameters()), lambda model, batch: ((model(batch[0]) - F.one_hot(batch[1], 2)) ** 2).mean()
    )
    with pytest.raises(RuntimeError, match="out of bounds"):
        fn.step(fn.init(), (normal(4, 36), torch.tensor([0, 1, 2, 1])))
