"""Optimizers that evaluate the loss themselves, or differentiate the gradient: `step(closure)` and `create_graph`."""

import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import pytorch_optimizer
import torch
from live_training import (
    Training,
    check_gradients,
    check_values,
    normal,
    regression,
    run_live,
    run_steps,
    sgd,
    squared_error,
    unrolled_gradients,
)
from torch import nn

import gimli_compile as gimli
from gimli_compile.protocol import Protocol


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def closure_of(optimizer, evaluate, losses, *, create_graph=False):
    def closure():
        optimizer.zero_grad()
        with torch.enable_grad():
            loss = evaluate()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the cycle that torch warns of is wanted
                loss.backward(create_graph=create_graph)
        losses.append(loss.detach())
        return loss

    return closure


def with_closure(optimizer, evaluate):
    """The usual way: everything happens in the closure."""
    losses: list[Any] = []
    optimizer.step(closure_of(optimizer, evaluate, losses))
    return losses[0]


def with_gradient_and_closure(optimizer, evaluate):
    """The way of sharpness-aware minimization: the gradient first, then a step that evaluates once more."""
    losses: list[Any] = []
    closure = closure_of(optimizer, evaluate, losses)
    closure()
    optimizer.step(closure)
    return losses[0]


def with_graph(optimizer, evaluate):
    """The way of second-order optimizers: the gradient keeps its graph."""
    losses: list[Any] = []
    closure_of(optimizer, evaluate, losses, create_graph=True)()
    optimizer.step()
    return losses[0]


class TwoEvaluations(torch.optim.Optimizer):
    """Heun's method: steps along the mean of the gradient here and that after a plain step."""

    def __init__(self, params, lr=0.1, mix=0.5):
        super().__init__(params, {"lr": lr, "mix": mix})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        params = [p for group in self.param_groups for p in group["params"]]
        before = [(p.clone(), p.grad.clone()) for p in params]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad)
        with torch.enable_grad():
            closure()
        for (old, gradient), p in zip(before, params, strict=True):
            group = self.param_groups[0]
            p.copy_(old - group["lr"] * ((1 - group["mix"]) * gradient + group["mix"] * p.grad))
        return loss


class Backtracking(torch.optim.Optimizer):
    """Halves the learning rate until the loss is small enough: a branch on tensor values for each try."""

    def __init__(self, params, lr=4.0, slope=0.3):
        super().__init__(params, {"lr": lr, "slope": slope})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        group = self.param_groups[0]
        before = [(p.clone(), p.grad.clone()) for p in group["params"]]
        square = sum((g * g).sum() for _, g in before)
        rate = group["lr"]
        for _ in range(8):
            for p, (old, gradient) in zip(group["params"], before, strict=True):
                p.copy_(old - rate * gradient)
            with torch.enable_grad():
                tried = closure()
            if tried <= loss - group["slope"] * rate * square:
                break
            rate = rate / 2
        return loss


class HessianDiagonal(torch.optim.Optimizer):
    """Divides the gradient by the exact product of the Hessian with a vector of ones, which needs its graph."""

    def __init__(self, params, lr=0.05, floor=0.5):
        super().__init__(params, {"lr": lr, "floor": floor})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            ones = [torch.ones_like(p) for p in params]
            products = torch.autograd.grad([p.grad for p in params], params, ones, retain_graph=True)
            for p, product in zip(params, products, strict=True):
                p.sub_(group["lr"] * p.grad / (product * product + group["floor"]).sqrt())


class UsesTheValue(torch.optim.Optimizer):
    """A Polyak step: the loss, as a plain number, over the squared norm of the gradient."""

    def __init__(self, params, scale=0.3):
        super().__init__(params, {"scale": scale})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = float(closure())
        for group in self.param_groups:
            square: Any = sum(p.grad.pow(2).sum() for p in group["params"])
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["scale"] * loss / square.item())


