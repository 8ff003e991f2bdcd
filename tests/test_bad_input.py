"""What cannot work is refused: by an error that says what, where and what to do, and that leaves everything as it was."""

import re
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from live_training import (
    Training,
    Untouched,
    adamw,
    assert_equal_tensors,
    assert_still_trains,
    normal,
    regression,
    run_live,
    sgd,
    squared_error,
)
from torch import nn

import gimli_compile as gimli
from gimli_compile import CaptureError, InputError


def mlp():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


PLAIN = Training(mlp, adamw, squared_error, regression(3))


class Refusal:
    """Expects an error of a class with certain words, and nothing live changed by it."""

    def __init__(self, error, *words, training=PLAIN):
        self.error, self.words, self.training = error, words, training
        self.model, self.optimizer = training.start()

    def of(self, action, **options):
        """Runs `action(model, optimizer)` and checks the error and the live objects."""
        untouched = Untouched(self.model, self.optimizer)
        with pytest.raises(self.error) as caught:
            action(self.model, self.optimizer, **options)
        untouched.check()
        message = str(caught.value)
        for word in self.words:
            assert re.search(word, message), f"{word!r} is not in:\n{message}"
        assert len(message.splitlines()) >= 2 or ". " in message, f"no cure in:\n{message}"
        assert_still_trains(self.training, self.model, self.optimizer)

    def of_step(self, batch=None, meta=None):
        """Checks the first step on a batch."""
        batch = self.training.batches[0] if batch is None else batch

        def action(model, optimizer):
            fn = gimli.functionalize(model, optimizer, self.training.loss)
            state = fn.init()
            fn.step(state, batch, None, meta)

        self.of(action)


def line_of(text):
    """Returns a pattern for the line of this file that ends with a comment."""
    with open(__file__) as source:
        numbers = [number for number, line in enumerate(source, 1) if line.rstrip().endswith(text)]
    assert len(numbers) == 1, (text, numbers)
    return rf"test_bad_input\.py:{numbers[0]}\b"


# ---------------------------------------------------------------------- models and losses that no graph can follow


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        out = self.layer(x)
        if out.mean() > 0:  # the branch
            return out
        return -out


class Looping(Branching):
    def forward(self, x):
        out = self.layer(x)
        while float(out.detach().norm()) > 0.5:  # the loop
            out = out * 0.5
        return out


class Converting(Branching):
    def forward(self, x):
        out = self.layer(x)
        return out * out.max().item()  # the number


class Listing(Branching):
    def forward(self, x):
        out = self.layer(x)
        return out * sum(out.mean(0).tolist())  # the list


class Indexing(Branching):
    def forward(self, x):
        out = self.layer(x)
        return out * [1.0, 2.0][out.sum(0).argmax()]  # the index


class Leaving(Branching):
    def forward(self, x):
        out = self.layer(x)
        return out * torch.from_numpy(out.detach().numpy().copy()).sum()  # the array


@pytest.mark.parametrize(
    ("model", "line"),
    [
        (Branching, "# the branch"),
        (Looping, "# the loop"),
        (Converting, "# the number"),
        (Listing, "# the list"),
        (Indexing, "# the index"),
        (Leaving, "# the array"),
    ],
)
def test_control_flow_on_tensor_values(model, line):
    training = replace(PLAIN, model=model, batches=[(normal(5, 3, seed=7), normal(5, 2, seed=8))])
    cure = r"torch\.where" if model is Leaving else r'torch\.where[\s\S]*branches="guard"'
    Refusal(CaptureError, r"Python value", line_of(line), cure, training=training).of_step()


def test_control_flow_in_the_forward_program():
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer)
        fn(fn.init(), normal(5, 3))

    Refusal(CaptureError, "Python value", line_of("# the branch"), training=replace(PLAIN, model=Branching)).of(action)


def test_control_flow_on_the_loss():
    def loss(model, batch):
        value = squared_error(model, batch)
        return value if value < 100 else value.sqrt()  # the comparison

    Refusal(CaptureError, "Python value", line_of("# the comparison"), training=replace(PLAIN, loss=loss)).of_step()


class Unique(Branching):
    def forward(self, x):
        out = self.layer(x)
        return torch.unique_consecutive(out.detach().round()).sum() + out  # the distinct values


def test_shapes_that_depend_on_values():
    training = replace(PLAIN, model=Unique)
    line = line_of("# the distinct values")
    Refusal(CaptureError, "shape depends on tensor values", line, r"torch\.where", training=training).of_step()


