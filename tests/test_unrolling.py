"""The loop: every way of running it gives the same values and gradients, alone and under torch.func transforms."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from live_training import (
    OPTIMIZERS,
    Training,
    Untouched,
    adamw,
    assert_close_gradients,
    assert_equal_histories,
    assert_equal_tensors,
    check_against_hand,
    check_gradients,
    continue_live,
    copied,
    differentiable_inputs,
    gradients_by_hand,
    normal,
    objective,
    plain_sgd,
    random_like,
    regression,
    relative_error,
    run_live,
    sgd,
    sgd_by_hand,
    slope_error,
    squared_error,
    unrolled_gradients,
    with_optimizer,
)
from torch import nn
from torch.utils import _pytree as pytree

import gimli_compile as gimli

HYPERS = {
    "sgd": ("groups.0.lr", "groups.0.momentum", "groups.0.weight_decay"),
    "adamw": ("groups.0.lr", "groups.0.betas.0", "groups.0.betas.1", "groups.0.weight_decay"),
}
CHECKPOINTS = ["step", 1, 2, 3, 100, "sqrt"]


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def normalized():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2))


def weighted(model, batch, meta):
    x, y = batch
    return (F.softmax(meta, 0) * ((model(x) - y) ** 2).mean(1)).sum()


PLAIN = Training(mlp, sgd, squared_error, regression(5))
WEIGHTED = Training(normalized, sgd, weighted, regression(5), normal(5, seed=80))
TRAININGS = {"plain": PLAIN, "weighted": WEIGHTED, "adamw": with_optimizer(WEIGHTED, adamw)}


# ---------------------------------------------------------------------- the loop itself


@pytest.mark.parametrize("name", TRAININGS)
def test_unroll_is_repeated_step(name):
    training = TRAININGS[name]
    _, _, fn = training.functionalized()
    torch.manual_seed(training.seed)
    unrolled, losses = fn.unroll(fn.init(), training.batches, None, training.meta)
    state = fn.init()
    torch.manual_seed(training.seed)
    for t, batch in enumerate(training.batches):
        state, loss = fn.step(state, batch, None, training.meta)
        assert torch.equal(losses[t], loss)
    got, expected = pytree.tree_leaves(unrolled), pytree.tree_leaves(state)
    assert pytree.tree_structure(unrolled) == pytree.tree_structure(state)
    assert all(torch.equal(left, right) for left, right in zip(got, expected, strict=True))


def test_batches_may_be_a_list_an_iterator_or_stacked():
    _, _, fn = PLAIN.functionalized()
    stacked = tuple(torch.stack(parts) for parts in zip(*PLAIN.batches, strict=True))
    expected_state, expected = fn.unroll(fn.init(), PLAIN.batches)
    for batches in (stacked, iter(PLAIN.batches), (batch for batch in PLAIN.batches)):
        state, losses = fn.unroll(fn.init(), batches)
        assert torch.equal(losses, expected)
        assert_equal_tensors(state.params, expected_state.params, tolerance=0.0)


def test_stacked_batches_of_any_structure():
    def loss(model, batch):
        return ((model(batch["x"]) - batch["y"][0]) ** 2).mean()

    _model, _optimizer, fn = replace(PLAIN, loss=loss).functionalized()
    batches = {"x": normal(4, 5, 3), "y": [normal(4, 5, 2, seed=1)]}
    _, got = fn.unroll(fn.init(), batches)
    _, expected = fn.unroll(fn.init(), [{"x": x, "y": [y]} for x, y in zip(batches["x"], batches["y"][0], strict=True)])
    assert torch.equal(got, expected)


def test_gradient_of_stacked_batches():
    _, _, fn = PLAIN.functionalized()
    _, grads = unrolled_gradients(PLAIN, fn)
    stacked = tuple(torch.stack(parts).requires_grad_() for parts in zip(*PLAIN.batches, strict=True))
    state, losses = fn.unroll(fn.init(), stacked)
    got = torch.autograd.grad(objective(state.params, losses), stacked)
    for t in range(len(PLAIN.batches)):
        for place in range(2):
            assert relative_error(got[place][t], grads[f"batches.{2 * t + place}"]) <= 1e-12


def test_losses_are_those_before_each_step():
    _, _, fn = PLAIN.functionalized()
    _, losses = fn.unroll(fn.init(), PLAIN.batches)
    assert losses.shape == (5,)
    assert relative_error(losses, torch.stack(run_live(PLAIN).losses)) <= 1e-12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_long_unroll(optimizer):
    training = with_optimizer(replace(PLAIN, batches=regression(20)), OPTIMIZERS[optimizer])
    _model, _, fn = training.functionalized()
    state, _losses = fn.unroll(fn.init(), training.batches)
    expected = run_live(training)
    assert_equal_tensors(state.params, expected.params[-1])
    check_gradients(training, HYPERS[optimizer], fn=fn)


def test_unroll_continues_where_another_ended():
    training = with_optimizer(WEIGHTED, adamw)
    _, _, fn = training.functionalized()

    def total(parts):
        inputs = differentiable_inputs(training, fn)
        torch.manual_seed(training.seed)
        state, losses = inputs.state, []
        for part in parts:
            state, some = fn.unroll(state, inputs.batches[part], inputs.hyper, inputs.meta)
            losses += some.unbind()
        named = inputs.named()
        grads = torch.autograd.grad(
            objective(state.params, losses), list(named.values()), materialize_grads=True, allow_unused=True
        )
        return dict(zip(named, grads, strict=True))

    assert_close_gradients(total([slice(0, 2), slice(2, 5)]), total([slice(0, 5)]), tolerance=1e-13)


def test_several_unrolls_from_one_state():
    """An outer loss over two tasks: the gradients add up."""
    _, _, fn = PLAIN.functionalized()
    first, second = PLAIN.batches[:3], PLAIN.batches[2:]
    hyper = fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    start = fn.init()

    def outer(batches):
        state, losses = fn.unroll(start, batches, hyper)
        return objective(state.params, losses)

    (both,) = torch.autograd.grad(outer(first) + outer(second), rate)
    alone = [torch.autograd.grad(outer(batches), rate)[0] for batches in (first, second)]
    assert relative_error(both, sum(alone)) <= 1e-13


# ---------------------------------------------------------------------- approximations


@pytest.mark.parametrize("optimizer", [plain_sgd, sgd])
def test_order_1_is_first_order_maml(optimizer):
    training = replace(PLAIN, optimizer=optimizer)
    check_against_hand(training, order=1, hand={"order": 1})


def test_order_1_for_adamw_takes_the_gradients_as_constants():
    training = with_optimizer(PLAIN, adamw)
    _, _, fn = training.functionalized()
    inputs, got = unrolled_gradients(training, fn, order=1)
    state, losses = inputs.state, []
    for batch in inputs.batches:
        params = {name: p.detach().requires_grad_() for name, p in state.params.items()}
        detached = pytree.tree_map(torch.Tensor.detach, batch)
        inner = torch.func.functional_call(training.start()[0], params, (detached[0],))
        grads = torch.autograd.grad(((inner - detached[1]) ** 2).mean(), list(params.values()))
        out = torch.func.functional_call(training.start()[0], state.params, (batch[0],))
        losses.append(((out - batch[1]) ** 2).mean())
        new, opt_state = fn.update(state.params, dict(zip(params, grads, strict=True)), state.opt_state, inputs.hyper)
        state = gimli.TrainState(new, state.buffers, opt_state)
    named = inputs.named()
    expected = torch.autograd.grad(
        objective(state.params, losses), list(named.values()), allow_unused=True, materialize_grads=True
    )
    assert_close_gradients(got, dict(zip(named, expected, strict=True)))


def test_order_1_gives_the_same_values():
    _, _, fn = PLAIN.functionalized()
    exact, losses = fn.unroll(fn.init(), PLAIN.batches)
    first, first_losses = fn.unroll(fn.init(), PLAIN.batches, order=1)
    assert torch.equal(losses, first_losses)
    assert_equal_tensors(first.params, exact.params, tolerance=0.0)


@pytest.mark.parametrize("truncate", [1, 2, 4])
@pytest.mark.parametrize("checkpoint", [None, "step"])
def test_truncation_differentiates_the_last_steps(truncate, checkpoint):
    _, _, fn = PLAIN.functionalized()
    _, got = unrolled_gradients(PLAIN, fn, truncate=truncate, checkpoint=checkpoint)
    expected = gradients_by_hand(PLAIN, fn, truncate=truncate)
    assert_close_gradients({name: got[name] for name in expected}, expected)
    assert not any(grad.any() for name, grad in got.items() if name.startswith("params"))


@pytest.mark.parametrize("truncate", [5, 9])
def test_truncation_longer_than_the_loop_changes_nothing(truncate):
    _, _, fn = PLAIN.functionalized()
    _, expected = unrolled_gradients(PLAIN, fn)
    _, got = unrolled_gradients(PLAIN, fn, truncate=truncate)
    assert_close_gradients(got, expected, tolerance=0.0)


def test_truncation_gives_the_same_values():
    _, _, fn = WEIGHTED.functionalized()
    torch.manual_seed(0)
    exact, losses = fn.unroll(fn.init(), WEIGHTED.batches, None, WEIGHTED.meta)
    torch.manual_seed(0)
    cut, cut_losses = fn.unroll(fn.init(), WEIGHTED.batches, None, WEIGHTED.meta, truncate=2)
    assert torch.equal(losses, cut_losses)
    assert_equal_tensors(cut.params, exact.params, tolerance=0.0)


# ---------------------------------------------------------------------- recomputation


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
@pytest.mark.parametrize("name", TRAININGS)
def test_recomputation_gives_identical_gradients(name, checkpoint):
    training = TRAININGS[name]
    _, _, fn = training.functionalized()
    _, expected = unrolled_gradients(training, fn)
    _, got = unrolled_gradients(training, fn, checkpoint=checkpoint)
    assert_close_gradients(got, expected, tolerance=1e-12)


def second_order(training, fn, **options):
    """Returns the gradient of a projection of the gradient: by name, with respect to every input."""
    inputs, first = unrolled_gradients(training, fn, create_graph=True, **options)
    named = inputs.named()
    total = sum(
        (random_like(grad, 400 + i) * grad).sum() for i, grad in enumerate(first.values()) if grad.requires_grad
    )
    grads = torch.autograd.grad(cast(Any, total), list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, grads, strict=True))


NORMALIZED = {
    "layer_norm": Training(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)), sgd, squared_error, regression(5)
    ),
    "batch_norm": Training(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), sgd, squared_error, regression(5)
    ),
}


@pytest.mark.parametrize("name", [*TRAININGS, *NORMALIZED])
def test_second_derivatives_of_an_unroll(name):
    """The gradient of the gradient, along one direction, against differences of the gradient itself.

    torch's own third derivatives of layer and batch normalization are silently wrong.
    """
    training = (TRAININGS | NORMALIZED)[name]
    training = replace(training, batches=training.batches[:3])
    _, _, fn = training.functionalized()
    got = second_order(training, fn)
    along = {name: random_like(value, 500 + i) for i, (name, value) in enumerate(fn.init().params.items())}

    def function(offset):
        inputs = differentiable_inputs(training, fn)
        moved = {n: (p.detach() + offset * along[n]).requires_grad_() for n, p in inputs.state.params.items()}
        inputs.state.params.update(moved)
        torch.manual_seed(training.seed)
        state, losses = fn.unroll(inputs.state, inputs.batches, inputs.hyper, inputs.meta)
        grads = torch.autograd.grad(
            objective(state.params, losses), list(inputs.named().values()), allow_unused=True, materialize_grads=True
        )
        return float(sum((random_like(grad, 400 + i) * grad).sum() for i, grad in enumerate(grads)))

    slope = sum(float((got[f"params.{n}"] * way).sum()) for n, way in along.items())
    assert slope_error(slope, function) <= 1e-6


@pytest.mark.parametrize("checkpoint", ["step", 2, "sqrt"])
@pytest.mark.parametrize("name", TRAININGS)
def test_recomputation_is_differentiable_twice(name, checkpoint):
    training = TRAININGS[name]
    _, _, fn = training.functionalized()
    assert_close_gradients(
        second_order(training, fn, checkpoint=checkpoint), second_order(training, fn), tolerance=1e-12
    )


def test_recomputation_backward_twice_over_a_kept_graph():
    _, _, fn = PLAIN.functionalized()
    inputs = differentiable_inputs(PLAIN, fn)
    state, losses = fn.unroll(inputs.state, inputs.batches, inputs.hyper, checkpoint="step")
    total = objective(state.params, losses)
    first = torch.autograd.grad(total, inputs.hyper[0]["lr"], retain_graph=True)
    second = torch.autograd.grad(total, inputs.hyper[0]["lr"])
    assert torch.equal(first[0], second[0])


def test_recomputation_accumulates_into_grad():
    _, _, fn = PLAIN.functionalized()
    _, expected = unrolled_gradients(PLAIN, fn)
    inputs = differentiable_inputs(PLAIN, fn)
    state, losses = fn.unroll(inputs.state, inputs.batches, inputs.hyper, checkpoint=2)
    objective(state.params, losses).backward()
    got = {name: leaf.grad for name, leaf in inputs.named().items() if leaf.grad is not None}
    assert_close_gradients(got, {name: expected[name] for name in got}, tolerance=1e-12)
    assert {"hyper.groups.0.lr", "params.0.weight", "batches.0"} <= set(got)


@pytest.mark.parametrize("others", [False, True], ids=["alone", "with_inputs"])
def test_a_closed_over_tensor_to_differentiate_is_refused_under_recomputation(others):
    """A segment is computed again from its arguments: the gradient of anything else would be lost without a word."""
    coefficient = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)

    def loss(model, batch):
        x, y = batch
        return ((model(x) * coefficient - y) ** 2).mean()

    training = replace(PLAIN, loss=loss)
    _, _, fn = training.functionalized()
    hyper = fn.hyperparameters()
    hyper[0]["lr"].requires_grad_(others)
    with pytest.raises(gimli.InputError, match=r"shape \(2,\)[\s\S]*as `meta`"):
        fn.unroll(fn.init(), training.batches, hyper, checkpoint="step")


# ---------------------------------------------------------------------- torch.func


def task_loss(fn, training, batches, held_out, **options):
    """Returns a function of start, hyperparameters and batches: the validation loss after the inner loop."""

    def outer(params, hyper, batches, held_out):
        start = fn.init()
        state, _ = fn.unroll(gimli.TrainState(params, start.buffers, start.opt_state), batches, hyper, **options)
        x, y = held_out
        return ((fn(state, x) - y) ** 2).mean()

    return outer


def tasks(count, steps=3):
    batches = (normal(count, steps, 5, 3, seed=90), normal(count, steps, 5, 2, seed=91))
    return batches, (normal(count, 5, 3, seed=92), normal(count, 5, 2, seed=93))


@pytest.mark.parametrize("warm", [False, True], ids=["captured_inside", "captured_before"])
@pytest.mark.parametrize("checkpoint", [None, "step"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_vmap_of_grad_over_tasks_equals_a_loop(optimizer, checkpoint, warm):
    training = with_optimizer(PLAIN, OPTIMIZERS[optimizer])
    model, live_optimizer, fn = training.functionalized()
    untouched = Untouched(model, live_optimizer)
    batches, held_out = tasks(3)
    start, hyper = fn.init(), fn.hyperparameters()
    outer = task_loss(fn, training, batches, held_out, checkpoint=checkpoint)
    if warm:
        outer(start.params, hyper, *pytree.tree_map(lambda leaf: leaf[0], (batches, held_out)))
    per_task = torch.func.vmap(torch.func.grad(outer, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    got = per_task(start.params, hyper, batches, held_out)
    untouched.check()

    reference = training.functionalized()[2]
    loop_outer = task_loss(reference, training, batches, held_out)
    for index in range(3):
        leaves = reference.init().params, reference.hyperparameters()
        flat, _structure = pytree.tree_flatten(leaves)
        for leaf in flat:
            leaf.requires_grad_()
        value = loop_outer(*leaves, *pytree.tree_map(lambda leaf, index=index: leaf[index], (batches, held_out)))
        expected = torch.autograd.grad(value, flat, allow_unused=True, materialize_grads=True)
        for own, grad in zip(pytree.tree_leaves(got), expected, strict=True):
            assert relative_error(own[index], grad) <= 1e-11


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_func_grad_equals_autograd(optimizer):
    training = with_optimizer(PLAIN, OPTIMIZERS[optimizer])
    batches, held_out = pytree.tree_map(lambda leaf: leaf[0], tasks(1))
    _, _, fn = training.functionalized()
    got = torch.func.grad(task_loss(fn, training, batches, held_out), argnums=(0, 1, 2))(
        fn.init().params, fn.hyperparameters(), batches, held_out
    )
    _, _, again = training.functionalized()
    leaves = (again.init().params, again.hyperparameters(), pytree.tree_map(torch.clone, batches))
    flat, _ = pytree.tree_flatten(leaves)
    params, hyper, batches = pytree.tree_map(torch.Tensor.requires_grad_, leaves)
    value = task_loss(again, training, batches, held_out)(params, hyper, batches, held_out)
    expected = torch.autograd.grad(value, flat, allow_unused=True, materialize_grads=True)
    for own, grad in zip(pytree.tree_leaves(got), expected, strict=True):
        assert relative_error(own, grad) <= 1e-12


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_grad_of_vmap_equals_the_sum_over_tasks(optimizer):
    training = with_optimizer(PLAIN, OPTIMIZERS[optimizer])
    _, _, fn = training.functionalized()
    batches, held_out = tasks(3)
    outer = task_loss(fn, training, batches, held_out)

    def mean(params, hyper):
        return torch.func.vmap(outer, in_dims=(None, None, 0, 0))(params, hyper, batches, held_out).mean()

    got = torch.func.grad(mean, argnums=(0, 1))(fn.init().params, fn.hyperparameters())
    each = torch.func.vmap(torch.func.grad(outer, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    expected = each(fn.init().params, fn.hyperparameters(), batches, held_out)
    for own, grad in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert relative_error(own, grad.mean(0)) <= 1e-11


def test_autograd_through_vmap():
    """An ordinary backward pass from the mean over tasks, as a meta-training script does it."""
    _, _, fn = PLAIN.functionalized()
    batches, held_out = tasks(3)
    outer = task_loss(fn, PLAIN, batches, held_out)
    start, hyper = fn.init(), fn.hyperparameters()
    rate = hyper[0]["lr"].requires_grad_()
    for value in start.params.values():
        value.requires_grad_()
    torch.func.vmap(outer, in_dims=(None, None, 0, 0))(start.params, hyper, batches, held_out).mean().backward()
    expected = torch.zeros_like(rate)
    for index in range(3):
        task = pytree.tree_map(lambda leaf, index=index: leaf[index], (batches, held_out))
        expected += torch.autograd.grad(outer(start.params, hyper, *task), rate)[0] / 3
    assert relative_error(rate.grad, expected) <= 1e-12


def test_vmap_over_hyperparameters():
    _, _, fn = PLAIN.functionalized()
    rates = torch.tensor([0.01, 0.05, 0.2], dtype=torch.float64)

    def final(rate):
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = rate
        return fn.unroll(fn.init(), PLAIN.batches, hyper)[0].params

    got = torch.func.vmap(final)(rates)
    for index, rate in enumerate(rates):
        assert_equal_tensors({n: v[index] for n, v in got.items()}, final(rate), tolerance=1e-12)


def test_vmap_over_states():
    """Each task goes on from its own state."""
    _, _, fn = PLAIN.functionalized()
    batches, _ = tasks(3)
    one = lambda state, batches: fn.unroll(state, batches)  # noqa: E731
    first, _ = torch.func.vmap(one, in_dims=(None, 0))(fn.init(), batches)
    second, losses = torch.func.vmap(one, in_dims=(0, 0))(first, batches)
    for index in range(3):
        own = pytree.tree_map(lambda leaf, index=index: leaf[index], batches)
        state, _ = fn.unroll(fn.init(), own)
        state, expected = fn.unroll(state, own)
        assert relative_error(losses[index], expected) <= 1e-12
        assert_equal_tensors({n: v[index] for n, v in second.params.items()}, state.params)


@pytest.mark.parametrize("checkpoint", [None, 2])
@pytest.mark.parametrize("form", ["stacked", "list", "iterator", "tasks_second", "iterator_of_tasks"])
def test_tasks_with_their_own_states(form, checkpoint):
    """From shared batches, which lead with the step, or from their own; against the live loop."""
    (x, y), _ = tasks(2, steps=5)  # as many steps as rows: no size tells them apart
    shared = "tasks" not in form
    each = [list(zip(x[0 if shared else index], y[0 if shared else index], strict=True)) for index in range(2)]
    batches, dim = {
        "stacked": ((x[0], y[0]), None),
        "list": (each[0], None),
        "iterator": (iter(each[0]), None),
        "tasks_second": ((x.movedim(0, 1), y.movedim(0, 1)), 1),
        "iterator_of_tasks": (zip(x.movedim(0, 1), y.movedim(0, 1), strict=True), 0),
    }[form]
    model, live_optimizer, fn = PLAIN.functionalized()
    start = fn.init()
    starts = [{name: (1 + index) * value for name, value in start.params.items()} for index in range(2)]
    together = replace(start, params={name: torch.stack([own[name] for own in starts]) for name in start.params})
    state, losses = fn.unroll(together, batches, checkpoint=checkpoint, tasks=(0, dim, None, None))
    for index in range(2):
        fn.load_into(model, live_optimizer, replace(start, params=starts[index]))
        for step, batch in enumerate(each[index]):
            live_optimizer.zero_grad()
            loss = squared_error(model, batch)
            assert relative_error(losses[index, step], loss.detach()) <= 1e-12
            loss.backward()
            live_optimizer.step()
        assert_equal_tensors({name: v[index] for name, v in state.params.items()}, dict(model.named_parameters()))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # by torch's own jvp rules
def test_forward_mode_over_an_unroll():
    """A directional derivative in the learning rate by torch.func.jvp."""
    _, _, fn = PLAIN.functionalized()

    def final(rate):
        hyper = fn.hyperparameters()
        hyper[0]["lr"] = rate
        state, losses = fn.unroll(fn.init(), PLAIN.batches, hyper)
        return objective(state.params, losses)

    rate = torch.tensor(0.07, dtype=torch.float64)
    tangent = torch.func.jvp(final, (rate,), (torch.ones_like(rate),))[1]
    assert relative_error(tangent, torch.func.grad(final)(rate)) <= 1e-12


# ---------------------------------------------------------------------- hyperparameters


def test_every_parameter_may_have_hyperparameters_of_its_own():
    model, optimizer = PLAIN.start()
    fn = gimli.functionalize(model, optimizer, squared_error, per_parameter=True)
    names = [name for name, _ in model.named_parameters()]
    hyper = fn.hyperparameters()
    assert len(hyper) == len(names)
    state, _ = fn.unroll(fn.init(), PLAIN.batches, hyper)
    assert_equal_tensors(state.params, run_live(PLAIN).params[-1])

    rates = {name: 0.02 + 0.03 * index for index, name in enumerate(names)}
    for index, name in enumerate(names):
        hyper[index]["lr"] = torch.tensor(rates[name], dtype=torch.float64, requires_grad=True)
    grouped = replace(
        PLAIN,
        optimizer=lambda params: torch.optim.SGD(
            [{"params": [p], "lr": rates[name]} for name, p in zip(names, params, strict=True)],
            lr=1.0, momentum=0.8, weight_decay=0.02,
        ),
    )  # fmt: skip
    state, losses = fn.unroll(fn.init(), PLAIN.batches, hyper)
    assert_equal_tensors(state.params, run_live(grouped).params[-1])
    total = objective(state.params, losses)
    got = torch.autograd.grad(total, [group["lr"] for group in hyper])
    for name, grad in zip(names, got, strict=True):

        def function(offset, name=name):
            live, live_optimizer = grouped.start()
            live_optimizer.param_groups[names.index(name)]["lr"] += offset
            history = continue_live(grouped, live, live_optimizer)
            return float(objective(history.params[-1], history.losses))

        assert slope_error(float(grad), function, 0.05) <= 1e-6


@pytest.mark.parametrize("checkpoint", [None, "step"])
def test_every_element_may_have_a_learning_rate_of_its_own(checkpoint):
    training = replace(PLAIN, optimizer=plain_sgd)
    model, optimizer = training.start()
    fn = gimli.functionalize(model, optimizer, squared_error, per_parameter=True)
    names = [name for name, _ in model.named_parameters()]
    hyper, by_hand = fn.hyperparameters(), {}
    for index, (name, p) in enumerate(model.named_parameters()):
        rate = (0.05 * random_like(p, 600 + index).abs()).requires_grad_()
        hyper[index]["lr"] = rate
        by_hand[name] = rate.detach().clone().requires_grad_()
    state, losses = fn.unroll(fn.init(), training.batches, hyper, checkpoint=checkpoint)
    got = torch.autograd.grad(objective(state.params, losses), [group["lr"] for group in hyper])
    params, hand_losses = sgd_by_hand(training, fn.init().params, training.batches, None, lr=by_hand)
    assert_equal_tensors(state.params, params)
    expected = torch.autograd.grad(objective(params, hand_losses), list(by_hand.values()))
    for name, own, grad in zip(names, got, expected, strict=True):
        assert own.shape == by_hand[name].shape
        assert relative_error(own, grad) <= 1e-11


def test_every_element_may_have_betas_of_its_own():
    """AdamW with tensors for both betas: elements with equal numbers go as if the numbers were shared."""
    training = with_optimizer(PLAIN, adamw)
    model, optimizer = training.start()
    fn = gimli.functionalize(model, optimizer, squared_error, per_parameter=True)
    hyper = fn.hyperparameters()
    for index, (_, p) in enumerate(model.named_parameters()):
        hyper[index]["betas"] = tuple(torch.full_like(p, value).requires_grad_() for value in (0.8, 0.9))
    state, losses = fn.unroll(fn.init(), training.batches, hyper)
    assert_equal_tensors(state.params, run_live(training).params[-1])
    leaves = [beta for group in hyper for beta in group["betas"]]
    got = torch.autograd.grad(objective(state.params, losses), leaves)
    _, expected = unrolled_gradients(training, training.functionalized()[2])
    for place in (0, 1):
        total = sum(grad.sum() for grad in got[place::2])
        assert relative_error(total, expected[f"hyper.groups.0.betas.{place}"]) <= 1e-10


def test_hyperparameters_change_the_outcome_without_touching_the_optimizer():
    _model, optimizer, fn = PLAIN.functionalized()
    hyper = fn.hyperparameters()
    hyper[0]["lr"] = torch.tensor(0.01, dtype=torch.float64)
    hyper[0]["momentum"] = 0.5
    state, _ = fn.unroll(fn.init(), PLAIN.batches, hyper)
    other = replace(PLAIN, optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.5, weight_decay=0.02))
    assert_equal_tensors(state.params, run_live(other).params[-1])
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.07, 0.8)


def test_live_hyperparameters_are_read_at_every_call():
    _model, optimizer, fn = PLAIN.functionalized()
    fn.unroll(fn.init(), PLAIN.batches)
    optimizer.param_groups[0]["lr"] = 0.2
    state, _ = fn.unroll(fn.init(), PLAIN.batches)
    other = replace(PLAIN, optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.8, weight_decay=0.02))
    assert_equal_tensors(state.params, run_live(other).params[-1])


# ---------------------------------------------------------------------- states


def test_a_state_is_a_pytree():
    _, _, fn = WEIGHTED.functionalized()
    state, _ = fn.unroll(fn.init(), WEIGHTED.batches[:2], None, WEIGHTED.meta)
    leaves, structure = pytree.tree_flatten(state)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    again = pytree.tree_map(torch.clone, state)
    assert isinstance(again, gimli.TrainState)
    assert pytree.tree_structure(again) == structure
    assert list(again.opt_state) == list(state.opt_state)
    results = []
    for start in (state, again, pytree.tree_unflatten(leaves, structure)):
        torch.manual_seed(0)
        results.append(pytree.tree_leaves(fn.unroll(start, WEIGHTED.batches, None, WEIGHTED.meta)[0]))
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


def test_hyperparameters_are_a_pytree():
    _, _, fn = with_optimizer(PLAIN, adamw).functionalized()
    hyper = fn.hyperparameters()
    again = pytree.tree_map(torch.clone, hyper)
    assert isinstance(again, gimli.Hyperparameters)
    assert again.by_path().keys() == hyper.by_path().keys()
    state, _ = fn.unroll(fn.init(), PLAIN.batches, again)
    expected, _ = fn.unroll(fn.init(), PLAIN.batches)
    assert_equal_tensors(state.params, expected.params, tolerance=0.0)


def test_states_of_fresh_and_trained_optimizers_differ_in_structure():
    _, _, fn = with_optimizer(PLAIN, adamw).functionalized()
    start = fn.init()
    state, _ = fn.step(start, PLAIN.batches[0])
    later, _ = fn.step(state, PLAIN.batches[1])
    assert pytree.tree_structure(start) != pytree.tree_structure(state)
    assert pytree.tree_structure(state) == pytree.tree_structure(later)


def test_steps_do_not_change_the_state_that_they_are_given():
    _, _, fn = WEIGHTED.functionalized()
    state, _ = fn.step(fn.init(), WEIGHTED.batches[0], None, WEIGHTED.meta)
    before = [leaf.clone() for leaf in pytree.tree_leaves(state)]
    fn.unroll(state, WEIGHTED.batches, None, WEIGHTED.meta, checkpoint="step")
    assert all(torch.equal(leaf, old) for leaf, old in zip(pytree.tree_leaves(state), before, strict=True))


def test_init_and_hyperparameters_are_copies():
    model, optimizer, fn = with_optimizer(WEIGHTED, adamw).functionalized()
    continue_live(with_optimizer(WEIGHTED, adamw), model, optimizer)
    untouched = Untouched(model, optimizer)
    fn = gimli.functionalize(model, optimizer, weighted)
    state, hyper = fn.init(), fn.hyperparameters()
    for leaf in pytree.tree_leaves((state, hyper)):
        leaf.add_(1)
    untouched.check()
    assert float(fn.hyperparameters()[0]["lr"]) == 0.03
    assert_equal_tensors(fn.init().params, dict(model.named_parameters()), tolerance=0.0)


def test_results_do_not_share_memory_with_live_objects_or_inputs():
    model, _optimizer, fn = PLAIN.functionalized()
    state = fn.init()
    after, _ = fn.step(state, PLAIN.batches[0])
    live = [*model.parameters(), *pytree.tree_leaves(state)]
    storages = {tensor.untyped_storage().data_ptr() for tensor in live}
    assert not storages & {leaf.untyped_storage().data_ptr() for leaf in after.params.values()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("make", [mlp, normalized])
def test_live_training_continues_from_what_load_into_wrote(make, optimizer):
    training = Training(make, OPTIMIZERS[optimizer], squared_error, regression(6))
    expected = run_live(training)
    model, live_optimizer, fn = training.functionalized()
    torch.manual_seed(training.seed)
    state, _ = fn.unroll(fn.init(), training.batches[:3])
    random = torch.get_rng_state()
    for target in ("same", "new"):
        if target == "new":
            model, live_optimizer = training.start()
        ids = [id(p) for p in model.parameters()]
        fn.load_into(model, live_optimizer, state)
        assert [id(p) for p in model.parameters()] == ids
        assert_equal_tensors(copied(model.named_parameters()), state.params, tolerance=0.0)
        assert_equal_tensors(copied(model.named_buffers()), state.buffers, tolerance=0.0)
        torch.set_rng_state(random)
        for batch in training.batches[3:]:
            live_optimizer.zero_grad()
            squared_error(model, batch).backward()
            live_optimizer.step()
        assert_equal_tensors(copied(model.named_parameters()), expected.params[-1])
        assert_equal_tensors(copied(model.named_buffers()), expected.buffers[-1])


def test_load_into_writes_copies():
    model, optimizer, fn = with_optimizer(PLAIN, adamw).functionalized()
    state, _ = fn.unroll(fn.init(), PLAIN.batches)
    before = [leaf.clone() for leaf in pytree.tree_leaves(state)]
    fn.load_into(model, optimizer, state)
    continue_live(PLAIN, model, optimizer)
    assert all(torch.equal(leaf, old) for leaf, old in zip(pytree.tree_leaves(state), before, strict=True))


def test_load_into_takes_states_with_a_graph():
    model, optimizer, fn = PLAIN.functionalized()
    inputs = differentiable_inputs(PLAIN, fn)
    state, _ = fn.unroll(inputs.state, inputs.batches, inputs.hyper)
    fn.load_into(model, optimizer, state)
    assert all(p.is_leaf and p.requires_grad for p in model.parameters())
    assert not any(value.requires_grad for slots in optimizer.state.values() for value in slots.values())


def test_captures_once_for_all_steps():
    """No program is made for a step that another step's program serves."""
    _, _, fn = with_optimizer(PLAIN, adamw).functionalized()
    fn.unroll(fn.init(), regression(3))
    count = {name: len(family) for name, family in fn.programs.items()}
    fn.unroll(fn.init(), regression(30))
    assert {name: len(family) for name, family in fn.programs.items()} == count
    assert count["grad"] == 1
    assert count["update"] == 2


