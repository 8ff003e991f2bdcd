"""Copies that go past the dispatcher, and constants that are made in place: `copy.deepcopy`, `out=`."""

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from live_training import (
    Training,
    assert_close_gradients,
    check_gradients,
    check_values,
    continue_live,
    regression,
    run_live,
    squared_error,
    train_step,
    unrolled_gradients,
)
from torch import nn

import gimli_compile as gimli


class Averaging(torch.optim.Optimizer):
    """Keeps copies of the first gradient and of the parameter."""

    def __init__(self, params, lr=0.1, decay=0.9):
        super().__init__(params, {"lr": lr, "decay": decay})

    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["average"] = copy.deepcopy(p.grad.data)
                    state["start"] = copy.deepcopy([p.data, p.data])[1]
                state["average"].mul_(group["decay"]).add_(p.grad.data)
                p.data.add_(state["average"] + p.data * p.data - state["start"], alpha=-group["lr"])


class Preconditioning(torch.optim.Optimizer):
    """Makes its constants in tensors that it has, as large as these are and larger."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                n, grad = p.shape[0], p.grad.reshape(p.shape[0], -1)
                ramp = torch.arange(1, n + 1, out=grad.new(n)).sqrt()
                mixed = torch.eye(n, out=grad.new(n, n)) + torch.full((n, 1), 0.3, out=grad.new()) * ramp
                p.data.add_((mixed @ grad).reshape(p.shape), alpha=-group["lr"])


class Reshaping(torch.optim.Optimizer):
    """Makes parameters and copies of parameters within its step."""

    def __init__(self, params, lr=0.05):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                twin = nn.Parameter(p * p)
                p.add_((twin + copy.deepcopy(p)) * p.grad, alpha=-group["lr"])
                self.state[p].setdefault("first", nn.Parameter(p.data.clone()))
                p.add_(self.state[p]["first"], alpha=0.1)


class Applying(nn.Module):
    """Multiplies by what `change` makes of its own weight."""

    def __init__(self, change):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.change = change

    def forward(self, x):
        return self.layer(x) * self.change(self.layer.weight).sum(1)


class Marked(torch.Tensor):
    pass


def rebuilt(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def moved_in(tensor):
    return torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage(), 0, (2, 3), (3, 1))


def sgd(params):
    return torch.optim.SGD(params, lr=0.05)


OPTIMIZERS = {"deepcopy": (Averaging, ("lr", "decay")), "out": (Preconditioning, ("lr",)), "new": (Reshaping, ("lr",))}
FOLLOWED = {
    "deepcopy": copy.deepcopy,
    "parameter": lambda w: nn.Parameter(w.detach().clone()),
    "parameter_of_view": lambda w: nn.Parameter(w.detach()[:, :2]),
    "parameter_of_result": lambda w: nn.Parameter(2 * w),
    "buffer": lambda w: nn.Buffer(2 * w.detach()),
    "variable": lambda w: torch.autograd.Variable(w.data * 2),
    "constructor": lambda w: torch.DoubleTensor(w.detach() * 2),
    "new": lambda w: w.detach().new(w.detach() * 2),
}
REFUSED = {
    "copy": lambda w: copy.copy(w.data),
    "subclass": lambda w: (2 * w).as_subclass(Marked),
    "dlpack": lambda w: torch.from_dlpack(2 * w.detach()),
    "storage": lambda w: moved_in(2 * w.detach()),
    "file": lambda w: rebuilt(2 * w.detach()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name):
    optimizer, hypers = OPTIMIZERS[name]
    training = Training(lambda: nn.Linear(3, 2), optimizer, squared_error, regression(4))
    check_values(training)
    check_gradients(training, [f"groups.0.{hyper}" for hyper in hypers])


@pytest.mark.parametrize("name", FOLLOWED)
def test_copies_of_a_models_own_weights_follow_them_and_have_no_gradient(name):
    """Most were constants, silently, with the values at capture."""
    training = Training(lambda: Applying(FOLLOWED[name]), sgd, squared_error, regression(3))
    check_values(training)
    stopped = replace(training, model=lambda: Applying(lambda w: FOLLOWED[name](w).detach().clone()))
    (_, got), (_, expected) = (unrolled_gradients(one, one.functionalized()[2]) for one in (training, stopped))
    assert_close_gradients(got, expected)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("whole", [False, True], ids=["loss", "step"])
def test_memory_used_past_the_operators_is_refused(name, whole):
    training = Training(lambda: Applying(REFUSED[name]), sgd, squared_error, regression(2))
    if whole:
        training = replace(training, train_step=train_step)
    with pytest.raises(gimli.CaptureError, match=r"memory of a captured tensor[\s\S]*test_copies[\s\S]*x.clone()"):
        _, _, fn = training.functionalized()
        fn.step(fn.init(), training.batches[0])


class Noisy(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(torch.randn(p.shape, out=torch.empty_like(p)), alpha=-group["lr"])


def test_a_draw_into_a_tensor_is_a_draw():
    """It is not taken for a constant that `out=` makes."""
    training = Training(lambda: nn.Linear(3, 2), Noisy, squared_error, regression(3))
    check_values(training)
    _, _, fn = training.functionalized()
    fn.step(fn.init(), training.batches[0])
    assert "noise_update_1" in str(fn.programs["update"])


# ---------------------------------------------------------------------- memory that tensors share


class Flattened(torch.optim.Optimizer):
    """Keeps a momentum buffer, and with it what `part` makes of it and of the parameter."""

    def __init__(self, params, part):
        super().__init__(params, {"lr": 0.05})
        self.part = part

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["flat"] = torch.zeros(2 * p.numel(), dtype=p.dtype)[: p.numel()]
                    state["part"] = self.part(state["flat"], p)
                state["flat"].mul_(0.9).add_(p.grad.reshape(-1))
                state["part"].mul_(0.8)
                p.add_(state["flat"].view_as(p), alpha=-group["lr"])


OVERLAPPING = {
    "view": lambda flat, p: flat.view_as(p),
    "first": lambda flat, p: flat[:1],
    "detached": lambda flat, p: flat.detach(),
    "parameter": lambda flat, p: p.data,
}


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("name", OVERLAPPING)
def test_state_that_shares_memory_is_refused(name, warm):
    """Each was an input of its own, and steps after the first were silently wrong."""
    training = Training(
        lambda: nn.Linear(3, 2), lambda params: Flattened(params, OVERLAPPING[name]), squared_error, regression(4)
    )
    model, optimizer = training.start()
    continue_live(training, model, optimizer, batches=training.batches[:warm])
    with pytest.raises(gimli.CaptureError, match=r"'weight.part' share memory[\s\S]*clone"):
        fn = training.functionalize(model, optimizer)
        fn.step(fn.init(), training.batches[0])


def test_parts_of_one_storage_that_do_not_overlap_are_independent():
    def rest(flat, p):
        return flat.as_strided((p.numel(),), (1,), p.numel())

    check_values(
        Training(lambda: nn.Linear(3, 2), lambda params: Flattened(params, rest), squared_error, regression(4))
    )


class Tied(nn.Module):
    """Multiplies by a view of its own weight, or of a buffer that it changes."""

    view: Any
    scale: Any

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layer = nn.Linear(3, 2).double()
        weight = self.layer.weight.data
        if kind == "parameter":
            self.view = nn.Parameter(weight)
        elif kind == "attribute":
            self.view = weight
        else:
            self.register_buffer("scale", torch.ones(6, dtype=torch.float64))
            self.register_buffer("view", weight if kind == "buffer" else self.scale[:])

    def forward(self, x):
        if self.kind == "buffers":
            self.scale.mul_(1.1)
        return self.layer(x) * self.view.view(2, 3).sum(1)


@pytest.mark.parametrize("kind", ["parameter", "attribute", "buffer", "buffers"])
def test_a_model_with_two_tensors_in_one_memory_is_refused(kind):
    """Live training changes both; each was a value of its own, silently."""
    training = Training(lambda: Tied(kind), sgd, squared_error, regression(2))
    text = "a reference that was kept" if kind == "attribute" else "share memory"
    with pytest.raises(gimli.CaptureError, match=text):
        _, _, fn = training.functionalized()
        fn.step(fn.init(), training.batches[0])


# ---------------------------------------------------------------------- functions that torch.compile compiled


@torch.compile(fullgraph=True, backend="aot_eager")
def whole(p, grad, lr):
    return p - lr * grad / (1 + grad.norm())


class Compiled(torch.optim.Optimizer):
    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(whole(p, p.grad, group["lr"]))


def test_a_compiled_function_that_wants_a_whole_graph():
    """Under a tracer torch compiles nothing, and with `fullgraph=True` raises."""
    with torch.compiler.set_stance("force_eager"):  # the live code without the compiler's roundings
        training = Training(lambda: nn.Linear(3, 2), Compiled, squared_error, regression(3))
        check_values(training)
        check_gradients(training, ["groups.0.lr"])
    fn = training.functionalized()[2]
    state, _ = fn.unroll(fn.init(), training.batches)
    expected = run_live(training).params[-1]
    for name, value in state.params.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-13)
