"""Lazy modules are initialized by an example: as by torch's own first call, and nothing else of the model changes."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

import gimli_compile as gimli
from gimli_compile import InputError

torch_double = torch.float64


class Nested(nn.Module):
    """Lazy layers below, beside layers that are not lazy, called by keyword."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleDict({"conv": nn.LazyConv2d(3, 3), "norm": nn.LazyBatchNorm2d()})
        self.plain = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Sequential(nn.Flatten(), nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, images):
        x = self.plain(torch.tanh(self.body["norm"](self.body["conv"](images))))
        return self.out(self.drop(x))


class Counted(Nested):
    calls = 0

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, images):
        self.calls += 1
        self.seen.append(images)
        return super().forward(images)


def linear():
    return nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(2))


def images():
    return nn.Sequential(nn.LazyConv2d(3, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))


@dataclass
class Batch:
    images: torch.Tensor
    labels: torch.Tensor


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def adam(params):
    """Adam with an eps that makes nothing of the rounding errors in the gradient of a bias before a normalization."""
    return torch.optim.Adam(params, lr=0.01, eps=1e-3)


def rows(count):
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(6, 3, generator=generator, dtype=torch_double), torch.randint(0, 2, (6,), generator=generator))
        for _ in range(count)
    ]


def pictures(count):
    generator = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(6, 2, 5, 5, generator=generator, dtype=torch_double),
            torch.randint(0, 2, (6,), generator=generator),
        )
        for _ in range(count)
    ]


