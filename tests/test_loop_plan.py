"""The choice of a way through the backward pass by memory."""

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from live_training import (
    Training,
    assert_close_gradients,
    normal,
    objective,
    plain_sgd,
    squared_error,
    train_step,
    unrolled_gradients,
)
from memory import peak_of
from mode_cases import CASES
from torch import nn

import gimli_compile as gimli
from gimli_compile.loop_plan import bytes_of_text


def deep(steps=12):
    layers = [part for _ in range(10) for part in (nn.Linear(8, 8), nn.Tanh())]
    batches = [(normal(64, 8, seed=t), normal(64, 8, seed=50 + t)) for t in range(steps)]
    return Training(lambda: nn.Sequential(*layers), plain_sgd, squared_error, batches)


def test_less_memory_leaner_ways():
    training = deep()
    _, _, fn = training.functionalized()
    _, expected = unrolled_gradients(training, fn)
    chosen = []
    for memory in ("1GiB", "1MB", 400_000, "240 kB"):
        _, got = unrolled_gradients(training, fn, backward="auto", memory=memory)
        assert_close_gradients(got, expected)
        assert fn.last_plan is not None
        assert fn.last_plan.bytes <= bytes_of_text(memory)
        chosen.append((fn.last_plan.backward, fn.last_plan.checkpoint))
    assert chosen[0] == ("reverse", None)
    assert chosen[-1][0] == "mixed"
    assert len(set(chosen)) >= 3


@pytest.mark.parametrize("steps", [6, 24])
@pytest.mark.parametrize("options", [{}, {"backward": "mixed"}], ids=["reverse", "mixed"])
def test_the_estimate_is_near_what_is_used(steps, options):
    training = deep(steps)
    _, _, fn = training.functionalized()
    memory = "1GiB"
    if options:
        hyper = fn.hyperparameters()
        fn.unroll(fn.init(), training.batches, hyper, backward="auto", memory=memory)
        memory = "0.3MB"

    def run():
        hyper = fn.hyperparameters()
        rate = hyper[0]["lr"].requires_grad_()
        state, _ = fn.unroll(fn.init(), training.batches, hyper, backward="auto", memory=memory)
        torch.autograd.grad(objective(state.params, ()), rate)

    run()
    assert fn.last_plan is not None
    assert fn.last_plan.backward == options.get("backward", "reverse")
    assert 0.4 * fn.last_plan.bytes <= peak_of(run) <= 1.3 * fn.last_plan.bytes


@pytest.mark.parametrize("tasks", [None, 3])
def test_compiled_loops_go_by_the_same_plans(tasks):
    training = deep()
    _, _, fn = training.functionalized()
    fast = fn.compile("eager")
    batches, options = training.batches, {}
    if tasks is not None:
        batches, options = [tuple(torch.stack([part] * tasks) for part in batch) for batch in batches], {"tasks": True}

    def gradient(fn, **way):
        hyper = fn.hyperparameters()
        rate = hyper[0]["lr"].requires_grad_()
        _, losses = fn.unroll(fn.init(), batches, hyper, **options, **way)
        return torch.autograd.grad(losses.sum(), rate)[0]

    expected, chosen = gradient(fn), []
    for memory in (1 << 30, (tasks or 1) * 1_000_000, (tasks or 1) * 240_000):
        run = partial(gradient, fast, backward="auto", memory=memory)
        assert torch.allclose(run(), expected, rtol=1e-10)
        assert fast.last_plan is not None and fn.last_plan is None
        assert peak_of(run) <= 1.3 * fast.last_plan.bytes
        chosen.append((fast.last_plan.backward, fast.last_plan.checkpoint))
    assert chosen[0] == ("reverse", None) and chosen[-1][0] == "mixed" and len(set(chosen)) == 3


def test_the_choice_is_logged(caplog):
    _, _, fn = CASES["mlp"].functionalized()
    with caplog.at_level(logging.INFO, "gimli_compile"):
        fn.unroll(fn.init(), CASES["mlp"].batches, backward="auto", memory="1GB")
    assert "unroll of 4 steps: backward='reverse', checkpoint=None" in caplog.text


def test_the_draws_are_those_of_a_plain_loop():
    training = CASES["weighted"]
    _, _, fn = training.functionalized()
    _, expected = unrolled_gradients(training, fn)
    _, got = unrolled_gradients(training, fn, backward="auto", memory="1GB")
    assert_close_gradients(got, expected)


def test_whole_steps_and_tasks():
    _, _, fn = replace(CASES["mlp"], train_step=train_step).functionalized()
    fn.unroll(fn.init(), CASES["mlp"].batches, backward="auto", memory="20kB")
    assert fn.last_plan is not None
    assert fn.last_plan.backward == "reverse"
    alone = fn.last_plan.bytes
    batches = tuple(torch.stack([torch.stack(parts)] * 3) for parts in zip(*CASES["mlp"].batches, strict=True))
    fn.unroll(fn.init(), batches, backward="auto", memory="1GB", tasks=True)
    assert fn.last_plan is not None
    assert fn.last_plan.bytes > alone


def test_nothing_fits():
    _, _, fn = CASES["mlp"].functionalized()
    with pytest.raises(gimli.InputError, match=r"no way[\s\S]*The leanest is backward="):
        fn.unroll(fn.init(), CASES["mlp"].batches, backward="auto", memory=100)


@pytest.mark.parametrize("memory", [None, "much", -1, True, "2 parsecs"])
def test_memory_is_an_amount(memory):
    _, _, fn = CASES["mlp"].functionalized()
    with pytest.raises(gimli.InputError, match="is no amount of memory"):
        fn.unroll(fn.init(), CASES["mlp"].batches, backward="auto", memory=memory)


def test_the_first_estimate_is_that_of_later_steps():
    """Momentum's first step starts the state; what later steps make is more."""
    fn = sgd_with_momentum()
    batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(6)]
    bytes_of = []
    for _ in range(2):
        fn.unroll(fn.init(), batches, backward="auto", memory="1GB")
        assert fn.last_plan is not None
        bytes_of.append(fn.last_plan.bytes)
    assert bytes_of[0] == bytes_of[1]


def sgd_with_momentum():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return gimli.functionalize(model, optimizer, lambda m, b: torch.nn.functional.cross_entropy(m(b[0]), b[1]))