class Sharpness(torch.optim.Optimizer):
    """Sharpness-aware minimization over momentum, in the precision of the parameters."""

    def __init__(self, params, lr=0.1, rho=0.1, momentum=0.8):
        super().__init__(params, {"lr": lr, "rho": rho, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        params = [(group, p) for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for _, p in params]).norm()
        for group, p in params:
            self.state[p]["shift"] = p.grad * (group["rho"] / norm)
            p.add_(self.state[p]["shift"])
        with torch.enable_grad():
            closure()
        for group, p in params:
            p.sub_(self.state[p].pop("shift"))
            buffer = self.state[p].get("buffer")
            self.state[p]["buffer"] = p.grad.clone() if buffer is None else buffer.mul_(group["momentum"]).add_(p.grad)
            p.sub_(group["lr"] * self.state[p]["buffer"])


po = pytorch_optimizer
CASES: dict[str, tuple[Any, Any, tuple[str, ...]]] = {
    "two evaluations": (TwoEvaluations, with_closure, ("lr", "mix")),
    "backtracking": (Backtracking, with_closure, ("lr",)),
    "Hessian": (HessianDiagonal, with_graph, ("lr", "floor")),
    "Polyak": (UsesTheValue, with_closure, ("scale",)),
    "LBFGS": (partial(torch.optim.LBFGS, lr=0.3, max_iter=3), with_closure, ("lr",)),
    "LBFGS with a line search": (
        partial(torch.optim.LBFGS, lr=0.5, max_iter=2, line_search_fn="strong_wolfe"), with_closure, ("lr",)
    ),
    "sharpness": (Sharpness, with_gradient_and_closure, ("lr", "rho", "momentum")),
    "SAM": (
        lambda params: po.SAM(params, torch.optim.SGD, lr=0.1, momentum=0.8, rho=0.1),
        with_gradient_and_closure,
        ("lr", "momentum", "rho"),
    ),
    "adaptive SAM over Adam": (
        lambda params: po.SAM(params, torch.optim.Adam, lr=0.02, adaptive=True, eps=1e-2),
        with_gradient_and_closure,
        ("lr", "rho", "betas.0", "betas.1"),
    ),
    "LookSAM": (
        lambda params: po.LookSAM(params, torch.optim.SGD, lr=0.1, k=2, rho=0.1), with_gradient_and_closure, ("lr", "rho")
    ),
    "FriendlySAM": (
        lambda params: po.FriendlySAM(params, torch.optim.SGD, lr=0.1, rho=0.1), with_gradient_and_closure, ("lr", "rho")
    ),
    "BSAM": (
        lambda params: po.BSAM(params, num_data=20, lr=0.05), with_gradient_and_closure, ("lr", "rho", "betas.0")
    ),
    "AliG": (lambda params: po.AliG(params, max_lr=0.1, momentum=0.5), with_closure, ("momentum",)),
    "AdaHessian": (lambda params: po.AdaHessian(params, lr=0.05, eps=1e-2), with_graph, ("lr", "betas.0", "betas.1")),
    "SophiaH": (lambda params: po.SophiaH(params, lr=0.02, update_period=2), with_graph, ("lr", "betas.0")),
}  # fmt: skip


def training_of(name, steps=4):
    make, step, _ = CASES[name]
    return Training(network, make, squared_error, regression(steps), step=step)


@pytest.mark.parametrize("name", CASES)
def test_values_equal_the_live_loop(name):
    check_values(training_of(name))


# They take the norm of all gradients in float32, whatever the parameters are: differences show no more than that.
SINGLE = ("SAM", "adaptive SAM over Adam", "LookSAM", "FriendlySAM", "BSAM", "AliG")


@pytest.mark.parametrize("name", sorted(set(CASES) - set(SINGLE)))
def test_gradients_equal_finite_differences(name):
    check_gradients(training_of(name, steps=3), [f"groups.0.{key}" for key in CASES[name][2]])


@pytest.mark.parametrize(
    ("name", "protocol"),
    [
        ("two evaluations", Protocol(gradient=False, closure=True)),
        ("sharpness", Protocol(closure=True)),
        ("Hessian", Protocol(graph=True)),
    ],
)
def test_how_a_step_is_called_is_found_out(name, protocol):
    assert training_of(name).functionalized()[2]._protocol == protocol


def test_dropout_draws_anew_in_each_evaluation():
    def model():
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.4), nn.Linear(8, 2))

    check_values(replace(training_of("two evaluations"), model=model))
    check_gradients(replace(training_of("two evaluations", steps=3), model=model), ["groups.0.lr"])


def test_batch_norm_sees_each_evaluation():
    def model():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    training = replace(training_of("sharpness"), model=model)
    fn = check_values(training)
    assert int(run_steps(training, fn, fn.init()).buffers[-1]["1.num_batches_tracked"]) == 8


def test_meta_parameters_reach_the_closure():
    def loss(model, batch, meta):
        x, y = batch
        return (meta["weight"] * (model(x) - y) ** 2).mean()

    training = replace(training_of("sharpness", steps=3), loss=loss, meta={"weight": normal(2).exp()})
    check_gradients(training, ["groups.0.rho"])


@pytest.mark.parametrize("checkpoint", ["step", 2])
def test_recomputed_steps_have_the_same_gradients(checkpoint):
    training = training_of("two evaluations")
    fn = training.functionalized()[2]
    _, stored = unrolled_gradients(training, fn)
    _, recomputed = unrolled_gradients(training, fn, checkpoint=checkpoint)
    for name, value in stored.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-12, atol=1e-12)


