"""The user's own loop body, captured whole: `functionalize(model, optimizer, train_step=...)`."""

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from live_training import (
    Training,
    adamw,
    check_gradients,
    check_values,
    normal,
    plain_sgd,
    regression,
    run_live,
    sgd,
    squared_error,
    unrolled_gradients,
)
from torch import nn

import gimli_compile as gimli


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def clipping(model, optimizer, batch):
    optimizer.zero_grad()
    loss = squared_error(model, batch)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    return loss


def accumulating(model, optimizer, batch):
    optimizer.zero_grad()
    total = 0.0
    for part in zip(*(half.chunk(2) for half in batch), strict=True):
        loss = squared_error(model, part) / 2
        loss.backward()
        total = total + loss.detach()
    optimizer.step()
    return total


def editing(model, optimizer, batch):
    """Noise-free gradient edits, and weights that are kept in a ball by hand."""
    model.zero_grad(set_to_none=False)
    loss = squared_error(model, batch)
    loss.backward(retain_graph=True)
    for p in model.parameters():
        p.grad.mul_(0.5).add_(p.detach(), alpha=0.02)
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 / (1 + 0.01 * p.norm()))
    return loss


def penalizing(model, optimizer, batch):
    """A gradient penalty: the inner gradient of an inner gradient."""
    x, y = batch
    x = x.clone().requires_grad_()
    loss = F.mse_loss(model(x), y)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    total = loss + 0.5 * slope.square().sum()
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return total


def two_losses(model, optimizer, batch):
    """Two backward passes through one graph."""
    x, y = batch
    out = model(x)
    optimizer.zero_grad()
    first, second = F.mse_loss(out, y), out.square().mean()
    first.backward(retain_graph=True)
    (0.1 * second).backward()
    optimizer.step()
    return first + second


def reading(model, optimizer, batch):
    """Skips the step of a loss that is small: a branch on a tensor value."""
    optimizer.zero_grad()
    loss = squared_error(model, batch)
    loss.backward()
    if loss.item() > 1.5:
        optimizer.step()
    return loss


def by_functions(model, optimizer, batch):
    """Without `backward`: gradients that are asked for and put where the optimizer looks."""
    loss = squared_error(model, batch)
    params = list(model.parameters())
    for p, grad in zip(params, torch.autograd.grad(loss, params), strict=True):
        p.grad = torch.sign(grad) * grad.abs().clamp(max=0.3)
    optimizer.step()
    return loss


def noisy(model, optimizer, batch):
    """Noise on every gradient, drawn anew in every step."""
    optimizer.zero_grad()
    loss = squared_error(model, batch)
    loss.backward()
    for p in model.parameters():
        p.grad.add_(torch.randn_like(p.grad), alpha=0.05)
    optimizer.step()
    return loss


def signed(model, optimizer, batch):
    """Gradients clipped by value, then half of them but their signs."""
    optimizer.zero_grad()
    loss = squared_error(model, batch)
    loss.backward()
    nn.utils.clip_grad_value_(model.parameters(), 0.2)
    first, *_ = model.parameters()
    first.grad.sign_().mul_(0.1)
    optimizer.step()
    return loss


STEPS = {step.__name__: step for step in (
    clipping, accumulating, editing, penalizing, two_losses, reading, by_functions, noisy, signed
)}  # fmt: skip


def training_of(train_step, optimizer=sgd, steps=4, model=network):
    return Training(model, optimizer, squared_error, regression(steps, size=6), train_step=train_step)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("name", STEPS)
def test_values_equal_the_live_loop(name, optimizer):
    check_values(training_of(STEPS[name], optimizer))


@pytest.mark.parametrize("name", STEPS)
def test_gradients_equal_finite_differences(name):
    check_gradients(training_of(STEPS[name], steps=3), ["groups.0.lr", "groups.0.momentum", "groups.0.weight_decay"])


def test_meta_parameters_and_numbers_of_the_step():
    def step(model, optimizer, batch, meta):
        optimizer.zero_grad()
        loss = (meta["weight"] * (model(batch[0]) - batch[1]) ** 2).mean()
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.8)
        optimizer.step()
        return loss

    training = replace(training_of(step, steps=3), meta={"weight": normal(2).exp()})
    check_gradients(training, ["groups.0.lr"])


