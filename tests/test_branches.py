"""Models and losses whose Python branches on values, with `branches="guard"`: against the live loop."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_reference import relative_error
from live_training import (
    Training,
    adamw,
    assert_equal_tensors,
    check_gradients,
    check_values,
    normal,
    regression,
    sgd,
    squared_error,
    train_step,
    unrolled_gradients,
)
from torch import nn

import gimli_compile as gimli

HYPERS = ("groups.0.lr", "groups.0.weight_decay")


class Guarded(Training):
    """A loop whose branches on values are guarded."""

    def functionalize(self, model, optimizer):
        loss = self.loss if self.train_step is None else None
        return gimli.functionalize(model, optimizer, loss, train_step=self.train_step, branches="guard")


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 2)


class Branching(Layers):
    def forward(self, x):
        out = self.first(x)
        if out.mean() > 0:
            return self.second(out)
        return -out.tanh()


class Looping(Layers):
    def forward(self, x):
        out, count = self.first(x), 0
        while float(out.detach().norm()) > 0.8 and count < 5:
            out, count = self.second(out), count + 1
        return out


class Settling(Layers):
    """Leaves early when it has come near a fixed point."""

    def forward(self, x):
        out = self.first(x)
        for _ in range(4):
            new = torch.tanh(self.second(out))
            if (new - out).detach().abs().max().item() < 0.6:
                return new
            out = new
        return out


class Indexing(Layers):
    def forward(self, x):
        out = self.first(x)
        return out * [1.0, 2.0][out.sum(0).argmax()]


class Slicing(Layers):
    def forward(self, x):
        out = self.first(x)
        positive = int((out > 0).sum())
        return out + self.second(out)[: 1 + positive % 3].sum()


class Skipping(Layers):
    """Stochastic depth: which layers run is drawn."""

    def forward(self, x):
        out = self.first(x)
        for _ in range(3):
            if torch.rand(1) < 0.5:
                continue
            out = out + F.dropout(self.second(out), 0.3)
        return out


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(3, 3), nn.ModuleList(nn.Linear(3, 2) for _ in range(3))


class Dispatching(Experts):
    """Each expert sees the rows that the router sends to it, in a loop over all experts."""

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = x.new_zeros(len(x), 2)
        for index, expert in enumerate(self.experts):
            row, place = torch.where(chosen == index)
            if row.numel() == 0:
                continue
            out.index_add_(0, row, expert(x[row]) * weights[row, place, None])
        return out


class DispatchingHits(Experts):
    """The same in a loop over the experts that have rows, as libraries of language models write it."""

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(1)
        mask = F.one_hot(chosen, 3).permute(2, 1, 0)
        out = x.new_zeros(len(x), 2)
        for hit in (mask.sum((-1, -2)) > 0).nonzero():
            index: Any = hit.item()
            place, row = torch.where(mask[index])
            state = x[None, row].reshape(-1, 3)
            out.index_add_(0, row, self.experts[index](state) * weights[row, place, None])
        return out


class Choosing(Experts):
    def forward(self, x):
        weights = self.router(x).mean(0).softmax(-1)
        best = weights.argmax().item()
        return self.experts[best](x) * weights[best]


def capped(model, batch):
    loss = squared_error(model, batch)
    return loss if loss < 2 else loss.sqrt()


def linear():
    return nn.Linear(3, 2)


TRAININGS = {
    "branch": Guarded(Branching, sgd, squared_error, regression(5)),
    "loop": Guarded(Looping, adamw, squared_error, regression(5)),
    "early_exit": Guarded(Settling, sgd, squared_error, regression(5)),
    "index": Guarded(Indexing, sgd, squared_error, regression(5)),
    "size": Guarded(Slicing, sgd, squared_error, regression(5)),
    "draw": Guarded(Skipping, sgd, squared_error, regression(5)),
    "experts": Guarded(Dispatching, adamw, squared_error, regression(5)),
    "experts_hit": Guarded(DispatchingHits, sgd, squared_error, regression(5)),
    "best_expert": Guarded(Choosing, adamw, squared_error, regression(5)),
    "loss": Guarded(linear, sgd, capped, regression(5)),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_values_equal_the_live_loop(name):
    check_values(TRAININGS[name])


@pytest.mark.parametrize("name", TRAININGS)
def test_gradients_equal_differences_of_the_live_loop(name):
    check_gradients(TRAININGS[name], HYPERS)


@pytest.mark.parametrize("name", ["branch", "draw", "experts"])
def test_steps_that_are_computed_again(name):
    check_gradients(TRAININGS[name], HYPERS, checkpoint="step")


@pytest.mark.parametrize("name", ["branch", "size", "experts"])
def test_more_than_one_program_is_taken(name):
    """The batches take different branches, so that the tests above say something; each outcome is captured once."""
    training = TRAININGS[name]
    _, _, fn = training.functionalized()
    fn.unroll(fn.init(), training.batches)
    taken = len(fn.programs["grad"])
    assert 1 < taken <= len(training.batches)
    assert str(fn.programs["grad"]).count("# holds when") == taken
    fn.unroll(fn.init(), training.batches)
    assert len(fn.programs["grad"]) == taken


@pytest.mark.parametrize("name", ["branch", "size", "experts"])
def test_in_a_whole_train_step(name):
    training = replace(TRAININGS[name], train_step=train_step)
    check_values(training)
    check_gradients(training, HYPERS)


def test_with_a_closure():
    def optimizer(params):
        return torch.optim.LBFGS(params, lr=0.1, max_iter=2, history_size=2)

    def step(optimizer, evaluate):
        def closure():
            optimizer.zero_grad()
            loss = evaluate()
            loss.backward()
            return loss

        return optimizer.step(closure)

    check_values(Guarded(Branching, optimizer, squared_error, regression(4), step=step))


class Scaling(Layers):
    def forward(self, x):
        out = self.first(x)
        return out * out.max().item() + sum(out.mean(0).tolist())


def test_no_derivative_goes_through_a_number():
    """As in eager training with `create_graph`, where `item()` is a constant."""
    training = Guarded(Scaling, lambda params: torch.optim.SGD(params, lr=0.05), squared_error, regression(3))
    fn = check_values(training)
    inputs, grads = unrolled_gradients(training, fn)
    params = {name: value.detach().clone().requires_grad_() for name, value in inputs.state.params.items()}
    now: Any = dict(params)
    for batch in training.batches:
        loss = squared_error(lambda x, held=now: _scaled(held, x), batch)
        steps = torch.autograd.grad(loss, [now["first.weight"], now["first.bias"]], create_graph=True)
        for name, slope in zip(("first.weight", "first.bias"), steps, strict=True):
            now = {**now, name: now[name] - 0.05 * slope}
    fn_state, _ = fn.unroll(inputs.state, training.batches)
    assert_equal_tensors(fn_state.params, {name: value.detach() for name, value in now.items()})
    wanted = torch.autograd.grad(now["first.weight"].square().sum(), params["first.weight"])[0]
    got = torch.autograd.grad(fn_state.params["first.weight"].square().sum(), inputs.state.params["first.weight"])[0]
    assert relative_error(got, wanted) < 1e-12
    assert grads["params.second.weight"].abs().max() > 0  # the objective looks at all parameters


def _scaled(params, x):
    out = F.linear(x, params["first.weight"], params["first.bias"])
    return out * out.detach().max() + out.detach().mean(0).sum()


class Bounded(Layers):
    """Looks up what exists in one of its branches only."""

    def forward(self, x):
        out = self.first(x)
        place = (out > 0).sum().clamp(max=9)
        if place < 4:
            return out * torch.arange(1.0, 5.0, dtype=x.dtype)[place.reshape(1)]
        return self.second(out)


def test_a_program_that_fails_where_it_does_not_hold():
    training = Guarded(Bounded, sgd, squared_error, [*regression(2), (normal(5, 3) * 5, normal(5, 2)), *regression(2)])
    fn = check_values(training)
    check_gradients(training, HYPERS)
    model = Bounded().double()
    fn = gimli.functionalize(model, sgd(model.parameters()), branches="guard")
    state, x = fn.init(), torch.zeros(5, 3, dtype=torch.float64)
    for bias in (-1.0, 1.0, -1.0):
        with torch.no_grad():
            state.params["first.bias"].fill_(bias)
            model.first.bias.fill_(bias)
        assert torch.equal(fn(state, x), model(x))


def test_the_forward_program():
    model = Branching().double()
    fn = gimli.functionalize(model, sgd(model.parameters()), branches="guard")
    state = fn.init()
    for seed in range(6):
        x = normal(5, 3, seed=seed) * (4 if seed % 2 else -4)
        assert torch.equal(fn(state, x), model(x))
    assert len(fn.programs["forward"]) == 2


def test_a_number_that_goes_where_no_tensor_goes_is_refused():
    """It would be a constant, and another in every step."""

    class Gamma(Layers):
        def forward(self, x):
            out = self.first(x)
            return out * math.gamma(1 + out.detach().norm().item())  # the function

    training = replace(TRAININGS["branch"], model=Gamma)
    _, _, fn = training.functionalized()
    with pytest.raises(gimli.CaptureError, match=r"# the function[\s\S]*as `item\(\)` returned it"):
        fn.step(fn.init(), training.batches[0])


class Listing(Layers):
    """Looks up a Python list by what it reads."""

    def forward(self, x):
        out = self.first(x)
        return out * (0.5, 1.0, 2.0, 3.0)[(out[0] > 0).sum().item()] + out[: 1 + int((out > 0).sum()) % 3].sum()


def test_whole_numbers_that_python_reads():
    training = Guarded(Listing, sgd, squared_error, regression(6))
    fn = check_values(training)
    check_gradients(training, HYPERS)
    assert len(fn.programs["grad"]) > 2


def test_labels_that_python_reads():
    """Whole numbers of the batch may always be read."""

    class Chosen(Layers):
        def forward(self, x, label):
            out = self.first(x)
            return out * (0.5, 1.0, 2.0)[int(label)] + (0.5 if label.item() > 0 else 0.0)

    def loss(model, batch):
        x, y, label = batch
        return F.mse_loss(model(x, label), y)

    def step(model, optimizer, batch):
        optimizer.zero_grad()
        value = loss(model, batch)
        if batch[2].item() == 1:
            value = value * 2
        value.backward()
        optimizer.step()
        return value

    batches = [(*batch, torch.tensor(t % 3)) for t, batch in enumerate(regression(4))]
    training = Training(Chosen, sgd, loss, batches)
    fn = check_values(training)
    check_gradients(training, HYPERS)
    assert len(fn.programs["grad"]) == 3
    whole = replace(training, train_step=step)
    check_values(whole)
    check_gradients(whole, HYPERS)


def test_tasks_that_disagree_are_refused():
    training = TRAININGS["branch"]
    _, _, fn = training.functionalized()
    x, y = training.batches[0]
    with pytest.raises(gimli.CaptureError, match=r"tasks that run together[\s\S]*one task at a time"):
        fn.unroll(fn.init(), [(torch.stack((x, -5 * x)), torch.stack((y, y)))], tasks=True)