def of_pair(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def of_dict(model, batch):
    return F.cross_entropy(model(images=batch["images"]), batch["labels"])


def of_record(model, batch):
    return F.cross_entropy(model(images=batch.images), batch.labels)


def with_meta(model, batch, meta):
    return meta["weight"] * of_pair(model, batch)


def train_step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = of_pair(model, batch)
    loss.backward()
    optimizer.step()
    return loss


CASES = {
    "linear": (linear, of_pair, rows(4)),
    "images": (images, of_pair, pictures(4)),
    "nested, dict": (Nested, of_dict, [{"images": x, "labels": y} for x, y in pictures(4)]),
    "nested, record": (Nested, of_record, [Batch(x, y) for x, y in pictures(4)]),
}


def live_run(make, optimizer, loss_fn, batches, dry):
    """Torch's documented order: model, dry run, training from the buffers that were there before the first batch."""
    torch.manual_seed(0)
    model = make().double()
    torch.manual_seed(7)
    dry(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    live = optimizer(model.parameters())
    losses = []
    torch.manual_seed(11)
    for batch in batches:
        live.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        live.step()
        losses.append(loss.detach())
    return model, losses


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_eager(case, optimizer, whole):
    make, loss_fn, batches = CASES[case]
    expected, losses = live_run(make, optimizer, loss_fn, batches, lambda model: loss_fn(model, batches[0]))

    torch.manual_seed(0)
    model = make().double()
    live = optimizer(model.parameters())
    torch.manual_seed(7)
    step = lambda model, optimizer, batch: stepped(loss_fn, model, optimizer, batch)  # noqa: E731
    options = {"train_step": step} if whole else {"loss_fn": loss_fn}
    fn = gimli.functionalize(model, live, example=batches[0], **options)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(11)
    state, found = fn.unroll(fn.init(), batches)
    torch.testing.assert_close(found, torch.stack(losses), rtol=1e-12, atol=1e-14)
    assert_equal(state.params, dict(expected.named_parameters()))
    assert_equal(state.buffers, dict(expected.named_buffers()))


def stepped(loss_fn, model, optimizer, batch):
    optimizer.zero_grad()
    loss = loss_fn(model, batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


def test_an_optimizer_made_afterwards_is_no_different():
    make, loss_fn, batches = CASES["images"]
    results = []
    for late in (False, True):
        torch.manual_seed(0)
        model = make().double()
        if late:
            gimli.functionalize(model, sgd(model.parameters()), loss_fn, example=batches[0])
            fn = gimli.functionalize(model, sgd(model.parameters()), loss_fn)
        else:
            fn = gimli.functionalize(model, sgd(model.parameters()), loss_fn, example=batches[0])
        results.append(fn.unroll(fn.init(), batches))
    assert_equal(results[1][0].params, results[0][0].params)
    assert_equal(results[1][0].buffers, results[0][0].buffers)


def test_the_dry_run_changes_nothing_else():
    torch.manual_seed(0)
    model = Counted().double()
    model.plain.weight.grad = torch.ones_like(model.plain.weight)
    modules = dict(model.named_modules())
    flags = [module.training for module in model.modules()]
    optimizer = adam(model.parameters())
    params = list(model.parameters())
    images, labels = pictures(1)[0]
    before = torch.random.get_rng_state()
    gimli.functionalize(model, optimizer, of_dict, example={"images": images, "labels": labels})

    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.calls == 0
    assert model.seen == []
    assert [module.training for module in model.modules()] == flags
    assert all(a is b for a, b in zip(model.parameters(), params, strict=True))
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
    assert torch.equal(model.plain.weight.grad, torch.ones_like(model.plain.weight))
    assert all(p.grad is None for p in params if p is not model.plain.weight)
    for norm in (model.plain, model.body["norm"]):
        assert isinstance(norm, nn.BatchNorm2d)
        assert torch.equal(norm.running_mean, torch.zeros(3, dtype=torch_double))  # pyright: ignore
        assert torch.equal(norm.running_var, torch.ones(3, dtype=torch_double))  # pyright: ignore
        assert int(norm.num_batches_tracked) == 0  # pyright: ignore
    conv = model.body["conv"]
    assert type(conv) is nn.Conv2d
    assert conv.in_channels == 2
    assert not conv._forward_pre_hooks
    assert not optimizer.state


def test_the_values_are_those_of_the_first_call():
    made = []
    for by_hand in (True, False):
        torch.manual_seed(0)
        model = Nested().double()
        batch = pictures(1)[0]
        if by_hand:
            model(batch[0])
        else:
            gimli.functionalize(model, sgd(model.parameters()), example={"images": batch[0]})
        made.append({name: p.detach() for name, p in model.named_parameters()})
    assert_equal(made[1], made[0])


@pytest.mark.parametrize("example", [(torch.ones(2, 3),), torch.ones(2, 3)])
def test_without_a_loss_the_model_is_called(example):
    model = linear()
    fn = gimli.functionalize(model, sgd(model.parameters()), example=example)
    assert fn(fn.init(), torch.ones(5, 3)).shape == (5, 2)


def test_a_loss_with_meta_parameters_and_a_train_step_with_two_models():
    """The run ends with the last initialization: what comes after it does not get a `meta`, or a real optimizer."""
    model = linear().double()
    meta = {"weight": torch.tensor(2.0, dtype=torch_double, requires_grad=True)}
    with pytest.raises(InputError, match=r"not subscriptable[\s\S]*`example_meta`"):
        gimli.functionalize(model, sgd(model.parameters()), with_meta, example=rows(1)[0])
    fn = gimli.functionalize(model, sgd(model.parameters()), with_meta, example=rows(1)[0], example_meta=meta)
    state, _ = fn.step(fn.init(), rows(1)[0], None, meta)
    assert state.params["0.weight"].requires_grad

    def adversarial(models, optimizers, batch):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(of_pair(model, batch))
            losses[-1].backward()
            optimizer.step()
        return losses

    models: Any = (nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)).double(), linear().double())
    optimizers = (sgd(models[0].parameters()), adam(models[1].parameters()))
    frozen = models[0][0].weight.detach().clone()
    fn = gimli.functionalize(models, optimizers, train_step=adversarial, example=rows(1)[0])
    assert torch.equal(models[0][0].weight, frozen)
    assert all(p.grad is None for model in models for p in model.parameters())
    copies = copy.deepcopy(models)
    theirs = (sgd(copies[0].parameters()), adam(copies[1].parameters()))
    state, _ = fn.unroll(fn.init(), rows(3))
    for batch in rows(3):
        adversarial(copies, theirs, batch)
    live = {f"{i}.{name}": p for i, model in enumerate(copies) for name, p in model.named_parameters()}
    assert_equal(state.params, live)


def test_an_example_that_does_not_fit_leaves_the_model_lazy():
    make, loss_fn, batches = CASES["images"]
    model = make().double()
    optimizer = sgd(model.parameters())
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    kinds = list(map(type, model.modules()))
    wrong = (torch.ones(6, 5, dtype=torch_double), batches[0][1])
    also_wrong = (batches[0][0], batches[0][1][:2])  # fails behind the lazy layers, and none of its business

    with pytest.raises(InputError, match=r"dry run of `of_pair` on `example`[\s\S]*Pass a batch"):
        gimli.functionalize(model, optimizer, loss_fn, example=wrong)
    assert list(map(type, model.modules())) == kinds
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    lazy = (UninitializedParameter, UninitializedBuffer)
    assert sum(isinstance(t, lazy) for t in (*model.parameters(), *model.buffers())) == 8
    gimli.functionalize(model, optimizer, loss_fn, example=also_wrong)
    assert list(map(type, model.modules())) == [
        nn.Sequential,
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.Flatten,
        nn.Linear,
    ]


def test_a_run_that_fails_half_way_is_undone():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.LazyLinear(4), nn.LazyLinear(2)
            self.broken = True

        def forward(self, x):
            x = self.first(x)
            if self.broken:
                raise ValueError("half way")
            return self.second(x)

    model = Broken().double()
    optimizer = sgd(model.parameters())
    with pytest.raises(InputError, match=r"raised ValueError: half way\n[^\n]*in forward"):
        gimli.functionalize(model, optimizer, of_pair, example=rows(1)[0])
    assert type(model.first) is nn.LazyLinear
    assert isinstance(model.first.weight, UninitializedParameter)
    model.broken = False
    fn = gimli.functionalize(model, optimizer, of_pair, example=rows(1)[0])
    assert fn.init().params["first.weight"].shape == (4, 3)
    assert optimizer.param_groups[0]["params"][0] is model.first.weight


def test_an_example_that_misses_a_lazy_layer():
    model = nn.ModuleDict({"used": nn.LazyLinear(2), "unused": nn.LazyLinear(2)}).double()
    loss_fn = lambda model, batch: F.cross_entropy(model["used"](batch[0]), batch[1])  # noqa: E731
    with pytest.raises(InputError, match=r"'unused\.weight' is not initialized[\s\S]*a batch that reaches them"):
        gimli.functionalize(model, sgd(model.parameters()), loss_fn, example=rows(1)[0])


def test_an_example_for_a_model_that_is_not_lazy_is_not_run():
    def loss_fn(model, batch):
        raise AssertionError("this is not called")

    model = nn.Linear(3, 2)
    gimli.functionalize(model, sgd(model.parameters()), loss_fn, example=object())


def test_without_an_example_the_error_names_it():
    model = linear()
    with pytest.raises(InputError, match=r"'0\.weight' is not initialized[\s\S]*example=batch"):
        gimli.functionalize(model, sgd(model.parameters()), of_pair)
    assert isinstance(model[0].weight, UninitializedParameter)
