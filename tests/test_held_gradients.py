"""Gradients that a train step leaves in `p.grad`: the next one finds them there."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from live_training import (
    GRADIENTS,
    Training,
    adamw,
    assert_equal_tensors,
    check_gradients,
    check_recomputation_and_tasks,
    check_values,
    continue_live,
    copied,
    objective,
    plain_sgd,
    random_like,
    regression,
    run_live,
    run_steps,
    sgd,
    slope_error,
    squared_error,
)
from torch import nn

import gimli_compile as gimli


class Counting(nn.Module):
    """A network that counts its steps."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        return self.second(self.first(x).tanh())


def never_cleared(model, optimizer, batch):
    loss = squared_error(model, batch)
    loss.backward()
    optimizer.step()
    return loss


def cleared_at_the_end(model, optimizer, batch):
    loss = squared_error(model, batch)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def accumulating(model, optimizer, batch):
    """Every third call steps along what came together."""
    loss = squared_error(model, batch) / 3
    loss.backward()
    model.count += 1
    if int(model.count) % 3 == 0:
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return loss


def cleared_before_every_second(model, optimizer, batch):
    """Nothing shows at the first call that the second reads what it left."""
    if int(model.count) % 2 == 0:
        optimizer.zero_grad()
    loss = squared_error(model, batch)
    loss.backward()
    if int(model.count) % 2 == 1:
        optimizer.step()
    model.count += 1
    return loss


def decaying(model, optimizer, batch):
    """Gradients fade out in place: momentum by hand."""
    for p in model.parameters():
        if p.grad is not None:
            p.grad.mul_(0.7)
    return never_cleared(model, optimizer, batch)


def zeros_for_what_is_not_used(model, optimizer, batch):
    """A zero gradient is not None: weight decay and momentum move a layer along that the loss does not reach."""
    optimizer.zero_grad(set_to_none=False)
    hidden = model.first(batch[0])
    loss = hidden.square().mean() if int(model.count) >= 2 else F.mse_loss(model.second(hidden.tanh()), batch[1])
    loss.backward()
    optimizer.step()
    model.count += 1
    return loss


def only_the_norm(model, optimizer, batch):
    """Reads the gradients of the last step and throws them away: its learning signal is their size."""
    size = sum((p.grad.square().sum() for p in model.parameters() if p.grad is not None), torch.zeros(()))
    optimizer.zero_grad()
    loss = squared_error(model, batch) * (1 + size.to(batch[0].dtype)).rsqrt()
    loss.backward()
    optimizer.step()
    return loss


STEPS = {step.__name__: step for step in (
    never_cleared, cleared_at_the_end, accumulating, cleared_before_every_second, decaying,
    zeros_for_what_is_not_used, only_the_norm,
)}  # fmt: skip


def training_of(train_step, optimizer=sgd, steps=4):
    return Training(Counting, optimizer, squared_error, regression(steps), train_step=train_step)


@pytest.mark.parametrize("optimizer", [plain_sgd, adamw])
@pytest.mark.parametrize("name", STEPS)
def test_values_equal_the_live_loop(name, optimizer):
    check_values(training_of(STEPS[name], optimizer, steps=7))


@pytest.mark.parametrize("name", STEPS)
def test_gradients_equal_finite_differences(name):
    check_gradients(training_of(STEPS[name]), ["groups.0.lr", "groups.0.momentum", "groups.0.weight_decay"])


