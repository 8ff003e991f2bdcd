"""`buffers="freeze"`: buffers after a step are those before it."""

from dataclasses import replace

import pytest
import torch
from live_training import (
    Training,
    assert_equal_tensors,
    check_gradients,
    check_values,
    copied,
    regression,
    run_live,
    sgd,
    squared_error,
    unrolled_gradients,
)
from torch import nn

import gimli_compile as gimli


def batch_normed():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Tanh(), nn.Linear(4, 2))


def evaluated():
    return batch_normed().eval()


def spectrally_normed():
    return nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def twice(model, optimizer, batch):
    """Buffers change within the step, and are put back at its end."""
    optimizer.zero_grad()
    with torch.no_grad():
        model(batch[0])
    loss = squared_error(model, batch)
    loss.backward()
    optimizer.step()
    return loss


def training_of(model=batch_normed, train_step=None, buffers="freeze"):
    return Training(
        model, sgd, squared_error, regression(4, size=6), train_step=train_step, options={"buffers": buffers}
    )


CASES = {
    "by the loss": training_of(),
    "evaluated": training_of(evaluated),
    "power iterations": training_of(spectrally_normed),
    "a step of its own": training_of(train_step=twice),
    "a step of its own, power iterations": training_of(spectrally_normed, twice),
}


@pytest.mark.parametrize("name", CASES)
def test_values_equal_the_live_loop_with_its_buffers_put_back(name):
    fn = check_values(CASES[name])
    state = fn.init()
    after, _ = fn.unroll(state, CASES[name].batches)
    assert_equal_tensors(after.buffers, state.buffers, 0.0)


@pytest.mark.parametrize("name", [name for name in CASES if "power" not in name])  # they run without gradients
def test_gradients_equal_finite_differences(name):
    check_gradients(replace(CASES[name], batches=CASES[name].batches[:3]), ["groups.0.lr", "groups.0.momentum"])


def test_the_policies_differ_where_buffers_are_read():
    frozen, threaded = (run_live(training_of(spectrally_normed, buffers=policy)) for policy in ("freeze", "thread"))
    assert (frozen.params[-1]["2.weight"] - threaded.params[-1]["2.weight"]).abs().max() > 1e-9
    check_values(training_of(spectrally_normed, buffers="thread"))


@pytest.mark.parametrize("train_step", [None, twice])
def test_tasks_share_the_buffers_that_they_start_from(train_step):
    training = training_of(train_step=train_step)
    model, _, fn = training.functionalized()
    many = [tuple(torch.stack([part, 0.5 * part + 0.1]) for part in batch) for batch in training.batches]
    state, losses = fn.unroll(fn.init(), many, tasks=True)
    start = copied(model.named_buffers())
    for task in range(2):
        expected = run_live(training, batches=[tuple(part[task] for part in batch) for batch in many])
        assert_equal_tensors({n: p[task] for n, p in state.params.items()}, expected.params[-1])
        assert_equal_tensors({n: b[task] for n, b in state.buffers.items()}, start, 0.0)
        assert_equal_tensors({"losses": losses[task]}, {"losses": torch.stack(expected.losses)})


def test_tasks_of_their_own_statistics_by_default():
    training = training_of(buffers="thread")
    fn = training.functionalized()[2]
    many = [tuple(torch.stack([part, 0.5 * part + 0.1]) for part in batch) for batch in training.batches]
    state, _ = fn.unroll(fn.init(), many, tasks=True)
    for task in range(2):
        expected = run_live(training, batches=[tuple(part[task] for part in batch) for batch in many])
        assert_equal_tensors({n: b[task] for n, b in state.buffers.items()}, expected.buffers[-1])


def test_recomputed_steps_have_the_same_gradients():
    training = training_of()
    fn = training.functionalized()[2]
    assert_equal_tensors(unrolled_gradients(training, fn, checkpoint=2)[1], unrolled_gradients(training, fn)[1])


def test_a_policy_that_does_not_exist_is_refused():
    model, optimizer = training_of().start()
    with pytest.raises(gimli.InputError, match="buffers='update' is not an option"):
        gimli.functionalize(model, optimizer, squared_error, buffers="update")