class Remembering(Branching):
    """Changes a tensor that torch knows nothing of."""

    def __init__(self):
        super().__init__()
        self.seen = torch.zeros(2, dtype=torch.float64)

    def forward(self, x):
        out = self.layer(x)
        self.seen.add_(out.detach().mean(0))  # the memory
        return out + self.seen


class Counting(Remembering):
    def forward(self, x):
        self.seen[0] += 1.0  # the counter
        return self.layer(x) + self.seen


@pytest.mark.parametrize(("model", "line"), [(Remembering, "# the memory"), (Counting, "# the counter")])
def test_changes_of_an_unregistered_tensor(model, line):
    training = replace(PLAIN, model=model)
    refusal = Refusal(
        CaptureError, "neither a parameter, a buffer nor state", line_of(line), "register_buffer", training=training
    )
    before = refusal.model.seen.clone()

    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        try:
            fn.step(fn.init(), PLAIN.batches[0])
        finally:
            assert torch.equal(model.seen, before)

    refusal.of(action)


class Assigning(Branching):
    """Puts a new tensor in place of an attribute: later steps would need it."""

    def __init__(self):
        super().__init__()
        self.last = torch.zeros(2, dtype=torch.float64)

    def forward(self, x):
        out = self.layer(x) + self.last
        self.last = out.detach().mean(0)
        return out


def test_a_tensor_attribute_that_the_model_replaces():
    """The next step of eager depends on it; the program must carry it, warn or refuse."""
    training = replace(PLAIN, model=Assigning)
    model, optimizer = training.start()
    fn = gimli.functionalize(model, optimizer, squared_error)
    with pytest.raises((CaptureError, gimli.BakedValueWarning), match="last"):
        fn.step(fn.init(), PLAIN.batches[0])


def test_a_number_that_the_model_counts_up():
    class Annealing(Branching):
        def __init__(self):
            super().__init__()
            self.count = 0

        def forward(self, x):
            self.count += 1
            return self.layer(x) * self.count

    model = Annealing().double()
    fn = gimli.functionalize(model, sgd(model.parameters()), squared_error)
    with pytest.raises((CaptureError, gimli.BakedValueWarning), match="count"):
        fn.step(fn.init(), PLAIN.batches[0])
    assert model.count == 0


# ---------------------------------------------------------------------- losses


def test_a_loss_that_is_no_scalar():
    def elements(model, batch):
        x, y = batch
        return (model(x) - y) ** 2

    refusal = Refusal(
        CaptureError, "elements", "not a scalar", r"\(5, 2\)", "mean", training=replace(PLAIN, loss=squared_error)
    )
    refusal.of(lambda model, optimizer: first_step(model, optimizer, elements))


def first_step(model, optimizer, loss):
    fn = gimli.functionalize(model, optimizer, loss)
    fn.step(fn.init(), PLAIN.batches[0])


@pytest.mark.parametrize("result", [None, 0.5, "text"])
def test_a_loss_that_is_no_tensor(result):
    def strange(model, batch):
        model(batch[0])
        return result

    refusal = Refusal(CaptureError, "strange", "not a scalar", "mean")
    refusal.of(lambda model, optimizer: first_step(model, optimizer, strange))


def test_a_loss_of_integers():
    def counted(model, batch):
        return (model(batch[0]) > 0).sum()

    Refusal(CaptureError, "counted", "int64").of(lambda model, optimizer: first_step(model, optimizer, counted))


@pytest.mark.parametrize("kind", ["detached", "no_grad", "labels_only"])
def test_a_loss_without_a_gradient(kind):
    def flat(model, batch):
        _x, y = batch
        if kind == "detached":
            return squared_error(model, batch).detach()
        if kind == "labels_only":
            return (y**2).mean()
        with torch.no_grad():
            return squared_error(model, batch)

    refusal = Refusal(CaptureError, "flat", "does not depend on any trained parameter", "detach")
    refusal.of(lambda model, optimizer: first_step(model, optimizer, flat))


def test_an_error_in_the_loss_is_the_users_own():
    def broken(model, batch):
        return model(batch[0].reshape(7, 7)).mean()

    model, optimizer = PLAIN.start()
    untouched = Untouched(model, optimizer)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        first_step(model, optimizer, broken)
    untouched.check()
    assert_still_trains(PLAIN, model, optimizer)