def test_meta_training_with_an_ordinary_optimizer():
    """Learning rates, the start and the loss weights learn together; the outer loop equals the one written by hand."""
    training = Training(mlp, plain_sgd, weighted, regression(3), normal(5, seed=81))
    _, _, fn = training.functionalized()
    held_out = regression(4)[3]

    def meta_train(inner):
        params = {name: p.requires_grad_() for name, p in fn.init().params.items()}
        rate = torch.tensor(0.07, dtype=torch.float64, requires_grad=True)
        meta = training.meta.clone().requires_grad_()
        outer = torch.optim.Adam([*params.values(), rate, meta], lr=0.01)
        values = []
        for _ in range(4):
            outer.zero_grad()
            final = inner(params, rate, meta)
            x, y = held_out
            loss = ((torch.func.functional_call(training.start()[0], final, (x,)) - y) ** 2).mean()
            loss.backward()
            outer.step()
            values.append(float(loss.detach()))
        return values

    def by_library(params, rate, meta):
        start, hyper = fn.init(), fn.hyperparameters()
        hyper[0]["lr"] = rate
        state = gimli.TrainState(params, start.buffers, start.opt_state)
        return fn.unroll(state, training.batches, hyper, meta)[0].params

    def by_hand(params, rate, meta):
        return sgd_by_hand(training, params, training.batches, meta, lr=rate)[0]

    got, expected = meta_train(by_library), meta_train(by_hand)
    assert got == pytest.approx(expected, rel=1e-10)


def test_eager_history_is_reproducible():
    """The yardstick itself: two live runs are the same."""
    assert_equal_histories(run_live(WEIGHTED), run_live(WEIGHTED), tolerance=0.0)
