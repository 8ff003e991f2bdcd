"""Meta-parameters are any subset of what a loop starts from."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from live_training import (
    GRADIENTS,
    Training,
    continue_live,
    normal,
    objective,
    random_like,
    regression,
    sgd,
    slope_error,
    squared_error,
)
from torch import nn


class Network(nn.Module):
    """A frozen body, a mask of its features as a buffer, a trained head."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.body.requires_grad_(False)
        self.register_buffer("mask", torch.linspace(0.2, 1.0, 4))

    def forward(self, x):
        return self.head(self.body(x).tanh() * self.mask)


def trained_sgd(params):
    return sgd([p for p in params if p.requires_grad])


def weighted(model, batch, meta):
    """Examples have weights, which are normalized."""
    x, y = batch
    weights = meta["examples"].softmax(0)
    return (weights * (model(x) - y).square().mean(-1)).sum() + meta["decay"] * model.head.weight.square().sum()


def whole(model, optimizer, batch, meta):
    optimizer.zero_grad()
    loss = weighted(model, batch, meta)
    loss.backward()
    optimizer.step()
    return loss


META = {"examples": normal(5, seed=70), "decay": torch.tensor(0.03, dtype=torch.float64)}
TRAINING = Training(Network, trained_sgd, weighted, regression(3), meta=META)
TRAININGS = {"by the loss": TRAINING, "a step of its own": replace(TRAINING, train_step=whole)}
SUBSETS: dict[str, list[str]] = {
    "the initial head": ["params.head.weight", "params.head.bias"],
    "one tensor of the head": ["params.head.bias"],
    "the frozen body": ["params.body.weight", "params.body.bias"],
    "frozen and trained": ["params.body.weight", "params.head.weight"],
    "a mask that is a buffer": ["buffers.mask"],
    "weights of examples": ["meta.examples"],
    "one entry of the loss": ["meta.decay"],
    "the inputs": ["batch.0"],
    "the targets": ["batch.1"],
    "a warm momentum": ["state.head.weight.momentum_buffer"],
    "of everything something": ["params.head.bias", "buffers.mask", "meta.decay", "batch.0", "params.body.bias"],
}


def start_of(training):
    """Returns the live objects after two warm steps."""
    model, optimizer = training.start()
    continue_live(training, model, optimizer, batches=regression(5)[3:])
    return model, optimizer


def live_tensor(model, optimizer, path):
    where, _, name = path.partition(".")
    if where == "params":
        return dict(model.named_parameters())[name]
    if where == "buffers":
        return dict(model.named_buffers())[name]
    parameter, _, key = name.rpartition(".")
    return optimizer.state[dict(model.named_parameters())[parameter]][key]


def live_value(training, paths, offset):
    """Trains the live objects with these tensors moved along a direction each."""
    model, optimizer = start_of(training)
    meta, batches = dict(training.meta), list(training.batches)
    for seed, path in enumerate(paths):
        where, _, name = path.partition(".")
        if where == "meta":
            meta[name] = meta[name] + offset * random_like(meta[name], seed)
        elif where == "batch":
            batches[0] = tuple(
                part + offset * random_like(part, seed) if name == str(index) else part
                for index, part in enumerate(batches[0])
            )
        else:
            with torch.no_grad():
                tensor = live_tensor(model, optimizer, path)
                tensor.add_(offset * random_like(tensor, seed))
    history = continue_live(training, model, optimizer, meta, batches)
    return float(objective(history.params[-1], history.losses))


@pytest.mark.parametrize("subset", SUBSETS)
@pytest.mark.parametrize("name", TRAININGS)
def test_a_subset_has_the_gradient_of_the_live_loop(name, subset):
    training, paths = TRAININGS[name], SUBSETS[subset]
    model, optimizer = start_of(training)
    fn = training.functionalize(model, optimizer)
    state = fn.init()
    places: dict[str, Any] = {"params": state.params, "buffers": state.buffers, "state": state.opt_state.values_by_path}
    places |= {"meta": dict(training.meta), "batch": dict(enumerate(training.batches[0]))}
    for path in paths:
        where, _, key = path.partition(".")
        key = int(key) if where == "batch" else key
        places[where][key] = places[where][key].detach().clone().requires_grad_()
    leaves = [places[p.partition(".")[0]][int(p[6:]) if p[:5] == "batch" else p.partition(".")[2]] for p in paths]
    batches = [tuple(places["batch"].values()), *training.batches[1:]]
    after, losses = fn.unroll(state, batches, fn.hyperparameters(), places["meta"])
    total = objective(after.params, losses)
    assert abs(float(total.detach()) - live_value(training, paths, 0.0)) <= 1e-12 * max(1.0, abs(float(total.detach())))
    slopes = torch.autograd.grad(total, leaves)
    slope = sum(
        float((got * random_like(leaf, i)).sum()) for i, (got, leaf) in enumerate(zip(slopes, leaves, strict=True))
    )
    assert slope_error(slope, lambda offset: live_value(training, paths, offset)) <= GRADIENTS


def test_nothing_else_gets_a_gradient():
    training = replace(TRAINING, loss=squared_error, meta=None)
    fn = training.functionalized()[2]
    state = fn.init()
    state.params["head.bias"].requires_grad_()
    after, losses = fn.unroll(state, training.batches)
    objective(after.params, losses).backward()
    assert [name for name, p in state.params.items() if p.grad is not None] == ["head.bias"]
    assert not after.params["body.weight"].requires_grad
    assert torch.equal(after.params["body.weight"], state.params["body.weight"])