def test_a_step_without_a_loss():
    def step(model, optimizer):
        fn = gimli.functionalize(model, optimizer)
        fn.step(fn.init(), PLAIN.batches[0])

    def unroll(model, optimizer):
        fn = gimli.functionalize(model, optimizer)
        fn.unroll(fn.init(), PLAIN.batches)

    for action in (step, unroll):
        Refusal(InputError, "need a loss", r"functionalize\(model, optimizer, loss_fn\)").of(action)


# ---------------------------------------------------------------------- batches


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_while_capturing(value):
    x, y = PLAIN.batches[0]
    spoiled = y.clone()
    spoiled[0, 0] = value
    Refusal(CaptureError, "nan|inf", "Check the batch", "squared_error").of_step((x, spoiled))


def test_values_that_are_not_finite_afterwards_go_through():
    """Captured programs (the first update's and the later ones') compute what eager computes, NaN included."""
    _model, _optimizer, fn = PLAIN.functionalized()
    state, _ = fn.unroll(fn.init(), PLAIN.batches[:2])
    _, loss = fn.step(state, (PLAIN.batches[0][0] * float("nan"), PLAIN.batches[0][1]))
    assert bool(loss.isnan())


@pytest.mark.parametrize(
    ("batch", "path"),
    [
        ((normal(5, 3), ["cat", "dog"]), r"1\.0"),
        ({"x": normal(5, 3), "labels": "cat"}, "labels"),
        ((normal(5, 3), {"more": [object()]}), r"1\.more\.0"),
        ((normal(5, 3).numpy(), normal(5, 2)), "0"),
    ],
)
def test_batches_of_other_things_than_numbers(batch, path):
    Refusal(InputError, rf"batch\[{path}\]", "tensor", "str|object|ndarray").of_step(batch)


def test_meta_of_other_things_than_numbers():
    def loss(model, batch, meta):
        return squared_error(model, batch)

    training = replace(PLAIN, loss=loss, meta={"mode": "fast"})
    refusal = Refusal(InputError, r"meta\[mode\]", "str", training=training)
    refusal.of_step(meta={"mode": "fast"})


@pytest.mark.parametrize(
    "batches", [[], iter([]), (normal(0, 5, 3), normal(0, 5, 2))], ids=["list", "iterator", "stacked"]
)
def test_an_unroll_without_steps(batches):
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        fn.unroll(fn.init(), batches)

    Refusal(InputError, "no steps", "at least one batch").of(action)


def test_ragged_batches():
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        fn.unroll(fn.init(), (normal(3, 5, 3), normal(2, 5, 2)))

    Refusal(InputError, "batches", "2, 3", "dimension", "one batch for each step").of(action)


def test_batches_without_a_step_dimension():
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        fn.unroll(fn.init(), (normal(3, 5, 3), torch.tensor(1.0)))

    Refusal(InputError, "batches", "dimension", "one batch for each step").of(action)


def test_batches_without_any_tensor():
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        fn.unroll(fn.init(), 3)

    Refusal(InputError, "batches").of(action)


# ---------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backward": "nope"}, ("backward='nope'", "'reverse'")),
        ({"checkpoint": 0}, ("checkpoint=0", "'sqrt'")),
        ({"checkpoint": -1}, ("checkpoint=-1",)),
        ({"checkpoint": "steps"}, ("checkpoint='steps'", "'step'")),
        ({"checkpoint": True}, ("checkpoint=True",)),
        ({"checkpoint": 1.5}, ("checkpoint=1.5",)),
        ({"order": 3}, ("order=3", "exact")),
        ({"order": 0}, ("order=0",)),
        ({"order": "first"}, ("order='first'",)),
        ({"truncate": 0}, ("truncate=0", "positive")),
        ({"truncate": -2}, ("truncate=-2",)),
        ({"truncate": "half"}, ("truncate='half'",)),
        ({"truncate": 1.5}, ("truncate=1.5",)),
    ],
)
def test_options_that_do_not_exist(options, words):
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        fn.unroll(fn.init(), PLAIN.batches, **options)

    Refusal(InputError, *words).of(action)


# ---------------------------------------------------------------------- models and optimizers that do not belong together


def test_an_optimizer_of_another_model():
    other = mlp().double()
    refusal = Refusal(InputError, "parameter 0 of the optimizer's group 0", r"\(4, 3\)", "parameters\\(\\)")
    refusal.of(lambda model, optimizer: gimli.functionalize(model, torch.optim.SGD(other.parameters(), lr=0.1)))


