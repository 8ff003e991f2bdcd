"""Every layer and loss of `torch.nn`: values, second derivatives in both orders, and tasks, against the live loop."""

from pathlib import Path

import pytest
import torch
from layer_cases import CASES, integers
from layer_measurement import Case, measure, tasks_error, training_of
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import rnn

import gimli_compile as gimli

# torch 2.13 warns of itself when forward mode is first used (torch/_decomp/decompositions_for_jvp.py).
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused])
def test_a_layer_is_differentiable_twice(name):
    measured = measure(CASES[name])
    assert not measured.refused, measured.refused
    assert not measured.beyond()
    assert len(measured.errors) == 4


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_a_layer_is_refused_at_capture(name):
    case = CASES[name]
    reason = measure(case).refused
    what, where, *rest = reason.split("\n")
    assert case.refused in what
    assert where.startswith("  layer_measurement.py:")
    assert len(rest) >= 2


def test_the_table_has_every_layer_and_none_that_is_wrong():
    table = (Path(__file__).parent.parent / "docs" / "layers.md").read_text().splitlines()
    rows = dict(line.strip("| ").split(" | ", 1) for line in table if line.startswith("| "))
    assert set(CASES) <= set(rows)
    assert not [name for name, row in rows.items() if "wrong" in row]


@pytest.mark.parametrize("scaled", [False, True])
def test_padding_gets_no_gradient_in_every_task(scaled):
    case = Case(lambda: nn.Embedding(6, 3, padding_idx=2, scale_grad_by_freq=scaled), integers(6, 2, 5))
    assert (case.batches[0][0] == 2).any()
    training = training_of(case)
    fn = training.functionalized()[2]
    assert tasks_error(training, fn, case) <= 1e-12


class Packed(nn.Module):
    """A recurrent model whose batches say how long each sequence is."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(2, 3, batch_first=True)

    def forward(self, x, lengths):
        sequences = rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.recurrent(sequences)[1][0]


@pytest.mark.parametrize("kind", [torch.tensor, list])
def test_lengths_of_the_batch_may_change(kind):
    model = Packed().double()
    fn = gimli.functionalize(
        model, torch.optim.SGD(model.parameters(), lr=0.1), lambda model, batch: model(*batch).square().mean()
    )
    state, x = fn.init(), torch.randn(2, 3, 2, dtype=torch.float64)
    for lengths in ([1, 3], [2, 3], [3, 1], [1, 3]):
        _, loss = fn.step(state, (x, kind(lengths)))
        torch.testing.assert_close(loss, model(x, lengths).square().mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize(
    "mode, rank", [("bilinear", 2), ("nearest", 2), ("bicubic", 2), ("bilinear", 3), ("nearest", 3)]
)
def test_samples_at_every_place_as_torch_does(mode, rank, padding, aligned):
    class Sampled(nn.Module):
        def forward(self, x, grid):
            return F.grid_sample(x, grid, mode, padding, aligned)

    model = Sampled()
    x = torch.randn(2, 2, *(1, 4, 3)[-rank:], dtype=torch.float64)
    grid = 1.7 * torch.randn(2, *(3, 2, 4)[-rank:], rank, dtype=torch.float64)
    made = gimli.functionalize({"model": model, "x": x.requires_grad_()}, torch.optim.SGD([x], lr=0.1), _loss)
    _, loss = made.step(made.init(), grid)
    torch.testing.assert_close(loss, _loss({"model": model, "x": x}, grid), rtol=1e-12, atol=1e-14)


def _loss(tree, grid):
    return tree["model"](tree["x"], grid).sin().sum()
