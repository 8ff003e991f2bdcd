"""The gradient of a fixed point: against closed forms, and against a long exact unroll."""

from typing import Any

import pytest
import torch
from live_training import normal, relative_error
from torch import nn

import gimli_compile as gimli

X, Y = normal(20, 4, seed=1), normal(20, 2, seed=2)
VALIDATION = normal(10, 4, seed=3), normal(10, 2, seed=4)
BATCH = (X, Y)
Implicit = gimli.Implicit


def ridge(model, batch, meta):
    x, y = batch
    return ((model(x) - y) ** 2).sum() / len(x) + meta.exp() * model.weight.pow(2).sum()


def start(loss=ridge, optimizer: Any = torch.optim.SGD, net: Any = None, **options):
    torch.manual_seed(0)
    model = (nn.Linear(4, 2, bias=False) if net is None else net()).double()
    return gimli.functionalize(model, optimizer(model.parameters(), **{"lr": 0.2, **options}), loss)


def outer(fn, state):
    x, y = VALIDATION
    return ((fn(state, x) - y) ** 2).mean()


def closed_form(meta, x, y, decay):
    """The validation loss of the exact ridge regression; torch.optim's weight decay adds decay/2 |w|^2."""
    gram = x.T @ x / len(x) + (meta.exp() + decay / 2) * torch.eye(4, dtype=x.dtype)
    weight = torch.linalg.solve(gram, x.T @ y / len(x)).T
    return ((VALIDATION[0] @ weight.T - VALIDATION[1]) ** 2).mean()


def gradients(fn, steps, meta, batch=BATCH, **options):
    meta = meta.clone().requires_grad_()
    batch = tuple(part.clone().requires_grad_() for part in batch)
    hyper = fn.hyperparameters()
    rate, decay = hyper[0]["lr"].requires_grad_(), hyper[0]["weight_decay"].requires_grad_()
    state, _ = fn.unroll(fn.init(), [batch] * steps, hyper, meta, **options)
    leaves = (meta, *batch, rate, decay)
    return torch.autograd.grad(outer(fn, state), leaves, allow_unused=True, materialize_grads=True)


META = torch.tensor(-1.5, dtype=torch.float64)


@pytest.mark.parametrize("implicit", [Implicit(), Implicit("cg", 20, 1e-12)], ids=["neumann", "cg"])
@pytest.mark.parametrize("decay", [0.01, 0.3])
def test_ridge_regression_against_the_closed_form(implicit, decay):
    """Weight decay is the optimizer's, the penalty the loss's: both move the fixed point; the learning rate does not."""
    fn = start(weight_decay=decay)
    got = gradients(fn, 300, META, backward="implicit", implicit=implicit)
    leaves = [META.clone(), X.clone(), Y.clone(), torch.tensor(decay, dtype=torch.float64)]
    meta, x, y, weight_decay = (leaf.requires_grad_() for leaf in leaves)
    expected = torch.autograd.grad(closed_form(meta, x, y, weight_decay), (meta, x, y, weight_decay))
    for own, wanted in zip((*got[:3], got[4]), expected, strict=True):
        assert relative_error(own, wanted) <= 1e-6
    assert abs(float(got[3])) <= 1e-8


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.5, "nesterov": True, "weight_decay": 0.05}),
        (torch.optim.AdamW, {"lr": 0.2, "weight_decay": 0.0, "eps": 1.0}),
    ],
    ids=["momentum", "nesterov", "adam"],
)
def test_a_long_exact_unroll_has_the_same_gradient(optimizer, options):
    fn = start(optimizer=optimizer, **options)
    expected = gradients(fn, 400, META)
    got = gradients(fn, 400, META, backward="implicit")
    for own, wanted in zip(got[:3], expected[:3], strict=True):
        assert relative_error(own, wanted) <= 1e-6


def _meta_gradient(fn, steps, **options):
    meta = META.clone().requires_grad_()
    state, _ = fn.unroll(fn.init(), [BATCH] * steps, None, meta, **options)
    return torch.autograd.grad(outer(fn, state), meta)[0]