def test_tasks_step_together():
    training = training_of("sharpness", steps=3)
    fn = training.functionalized()[2]
    many = [tuple(torch.stack([part, 0.5 * part + 0.1]) for part in batch) for batch in regression(3)]
    state, losses = fn.unroll(fn.init(), many, tasks=True)
    for task in range(2):
        own = [tuple(part[task] for part in batch) for batch in many]
        expected = run_live(training, batches=own)
        for name, value in expected.params[-1].items():
            torch.testing.assert_close(state.params[name][task], value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(losses[task], torch.stack(expected.losses), rtol=1e-12, atol=1e-12)


class Extragradient(torch.optim.Optimizer):
    """Steps along the gradient at the point that a plain step would reach."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure()
        (group,) = self.param_groups
        before = [p.clone() for p in group["params"]]
        for p in group["params"]:
            p.sub_(group["lr"] * p.grad)
        with torch.enable_grad():
            closure()
        for p, old in zip(group["params"], before, strict=True):
            p.copy_(old - group["lr"] * p.grad)
        return loss


def test_first_order_takes_every_inner_gradient_as_a_constant():
    training = replace(training_of("sharpness", steps=3), optimizer=Extragradient, step=with_closure)
    fn = training.functionalized()[2]
    state = fn.init()
    for value in state.params.values():
        value.requires_grad_()
    final, _ = fn.unroll(state, training.batches, order=1)
    for name, value in state.params.items():
        ones = torch.ones_like(value)
        (grad,) = torch.autograd.grad(final.params[name], value, ones, retain_graph=True)
        assert torch.equal(grad, ones)  # theta_J = theta_0 - lr * constants
    exact, _ = fn.unroll(state, training.batches)
    (grad,) = torch.autograd.grad(exact.params["0.weight"].sum(), state.params["0.weight"])
    assert not torch.allclose(grad, torch.ones_like(grad))


def test_sam_forward_over_closures_is_one_program():
    training = training_of("SAM")
    fn = training.functionalized()[2]
    run_steps(training, fn, fn.init())
    assert list(fn.programs) == ["step"]
    assert len(fn.programs["step"]) <= 2
    assert "SAM" in fn.programs["step"].code


def test_an_update_alone_is_refused_by_name():
    fn = training_of("SAM").functionalized()[2]
    state = fn.init()
    with pytest.raises(gimli.InputError, match=r"`SAM.step` is no function of gradients alone"):
        fn.update(state.params, {}, state.opt_state)
    with pytest.raises(gimli.InputError, match="no function of gradients alone"):
        fn.update_rule()


class NeverCalls(torch.optim.Optimizer):
    """Insists on a closure that it does not use."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.sub_(self.param_groups[0]["lr"] * p.grad)


def test_a_step_that_does_not_call_its_closure_has_the_gradient():
    check_values(Training(network, NeverCalls, squared_error, regression(2), step=with_gradient_and_closure))


class NeedsMore(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None, *, batch: Any) -> Any:  # type: ignore[override]
        raise AssertionError


def test_a_step_that_needs_other_arguments_is_refused():
    model = network()
    with pytest.raises(gimli.CaptureError, match=r"`NeedsMore.step` raised TypeError"):
        gimli.functionalize(model, NeedsMore(model.parameters()), squared_error)


class KeyedById(torch.optim.Optimizer):
    """Keeps its state, and which parameters it leaves alone, under the ids of parameters."""

    def __init__(self, params, lr=0.1, skip=()):
        super().__init__(params, {"lr": lr})
        self.sums: dict[int, Any] = {}
        self.skipped = {id(p) for p in skip}

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            if id(p) not in self.skipped:
                total = self.sums.setdefault(id(p), {"sum": torch.zeros_like(p)})["sum"].add_(p.grad)
                p.sub_(self.param_groups[0]["lr"] * total)


def test_state_under_the_ids_of_parameters():
    def optimizer(params):
        params = list(params)
        return KeyedById(params, skip=params[1:2])

    training = Training(network, optimizer, squared_error, regression(4))
    fn = check_values(training)
    assert "sums.0.weight.sum" in run_state(training, fn)
    check_gradients(training, ["groups.0.lr"])


def run_state(training, fn):
    return fn.step(fn.init(), training.batches[0])[0].opt_state


def test_a_plain_optimizer_still_has_two_programs():
    training = Training(network, sgd, squared_error, regression(2))
    fn = check_values(training)
    assert list(fn.programs) == ["grad", "update", "step"]