def test_an_optimizer_with_one_more_parameter():
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def action(model, optimizer):
        groups = [{"params": list(model.parameters())}, {"params": [extra]}]
        gimli.functionalize(model, torch.optim.SGD(groups, lr=0.1), squared_error)

    Refusal(InputError, "parameter 0 of the optimizer's group 1", r"\(2,\)").of(action)


@pytest.mark.parametrize("thing", [None, 3, [], torch.ones(2), {"lr": 0.1}])
def test_things_that_are_no_optimizer(thing):
    Refusal(InputError, type(thing).__name__, "optimizer", "step").of(
        lambda model, _: gimli.functionalize(model, thing)
    )


@pytest.mark.parametrize("thing", [None, 3, lambda x: x, [3, {}]])
def test_things_that_are_no_model(thing):
    Refusal(InputError, "model", type(thing).__name__).of(lambda _, optimizer: gimli.functionalize(thing, optimizer))


@pytest.mark.parametrize("thing", [3, "mse", nn.Linear(2, 2).weight])
def test_things_that_are_no_loss(thing):
    Refusal(InputError, "loss").of(lambda model, optimizer: gimli.functionalize(model, optimizer, thing))


def test_lazy_modules_that_never_ran():
    model = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"'0\.weight' is not initialized[\s\S]*example=batch"):
        gimli.functionalize(model, optimizer, squared_error)
    assert isinstance(model[0].weight, nn.parameter.UninitializedParameter)


def test_states_of_another_model():
    other = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    foreign = gimli.functionalize(other, sgd(other.parameters()), squared_error).init()

    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        fn.step(foreign, PLAIN.batches[0])

    Refusal(InputError, r"state\.params\['0\.weight'\]", r"\(6, 3\)", r"\(4, 3\)", r"init\(\)").of(action)


def test_states_of_a_model_with_other_names():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

    other = Named().double()
    foreign = gimli.functionalize(other, sgd(other.parameters()), squared_error).init()

    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        fn.step(foreign, PLAIN.batches[0])

    Refusal(InputError, r"state\.params lacks '0\.weight'", r"init\(\)").of(action)


def test_states_of_another_optimizer():
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        other = gimli.functionalize(model, torch.optim.Adagrad(model.parameters()), squared_error)
        fn.step(other.init(), PLAIN.batches[0])

    Refusal(InputError, "another optimizer", "Adagrad", r"init\(\)").of(action)


@pytest.mark.parametrize("thing", [None, {}, (1, 2, 3)])
def test_things_that_are_no_state(thing):
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        fn.step(thing, PLAIN.batches[0])

    Refusal(InputError, "state", r"init\(\)").of(action)


def test_states_with_an_entry_of_another_dtype():
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        state = fn.init()
        state.params["0.weight"] = cast(Any, "weights")
        fn.step(state, PLAIN.batches[0])

    Refusal(InputError, r"state\.params\['0\.weight'\] is str").of(action)


def test_loading_into_another_optimizer():
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        state, _ = fn.unroll(fn.init(), PLAIN.batches)
        fn.load_into(model, torch.optim.SGD(model.parameters(), lr=0.1), state)

    Refusal(InputError, "AdamW", "SGD", "same class").of(action)


def test_loading_into_another_model():
    other = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).double()

    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        state, _ = fn.unroll(fn.init(), PLAIN.batches)
        fn.load_into(other, adamw(other.parameters()), state)

    Refusal(InputError, r"state\.params\['0\.weight'\]", r"\(6, 3\)").of(action)


def test_loading_into_an_optimizer_with_other_groups():
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        state, _ = fn.unroll(fn.init(), PLAIN.batches)
        first, *rest = model.parameters()
        fn.load_into(model, torch.optim.AdamW([{"params": [first]}, {"params": rest}], lr=0.1), state)

    Refusal(InputError, "group").of(action)


# ---------------------------------------------------------------------- hyperparameters