class Teacher(nn.Module):
    """A network and the moving average of it, whose outputs regularize it."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = network(), network()
        self.teacher.requires_grad_(False)

    def forward(self, x):
        return self.student(x)


def averaging(model, optimizer, batch):
    x, y = batch
    optimizer.zero_grad()
    with torch.no_grad():
        target = model.teacher(x)
    loss = F.mse_loss(model(x), y) + 0.3 * F.mse_loss(model(x), target)
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for slow, fast in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            slow.mul_(0.9).add_(fast, alpha=0.1)
    return loss


def student_sgd(params):
    return sgd([p for p in params if p.requires_grad])


def test_a_moving_average_of_the_weights_is_trained_along():
    training = training_of(averaging, student_sgd, steps=3, model=Teacher)
    check_values(training)
    check_gradients(training, ["groups.0.lr"])  # through the teacher as well, as the live loop depends on it


def test_batch_norm_and_dropout_of_the_model():
    def model():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))

    training = training_of(clipping, steps=3, model=model)
    check_values(training)
    check_gradients(training, ["groups.0.lr"])


class FusedIntoBackward(torch.optim.Optimizer):
    """Updates each parameter as soon as its gradient is there, and notes the norms in that order."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.norms: list[Any] = []
        for group in self.param_groups:
            for p in group["params"]:
                p.register_post_accumulate_grad_hook(self._update)

    @torch.no_grad()
    def _update(self, p):
        self.norms.append(p.grad.norm())
        p.sub_(self.param_groups[0]["lr"] * p.grad / (1 + self.norms[0]))
        p.grad = None

    def run(self, loss):
        self.norms = []
        loss.backward()

    def step(self, closure: Any = None) -> Any:
        raise RuntimeError("The update is part of the backward pass.")


def fused(model, optimizer, batch):
    loss = squared_error(model, batch)
    optimizer.run(loss)
    return loss


def test_an_update_inside_the_backward_pass():
    training = training_of(fused, FusedIntoBackward)
    check_values(training)
    check_gradients(replace(training, batches=training.batches[:3]), ["groups.0.lr"])


