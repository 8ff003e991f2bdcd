"""How much memory capture takes, in multiples of the model's weights, and that it gives it back."""

import gc
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensor_memory import peak_growth
from torch import nn

import gimli_compile as gimli
from gimli_compile import comparison, protocol, validation
from gimli_compile.release import compile_releasing

WIDTH, LAYERS = 256, 6
WEIGHTS = 4 * LAYERS * (WIDTH + 1) * WIDTH
BATCH = (torch.ones(2, WIDTH), torch.zeros(2, WIDTH))
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.1),
}


@pytest.fixture
def small_pieces(monkeypatch):
    """What is compared at a time is as small, beside this model, as it is beside a large one."""
    monkeypatch.setattr(validation, "_SMALL", 0)
    monkeypatch.setattr(comparison, "_PIECE", 1 << 10)
    monkeypatch.setattr(comparison, "_SAMPLED", 1 << 10)


def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def made(name):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    return model, OPTIMIZERS[name](model.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finding_out_how_an_optimizer_steps_takes_no_memory_where_there_is_much(name, monkeypatch):
    monkeypatch.setattr(protocol, "LARGE", WEIGHTS)
    model, optimizer = made(name)
    assert peak_growth(lambda: gimli.functionalize(model, optimizer, loss)) <= 0.01 * WEIGHTS


# What a run of the optimizer's own step takes, on copies: parameters, gradients and state.
@pytest.mark.parametrize(("name", "own"), [("sgd", 3), ("adamw", 4)])
def test_finding_out_how_an_optimizer_steps_takes_one_copy_of_everything(name, own):
    model, optimizer = made(name)
    growth = peak_growth(lambda: gimli.functionalize(model, optimizer, loss))
    assert growth <= (own + 1) * WEIGHTS


# What is compared at a time; gradients are only read by the optimizer's own step.
@pytest.mark.parametrize(("name", "state"), [("sgd", 1), ("adamw", 2)])
def test_capturing_a_step_takes_little_more_than_running_it(name, state, small_pieces):
    model, optimizer = made(name)
    fn = gimli.functionalize(model, optimizer, loss)
    start = fn.init()
    with torch.no_grad():
        first = peak_growth(lambda: fn.step(start, BATCH))
        start, _ = fn.step(start, BATCH)
        second = peak_growth(lambda: fn.step(start, BATCH))
        again = peak_growth(lambda: fn.step(start, BATCH))
    results = 1 + 1 + state  # gradients, parameters, state
    assert results * WEIGHTS <= again <= (results + 0.7) * WEIGHTS
    assert first <= again + 0.8 * WEIGHTS
    assert second <= again + 0.8 * WEIGHTS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_capture_gives_its_memory_back_at_once(name):
    """Nothing large is left to the collector of cycles, which comes when it likes."""
    model, optimizer = made(name)
    gc.collect()
    gc.disable()
    try:
        fn = gimli.functionalize(model, optimizer, loss)
        with torch.no_grad():
            fn.step(fn.init(), BATCH)
        alive = [found for found in gc.get_objects() if type(found) in (torch.Tensor, nn.Parameter)]
    finally:
        gc.enable()
    large = [found for found in alive if found.numel() == WIDTH * WIDTH]
    assert {id(found) for found in large} == {id(p) for p in model.parameters() if p.numel() == WIDTH * WIDTH}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_results_that_are_compared_in_parts(name, monkeypatch, small_pieces):
    """A program that is wrong in one result is refused, whichever part that is in."""
    model, optimizer = made(name)
    view = gimli.functionalize(model, optimizer, loss)._view
    original = type(view).replay

    def changed(self, inputs):
        outputs = original(self, inputs)
        with torch.no_grad():
            outputs.params["3.weight"][7, 11] += 1e-3
        return outputs

    monkeypatch.setattr(type(view), "replay", changed)
    with pytest.raises(gimli.CaptureError, match=r"params\[3.weight\] differ"):
        fn = gimli.functionalize(model, optimizer, loss)
        fn.step(fn.init(), BATCH)


def test_values_are_let_go_after_their_last_use():
    alive = []

    class Value:
        def __init__(self, name):
            self.name = name
            alive.append(name)

        def __del__(self):
            alive.remove(self.name)

    def make(name, *_):
        seen.append(sorted(alive))
        return Value(name)

    seen: list[list[str]] = []
    source = (
        "def run(x):\n    a = make('a', x)\n    b = make('b', a)\n    c = make('c', a)\n    return (c, make('d'),)\n"
    )
    namespace: dict[str, Any] = {"make": make}
    exec(compile_releasing(source, "<a program>"), namespace)
    assert [value.name for value in namespace["run"](0)] == ["c", "d"]
    assert seen == [[], ["a"], ["a"], ["c"]]
