"""Forward over reverse: the same gradients as by reverse, little memory, and a word where it is not possible."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from live_training import (
    Training,
    assert_close_gradients,
    check_gradients,
    normal,
    objective,
    regression,
    relative_error,
    squared_error,
    train_step,
    unrolled_gradients,
    with_optimizer,
)
from memory import peak_of
from mode_cases import CASES, EVERY, OPTIMIZERS, mlp, weighted
from torch import nn
from torch.utils import _pytree as pytree

import gimli_compile as gimli

PLAIN = CASES["mlp"]


@pytest.mark.parametrize(("case", "optimizer"), EVERY)
def test_the_gradients_are_those_of_reverse(case, optimizer):
    training = with_optimizer(CASES[case], OPTIMIZERS[optimizer])
    _, _, fn = training.functionalized()
    _, expected = unrolled_gradients(training, fn)
    for checkpoint in (None, 2):
        _, got = unrolled_gradients(training, fn, backward="mixed", checkpoint=checkpoint)
        assert_close_gradients(got, expected)


@pytest.mark.parametrize(
    ("case", "optimizer", "hypers"),
    [
        ("weighted", "sgd", ("groups.0.lr", "groups.0.momentum")),
        ("deep", "adamw", ("groups.0.betas.1",)),
        ("convolutional", "adamw", ("groups.0.lr",)),
    ],
)
def test_gradients_equal_differences_of_the_live_loop(case, optimizer, hypers):
    check_gradients(with_optimizer(CASES[case], OPTIMIZERS[optimizer]), hypers, backward="mixed", checkpoint="sqrt")


def test_square_layers_that_tasks_share():
    """What goes back through a square matrix is transposed, and was copied into a parameter that all tasks share."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), squared_error)
    batches = normal(3, 4, 5, 2), normal(3, 4, 5, 1)

    def gradients(backward):
        state = fn.init()
        start = replace(state, params={name: p.clone().requires_grad_() for name, p in state.params.items()})
        _, losses = fn.unroll(start, batches, tasks=True, backward=backward)
        return torch.autograd.grad(losses[:, -1].sum(), list(start.params.values()))

    for got, expected in zip(gradients("mixed"), gradients("reverse"), strict=True):
        assert relative_error(got, expected) <= 1e-12


@pytest.mark.parametrize("last", [0, -1])
def test_one_loss_alone(last):
    """The step of that loss has an adjoint of its loss and none of what it ends with."""
    _, _, fn = PLAIN.functionalized()

    def gradients(backward):
        state = fn.init()
        start = replace(state, params={name: p.clone().requires_grad_() for name, p in state.params.items()})
        _, losses = fn.unroll(start, PLAIN.batches, None, PLAIN.meta, backward=backward)
        return torch.autograd.grad(losses[last], list(start.params.values()))

    for got, expected in zip(gradients("mixed"), gradients("reverse"), strict=True):
        assert relative_error(got, expected) <= 1e-12


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_a_warm_state(optimizer):
    """The state of the optimizer carries adjoints into the loop and out of it."""
    training = with_optimizer(CASES["weighted"], OPTIMIZERS[optimizer])
    _, _, fn = training.functionalized()
    warm, _ = fn.unroll(fn.init(), training.batches[:2], None, training.meta)
    warm = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, warm)

    def gradients(**options):
        state = pytree.tree_map(torch.clone, warm)
        leaves = [*state.params.values(), *state.buffers.values(), *state.opt_state.values()]
        leaves = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
        torch.manual_seed(0)
        last, losses = fn.unroll(state, training.batches[2:], None, training.meta, **options)
        total = objective(last.params, losses) + sum(
            v.sum() for v in last.opt_state.values() if v.requires_grad and v.dim()
        )
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    for got, expected in zip(gradients(backward="mixed"), gradients(), strict=True):
        assert relative_error(got, expected) <= 1e-10