def with_hyper(change):
    def action(model, optimizer):
        fn = gimli.functionalize(model, optimizer, squared_error)
        hyper = fn.hyperparameters()
        fn.step(fn.init(), PLAIN.batches[0], change(hyper) or hyper)

    return action


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda hyper: hyper[0].pop("lr") is None, ("hyper lacks 'groups.0.lr'", "do not remove")),
        (lambda hyper: hyper[0].update(rate=0.1), ("'groups.0.rate'", "groups.0.lr")),
        (lambda hyper: hyper[0].update(lr="fast"), (r"hyper\[groups\.0\.lr\]|'groups\.0\.lr'", "str|lacks")),
        (lambda hyper: hyper[0].update(betas=(0.9,)), ("groups.0.betas.1",)),
        (lambda hyper: hyper[0].update(betas=0.9), (r"groups\.0\.betas",)),
        (lambda hyper: hyper.groups.append({"lr": 0.1}), (r"groups\.1\.lr",)),
        (lambda hyper: {"lr": 0.1}, ("hyper is a dict", "hyperparameters")),
        (lambda hyper: [0.1], ("hyper is a list", "hyperparameters")),
    ],
)
def test_hyperparameters_of_another_structure(change, words):
    def changed(hyper):
        result = change(hyper)
        return result if isinstance(result, (dict, list)) else hyper

    Refusal(InputError, *words).of(with_hyper(changed))


def test_hyperparameters_of_a_shape_that_fits_no_parameter():
    def change(hyper):
        hyper[0]["lr"] = torch.ones(7, dtype=torch.float64)

    Refusal((InputError, CaptureError), r"groups\.0\.lr", r"\(7,\)|7").of(with_hyper(change))


# ---------------------------------------------------------------------- optimizers that change after functionalize


def test_a_flag_that_is_flipped_afterwards():
    model, optimizer, fn = PLAIN.functionalized()
    state, hyper = fn.init(), fn.hyperparameters()
    optimizer.param_groups[0]["amsgrad"] = True
    for action in (
        fn.init,
        fn.hyperparameters,
        lambda: fn.step(state, PLAIN.batches[0]),
        lambda: fn.unroll(state, PLAIN.batches, hyper),
        lambda: fn.update(state.params, state.params, state.opt_state),
    ):
        with pytest.raises(InputError, match=r"groups\.0\.amsgrad[\s\S]*functionalize` again"):
            action()
    optimizer.param_groups[0]["amsgrad"] = False
    fn.step(state, PLAIN.batches[0])
    assert_still_trains(PLAIN, model, optimizer)


def test_a_group_that_is_added_afterwards():
    model = mlp().double()
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    fn = gimli.functionalize(model, optimizer, squared_error)
    state = fn.init()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    with pytest.raises(InputError, match=r"number of parameter groups[\s\S]*functionalize` again"):
        fn.step(state, PLAIN.batches[0])


def test_a_parameter_that_is_replaced_afterwards():
    model, _optimizer, fn = PLAIN.functionalized()
    state = fn.init()
    model[0].weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(InputError, match="functionalize` again"):
        fn.step(state, PLAIN.batches[0])


def test_a_parameter_that_is_frozen_afterwards():
    """Eager would no longer train it: the program must follow or refuse."""
    model, _optimizer, fn = PLAIN.functionalized()
    state = fn.init()
    model[0].weight.requires_grad_(False)
    before = state.params["0.weight"].clone()
    try:
        after, _ = fn.step(state, PLAIN.batches[0])
    except InputError:
        return
    assert torch.equal(after.params["0.weight"], before)


def test_an_optimizer_whose_step_fails():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise ValueError("out of order")

    def action(model, optimizer):
        gimli.functionalize(model, Broken(model.parameters(), lr=0.1), squared_error)

    Refusal(CaptureError, r"Broken\.step", "ValueError: out of order", r"test_bad_input\.py:\d+", "eager").of(action)


