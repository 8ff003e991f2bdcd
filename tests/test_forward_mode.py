"""Tangents pushed forward through a loop: the same gradients as by reverse, in memory that steps do not add to."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from live_training import (
    Training,
    hyper_error,
    normal,
    objective,
    plain_sgd,
    relative_error,
    squared_error,
    with_optimizer,
)
from memory import peak_of
from mode_cases import CASES, EVERY, OPTIMIZERS
from torch import nn
from torch.utils import _pytree as pytree

import gimli_compile as gimli

PLAIN = CASES["mlp"]


@pytest.fixture(params=[False, True], ids=["uncompiled", "compiled"])
def way(request):
    """The functions as they are, or their compiled loops."""
    return (lambda fn: fn.compile("eager")) if request.param else (lambda fn: fn)


def few_inputs(training, fn, *, tasks=1):
    """Returns what to unroll from, and a few leaves that require gradients: numbers, a bias, meta-parameters."""
    state, hyper = fn.init(), fn.hyperparameters()
    meta = pytree.tree_map_only(torch.Tensor, torch.clone, training.meta)
    leaves = [leaf for leaf in pytree.tree_leaves(hyper) if isinstance(leaf, torch.Tensor)]
    leaves += [list(state.params.values())[-1]]
    leaves += [leaf for leaf in pytree.tree_leaves(meta) if isinstance(leaf, torch.Tensor)]
    return state, hyper, meta, [leaf.requires_grad_() for leaf in leaves]


def gradients(training, fn, **options):
    state, hyper, meta, leaves = few_inputs(training, fn)
    torch.manual_seed(training.seed)
    state, losses = fn.unroll(state, training.batches, hyper, meta, **options)
    total = objective(state.params, losses)
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize(("case", "optimizer"), EVERY)
def test_the_gradients_are_those_of_reverse(case, optimizer, way):
    training = with_optimizer(CASES[case], OPTIMIZERS[optimizer])
    _, _, fn = training.functionalized()
    expected = gradients(training, fn)
    scale = max(float(grad.abs().max()) for grad in expected)
    for got, wanted in zip(gradients(training, way(fn), backward="forward"), expected, strict=True):
        assert float((got - wanted).abs().max()) <= 1e-10 * max(scale, 1.0)


@pytest.mark.parametrize("path", ["groups.0.lr", "groups.0.betas.1"])
def test_gradients_equal_differences_of_the_live_loop(path, way):
    training = with_optimizer(CASES["weighted"], OPTIMIZERS["adamw"])
    _, _, fn = training.functionalized()
    state, hyper, meta, _ = few_inputs(training, fn)
    torch.manual_seed(training.seed)
    state, losses = way(fn).unroll(state, training.batches, hyper, meta, backward="forward")
    objective(state.params, losses).backward()
    grads = {f"hyper.{name}": leaf.grad for name, leaf in hyper.by_path().items()}
    assert hyper_error(training, path, grads) <= 1e-6


@pytest.mark.parametrize("options", [{"order": 1}, {"truncate": 2}], ids=["first_order", "truncated"])
def test_with_other_options(options, way):
    training = CASES["weighted"]
    _, _, fn = training.functionalized()
    expected = gradients(training, fn, **options)
    for got, wanted in zip(gradients(training, way(fn), backward="forward", **options), expected, strict=True):
        assert relative_error(got, wanted) <= 1e-10


@pytest.mark.parametrize("case", ["weighted", "convolutional"])
def test_many_tasks(case, way):
    training = CASES[case]
    _, _, fn = training.functionalized()
    batches = pytree.tree_map(lambda *parts: torch.stack(parts), *training.batches)
    batches = pytree.tree_map(lambda t: torch.stack([t, t.flip(1), t.flip(0)]), batches)

    def both(one, **options):
        state, hyper, meta, leaves = few_inputs(training, fn)
        torch.manual_seed(0)
        state, losses = one.unroll(state, batches, hyper, meta, tasks=True, **options)
        total = (normal(*losses.shape) * losses).sum() + sum(
            (normal(*p.shape) * p).sum() for p in state.params.values()
        )
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    expected = both(fn)
    scale = max(float(grad.abs().max()) for grad in expected)
    for got, wanted in zip(both(way(fn), backward="forward"), expected, strict=True):
        assert float((got - wanted).abs().max()) <= 1e-10 * scale


def test_whole_steps(way):
    def train_step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = squared_error(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        return {"size": len(batch), "loss": loss}

    _, _, fn = replace(PLAIN, train_step=train_step).functionalized()

    def rate_gradient(one, **options: Any) -> torch.Tensor:
        hyper = fn.hyperparameters()
        rate = hyper[0]["lr"].requires_grad_()
        state, made = cast(Any, one.unroll(fn.init(), PLAIN.batches, hyper, **options))
        assert made["size"] == 2
        return torch.autograd.grad(objective(state.params, made["loss"]), rate)[0]

    assert relative_error(rate_gradient(way(fn), backward="forward"), rate_gradient(fn)) <= 1e-11


def test_without_anything_to_differentiate_it_is_a_plain_loop(way):
    _, _, fn = PLAIN.functionalized()
    expected, losses = fn.unroll(fn.init(), PLAIN.batches)
    state, again = way(fn).unroll(fn.init(), PLAIN.batches, backward="forward")
    assert torch.equal(losses, again)
    assert not again.requires_grad
    assert all(torch.equal(value, expected.params[name]) for name, value in state.params.items())


def test_memory_does_not_grow_with_the_steps():
    net = lambda: nn.Sequential(nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 20))  # noqa: E731
    training = Training(net, plain_sgd, squared_error, [(normal(8, 20), normal(8, 20, seed=1))])
    _, _, fn = training.functionalized()
    hyper = fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()

    def peak(steps):
        def run():
            state, _ = fn.unroll(fn.init(), training.batches * steps, hyper, backward="forward")
            torch.autograd.grad(objective(state.params, ()), rate)

        run()
        return peak_of(run)

    few, many = peak(5), peak(50)
    assert many - few <= 45 * 200  # bytes: a loss and its tangents for each step, far less than a state


def test_many_numbers_are_refused():
    _, _, fn = PLAIN.functionalized()
    batches = [(normal(50, 3).requires_grad_(), normal(50, 2))]
    with pytest.raises(gimli.InputError, match=r"150 numbers[\s\S]*128 is the limit[\s\S]*mixed"):
        fn.unroll(fn.init(), batches, backward="forward")


def test_a_second_differentiation_is_refused():
    _, _, fn = PLAIN.functionalized()
    hyper = fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    _, losses = fn.unroll(fn.init(), PLAIN.batches, hyper, backward="forward")
    (grad,) = torch.autograd.grad(losses.sum(), rate, create_graph=True)
    with pytest.raises(gimli.InputError, match="differentiable once"):
        grad.backward()


def test_checkpoints_are_refused():
    _, _, fn = PLAIN.functionalized()
    with pytest.raises(gimli.InputError, match="keep nothing of the steps"):
        fn.unroll(fn.init(), PLAIN.batches, backward="forward", checkpoint=2)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_a_warm_state(optimizer, way):
    training = with_optimizer(CASES["weighted"], OPTIMIZERS[optimizer])
    _, _, fn = training.functionalized()
    warm, _ = fn.unroll(fn.init(), training.batches[:2], None, training.meta)

    def both(one, **options):
        state = pytree.tree_map(lambda t: t.detach().clone(), warm)
        rate = fn.hyperparameters()
        leaves = [rate[0]["lr"], next(v for v in state.opt_state.values() if v.is_floating_point() and 0 < v.dim() < 2)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        torch.manual_seed(0)
        last, losses = one.unroll(state, training.batches[2:], rate, training.meta, **options)
        return torch.autograd.grad(objective(last.params, losses), leaves)

    for got, wanted in zip(both(way(fn), backward="forward"), both(fn), strict=True):
        assert relative_error(got, wanted) <= 1e-10