def test_a_network_with_a_proximal_term():
    """iMAML: the penalty is the distance from the meta-parameters where training starts."""

    def proximal(model, batch, meta):
        x, y = batch
        distance = sum((p - meta[name]).pow(2).sum() for name, p in model.named_parameters())
        return ((model(x) - y) ** 2).mean() + distance

    fn = start(proximal, net=lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), lr=0.15)

    def gradient(**options):
        meta = {name: value.requires_grad_() for name, value in fn.init().params.items()}
        begin = fn.init()
        begin.params = dict(meta)
        state, _ = fn.unroll(begin, [BATCH] * 200, None, meta, **options)
        return torch.autograd.grad(outer(fn, state), list(meta.values()))

    expected = gradient()
    for solver in (Implicit(), Implicit("cg", 50)):
        for own, wanted in zip(gradient(backward="implicit", implicit=solver), expected, strict=True):
            assert relative_error(own, wanted) <= 1e-6


def test_many_tasks():
    fn = start(weight_decay=0.05)
    batches = (torch.stack([X, X + 0.3, X.flip(1)]), torch.stack([Y, Y - 0.5, Y]))

    def gradient(**options):
        meta = META.clone().requires_grad_()
        stacked = tuple(part.unsqueeze(1).expand(3, 200, *part.shape[1:]) for part in batches)
        state, _ = fn.unroll(fn.init(), stacked, None, meta, tasks=True, **options)
        x, y = VALIDATION
        out = fn(state, x.expand(3, *x.shape), tasks=True)
        return torch.autograd.grad(((out - y) ** 2).mean(), meta)[0]

    expected = gradient()
    for solver in ("neumann", "cg"):
        got = gradient(backward="implicit", implicit=Implicit(solver))
        assert relative_error(got, expected) <= 1e-6


def test_a_frozen_parameter_is_an_input_of_the_fixed_point():
    net = lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))  # noqa: E731
    torch.manual_seed(0)
    model = net().double()
    model[0].requires_grad_(False)

    def loss(model, batch, meta):
        x, y = batch
        return ((model(x) - y) ** 2).mean() + meta.exp() * model[1].weight.pow(2).sum() + model[1].bias.pow(2).sum()

    fn = gimli.functionalize(model, torch.optim.SGD(model[1].parameters(), lr=0.2), loss)

    def gradient(**options):
        state = fn.init()
        frozen = state.params["0.weight"].requires_grad_()
        state, _ = fn.unroll(state, [BATCH] * 300, None, META, **options)
        return torch.autograd.grad(outer(fn, state), frozen)[0]

    assert relative_error(gradient(backward="implicit"), gradient()) <= 1e-6


def test_a_loop_that_has_not_converged_is_refused():
    fn = start()
    with pytest.raises(gimli.InputError, match=r"not converged[\s\S]*One more step[\s\S]*residual"):
        _meta_gradient(fn, 2, backward="implicit")


def test_a_solver_that_does_not_converge_says_so():
    fn = start(lr=0.01)
    with pytest.raises(gimli.InputError, match=r'"neumann" did not converge in 5 iterations'):
        _meta_gradient(fn, 1000, backward="implicit", implicit=Implicit(iterations=5))


def test_conjugate_gradients_need_a_symmetric_step():
    fn = start(momentum=0.5, lr=0.1)
    with pytest.raises(gimli.InputError, match=r"symmetric[\s\S]*neumann"):
        _meta_gradient(fn, 300, backward="implicit", implicit=Implicit("cg"))


def test_losses_on_the_way_are_not_differentiated():
    fn = start()
    meta = META.clone().requires_grad_()
    _, losses = fn.unroll(fn.init(), [BATCH] * 300, None, meta, backward="implicit")
    with pytest.raises(gimli.InputError, match="not the losses on the way"):
        losses[-1].backward()


def test_options_are_checked():
    fn = start()
    with pytest.raises(gimli.InputError, match="'neumann', 'cg'"):
        Implicit(solver="lu")
    with pytest.raises(gimli.InputError, match="constants"):
        fn.unroll(fn.init(), [BATCH], None, META, backward="implicit", order=1)
    with pytest.raises(gimli.InputError, match="implicit="):
        fn.unroll(fn.init(), [BATCH], None, META, implicit=Implicit())