class StoredClosure(torch.optim.Optimizer):
    """Evaluates the loss by a function that it was given before the step, and keeps."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.evaluate: Any = None

    def step(self, closure: Any = None) -> Any:
        self.zero_grad()
        loss = self.evaluate()
        loss.backward()
        with torch.no_grad():
            for p in (p for p in self.param_groups[0]["params"] if p.grad is not None):
                p.sub_(self.param_groups[0]["lr"] * p.grad)
        return loss


def storing(model, optimizer, batch):
    optimizer.evaluate = lambda: squared_error(model, batch)
    return optimizer.step().detach()


@pytest.mark.parametrize("warm", [0, 2])
def test_a_loss_that_the_optimizer_keeps_from_step_to_step(warm):
    """What it kept from live training is a loss of the live model: a step of its own must not reach that."""
    training = training_of(storing, StoredClosure)
    model, optimizer = training.start()
    for batch in regression(warm, size=6):
        storing(model, optimizer, batch)
    fn = training.functionalize(model, optimizer)
    state, hyper = fn.init(), fn.hyperparameters()
    for batch in training.batches:
        state, loss = fn.step(state, batch, hyper)
        torch.testing.assert_close(loss, storing(model, optimizer, batch), rtol=1e-12, atol=0)
    for name, p in model.named_parameters():
        torch.testing.assert_close(state.params[name], p.detach(), rtol=1e-12, atol=1e-14)


def test_a_loss_of_the_live_model_is_refused_without_a_train_step():
    training = training_of(storing, StoredClosure)
    model, optimizer = training.start()
    storing(model, optimizer, training.batches[0])
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(gimli.CaptureError, match=r"evaluates a loss of the live model[\s\S]*train_step"):
        gimli.functionalize(model, optimizer, squared_error)
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


def test_what_a_step_returns_may_be_a_pytree():
    def step(model, optimizer, batch):
        loss = clipping(model, optimizer, batch)
        return {"loss": loss, "twice": (2 * loss, loss.item()), "name": "clipped", "none": None}

    model, optimizer = training_of(clipping).start()
    fn = gimli.functionalize(model, optimizer, train_step=step)
    state = fn.init()
    returned: Any = fn.step(state, regression(1)[0])[1]
    assert returned["name"] == "clipped"
    assert returned["none"] is None
    assert torch.equal(returned["twice"][0], 2 * returned["loss"])
    assert torch.equal(returned["twice"][1], returned["loss"].to(torch.float64))


def test_counters_and_logs_of_the_step_are_undone_and_said():
    """They run while capturing, more than once; a program does not run them at all."""
    count, log = 0, []

    def step(model, optimizer, batch):
        nonlocal count
        count += 1
        loss = clipping(model, optimizer, batch)
        log.append(loss.detach())
        return loss

    model, optimizer = training_of(clipping).start()
    fn = gimli.functionalize(model, optimizer, train_step=step)
    with pytest.warns(gimli.BakedValueWarning, match="the train step changes `(count|log)`, `(count|log)`"):
        fn.step(fn.init(), regression(1)[0])
    assert (count, log) == (0, [])


def test_pytrees_of_losses_are_stacked_over_steps():
    def step(model, optimizer, batch):
        loss = clipping(model, optimizer, batch)
        return {"loss": loss, "size": batch[0].abs().amax(0)}

    training = training_of(clipping)
    model, optimizer = training.start()
    fn = gimli.functionalize(model, optimizer, train_step=step)
    returned: Any = fn.unroll(fn.init(), training.batches)[1]
    torch.testing.assert_close(returned["loss"], torch.stack(run_live(training).losses), rtol=1e-12, atol=0)
    assert returned["size"].shape == (3, 4)
    again: Any = fn.unroll(fn.init(), training.batches, checkpoint=2)[1]
    assert torch.equal(again["size"], returned["size"])


@pytest.mark.parametrize("checkpoint", ["step", "sqrt"])
def test_recomputed_steps_have_the_same_gradients(checkpoint):
    training = training_of(accumulating)
    fn = training.functionalized()[2]
    _, stored = unrolled_gradients(training, fn)
    _, recomputed = unrolled_gradients(training, fn, checkpoint=checkpoint)
    for name, value in stored.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-12, atol=1e-12)


def test_tasks_step_together():
    training = training_of(clipping, steps=3)
    fn = training.functionalized()[2]
    many = [tuple(torch.stack([part, 0.5 * part + 0.1]) for part in batch) for batch in training.batches]
    state, losses = fn.unroll(fn.init(), many, tasks=True)
    for task in range(2):
        expected = run_live(training, batches=[tuple(part[task] for part in batch) for batch in many])
        for name, value in expected.params[-1].items():
            torch.testing.assert_close(state.params[name][task], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(losses[task], torch.stack(expected.losses), rtol=1e-12, atol=1e-12)


def test_the_update_alone_is_still_a_program():
    fn = training_of(clipping).functionalized()[2]
    state = fn.init()
    fn.update(state.params, {name: torch.ones_like(p) for name, p in state.params.items()}, state.opt_state)
    assert "momentum" in fn.programs["update"].code


def test_a_number_of_python_is_drawn_anew_in_each_step():
    def step(model, optimizer, batch):
        return random.random() * clipping(model, optimizer, batch)

    training = training_of(step)
    model, optimizer = training.start()
    random.seed(4)
    expected = run_live(training)
    fn = gimli.functionalize(model, optimizer, train_step=step)
    state = fn.init()
    random.seed(4)
    for batch, loss in zip(training.batches, expected.losses, strict=True):
        state, got = fn.step(state, batch)
        torch.testing.assert_close(got, loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("draw", [lambda: np.random.rand(2), lambda: random.choice([1, 2])])
def test_other_randomness_of_python_is_refused_by_line(draw):
    """A program would hold the one draw of the capture."""

    def step(model, optimizer, batch):
        return float(np.sum(draw())) * clipping(model, optimizer, batch)

    model, optimizer = training_of(clipping).start()
    fn = gimli.functionalize(model, optimizer, train_step=step)
    with pytest.raises(gimli.CaptureError, match=r"draws from a gen[\s\S]*test_train_steps.py[\s\S]*Draw with torch"):
        fn.step(fn.init(), regression(1)[0])


def test_randomness_of_python_is_noticed_where_no_line_is_known():
    draw = random.choice

    def step(model, optimizer, batch):
        return draw([1.0, 2.0]) * clipping(model, optimizer, batch)

    model, optimizer = training_of(clipping).start()
    before = random.getstate()
    fn = gimli.functionalize(model, optimizer, train_step=step)
    with pytest.raises(gimli.CaptureError, match="the step draws from a generator of Python or NumPy"):
        fn.step(fn.init(), regression(1)[0])
    assert random.getstate() == before


class OwnGenerator(torch.optim.Optimizer):
    """Draws from a generator that it holds."""

    def __init__(self, params, make):
        super().__init__(params, {"lr": 0.1})
        self.generator = make()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            generator: Any = self.generator
            if isinstance(generator, torch.Generator):
                noise: Any = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            else:
                noise = generator.random()
            p.sub_(self.param_groups[0]["lr"] * (p.grad + noise))


@pytest.mark.parametrize("make", [lambda: random.Random(0), lambda: np.random.default_rng(0)])
def test_an_optimizer_with_a_generator_of_python_is_refused(make):
    model = network().double()
    fn = gimli.functionalize(model, OwnGenerator(model.parameters(), make), squared_error)
    with pytest.raises(gimli.CaptureError, match="that the optimizer holds"):
        fn.step(fn.init(), regression(1)[0])


def test_an_optimizer_with_a_generator_of_torch_draws_what_eager_draws():
    def optimizer(params):
        return OwnGenerator(params, lambda: torch.Generator().manual_seed(3))

    training = Training(network, optimizer, squared_error, regression(3))
    expected = run_live(training)
    model, live = training.start()
    fn = gimli.functionalize(model, live, squared_error)
    state = fn.init()
    assert torch.equal(live.generator.get_state(), torch.Generator().manual_seed(3).get_state())
    for t, batch in enumerate(training.batches):
        state, _ = fn.step(state, batch)
        for name, value in expected.params[t].items():
            torch.testing.assert_close(state.params[name], value, rtol=1e-12, atol=0)


def test_a_weight_decay_of_zero_beside_a_frozen_layer_has_its_derivative():
    """What the step leaves alone is no result of its program, and was taken for a difference."""

    def frozen():
        model = network()
        model[0].requires_grad_(False)
        return model

    check_gradients(
        training_of(clipping, lambda params: torch.optim.SGD(params, lr=0.07), steps=3, model=frozen),
        ["groups.0.lr", "groups.0.weight_decay"],
    )


def test_plain_sgd_without_a_loss_function():
    check_gradients(training_of(two_losses, plain_sgd, steps=3), ["groups.0.lr"])


def test_one_tensor_at_two_places_of_a_batch():
    """A step that is captured with one is right for two, as an autoencoder's with noise in its input."""
    torch.manual_seed(0)
    model = nn.Linear(3, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(model, optimizer, batch, meta):
        optimizer.zero_grad()
        loss = ((model(batch[0]) - batch[1]) ** 2).mean() + (meta[0] * meta[1] ** 2).sum()
        loss.backward()
        optimizer.step()
        return loss

    fn = gimli.functionalize(model, optimizer, train_step=train_step)
    x, y, a, b = torch.randn(4, 3, 3, dtype=torch.float64)
    fn.step(fn.init(), (x, x), meta=(a, a))
    start = fn.init()
    last, loss = fn.step(start, (x, y), meta=(a, b))
    with torch.no_grad():
        assert torch.allclose(loss, ((model(x) - y) ** 2).mean() + (a * b**2).sum())
    train_step(model, optimizer, (x, y), (a, b))
    for name, value in model.named_parameters():
        assert torch.allclose(last.params[name], value)