@pytest.mark.parametrize("name", ["never_cleared", "accumulating"])
def test_what_live_training_left_is_where_the_loop_begins(name):
    training = training_of(STEPS[name])
    model, optimizer = training.start()
    continue_live(training, model, optimizer)  # four steps: one of the next three is begun
    fn = training.functionalize(model, optimizer)
    start = fn.init()
    assert_equal_tensors(start.grads, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    got = run_steps(training, fn, start)
    expected = continue_live(training, model, optimizer)
    for t, params in enumerate(expected.params):
        assert_equal_tensors(got.params[t], params)


def test_it_is_differentiated():
    training = training_of(never_cleared, steps=3)

    def live(offset):
        model, optimizer = training.start()
        for index, p in enumerate(model.parameters()):
            p.grad = random_like(p, index) + offset * random_like(p, 50 + index)
        history = continue_live(training, model, optimizer)
        return float(objective(history.params[-1], history.losses))

    fn = training.functionalized()[2]
    start = fn.init()
    grads = {name: random_like(p, index).requires_grad_() for index, (name, p) in enumerate(start.params.items())}
    state, losses = fn.unroll(replace(start, grads=grads), training.batches)
    total = objective(state.params, losses)
    assert abs(float(total.detach()) - live(0.0)) <= 1e-12
    slopes = torch.autograd.grad(total, list(grads.values()))
    along = [random_like(slope, 50 + index) for index, slope in enumerate(slopes)]
    assert slope_error(sum(float((s * way).sum()) for s, way in zip(slopes, along, strict=True)), live) <= GRADIENTS


def test_it_is_written_back():
    training = training_of(accumulating, steps=5)
    model, optimizer, fn = training.functionalized()
    state, _ = fn.unroll(fn.init(), training.batches[:2])
    other, its = training.start()
    fn.load_into(other, its, state)
    assert_equal_tensors({name: p.grad for name, p in other.named_parameters()}, state.grads)
    continue_live(training, other, its, batches=training.batches[2:])
    assert_equal_tensors(copied(other.named_parameters()), run_live(training).params[-1])
    fn.load_into(model, optimizer, fn.unroll(fn.init(), training.batches[:3])[0])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["never_cleared", "accumulating"])
def test_recomputation_and_tasks(name):
    check_recomputation_and_tasks(training_of(STEPS[name], steps=5))


def test_first_order_takes_them_as_constants():
    """The gradients of all steps are; the learning rate is not."""
    training = training_of(never_cleared, plain_sgd, steps=3)
    fn = training.functionalized()[2]
    state, hyper = fn.init(), fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    after, _ = fn.unroll(state, training.batches, hyper, order=1)
    (slope,) = torch.autograd.grad(after.params["first.weight"].sum(), rate)
    expected = (after.params["first.weight"] - state.params["first.weight"]).sum() / 0.07
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-10, atol=0)


def embedded(model, batch):
    return ((model(batch[0]).sum(1) - batch[1]) ** 2).mean()


def sparse_adam(params):
    return torch.optim.SparseAdam(params, lr=0.03, eps=1e-2)


@pytest.mark.parametrize("optimizer", [plain_sgd, sparse_adam])
def test_sparse_gradients_accumulate(optimizer):
    def step(model, optimizer, batch):
        loss = embedded(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    indices = [torch.tensor([[0, 1], [3, 1]]), torch.tensor([[2, 1], [4, 4]]), torch.tensor([[0, 5], [5, 1]])]
    batches = [(index, random_like(torch.empty(2, 3, dtype=torch.float64), t)) for t, index in enumerate(indices)]
    training = Training(lambda: nn.Embedding(7, 3, sparse=True), optimizer, embedded, batches, train_step=step)
    check_values(training)
    if optimizer is sparse_adam:  # SGD has a weight decay, which it refuses for sparse gradients
        check_gradients(training, ["groups.0.lr"])


def test_gradients_of_something_else_are_refused():
    training = training_of(never_cleared)
    fn = training.functionalized()[2]
    state = fn.init()
    with pytest.raises(gimli.InputError, match=r"state.grads\['first.weight'\] has shape \(2,\)"):
        fn.step(replace(state, grads={"first.weight": torch.zeros(2)}), training.batches[0])
    with pytest.raises(gimli.InputError, match="gradient of no parameter"):
        fn.step(replace(state, grads={"third": torch.zeros(2)}), training.batches[0])


def test_a_method_that_clears_them_is_refused():
    training = training_of(never_cleared)
    fn = training.functionalized()[2]
    state, _ = fn.step(fn.init(), training.batches[0])
    with pytest.raises(gimli.CaptureError, match=r"`zero_grad` changes gradients[\s\S]*replace\(state, grads=\{\}\)"):
        fn.call_optimizer("zero_grad", state)


def test_the_default_step_leaves_none():
    model, optimizer = training_of(never_cleared).start()
    squared_error(model, regression(1)[0]).backward()
    fn = gimli.functionalize(model, optimizer, squared_error)
    assert not fn.init().grads
    assert not fn.step(fn.init(), regression(1)[0])[0].grads
