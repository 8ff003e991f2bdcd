"""`fn.loss`: the loss of a train state without a step, against the live loss and against finite differences."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gimli_compile as gimli

COMPILED = [None, "eager", "torchscript", "inductor"]


class Normalized(nn.Module):
    """A network with a buffer that its forward pass changes."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def weighted(model, batch, meta):
    """A loss with one learned weight for each example."""
    return (F.cross_entropy(model(batch["x"]), batch["y"], reduction="none") * meta.sigmoid()).mean()


def plain(model, batch):
    return ((model(batch[0]) - batch[1]) ** 2).mean()


def batch(seed, *lead):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, 5, 4, generator=generator, dtype=torch.float64)
    return {"x": x, "y": torch.randint(3, (*lead, 5), generator=generator)}


def functional(backend, loss_fn=weighted):
    torch.manual_seed(0)
    model = Normalized().double()
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loss_fn)
    return model, fn if backend is None else fn.compile(backend)


@pytest.mark.parametrize("backend", COMPILED)
def test_equals_the_live_loss_and_its_gradients(backend):
    model, fn = functional(backend)
    meta = torch.linspace(-1, 1, 5, dtype=torch.float64)
    for seed in range(3):
        state, given = fn.init(), meta.clone().requires_grad_()
        leaves = [p.requires_grad_() for p in state.params.values()]
        buffers = {name: value.clone() for name, value in state.buffers.items()}
        loss = fn.loss(state, batch(seed), given)
        found = torch.autograd.grad(loss, [*leaves, given])
        assert all(torch.equal(state.buffers[name], value) for name, value in buffers.items())
        live_meta = meta.clone().requires_grad_()
        live = weighted(model, batch(seed), live_meta)
        expected = torch.autograd.grad(live, [*model.parameters(), live_meta])
        assert loss.shape == () and torch.allclose(loss, live, rtol=1e-13)
        assert all(torch.allclose(got, want, rtol=1e-10) for got, want in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", COMPILED)
def test_after_training_equals_finite_differences_of_live_training(backend):
    _, fn = functional(backend)
    meta, batches, held_out = torch.zeros(5, dtype=torch.float64), [batch(t) for t in range(3)], batch(9)
    direction = torch.linspace(0.5, -1, 5, dtype=torch.float64)

    def live(move):
        torch.manual_seed(0)
        copy = Normalized().double()
        optimizer = torch.optim.SGD(copy.parameters(), lr=0.1, momentum=0.9)
        for one in batches:
            optimizer.zero_grad()
            weighted(copy, one, meta + move * direction).backward()
            optimizer.step()
        return float(weighted(copy, held_out, meta).detach())

    given = meta.clone().requires_grad_()
    state, _ = fn.unroll(fn.init(), batches, meta=given)
    loss = fn.loss(state, held_out, meta)
    (grad,) = torch.autograd.grad(loss, given)
    slope = (live(1e-5) - live(-1e-5)) / 2e-5
    assert abs(float(loss.detach()) - live(0.0)) < 1e-13
    assert abs(float(grad @ direction) - slope) < 1e-6 * abs(slope)


@pytest.mark.parametrize("backend", COMPILED)
def test_of_many_tasks_is_that_of_each(backend):
    _, fn = functional(backend)
    meta = torch.linspace(-1, 1, 5, dtype=torch.float64).requires_grad_()
    batches, held_out = batch(1, 4, 2), batch(2, 4)
    states, _ = fn.unroll(fn.init(), batches, meta=meta.detach(), tasks=True)
    losses = fn.loss(states, held_out, meta, tasks=True)
    assert losses.shape == (4,)
    (grad,) = torch.autograd.grad(losses @ torch.arange(4.0, dtype=torch.float64), meta)
    alone = []
    for task in range(4):
        one = {name: value[task] for name, value in batches.items()}
        state, _ = fn.unroll(fn.init(), one, meta=meta.detach())
        alone.append(fn.loss(state, {name: value[task] for name, value in held_out.items()}, meta))
    (expected,) = torch.autograd.grad(torch.stack(alone) @ torch.arange(4.0, dtype=torch.float64), meta)
    assert torch.allclose(losses, torch.stack(alone), rtol=1e-12)
    assert torch.allclose(grad, expected, rtol=1e-10)


def test_follows_the_mode_of_the_model():
    model, fn = functional(None)
    fast = fn.compile("eager")
    state, meta = fn.init(), torch.zeros(5, dtype=torch.float64)
    training = [one.loss(state, batch(0), meta) for one in (fn, fast)]
    model.eval()
    evaluating = [one.loss(state, batch(0), meta) for one in (fn, fast)]
    expected = weighted(model, batch(0), meta)
    assert all(torch.allclose(loss, expected, rtol=1e-13) for loss in evaluating)
    assert all(not torch.allclose(loss, expected, rtol=1e-3) for loss in training)


def test_is_a_program_of_its_own_that_can_be_read():
    _, fn = functional(None)
    with pytest.raises(KeyError, match="call `loss` on a batch first"):
        fn.programs["loss"]
    fn.loss(fn.init(), batch(0), torch.zeros(5, dtype=torch.float64))
    assert "forward" not in fn.programs and "def loss(" in fn.programs["loss"].code


def test_without_a_loss_is_refused():
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fn = gimli.functionalize(model, optimizer)
    with pytest.raises(gimli.InputError, match="needs a loss function"):
        fn.loss(fn.init(), batch(0))
    whole = gimli.functionalize(model, optimizer, train_step=lambda model, optimizer, batch: None)
    with pytest.raises(gimli.InputError, match="a train step computes its loss itself"):
        whole.loss(whole.init(), batch(0))


def test_a_state_of_another_model_is_refused_also_with_tasks():
    _, fn = functional(None, plain)
    state = fn.init()
    wrong = gimli.TrainState({**state.params, "last.bias": torch.zeros(7)}, state.buffers, state.opt_state)
    data = (torch.zeros(5, 4, dtype=torch.float64), torch.zeros(5, 3, dtype=torch.float64))
    for one in (fn, fn.compile("eager")):
        with pytest.raises(gimli.InputError, match=r"last\.bias"):
            one.loss(wrong, data)
        stacked = gimli.TrainState(
            {name: torch.stack([value] * 2) for name, value in wrong.params.items()},
            {name: torch.stack([value] * 2) for name, value in state.buffers.items()},
            state.opt_state,
        )
        with pytest.raises(gimli.InputError, match=r"last\.bias"):
            one.loss(stacked, (data[0].expand(2, 5, 4), data[1].expand(2, 5, 3)), tasks=True)
