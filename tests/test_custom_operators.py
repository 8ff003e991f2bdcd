"""Operators of `torch.library`: one call each, with the derivative that they were given; what they lack is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live_training import (
    Training,
    adamw,
    assert_equal_tensors,
    check_against_hand,
    check_gradients,
    check_values,
    hyper_error,
    normal,
    objective,
    regression,
    run_live,
    sgd,
    squared_error,
)
from torch import nn
from torch.autograd import forward_ad

import gimli_compile as gimli

HYPERS = ("groups.0.lr", "groups.0.weight_decay")


@torch.library.custom_op("gimli_tests::wave", mutates_args=())
def wave(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
    return x.sin() * scale


def save_wave(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.scale = inputs[1]


wave.register_fake(lambda x, scale=2.0: torch.empty_like(x))
wave.register_autograd(lambda ctx, g: (g * ctx.saved_tensors[0].cos() * ctx.scale, None), setup_context=save_wave)


@torch.library.custom_op("gimli_tests::named_wave", mutates_args=())
def named_wave(x: torch.Tensor, *, scale: float = 2.0) -> torch.Tensor:
    return x.sin() * scale


def save_named_wave(ctx, inputs, keyword_only_inputs, output):
    ctx.save_for_backward(inputs[0])
    ctx.scale = keyword_only_inputs["scale"]


named_wave.register_fake(lambda x, *, scale=2.0: torch.empty_like(x))
named_wave.register_autograd(lambda ctx, g: g * ctx.saved_tensors[0].cos() * ctx.scale, setup_context=save_named_wave)


@torch.library.custom_op("gimli_tests::product_and_sum", mutates_args=())
def product_and_sum(xs: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return xs[0] * xs[1], xs[0] + xs[1]


product_and_sum.register_fake(lambda xs: (torch.empty_like(xs[0]), torch.empty_like(xs[0])))
product_and_sum.register_autograd(
    lambda ctx, g, h: ([g * ctx.saved_tensors[1] + h, g * ctx.saved_tensors[0] + h],),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[0]),
)


@torch.library.custom_op("gimli_tests::formless", mutates_args=())
def formless(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


formless.register_autograd(
    lambda ctx, g: g * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


@torch.library.custom_op("gimli_tests::underived", mutates_args=())
def underived(x: torch.Tensor) -> torch.Tensor:
    return x.cos()


@torch.library.custom_op("gimli_tests::positive", mutates_args=())
def positive(x: torch.Tensor) -> torch.Tensor:
    return x[x > 0].clone()


@torch.library.custom_op("gimli_tests::descend", mutates_args=("param",))
def descend(param: torch.Tensor, grad: torch.Tensor) -> None:
    param.sub_(grad, alpha=0.1)


composite = torch.library.Library("gimli_tests_composite", "DEF")
composite.define("wave(Tensor x) -> Tensor")
composite.impl("wave", lambda x: x.sin() * 2, "CompositeImplicitAutograd")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)


class Waving(Layer):
    def forward(self, x):
        return wave(self.layer(x)) + wave(self.layer(x).square(), 0.3)  # the waves


class ByPacket(Layer):
    def forward(self, x):
        return torch.ops.gimli_tests.wave(self.layer(x))


class Named(Layer):
    def forward(self, x):
        return named_wave(self.layer(x), scale=0.7) * named_wave(self.layer(x))


class Several(Layer):
    def forward(self, x):
        out = self.layer(x)
        product, total = product_and_sum([out, out.cos()])
        return product * total.sin() + total


class Formless(Layer):
    def forward(self, x):
        return formless(self.layer(x))  # without a form


class OfData(Layer):
    def forward(self, x):
        return self.layer(x) * underived(x.sum(1, keepdim=True))


class Composite(Layer):
    def forward(self, x):
        return torch.ops.gimli_tests_composite.wave(self.layer(x))


TRAININGS = {
    module.__name__: Training(module, optimizer, squared_error, regression(4))
    for module, optimizer in (
        *((Waving, adamw), (ByPacket, sgd), (Named, adamw), (Several, sgd)),
        *((Formless, sgd), (OfData, adamw), (Composite, sgd)),
    )
}
WITH_FORMS = sorted(TRAININGS.keys() - {"Formless", "OfData"})


@pytest.mark.parametrize("name", TRAININGS)
def test_values_equal_the_live_loop(name):
    """Operators with a derivative of their own ended in a TypeError."""
    check_values(TRAININGS[name])


@pytest.mark.parametrize("name", sorted(TRAININGS.keys() - {"OfData"}))
def test_gradients_equal_differences_of_the_live_loop(name):
    check_gradients(TRAININGS[name], HYPERS)


def test_no_gradient_has_to_go_through_an_operator_of_the_data():
    _, _, fn = TRAININGS["OfData"].functionalized()
    hyper = fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    state, losses = fn.unroll(fn.init(), TRAININGS["OfData"].batches, hyper)
    objective(state.params, losses).backward()
    assert hyper_error(TRAININGS["OfData"], "groups.0.lr", {"hyper.groups.0.lr": rate.grad}) < 1e-6


@pytest.mark.parametrize("name", ["Waving", "Several"])
@pytest.mark.parametrize("checkpoint", ["step", 2])
def test_steps_that_are_computed_again(name, checkpoint):
    check_gradients(TRAININGS[name], HYPERS, checkpoint=checkpoint)


@pytest.mark.parametrize("name", WITH_FORMS)
def test_compiled(name):
    _, _, fn = TRAININGS[name].functionalized()
    fast, hyper = fn.compile("eager"), fn.hyperparameters()
    hyper[0]["lr"].requires_grad_()
    found = []
    for one in (fn, fast, fast):
        _, losses = one.unroll(one.init(), TRAININGS[name].batches, hyper)
        found.append((losses, *torch.autograd.grad(losses.square().sum(), [hyper[0]["lr"]])))
    for losses, gradient in found[1:]:
        assert torch.allclose(losses, found[0][0], rtol=1e-12, atol=0)
        assert torch.allclose(gradient, found[0][1], rtol=1e-10, atol=0)


def test_compiled_by_inductor():
    training = TRAININGS["Waving"]
    _, _, fn = training.functionalized()
    state, _ = fn.compile("inductor").unroll(fn.init(), training.batches)
    assert_equal_tensors(state.params, run_live(training).params[-1])


def test_tasks_equal_a_loop():
    _, _, fn = TRAININGS["Waving"].functionalized()
    x, y = normal(2, 3, 5, 3), normal(2, 3, 5, 2, seed=5)
    _, losses = fn.unroll(fn.init(), (x, y), tasks=True)
    for task in range(2):
        assert torch.allclose(losses[task], fn.unroll(fn.init(), (x[task], y[task]))[1], rtol=1e-12, atol=0)


def test_the_gradient_of_where_training_starts():
    """Of plain SGD, against the loop by hand; `wave` is called there as everywhere."""
    training = Training(Waving, lambda params: torch.optim.SGD(params, lr=0.05), squared_error, regression(3))
    check_against_hand(training)


# ---------------------------------------------------------------------- what they lack


def differentiate(fn, training, backward):
    hyper = fn.hyperparameters()
    hyper[0]["lr"].requires_grad_()
    _, losses = fn.unroll(fn.init(), training.batches, hyper, backward=backward)
    torch.autograd.grad(losses.sum(), [hyper[0]["lr"]])


@pytest.mark.parametrize("backward", ["forward", "mixed"])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_forward_mode_is_refused(backward, backend):
    """torch drops tangents at custom operators: the gradients were zero, or of parts, without a word."""
    training = TRAININGS["Waving"]
    _, _, fn = training.functionalized()
    with pytest.raises(gimli.CaptureError, match=r"gimli_tests_wave[\s\S]*# the waves"):
        differentiate(fn.compile(backend) if backend else fn, training, backward)


def tangent_of(function, x):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: torch.func.jvp(lambda y: torch.func.vmap(f)(torch.stack((y, y))).sum(), (x,), (x,)),
        tangent_of,
    ],
)
def test_tangents_through_programs_are_refused(differentiate):
    training = TRAININGS["Waving"]
    _, _, fn = training.functionalized()
    state, batch = fn.init(), training.batches[0]

    def loss(weight):
        return fn.loss(
            gimli.TrainState({**state.params, "layer.weight": weight}, state.buffers, state.opt_state), batch
        )

    weight = state.params["layer.weight"]
    fn.loss(state, batch)
    with pytest.raises(gimli.CaptureError, match=r"gimli_tests_wave` has no forward-mode derivative"):
        differentiate(loss, weight)


def test_without_a_form_compilation_says_so():
    training = TRAININGS["Formless"]
    _, _, fn = training.functionalized()
    with pytest.raises(gimli.CompileError, match=r"gimli_tests_formless[\s\S]*# without a form[\s\S]*register_fake"):
        fn.compile("eager").unroll(fn.init(), training.batches)


def test_least_squares_cannot_be_compiled():
    """The rank decides on the shape of the residuals; torch's own error names no line."""

    def loss_fn(model, batch):
        hidden = model(batch[0])
        return (hidden @ torch.linalg.lstsq(hidden, batch[1]).solution - batch[1]).square().mean()  # least squares

    training = Training(lambda: nn.Linear(3, 2), sgd, loss_fn, regression(2))
    check_values(training)
    _, _, fn = training.functionalized()
    with pytest.raises(gimli.CompileError, match=r"linalg_lstsq[\s\S]*# least squares[\s\S]*pinv"):
        fn.compile("eager").unroll(fn.init(), training.batches)