@pytest.mark.parametrize("truncate", [1, 3])
def test_truncation(truncate):
    training = CASES["weighted"]
    _, _, fn = training.functionalized()
    _, expected = unrolled_gradients(training, fn, truncate=truncate)
    _, got = unrolled_gradients(training, fn, truncate=truncate, backward="mixed")
    assert_close_gradients(got, expected)


@pytest.mark.parametrize("case", ["weighted", "convolutional", "deep"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own_states"])
def test_many_tasks(case, own):
    training = CASES[case]
    _, _, fn = training.functionalized()
    batches = pytree.tree_map(lambda *parts: torch.stack(parts), *training.batches)
    batches = pytree.tree_map(lambda t: torch.stack([t, t.flip(1), t.flip(0)]), batches)

    def gradients(**options):
        start, hyper = fn.init(), fn.hyperparameters()
        dims: object = True
        if own:
            start = pytree.tree_map(lambda t: torch.stack([t, t + (0.1 if t.dim() > 1 else 0), t]), start)
            dims = (0, 0, None, None)
        meta = pytree.tree_map_only(torch.Tensor, torch.clone, training.meta)
        given = pytree.tree_map(lambda t: t.clone(), batches)
        inputs = (start, hyper, meta, given)
        leaves = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
        leaves = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
        torch.manual_seed(0)
        state, losses = fn.unroll(start, given, hyper, meta, tasks=dims, **options)
        weights = normal(*losses.shape, seed=7)
        total = (weights * losses).sum() + sum((normal(*p.shape) * p).sum() for p in state.params.values())
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    for got, expected in zip(gradients(backward="mixed", checkpoint=2), gradients(), strict=True):
        assert relative_error(got, expected) <= 1e-10


def test_sparse_gradients():
    def train(params):
        return torch.optim.SGD(params, lr=0.3)

    embedding = lambda: nn.Sequential(nn.Embedding(6, 3, sparse=True), nn.Linear(3, 2))  # noqa: E731
    batches = [(torch.tensor([t, 1, 3]), normal(3, 2, seed=t)) for t in range(4)]
    training = Training(embedding, train, squared_error, batches)
    _, _, fn = training.functionalized()

    def gradients(**options):
        state, hyper = fn.init(), fn.hyperparameters()
        leaves = [hyper[0]["lr"], *state.params.values()]
        for leaf in leaves:
            leaf.requires_grad_()
        last, losses = fn.unroll(state, batches, hyper, **options)
        return torch.autograd.grad(objective(last.params, losses), leaves)

    for got, expected in zip(gradients(backward="mixed"), gradients(), strict=True):
        assert relative_error(got, expected) <= 1e-10


def test_the_values_are_those_of_reverse():
    training = CASES["weighted"]
    _, _, fn = training.functionalized()
    results = []
    for backward in ("reverse", "mixed"):
        torch.manual_seed(0)
        results.append(fn.unroll(fn.init(), training.batches, None, training.meta, backward=backward))
    for left, right in zip(*map(pytree.tree_leaves, results), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("backward", ["mixed", "forward"])
def test_one_tensor_in_several_places(backward):
    """A tensor that is both meta-parameter and learning rate gets the gradient of both uses."""
    training = Training(mlp, OPTIMIZERS["sgd"], lambda m, b, w: w * squared_error(m, b), regression(3), normal())
    _, _, fn = training.functionalized()

    def gradient(**options):
        shared = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = hyper[0]["momentum"] = shared
        state, losses = fn.unroll(fn.init(), training.batches, hyper, shared, **options)
        return torch.autograd.grad(objective(state.params, losses), shared)[0]

    assert relative_error(gradient(backward=backward), gradient()) <= 1e-12


def test_backward_twice_over_a_kept_graph():
    _, _, fn = PLAIN.functionalized()
    hyper = fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    state, losses = fn.unroll(fn.init(), PLAIN.batches, hyper, backward="mixed")
    total = objective(state.params, losses)
    first = torch.autograd.grad(total, rate, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(total, rate)[0])


# ---------------------------------------------------------------------- memory


def transformer(blocks, width=16):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layers = [
                nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True) for _ in range(blocks)
            ]
            self.layers, self.out = nn.Sequential(*layers), nn.Linear(width, 2)

        def forward(self, x):
            return self.out(self.layers(x).mean(1))

    return Net


def loop_peak(training, fn, steps, **options):
    """Returns the most live bytes of one meta-gradient, and the bytes of one set of parameters."""
    batches = training.batches[:1] * steps
    hyper = fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()

    def run():
        state, _ = fn.unroll(fn.init(), batches, hyper, **options)
        torch.autograd.grad(objective(state.params, ()), rate)

    run()  # capture
    return peak_of(run)


def attention_training(blocks, length=32):
    batch = (normal(4, length, 16), normal(4, 2))
    return Training(transformer(blocks), OPTIMIZERS["plain"], squared_error, [batch])


def size_of(fn):
    return sum(p.numel() * p.element_size() for p in fn.init().params.values())


def test_memory_grows_with_the_states_between_steps_only():
    training = attention_training(2)
    _, _, fn = training.functionalized()
    few, many = (loop_peak(training, fn, steps, backward="mixed") for steps in (10, 40))
    kept = 2 * size_of(fn)  # state and inner gradient
    assert many - few <= 30 * kept * 1.05


def test_the_root_of_the_steps_is_kept():
    training = Training(mlp, OPTIMIZERS["plain"], squared_error, regression(1))
    _, _, fn = training.functionalized()
    peaks = [loop_peak(training, fn, steps, backward="mixed", checkpoint="sqrt") for steps in (16, 64, 256)]
    assert peaks[2] - peaks[1] <= 2.3 * (peaks[1] - peaks[0])
    assert peaks[2] < loop_peak(training, fn, 256, backward="mixed") / 4


def test_a_transformer_needs_a_tenth_of_the_memory_of_reverse():
    training = attention_training(8)
    _, _, fn = training.functionalized()
    assert loop_peak(training, fn, 50, backward="mixed") <= loop_peak(training, fn, 50) / 10


# ---------------------------------------------------------------------- what it cannot do


def test_a_second_differentiation_is_refused():
    _, _, fn = PLAIN.functionalized()
    hyper = fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    state, losses = fn.unroll(fn.init(), PLAIN.batches, hyper, backward="mixed")
    (grad,) = torch.autograd.grad(objective(state.params, losses), rate, create_graph=True)
    assert grad.requires_grad
    with pytest.raises(gimli.InputError, match=r"differentiable once[\s\S]*backward=\"reverse\""):
        grad.backward()


class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        return grad_outputs[0]


def straight(model, batch):
    x, y = batch
    return ((Straight.apply(4 * model(x)) - y) ** 2).mean()


def hooked(model, batch):
    x, y = batch
    out = model(x)
    out.register_hook(lambda grad: grad.clamp(-1, 1))
    return ((out - y) ** 2).mean()


@pytest.mark.parametrize("loss", [straight, hooked])
def test_an_inner_gradient_that_is_none_is_refused(loss):
    training = replace(PLAIN, loss=loss)
    _, _, fn = training.functionalized()
    with pytest.raises(gimli.CaptureError, match=rf"test_mixed_mode.py:\d+ in {loss.__name__}[\s\S]*reverse"):
        unrolled_gradients(training, fn, backward="mixed")


@pytest.mark.parametrize("kind", ["parameter", "accumulation", "module"])
def test_hooks_of_the_model_are_refused(kind):
    def prepare(model):
        if kind == "parameter":
            model[0].weight.register_hook(lambda grad: 2 * grad)
        elif kind == "accumulation":
            model[0].weight.register_post_accumulate_grad_hook(lambda p: None)
        else:
            model[2].register_full_backward_hook(lambda module, incoming, outgoing: None)

    training = replace(PLAIN, prepare=prepare)
    _, _, fn = training.functionalized()
    with pytest.raises(gimli.CaptureError, match="has a hook"):
        unrolled_gradients(training, fn, backward="mixed")


def test_a_derivative_that_is_not_symmetric_is_refused():
    """A hook that nothing but the numbers gives away: on a node of the autograd graph."""

    def loss(model, batch):
        x, y = batch
        hidden = model[0](x)
        hidden.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
        return ((model[2](hidden.tanh()) - y) ** 2).mean()

    training = replace(PLAIN, loss=loss)
    _, _, fn = training.functionalized()
    with pytest.raises(gimli.CaptureError, match="not symmetric"):
        unrolled_gradients(training, fn, backward="mixed")


def test_whole_steps_are_refused():
    _, _, fn = replace(PLAIN, train_step=train_step).functionalized()
    with pytest.raises(gimli.InputError, match=r"captured whole[\s\S]*reverse"):
        fn.unroll(fn.init(), PLAIN.batches, backward="mixed")


def test_first_order_is_refused():
    _, _, fn = PLAIN.functionalized()
    with pytest.raises(gimli.InputError, match="takes the inner gradients as constants"):
        fn.unroll(fn.init(), PLAIN.batches, backward="mixed", order=1)


def test_func_transforms_are_refused():
    _, _, fn = PLAIN.functionalized()

    def final(rate):
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = rate
        return fn.unroll(fn.init(), PLAIN.batches, hyper, backward="mixed")[1].sum()

    with pytest.raises(gimli.InputError, match=r"torch.func transform[\s\S]*tasks=True"):
        torch.func.grad(final)(torch.tensor(0.1, dtype=torch.float64))


def test_a_closed_over_tensor_to_differentiate_is_refused():
    coefficient = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)

    def loss(model, batch):
        x, y = batch
        return ((model(x) * coefficient - y) ** 2).mean()

    _, _, fn = replace(PLAIN, loss=loss).functionalized()
    with pytest.raises(gimli.InputError, match=r"shape \(2,\)[\s\S]*as `meta`"):
        fn.unroll(fn.init(), PLAIN.batches, backward="mixed")


def test_a_loss_with_learned_parts_needs_no_gradient_of_what_is_fixed():
    """Only what requires a gradient gets one."""
    training = CASES["weighted"]
    _, _, fn = training.functionalized()
    meta = pytree.tree_map(torch.clone, training.meta)
    meta["weights"].requires_grad_()
    torch.manual_seed(0)
    state, losses = fn.unroll(fn.init(), training.batches, None, meta, backward="mixed")
    objective(state.params, losses).backward()
    torch.manual_seed(0)
    again = pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), meta)
    state, losses = fn.unroll(fn.init(), training.batches, None, again)
    objective(state.params, losses).backward()
    assert relative_error(meta["weights"].grad, again["weights"].grad) <= 1e-12
    assert meta["penalty"].grad is None
    assert weighted is training.loss


class Spectral(nn.Module):
    """Weights of a spectrum: complex, so that the derivative of a gradient is no symmetric matrix."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, dtype=torch.complex128))

    def forward(self, x):
        return torch.fft.ifft(torch.fft.fft(x) * self.weight).real[:, :2]


@pytest.mark.parametrize("compiled", [False, True])
def test_complex_parameters_are_refused(compiled):
    torch.manual_seed(0)
    model = Spectral()
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), squared_error)
    state = fn.init()
    start = replace(state, params={name: p.clone().requires_grad_() for name, p in state.params.items()})
    with pytest.raises(gimli.CaptureError, match=r"complex numbers: params\[weight\][\s\S]*reverse"):
        fast = fn.compile("eager") if compiled else fn
        _, losses = fast.unroll(start, PLAIN.batches, backward="mixed")
        losses.sum().backward()