def test_an_optimizer_that_decides_in_numpy():
    class Sorting(torch.optim.SGD):
        def step(self, closure=None):
            norms = [p.grad.norm() for group in self.param_groups for p in group["params"]]
            order = sorted(float(n) for n in norms)  # the sorting
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.sub_(p.grad, alpha=group["lr"] / (1 + order[0]))

    model = mlp().double()
    optimizer = Sorting(model.parameters(), lr=0.1)
    fn = gimli.functionalize(model, optimizer, squared_error)
    twin = mlp().double()
    twin.load_state_dict(model.state_dict())
    twin_optimizer = Sorting(twin.parameters(), lr=0.1)
    state = fn.init()
    for batch in PLAIN.batches:
        twin_optimizer.zero_grad()
        squared_error(twin, batch).backward()
        twin_optimizer.step()
        try:
            state, _ = fn.step(state, batch)
        except CaptureError as error:
            assert re.search(line_of("# the sorting"), str(error))
            return
    for name, p in twin.named_parameters():
        assert torch.allclose(state.params[name], p, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------- the errors themselves


def test_errors_are_one_family():
    assert issubclass(CaptureError, gimli.GimliError)
    assert issubclass(InputError, (gimli.GimliError, ValueError))
    assert issubclass(gimli.BakedValueWarning, UserWarning)


def test_a_refused_capture_is_not_kept():
    """After an error the same object works on what it can capture."""
    _model, _optimizer, fn = PLAIN.functionalized()
    state = fn.init()
    with pytest.raises(CaptureError):
        fn.step(state, (PLAIN.batches[0][0] * float("inf"), PLAIN.batches[0][1]))
    with pytest.raises(InputError):
        fn.step(state, "batch")
    got, _ = fn.unroll(state, PLAIN.batches)
    assert_equal_tensors(got.params, run_live(PLAIN).params[-1])


def test_an_optimizer_that_needs_a_closure_has_no_update_of_its_own():
    model = mlp().double()
    fn = gimli.functionalize(model, torch.optim.LBFGS(model.parameters()), squared_error)
    with pytest.raises(
        InputError, match=r"`LBFGS.step` is no function of gradients alone[\s\S]*Use `step` and `unroll`"
    ):
        fn.update(fn.init().params, {}, fn.init().opt_state)
    with pytest.raises(InputError, match="need a loss"):
        gimli.functionalize(model, torch.optim.LBFGS(model.parameters())).step(fn.init(), None)


def test_a_word_for_branches_that_means_nothing():
    def action(model, optimizer):
        gimli.functionalize(model, optimizer, squared_error, branches="follow")

    Refusal(InputError, "branches='follow'", "refuse", "guard").of(action)


def test_a_loss_beside_a_train_step():
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="exclude each other"):
        gimli.functionalize(model, optimizer, squared_error, train_step=lambda model, optimizer, batch: None)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_while_capturing(value):
    """Nothing is captured from them; a program that exists takes them, as eager does."""
    model, optimizer, fn = PLAIN.functionalized()
    state = fn.init()
    bad = {name: torch.full_like(p, value) for name, p in state.params.items()}
    with pytest.raises(CaptureError, match=r"grads\['0.weight'\] has NaN or infinite[\s\S]*Start from finite values"):
        fn.update(state.params, bad, state.opt_state)
    fn.update(state.params, {name: torch.ones_like(p) for name, p in state.params.items()}, state.opt_state)
    params, _ = fn.update(state.params, bad, state.opt_state)
    assert not any(p.isfinite().any() for p in params.values())
    assert_still_trains(PLAIN, model, optimizer)


class Fed(torch.optim.SGD):
    """Steps with what the train step gave it."""

    given = None

    def step(self, closure=None):
        if self.given is None:
            raise RuntimeError("nothing was given")
        super().step(closure)


@pytest.mark.parametrize("ask", ("update_rule", "requirements", "update"))
def test_an_optimizer_that_runs_in_the_train_step_only_has_no_update_of_its_own(ask):
    def train_step(model, optimizer, batch):
        optimizer.given = True
        return squared_error(model, batch)

    model = mlp().double()
    fn = gimli.functionalize(model, Fed(model.parameters(), lr=0.1), train_step=train_step)
    state = fn.init()
    arguments = (state.params, {}, state.opt_state) if ask == "update" else ()
    with pytest.raises(InputError, match=r"`Fed.step` runs in the train step only[\s\S]*Use `step` and `unroll`"):
        getattr(fn, ask)(*arguments)


def test_the_update_of_a_plain_optimizer_in_a_train_step_is_known_apart():
    model = mlp().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    fn = gimli.functionalize(model, optimizer, train_step=lambda model, optimizer, batch: None)
    assert str(fn.update_rule()) == str(gimli.functionalize(model, optimizer).update_rule())
    assert "lr" in str(fn.requirements())


@pytest.mark.parametrize("ask", ("update_rule", "requirements"))
def test_a_step_with_a_closure_is_not_analyzed(ask):
    model = mlp().double()
    fn = gimli.functionalize(model, torch.optim.LBFGS(model.parameters()), squared_error)
    with pytest.raises(InputError, match=r"`LBFGS.step` is no function of gradients alone[\s\S]*torch.autograd.grad"):
        getattr(fn, ask)()
