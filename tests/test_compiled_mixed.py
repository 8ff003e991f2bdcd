"""Mixed mode in compiled loops: the gradients of reverse mode, from the states between steps alone."""

from __future__ import annotations

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
from memory import LiveBytes, peak_of
from mode_cases import CASES, OPTIMIZERS
from torch import nn
from torch.utils import _pytree as pytree

import gimli_compile as gimli
from gimli_compile.compiled import backends, functions
from tests.test_lean_loops import in_python, runs, way

__all__ = ["runs", "way"]  # fixtures

needs_compiler = pytest.mark.skipif(not backends.has_compiler(), reason="Inductor needs a C++ compiler")
PLAIN = CASES["mlp"]
COMPARED = [(case, "sgd") for case in CASES]
COMPARED += [(case, "adamw") for case in ("mlp", "weighted", "stopped", "convolutional", "tied", "averaging")]
COMPARED += [("mlp", optimizer) for optimizer in ("plain", "rmsprop", "adagrad", "nadam")]


def functionalized(training):
    return training.functionalized()[2]


@pytest.mark.parametrize(("case", "optimizer"), COMPARED)
def test_the_gradients_are_those_of_reverse(case, optimizer):
    training = with_optimizer(CASES[case], OPTIMIZERS[optimizer])
    fn = functionalized(training)
    _, expected = unrolled_gradients(training, fn)
    fast = fn.compile("eager")
    for checkpoint in (None, "step", 2, "sqrt"):
        _, got = unrolled_gradients(training, fast, backward="mixed", checkpoint=checkpoint)
        assert_close_gradients(got, expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_gradients_are_those_of_compiled_reverse(optimizer):
    training = with_optimizer(CASES["weighted"], OPTIMIZERS[optimizer])
    fast = functionalized(training).compile("eager")
    _, expected = unrolled_gradients(training, fast)
    _, got = unrolled_gradients(training, fast, backward="mixed")
    assert_close_gradients(got, expected)


@pytest.mark.parametrize(
    ("case", "optimizer", "hypers"),
    [
        ("weighted", "sgd", ("groups.0.lr", "groups.0.momentum")),
        ("mlp", "adamw", ("groups.0.betas.1",)),
        ("convolutional", "adamw", ("groups.0.lr",)),
    ],
)
def test_gradients_equal_differences_of_the_live_loop(case, optimizer, hypers):
    training = with_optimizer(CASES[case], OPTIMIZERS[optimizer])
    fast = functionalized(training).compile("eager")
    check_gradients(training, hypers, fn=fast, backward="mixed", checkpoint="sqrt")


@needs_compiler
@pytest.mark.parametrize(("case", "optimizer"), [("mlp", "adamw"), ("weighted", "sgd")])
@pytest.mark.parametrize("checkpoint", [None, 2])
def test_loops_in_cpp(case, optimizer, checkpoint, runs, monkeypatch):
    """The driver gives what the loop in Python gives, and both what the uncompiled loop gives."""
    training = with_optimizer(CASES[case], OPTIMIZERS[optimizer])
    fn = functionalized(training)
    _, expected = unrolled_gradients(training, fn)
    fast = fn.compile("inductor")
    options: dict[str, Any] = {"backward": "mixed", "checkpoint": checkpoint}
    unrolled_gradients(training, fast, **options)
    assert runs["forward"] == runs["backward"] == 0
    _, got = unrolled_gradients(training, fast, **options)
    assert runs["forward"] == runs["backward"] == 1
    _, same = in_python(monkeypatch, lambda: unrolled_gradients(training, fast, **options))
    assert all(torch.equal(value, same[name]) for name, value in got.items())
    assert_close_gradients(got, expected)


@needs_compiler
def test_a_loop_of_one_segment_in_cpp(runs):
    """The last step of a segment is not taken again, and here there is no other of its kind."""
    training = replace(PLAIN, batches=PLAIN.batches[:2])
    fast = functionalized(training).compile("inductor")
    for _ in range(2):
        unrolled_gradients(training, fast, backward="mixed", checkpoint=2)
    assert runs["forward"] == runs["backward"] == 1


@pytest.mark.parametrize("truncate", [1, 3])
def test_truncation(truncate):
    training = CASES["weighted"]
    fn = functionalized(training)
    _, expected = unrolled_gradients(training, fn, truncate=truncate)
    _, got = unrolled_gradients(training, fn.compile("eager"), truncate=truncate, backward="mixed")
    assert_close_gradients(got, expected)


@pytest.mark.parametrize("case", ["weighted", "convolutional", "averaging"])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own_states"])
def test_many_tasks(case, own):
    training = CASES[case]
    fn = functionalized(training)
    batches = pytree.tree_map(lambda *parts: torch.stack(parts), *training.batches)
    batches = pytree.tree_map(lambda t: torch.stack([t, t.flip(1), t.flip(0)]), batches)

    def gradients(fn, **options):
        start, hyper = fn.init(), fn.hyperparameters()
        dims: object = True
        if own:
            start = pytree.tree_map(lambda t: torch.stack([t, t + (0.1 if t.dim() > 1 else 0), t]), start)
            dims = (0, 0, None, None)
        meta = pytree.tree_map_only(torch.Tensor, torch.clone, training.meta)
        given = pytree.tree_map(torch.clone, batches)
        leaves = [t for t in pytree.tree_leaves((start, hyper, meta, given)) if isinstance(t, torch.Tensor)]
        leaves = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
        torch.manual_seed(0)
        state, losses = fn.unroll(start, given, hyper, meta, tasks=dims, **options)
        weights = normal(*losses.shape, seed=7)
        total = (weights * losses).sum() + sum((normal(*p.shape) * p).sum() for p in state.params.values())
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    got = gradients(fn.compile("eager"), backward="mixed", checkpoint=2)
    for one, other in zip(got, gradients(fn), strict=True):
        assert relative_error(one, other) <= 1e-10


@needs_compiler
def test_square_layers_that_tasks_share():
    """What goes back through a square matrix is transposed, and all tasks share the batch's form."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1), squared_error)
    batches = normal(3, 4, 5, 2), normal(3, 4, 5, 1)

    def gradients(fn, **options):
        state = fn.init()
        start = replace(state, params={name: p.clone().requires_grad_() for name, p in state.params.items()})
        _, losses = fn.unroll(start, batches, tasks=True, **options)
        return torch.autograd.grad(losses[:, -1].sum(), list(start.params.values()))

    expected = gradients(fn)
    for backend in ("eager", "inductor"):
        fast = fn.compile(backend)
        for _ in range(2):
            for one, other in zip(gradients(fast, backward="mixed"), expected, strict=True):
                assert relative_error(one, other) <= 1e-12


@pytest.mark.parametrize("last", [0, -1])
def test_one_loss_alone(last):
    """Where training starts gets the adjoint of that loss; steps after it have none."""
    fn = functionalized(PLAIN)

    def gradients(fn, **options):
        state = fn.init()
        start = replace(state, params={name: p.clone().requires_grad_() for name, p in state.params.items()})
        _, losses = fn.unroll(start, PLAIN.batches, None, PLAIN.meta, **options)
        return torch.autograd.grad(losses[last], list(start.params.values()))

    for got, expected in zip(gradients(fn.compile("eager"), backward="mixed"), gradients(fn), strict=True):
        assert relative_error(got, expected) <= 1e-12


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_a_warm_state(optimizer):
    """The state of the optimizer carries adjoints into the loop and out of it."""
    training = with_optimizer(CASES["weighted"], OPTIMIZERS[optimizer])
    fn = functionalized(training)
    warm, _ = fn.unroll(fn.init(), training.batches[:2], None, training.meta)
    warm = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, warm)

    def gradients(fn, **options):
        state = pytree.tree_map(torch.clone, warm)
        leaves = [*state.params.values(), *state.buffers.values(), *state.opt_state.values()]
        leaves = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
        torch.manual_seed(0)
        last, losses = fn.unroll(state, training.batches[2:], None, training.meta, **options)
        of_state = [v.sum() for v in last.opt_state.values() if v.requires_grad and v.dim()]
        total = objective(last.params, losses) + sum(of_state)
        return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)

    for got, expected in zip(gradients(fn.compile("eager"), backward="mixed"), gradients(fn), strict=True):
        assert relative_error(got, expected) <= 1e-10


@pytest.mark.parametrize("optimizer", [torch.optim.SparseAdam, torch.optim.SGD])
def test_sparse_gradients(optimizer):
    """The rows that a batch touches go from the loss to the update, in the backward pass as well."""

    def embedding():
        return nn.Embedding(6, 3, sparse=True)

    batches = [(torch.tensor([t, 1, 3]), normal(3, 3, seed=t)) for t in range(4)]
    training = Training(embedding, lambda params: optimizer(params, lr=0.3), squared_error, batches)
    fn = functionalized(training)

    def gradients(fn, **options):
        state, hyper = fn.init(), fn.hyperparameters()
        leaves = [hyper[0]["lr"], *state.params.values()]
        for leaf in leaves:
            leaf.requires_grad_()
        last, losses = fn.unroll(state, batches, hyper, **options)
        return torch.autograd.grad(objective(last.params, losses), leaves)

    for got, expected in zip(gradients(fn.compile("eager"), backward="mixed"), gradients(fn), strict=True):
        assert relative_error(got, expected) <= 1e-10


def test_a_loss_with_learned_parts_needs_no_gradient_of_what_is_fixed():
    training = CASES["weighted"]
    fn = functionalized(training)

    def gradients(fn, **options):
        meta = pytree.tree_map(torch.clone, training.meta)
        meta["weights"].requires_grad_()
        torch.manual_seed(0)
        state, losses = fn.unroll(fn.init(), training.batches, None, meta, **options)
        objective(state.params, losses).backward()
        return meta["weights"].grad, meta["penalty"].grad

    weights, penalty = gradients(fn.compile("eager"), backward="mixed")
    assert penalty is None and relative_error(weights, gradients(fn)[0]) <= 1e-12


def test_a_plan_whose_conditions_fail_is_made_again():
    """Steps that take another branch have other programs, with a joint gradient of their own branch."""

    def loss(model, batch):
        error = squared_error(model, batch)
        return error.sin() if bool(error < 1) else error.square()

    training = replace(PLAIN, loss=loss, options={"branches": "guard"})
    fn = functionalized(training)
    fast = fn.compile("eager")
    for scale in (1.0, 0.1, 3.0, 1.0):
        batches = [tuple(scale * part for part in batch) for batch in PLAIN.batches]
        scaled = replace(training, batches=batches)
        _, got = unrolled_gradients(scaled, fast, backward="mixed")
        assert_close_gradients(got, unrolled_gradients(scaled, fn)[1])


def test_a_tensor_that_the_loss_holds():
    """Constants of the step and of its joint gradient are counted by themselves."""
    first, second = normal(2, seed=5), normal(5, 2, seed=6)

    def loss(model, batch):
        x, y = batch
        return ((model(x) * first - y) * second).pow(2).mean()

    training = replace(PLAIN, loss=loss)
    fn = functionalized(training)
    _, got = unrolled_gradients(training, fn.compile("eager"), backward="mixed")
    assert_close_gradients(got, unrolled_gradients(training, fn)[1])


# ---------------------------------------------------------------------- memory and work


def kept_bytes(fn, steps, **options):
    """Returns the bytes of tensors that a loop has made and keeps for the backward pass, and those of its state."""
    batches = PLAIN.batches[:1] * steps
    results = []

    def run():
        hyper = fn.hyperparameters()
        hyper[0]["lr"].requires_grad_()
        results.append(fn.unroll(fn.init(), batches, hyper, **options))

    run()
    results.clear()
    with LiveBytes() as counter:
        run()
        live = counter.live
    tensors = [*results[0][0].params.values(), *results[0][0].opt_state.values()]
    return live, sum(value.numel() * value.element_size() for value in tensors)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_states_are_kept_and_nothing_else(optimizer):
    fast = functionalized(with_optimizer(PLAIN, OPTIMIZERS[optimizer])).compile("eager")
    (few, state), (many, _) = (kept_bytes(fast, steps, backward="mixed") for steps in (10, 40))
    assert many - few <= 30 * (state + 8)  # and the loss
    less, _ = kept_bytes(fast, 40, backward="mixed", checkpoint=8)
    assert less <= few / 1.5
    assert kept_bytes(fast, 40)[0] > 1.2 * many


def test_the_root_of_the_steps_is_kept():
    def wide():
        return nn.Sequential(nn.Linear(3, 40), nn.Tanh(), nn.Linear(40, 2))

    training = Training(wide, OPTIMIZERS["plain"], squared_error, regression(1))
    fast = functionalized(training).compile("eager")

    def peak(steps, **options):
        def run():
            hyper = fast.hyperparameters()
            rate = hyper[0]["lr"].requires_grad_()
            state, _ = fast.unroll(fast.init(), training.batches * steps, hyper, backward="mixed", **options)
            torch.autograd.grad(objective(state.params, ()), rate)

        run()
        return peak_of(run)

    peaks = [peak(steps, checkpoint="sqrt") for steps in (16, 64, 256)]
    assert peaks[2] - peaks[1] <= 2.3 * (peaks[1] - peaks[0])
    assert peaks[2] < peak(256) / 3


def test_the_last_step_of_a_segment_is_not_taken_again(monkeypatch):
    """Its adjoint needs what it starts from, and nothing of what it computes."""
    calls = []

    def counted(module):
        name = "adjoint" if any("accumulator" in node.name for node in module.graph.nodes) else "step"
        return lambda inputs: calls.append(name) or module(*inputs)

    monkeypatch.setitem(backends.BACKENDS, "eager", counted)
    fast = functionalized(PLAIN).compile("eager", verify=False)
    unrolled_gradients(PLAIN, fast, backward="mixed", checkpoint=2)
    assert calls == ["step"] * 4 + ["step", "adjoint", "adjoint"] * 2


def built(monkeypatch, training, *, of_hyper=True, **options):
    """Returns the halves of the last step that a loop built, differentiated in everything or in where it starts."""
    made = []
    build = functions.CompiledFunction.__init__

    def noticed(self, *args, **kwargs):
        build(self, *args, **kwargs)
        made.append(self.halves)

    monkeypatch.setattr(functions.CompiledFunction, "__init__", noticed)
    fast = functionalized(training).compile("eager", verify=False)
    if of_hyper:
        unrolled_gradients(training, fast, **options)
    else:
        state = fast.init()
        start = replace(state, params={name: p.requires_grad_() for name, p in state.params.items()})
        fast.unroll(start, training.batches, None, training.meta, **options)
    return made[-1]


def count(module, *targets):
    return sum(len(list(module.graph.find_nodes(op="call_function", target=target))) for target in targets)


def test_the_work_is_that_of_one_gradient_and_its_derivative(monkeypatch):
    """A product of two matrices with derivatives has two products in its derivative, of which the input has none."""
    aten = torch.ops.aten
    halves = built(monkeypatch, with_optimizer(PLAIN, OPTIMIZERS["adamw"]), backward="mixed")
    assert halves.saving is halves.plain
    gradient = 2 + 1 + 2  # values, what goes back, weights
    inputs = 1  # the batch is differentiated here, which asks for one product more
    products = count(halves.backward, aten.mm.default, aten.addmm.default)
    assert products <= gradient + inputs + 2 * (gradient + inputs) - 2
    assert not count(halves.backward, aten.zeros.default, aten.alias.default)


def test_inner_gradients_are_kept_where_blocks_are_computed_again(monkeypatch):
    halves = built(monkeypatch, CASES["deep"], backward="mixed")
    inputs = len(list(halves.plain.graph.find_nodes(op="placeholder")))
    fresh = [place for place in halves.residuals if place >= inputs + len(halves.results)]
    momenta = [place for place in halves.residuals if inputs <= place < inputs + len(halves.results)]
    assert len(fresh) + len(momenta) == len(dict(CASES["deep"].model().named_parameters()))


def test_inner_gradients_that_the_update_does_not_need_are_not_kept(monkeypatch):
    """The adjoint of a step along the gradient needs the gradient for the learning rate alone."""
    training = with_optimizer(CASES["deep"], OPTIMIZERS["plain"])
    training = replace(training, batches=training.batches[:1])
    halves = built(monkeypatch, training, of_hyper=False, backward="mixed")
    assert halves.saving is halves.plain


# ---------------------------------------------------------------------- what it cannot do


def refused(training, error, match, fn=None, **options):
    fast = functionalized(training).compile("eager")
    with pytest.raises(error, match=match):
        unrolled_gradients(training, fast, backward="mixed", **options)


def test_whole_steps_are_refused():
    refused(replace(PLAIN, train_step=train_step), gimli.InputError, r"captured whole[\s\S]*reverse")


def test_first_order_is_refused():
    refused(PLAIN, gimli.InputError, "takes the inner gradients as constants", order=1)


def test_hooks_are_refused():
    def prepare(model):
        model[0].weight.register_hook(lambda grad: 2 * grad)

    refused(replace(PLAIN, prepare=prepare), gimli.CaptureError, "has a hook")


def test_a_derivative_that_is_not_symmetric_is_refused():
    def loss(model, batch):
        x, y = batch
        hidden = model[0](x)
        hidden.grad_fn.register_prehook(lambda grads: (2 * grads[0],))
        return ((model[2](hidden.tanh()) - y) ** 2).mean()

    refused(replace(PLAIN, loss=loss), gimli.CaptureError, "not symmetric")


def test_conditions_of_the_joint_gradient_alone_are_refused():
    """A loss that asks what is differentiated: the step never saw the condition."""

    def loss(model, batch, meta):
        x, y = batch
        error = (model(x) - y) ** 2 * meta
        return error.sum() if meta.requires_grad and bool((x > 0).sum() > 3) else error.mean()

    training = replace(PLAIN, loss=loss, meta=normal(), options={"branches": "guard"})
    refused(training, gimli.CaptureError, "conditions of its own")


def test_a_second_differentiation_is_refused():
    fast = functionalized(PLAIN).compile("eager")
    hyper = fast.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    state, losses = fast.unroll(fast.init(), PLAIN.batches, hyper, backward="mixed")
    (grad,) = torch.autograd.grad(objective(state.params, losses), rate, create_graph=True)
    with pytest.raises(gimli.InputError, match="differentiated twice"):
        grad.backward()


def test_a_closed_over_tensor_to_differentiate_is_refused():
    coefficient = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)

    def loss(model, batch):
        x, y = batch
        return ((model(x) * coefficient - y) ** 2).mean()

    refused(replace(PLAIN, loss=loss), gimli.InputError, r"shape \(2,\)[\s\S]*as `meta`")
