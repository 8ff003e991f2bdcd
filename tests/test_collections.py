"""What is trained need not be a module: tensors, pytrees of tensors, and pytrees of modules and tensors."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_reference import projection
from live_training import (
    GRADIENTS,
    adamw,
    assert_equal_tensors,
    copied,
    normal,
    random_like,
    sgd,
    slope_error,
)
from torch import nn
from torch.utils import _pytree as pytree

import gimli_compile as gimli

Pair = namedtuple("Pair", "first second")


def leaf(*shape, seed=0):
    return random_like(torch.empty(shape, dtype=torch.float64), 50 + seed).requires_grad_()


def linear_loss(weight: Any, bias: Any, batch: Any) -> torch.Tensor:
    x, y = batch
    return ((x @ weight + bias).tanh() - y).square().mean()


def trained_tensors(params):
    found = []
    for part in pytree.tree_leaves(params):
        found += part.parameters() if isinstance(part, nn.Module) else [part] if isinstance(part, torch.Tensor) else []
    return [p for p in dict.fromkeys(found) if p.requires_grad]


def discriminate(networks, batch):
    generator, discriminator = networks
    fake, real = generator(batch[0]), batch[1]
    return F.softplus(discriminator(fake)).mean() + F.softplus(-discriminator(real)).mean() + fake.square().mean()


def distill(params, batch):
    """A network learns from images that are learned beside it."""
    fitted = F.mse_loss(params["model"](params["images"]), params["labels"].double())
    return fitted + F.mse_loss(params["model"](batch[0]), batch[1]) + 0.1 * params["images"].square().mean()


def batch_normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2)).double()


def tied():
    model = nn.Linear(3, 2).double()
    return [model, model, model.weight]


@dataclass(frozen=True)
class Collection:
    """A structure to train, its loss, and the names of what is in it."""

    make: Any
    loss: Any
    names: tuple[str, ...]


COLLECTIONS = {
    "list": Collection(
        lambda: [leaf(3, 2), leaf(2, seed=1)],
        lambda params, batch: linear_loss(params[0], params[1], batch),
        ("0", "1"),
    ),
    "tuple-of-parameters": Collection(
        lambda: (nn.Parameter(leaf(3, 2).detach()), nn.Parameter(leaf(2, seed=1).detach())),
        lambda params, batch: linear_loss(params[0], params[1], batch),
        ("0", "1"),
    ),
    "nested": Collection(
        lambda: {"weights": {"w1": leaf(3, 2)}, "biases": [leaf(2, seed=1)], "scale": 0.5},
        lambda p, batch: p["scale"] * linear_loss(p["weights"]["w1"], p["biases"][0], batch),
        ("weights.w1", "biases.0"),
    ),
    "namedtuple": Collection(
        lambda: Pair(leaf(3, 2), leaf(2, seed=1)),
        lambda p, batch: linear_loss(p.first, p.second, batch),
        ("first", "second"),
    ),
    "tensor": Collection(lambda: leaf(3, 2), lambda p, batch: linear_loss(p, 0.1, batch), ("0",)),
    "not-trained": Collection(
        lambda: [leaf(3, 2), leaf(2, seed=1).detach()],
        lambda params, batch: linear_loss(params[0], params[1], batch),
        ("0", "1"),
    ),
    "modules": Collection(
        lambda: (nn.Linear(3, 2).double(), nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()),
        discriminate,
        ("0.weight", "0.bias", "1.0.weight", "1.0.bias", "1.2.weight", "1.2.bias"),
    ),
    "model-and-images": Collection(
        lambda: {"model": batch_normed(), "images": leaf(4, 3), "labels": torch.arange(8).reshape(4, 2) % 3},
        distill,
        (*(f"model.{i}.{part}" for i in (0, 1, 4) for part in ("weight", "bias")), "images", "labels"),
    ),
    "tied": Collection(
        tied,
        lambda p, batch: F.mse_loss(p[0](batch[0]) + p[1](batch[0]).sin(), batch[1]) + p[2].square().mean(),
        ("0.weight", "0.bias"),
    ),
}
OPTIMIZERS = {"sgd": sgd, "adamw": adamw}
BATCHES = [(normal(5, 3, seed=30 + i), normal(5, 2, seed=40 + i)) for i in range(8)]


def start(collection, optimizer):
    torch.manual_seed(1)
    params = collection.make()
    return params, OPTIMIZERS[optimizer](trained_tensors(params))


def named(params):
    """Returns live parameters by name, and buffers."""
    found, buffers = {}, {}
    for path, part in pytree.tree_flatten_with_path(params)[0]:
        text = ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", None)))) for key in path)
        if isinstance(part, nn.Module):
            found.update({f"{text}.{name}": p for name, p in part.named_parameters()})
            buffers.update({f"{text}.{name}": b for name, b in part.named_buffers()})
        elif isinstance(part, torch.Tensor):
            found[text or "0"] = part
    return found, buffers


def run_live(collection, params, optimizer, batches=BATCHES, seed=3):
    torch.manual_seed(seed)
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = collection.loss(params, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def run(fn, state, hyper=None, batches=BATCHES, seed=3, **options):
    torch.manual_seed(seed)
    return fn.unroll(state, batches, hyper, **options)


def names_in(collection, params):
    """Returns the live tensors by the names of the state."""
    found = named(params)[0]
    return {name: found[name] for name in collection.names}


# ---------------------------------------------------------------------- values and derivatives


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", COLLECTIONS)
def test_values_equal_eager(name, optimizer):
    collection = COLLECTIONS[name]
    params, live = start(collection, optimizer)
    untouched = copied({**named(params)[0], **named(params)[1]}.items())
    fn = gimli.functionalize(params, live, collection.loss)
    state, losses = run(fn, fn.init())
    assert_equal_tensors({**named(params)[0], **named(params)[1]}, untouched, 0.0)
    assert all(p.grad is None for p in trained_tensors(params))
    expected = run_live(collection, params, live)
    torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
    assert tuple(state.params) == collection.names
    assert_equal_tensors(state.params, names_in(collection, params))
    assert_equal_tensors(state.buffers, {n: b for n, b in named(params)[1].items() if n in state.buffers})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", COLLECTIONS)
def test_derivatives_equal_differences_of_eager(name, optimizer):
    collection = COLLECTIONS[name]
    batches = BATCHES[:5]
    fn = gimli.functionalize(*start(collection, optimizer), collection.loss)
    state, hyper = fn.init(), fn.hyperparameters()
    inputs = {name: p.requires_grad_() for name, p in state.params.items() if p.is_floating_point()}
    rate = hyper[0]["lr"].requires_grad_()
    last, losses = run(fn, state, hyper, batches)
    total = projection({n: last.params[n] for n in inputs}) + losses.sum()
    *grads, by_rate = torch.autograd.grad(total, [*inputs.values(), rate])
    ways = {name: random_like(p, 70 + i) for i, (name, p) in enumerate(inputs.items())}
    slope = sum(float((grad * ways[name]).sum()) for name, grad in zip(inputs, grads, strict=True))

    def live(offset, rate_offset=0.0):
        params, optimizer_now = start(collection, optimizer)
        tensors = names_in(collection, params)
        with torch.no_grad():
            for name, way in ways.items():
                tensors[name].add_(offset * way)
        optimizer_now.param_groups[0]["lr"] += rate_offset
        losses = run_live(collection, params, optimizer_now, batches)
        return float(projection({n: tensors[n].detach() for n in inputs}) + losses.sum())

    assert slope_error(slope, live) <= GRADIENTS
    assert slope_error(float(by_rate), lambda offset: live(0.0, offset)) <= GRADIENTS


@pytest.mark.parametrize("name", ["list", "nested", "modules", "tensor"])
def test_checkpoints_and_tasks_equal_the_plain_loop(name):
    collection = COLLECTIONS[name]
    fn = gimli.functionalize(*start(collection, "adamw"), collection.loss)
    hyper = fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    steps = tuple(torch.stack(parts) for parts in zip(*BATCHES, strict=True))
    tasks = tuple(torch.stack([part, part * 0.5, part.flip(0)]) for part in steps)
    alone = [run(fn, fn.init(), hyper, tuple(part[i] for part in tasks))[1] for i in range(3)]
    (expected,) = torch.autograd.grad(torch.stack(alone).sum(), rate)
    for checkpoint in (None, 3):
        state, losses = run(fn, fn.init(), hyper, tasks, tasks=True, checkpoint=checkpoint)
        torch.testing.assert_close(losses, torch.stack(alone), rtol=1e-11, atol=1e-12)
        assert next(iter(state.params.values())).shape[0] == 3
        torch.testing.assert_close(torch.autograd.grad(losses.sum(), rate)[0], expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", COLLECTIONS)
def test_live_training_continues_from_what_load_into_wrote(name, optimizer):
    collection = COLLECTIONS[name]
    params, live = start(collection, optimizer)
    fn = gimli.functionalize(params, live, collection.loss)
    state, _ = run(fn, fn.init(), batches=BATCHES[:4])
    other, other_live = start(collection, optimizer)
    fn.load_into(other, other_live, state)
    got = run_live(collection, other, other_live, BATCHES[4:], seed=9)
    run_live(collection, params, live, BATCHES[:4])
    expected = run_live(collection, params, live, BATCHES[4:], seed=9)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_meta_parameters_and_the_update():
    def loss(params, batch, meta):
        return meta * linear_loss(params[0], params[1], batch)

    params = [leaf(3, 2), leaf(2, seed=1)]
    fn = gimli.functionalize(params, torch.optim.SGD(params, lr=0.1), loss)
    meta = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    state, loss_value = fn.step(fn.init(), BATCHES[0], None, meta)
    grads = torch.autograd.grad(linear_loss(params[0], params[1], BATCHES[0]), params)
    for name, p, grad in zip(state.params, params, grads, strict=True):
        torch.testing.assert_close(state.params[name], p - 0.15 * grad, rtol=1e-12, atol=1e-14)
    (slope,) = torch.autograd.grad(state.params["0"].sum(), meta)
    torch.testing.assert_close(slope, -0.1 * grads[0].sum())
    assert loss_value.item() == pytest.approx(1.5 * linear_loss(params[0], params[1], BATCHES[0]).item())
    new, _ = fn.update({"0": params[0], "1": params[1]}, dict(zip("01", grads, strict=True)), fn.init().opt_state)
    torch.testing.assert_close(new["1"], params[1] - 0.1 * grads[1])


# ---------------------------------------------------------------------- what is refused


def refused(match, call):
    with pytest.raises(gimli.InputError, match=match) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(set(COLLECTIONS) - {"tensor"}))
def test_a_collection_has_no_forward(name):
    fn = gimli.functionalize(*start(COLLECTIONS[name], "sgd"), COLLECTIONS[name].loss)
    state = fn.init()
    refused("cannot be called[\\s\\S]*no forward pass", lambda: fn(state, torch.zeros(1, 3)))
    refused("cannot be called", lambda: fn.forward(state.params, state.buffers, torch.zeros(1, 3)))


def test_other_objects_are_refused():
    class Holder:
        weight = leaf(2)

    optimizer = torch.optim.SGD([leaf(2)], lr=0.1)
    for nothing in (None, [], {"scale": 0.5}, "model"):
        refused("without tensors. Pass an instance of", lambda model=nothing: gimli.functionalize(model, optimizer))
    refused("has a Holder at '1'", lambda: gimli.functionalize([leaf(2), Holder()], optimizer))


def test_an_optimizer_over_other_tensors_is_refused():
    params = [leaf(3, 2), leaf(2, seed=1)]
    others = torch.optim.SGD([params[0], leaf(2, seed=1)], lr=0.1)
    refused(
        "parameter 1 of the optimizer's group 0 .* is none of the model's", lambda: gimli.functionalize(params, others)
    )


def test_kept_references_are_refused():
    params = [leaf(3, 2), leaf(2, seed=1)]
    fn = gimli.functionalize(params, sgd(params), lambda _, batch: linear_loss(params[0], params[1], batch))
    with pytest.raises(gimli.CaptureError, match="the live tensor '0' is used through a reference that was kept"):
        fn.step(fn.init(), BATCHES[0])


def test_replaced_tensors_are_noticed():
    params = [leaf(3, 2), leaf(2, seed=1)]
    fn = gimli.functionalize(params, sgd(params), lambda p, batch: linear_loss(p[0], p[1], batch))
    params[1] = leaf(2, seed=2)
    refused("parameters changed after `functionalize`: 1", lambda: fn.step(fn.init(), BATCHES[0]))


def test_numbers_beside_the_tensors_are_part_of_the_program():
    params = {"weight": leaf(3, 2), "scale": 0.5}
    fn = gimli.functionalize(
        params, sgd([params["weight"]]), lambda p, batch: p["scale"] * linear_loss(p["weight"], 0.0, batch)
    )
    before = fn.step(fn.init(), BATCHES[0])[1]
    params["scale"] = 2.0
    assert float(fn.step(fn.init(), BATCHES[0])[1]) == pytest.approx(4 * float(before))
