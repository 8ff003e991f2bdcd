"""Operators without a derivative are refused where they are called."""

import pytest
import torch
from live_training import Training, plain_sgd, regression
from torch import nn

import gimli_compile as gimli
from gimli_compile.passes.differentiability import refuse_missing_derivatives

aten = torch.ops.aten


def distances(model, batch):
    return aten._pdist_forward(model(batch[0]), 2.0).mean()


def distances_of_the_batch(model, batch):
    return (aten._pdist_forward(batch[0], 2.0).mean() - model(batch[0])).square().mean()


def detached_distances(model, batch):
    return (aten._pdist_forward(model(batch[0]).detach(), 2.0).mean() - model(batch[0])).square().mean()


def started(loss):
    training = Training(lambda: nn.Linear(3, 2), plain_sgd, loss, regression(1))
    return training.functionalized()[2]


def test_the_gradient_of_an_operator_without_a_second_derivative_is_refused():
    fn = started(distances)
    with pytest.raises(gimli.CaptureError, match=r"`aten._pdist_backward.default` has no derivative") as caught:
        fn.step(fn.init(), regression(1)[0])
    assert "in distances: return aten._pdist_forward(model(batch[0]), 2.0).mean()" in str(caught.value)


def test_calls_of_one_operator_may_have_different_numbers_of_results():
    def rows(model, batch):
        out = model(batch[0])
        return out.unbind(1)[1].sum() + out.unbind(0)[-1].square().sum()

    fn = started(rows)
    _, loss = fn.step(fn.init(), regression(1)[0])
    assert loss.item() != 0


@pytest.mark.parametrize("loss", [distances_of_the_batch, detached_distances])
def test_what_no_parameter_reaches_needs_no_derivative(loss):
    fn = started(loss)
    fn.step(fn.init(), regression(1)[0])
    ((program, _),) = fn.programs["grad"].variants
    assert "_pdist_forward" in program.code
    assert refuse_missing_derivatives(program) is program


def test_a_forward_pass_needs_first_derivatives_only():
    class Distances(nn.Linear):
        def forward(self, input):
            return aten._pdist_forward(super().forward(input), 2.0)

    training = Training(lambda: Distances(3, 2), plain_sgd, distances, regression(1))
    fn = training.functionalized()[2]
    state = fn.init()
    weight = state.params["weight"].requires_grad_()
    (gradient,) = torch.autograd.grad(fn(state, regression(1)[0][0]).sum(), weight)
    assert gradient.any()


# ---------------------------------------------------------------------- whole steps and updates, when they are asked


def train_on_distances(model, optimizer, batch, meta=None):
    optimizer.zero_grad()
    loss = aten._pdist_forward(model(batch[0]), 2.0).mean()
    loss.backward()
    optimizer.step()
    return loss


def log_distances(model, optimizer, batch, meta=None):
    optimizer.zero_grad()
    loss = (model(batch[0]) - batch[1]).square().mean()
    loss.backward()
    optimizer.step()
    return {"loss": loss, "zeta": torch.special.zeta(model.weight.square() + 2, model.weight.square())}


def whole(train_step):
    return Training(
        lambda: nn.Linear(3, 2), plain_sgd, None, regression(3), train_step=train_step, step=None
    ).functionalized()[2]


def live_params(train_step):
    training = Training(lambda: nn.Linear(3, 2), plain_sgd, None, regression(3))
    model, optimizer = training.start()
    for batch in training.batches:
        train_step(model, optimizer, batch)
    return dict(model.named_parameters())


def agrees(state, train_step):
    for name, value in live_params(train_step).items():
        torch.testing.assert_close(state.params[name].detach(), value.detach(), rtol=1e-12, atol=0)


def test_a_whole_step_runs_without_the_derivatives_that_nobody_asks_for():
    fn = whole(train_on_distances)
    state, _ = fn.unroll(fn.init(), regression(3))
    agrees(state, train_on_distances)


@pytest.mark.parametrize("where", ("weight", "lr"))
def test_a_whole_step_without_a_derivative_that_is_asked_for_is_refused(where):
    fn = whole(train_on_distances)
    state, hyper = fn.init(), fn.hyperparameters()
    (state.params["weight"] if where == "weight" else hyper[0]["lr"]).requires_grad_()
    with pytest.raises(gimli.CaptureError, match=r"`aten._pdist_backward.default` has no derivative") as caught:
        fn.unroll(state, regression(3), hyper)
    assert "in train_on_distances: loss" in str(caught.value)
    with torch.no_grad():
        last, _ = fn.unroll(state, regression(3), hyper)
    agrees(last, train_on_distances)


def test_one_step_has_its_derivative_in_the_learning_rate():
    """The distances are those of the parameters before it."""
    fn = whole(train_on_distances)
    hyper = fn.hyperparameters()
    hyper[0]["lr"].requires_grad_()
    state, _ = fn.step(fn.init(), regression(3)[0], hyper)
    (slope,) = torch.autograd.grad(state.params["weight"].sum(), hyper[0]["lr"])
    before = fn.init().params["weight"]
    torch.testing.assert_close(slope, (state.params["weight"] - before).sum().detach() / hyper[0]["lr"].detach())


def test_a_first_order_step_needs_no_derivative_of_the_gradient():
    fn = whole(train_on_distances)
    state = fn.init()
    weight = state.params["weight"].requires_grad_()
    last, _ = fn.unroll(state, regression(3), order=1)
    (slope,) = torch.autograd.grad(last.params["weight"].sum(), weight)
    assert torch.equal(slope, torch.ones_like(slope))


def test_what_is_only_returned_needs_no_derivative():
    fn = whole(log_distances)
    state = fn.init()
    weight = state.params["weight"].requires_grad_()
    last, _ = fn.unroll(state, regression(3))
    agrees(last, log_distances)
    assert torch.autograd.grad(last.params["weight"].sum(), weight)[0].abs().sum() > 0


class Zeta(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(torch.special.zeta(p.grad.abs() + 1 + group["lr"], p.grad.abs()))


def test_an_update_without_a_derivative_that_is_asked_for_is_refused():
    model = nn.Linear(3, 2).double()
    fn = gimli.functionalize(model, Zeta(model.parameters(), lr=0.1))
    state, hyper = fn.init(), fn.hyperparameters()
    grads = {name: torch.ones_like(p) for name, p in state.params.items()}
    fn.update(state.params, grads, state.opt_state, hyper)
    hyper[0]["lr"].requires_grad_()
    with pytest.raises(gimli.CaptureError, match=r"`aten.special_zeta.default` has no derivative") as caught:
        fn.update(state.params, grads, state.opt_state, hyper)
    assert "in step: p.sub_(torch.special.zeta(p.grad.abs() + 1 + group" in str(caught.value)


class OnClosure(torch.optim.SGD):
    def step(self, closure):  # pyright: ignore[reportIncompatibleMethodOverride]
        with torch.enable_grad():
            loss = closure()
        super().step()
        return loss


def test_a_step_with_a_closure_is_refused_where_it_is_differentiated():
    model = nn.Linear(3, 2).double()
    fn = gimli.functionalize(model, OnClosure(model.parameters(), lr=0.1), distances)
    state = fn.init()
    fn.step(state, regression(1)[0])
    state.params["weight"].requires_grad_()
    with pytest.raises(gimli.CaptureError, match=r"`aten._pdist_backward.default` has no derivative") as caught:
        fn.step(state, regression(1)[0])
    assert "in distances: return aten._pdist_forward(model(batch[0]), 2.0).mean()" in str(caught.value)