def test_results_whose_shapes_follow_from_values():
    """A program has the shapes of its capture in it, and the mean of three as the mean of two would be wrong."""

    def loss_fn(model, batch):
        return model(batch).square().mean() * positive(batch).mean()  # the positive ones

    model = nn.Linear(2, 1).double()
    fn = gimli.functionalize(model, sgd(model.parameters()), loss_fn)
    two, one = torch.tensor([[1.0, -1.0], [2.0, -3.0]]).double(), torch.tensor([[1.0, -1.0], [-2.0, -3.0]]).double()
    assert torch.allclose(fn.loss(fn.init(), two), loss_fn(model, two), rtol=1e-12, atol=0)
    with pytest.raises(gimli.CaptureError, match=r"gimli_tests_positive` gave results of other[\s\S]*# the positive"):
        fn.loss(fn.init(), one)


def test_an_operator_without_a_derivative_is_refused_as_in_live_code():
    model = nn.Linear(3, 2).double()
    fn = gimli.functionalize(model, sgd(model.parameters()), lambda model, batch: underived(model(batch)).sum())
    with pytest.raises(RuntimeError, match="no autograd formula"):
        fn.step(fn.init(), normal(5, 3))


def test_an_optimizer_whose_operator_writes_is_refused():
    class Descent(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> Any:
            with torch.no_grad():
                for param in self.param_groups[0]["params"]:
                    descend(param, param.grad)  # the write

    model = nn.Linear(3, 2).double()
    fn = gimli.functionalize(model, Descent(model.parameters(), {}), squared_error)
    with pytest.raises(gimli.CaptureError, match=r"gimli_tests.descend` writes to its arguments[\s\S]*# the write"):
        fn.step(fn.init(), regression(1)[0])
