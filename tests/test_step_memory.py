"""What a train step leaves for the next one: state where it has a place, refused with its line elsewhere."""

import copy
import warnings
from collections import deque
from dataclasses import replace

import pytest
import torch
from live_training import Training, Untouched, adamw, check_gradients, plain_sgd, regression, sgd, squared_error
from torch import nn

import gimli_compile as gimli
from gimli_compile import CaptureError

BATCHES = regression(4)


class Net(nn.Module):
    """A model with attributes that nothing registers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.average = torch.zeros((), dtype=torch.float64)
        self.calls = 0
        self.mean = 0.0
        self.cache = None
        self.log = []

    def forward(self, x):
        return self.net(x)


def stepped(model, optimizer, batch, weight: float | torch.Tensor = 1.0):
    optimizer.zero_grad()
    loss = squared_error(model, batch)
    (weight * loss).backward()
    optimizer.step()
    return loss.detach()


def with_average(model, optimizer, batch):
    loss = stepped(model, optimizer, batch, 1 + model.average)
    model.average = 0.9 * model.average + 0.1 * loss
    return loss


def with_counter(model, optimizer, batch):
    model.calls += 1
    return stepped(model, optimizer, batch, 1.0 / model.calls)


def with_schedule(model, optimizer, batch):
    model.calls += 1
    return stepped(model, optimizer, batch, 0.1 if model.calls > 2 else 1.0)


def with_float(model, optimizer, batch):
    loss = stepped(model, optimizer, batch, 1 + model.mean)
    model.mean = 0.9 * model.mean + 0.1 * loss.item()
    return loss


class Counting(Net):
    """Anneals what it returns, in a module below the top."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(Annealed(), nn.Linear(3, 2))


class Annealed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.count = 0
        self.last = torch.zeros(3, dtype=torch.float64)

    def forward(self, x):
        self.count += 1
        out = self.layer(x) * (1 + 1.0 / self.count) + 0.1 * self.last
        self.keep(out)
        return out

    def keep(self, out):
        self.last = out.detach().mean(0)


KEPT = {
    "average": (Net, with_average),
    "counter": (Net, with_counter),
    "schedule": (Net, with_schedule),
    "float": (Net, with_float),
    "module": (Counting, lambda model, optimizer, batch: stepped(model, optimizer, batch)),
}


def training_of(name, optimizer=sgd):
    model, step = KEPT[name]
    return Training(model, optimizer, None, BATCHES, train_step=step)


def live_values(model, losses):
    return [*losses, *(p.detach().clone() for p in model.parameters())]


def assert_close(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("optimizer", [sgd, adamw])
@pytest.mark.parametrize("name", KEPT)
def test_attributes_that_the_step_assigns_are_state(name, optimizer):
    training = training_of(name, optimizer)
    model, live = training.start()
    expected = live_values(model, [training.train_step(model, live, batch) for batch in BATCHES])
    held = {key: value for one in model.modules() for key, value in vars(one).items() if key in KEYS}

    other, its = training.start()
    untouched = Untouched(other, its)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fn = training.functionalize(other, its)
        state, losses = fn.unroll(fn.init(), BATCHES)
    assert_close([*losses, *state.params.values()], expected)
    untouched.check()
    assert all(not getattr(one, "calls", 0) and not getattr(one, "count", 0) for one in other.modules())

    fn.load_into(other, its, state)
    now = {key: value for one in other.modules() for key, value in vars(one).items() if key in KEYS}
    assert_close([torch.as_tensor(v) for v in now.values()], [torch.as_tensor(v) for v in held.values()])
    assert list(map(type, now.values())) == list(map(type, held.values()))
    more, _ = training.functionalize(other, its).unroll(training.functionalize(other, its).init(), BATCHES[:1])
    training.train_step(model, live, BATCHES[0])
    assert_close(more.params.values(), [p.detach() for p in model.parameters()])


def test_a_number_that_becomes_a_tensor():
    """In single precision it is one of another type than the number was."""

    def step(model, optimizer, batch):
        loss = ((model(batch[0]) - batch[1]) ** 2).mean()
        model.mean = 0.9 * model.mean + 0.1 * loss.detach()
        optimizer.zero_grad()
        (loss / (1 + model.mean)).backward()
        optimizer.step()
        return loss

    batches = [tuple(part.float() for part in batch) for batch in BATCHES]
    torch.manual_seed(0)
    model = Net().float()
    live = copy.deepcopy(model)
    fn = gimli.functionalize(model, sgd(model.parameters()), train_step=step)
    state, losses = fn.unroll(fn.init(), batches)
    optimizer = sgd(live.parameters())
    expected = live_values(live, [step(live, optimizer, batch).detach() for batch in batches])
    for a, b in zip([*losses, *state.params.values()], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert state.opt_state["model.mean"].dtype is torch.float32


KEYS = ("average", "calls", "mean", "count", "last")


@pytest.mark.parametrize("name", ["counter", "schedule"])
def test_derivatives_of_steps_that_count(name):
    check_gradients(replace(training_of(name), batches=BATCHES[:3]), ("groups.0.lr",))


def test_kept_attributes_have_paths_and_go_to_another_model():
    training = training_of("module")
    model, live = training.start()
    fn = training.functionalize(model, live)
    state = fn.init()
    assert {path for path in state.opt_state if path.startswith("model.")} == {"model.net.0.count", "model.net.0.last"}
    state, _ = fn.unroll(state, BATCHES[:2])
    other, its = training.start()
    fn.load_into(other, its, state)
    assert other.net[0].count == 2
    assert model.net[0].count == 0
    assert torch.equal(other.net[0].last, state.opt_state["model.net.0.last"])


def test_live_changes_of_kept_attributes_are_seen():
    training = training_of("counter")
    model, live = training.start()
    fn = training.functionalize(model, live)
    model.calls = 5
    assert int(fn.init().opt_state["model.calls"]) == 5


@pytest.mark.parametrize("backend", ["eager", "torchscript"])
def test_compiled_loops_carry_kept_attributes(backend):
    training = training_of("schedule")
    model, live = training.start()
    fn = training.functionalize(model, live)
    expected, losses = fn.unroll(fn.init(), BATCHES)
    found, again = fn.compile(backend).unroll(fn.init(), BATCHES)
    assert_close([*found.params.values(), again], [*expected.params.values(), losses])


# ---------------------------------------------------------------------- what has no place in the state


class Stats:
    def __init__(self):
        self.average = torch.zeros((), dtype=torch.float64)
        self.count = 0


class Counter:
    count = 0


def attribute_from_none(model, optimizer, batch):
    weight = 1.0 if model.cache is None else 1 + model.cache
    model.cache = stepped(model, optimizer, batch, weight)
    return model.cache


def length_of_a_log(model, optimizer, batch):
    loss = stepped(model, optimizer, batch, 1.0 + len(model.log))
    model.log.append(loss)
    return loss


def enclosed_tensor():
    average = torch.zeros((), dtype=torch.float64)

    def step(model, optimizer, batch):
        nonlocal average
        loss = stepped(model, optimizer, batch, 1 + average)
        average = 0.9 * average + 0.1 * loss
        return loss

    return step


def enclosed_number():
    count = 0

    def step(model, optimizer, batch):
        nonlocal count
        count += 1
        return stepped(model, optimizer, batch, 1 / count)

    return step


def enclosed_dict():
    kept = {"inner": {"average": torch.zeros((), dtype=torch.float64)}}

    def step(model, optimizer, batch):
        inner = kept["inner"]
        loss = stepped(model, optimizer, batch, 1 + inner["average"])
        inner["average"] = 0.9 * inner["average"] + 0.1 * loss
        return loss

    return step


def enclosed_deque():
    kept = deque([1.0], maxlen=3)

    def step(model, optimizer, batch):
        loss = stepped(model, optimizer, batch, sum(kept))
        kept.append(loss.item())
        return loss

    return step


def enclosed_object():
    stats = Stats()

    def step(model, optimizer, batch):
        loss = stepped(model, optimizer, batch, 1 + stats.average)
        stats.average = 0.9 * stats.average + 0.1 * loss
        return loss

    return step


def own_attribute():
    def step(model, optimizer, batch):
        vars(step)["count"] = getattr(step, "count", 0) + 1
        return stepped(model, optimizer, batch, 1 / vars(step)["count"])

    return step


def class_attribute():
    Counter.count = 0

    def step(model, optimizer, batch):
        Counter.count += 1
        return stepped(model, optimizer, batch, 1 / Counter.count)

    return step


def default_argument():
    def step(model, optimizer, batch, *, memo={}):  # noqa: B006
        memo["count"] = memo.get("count", 0) + 1
        return stepped(model, optimizer, batch, 1 / memo["count"])

    return step


def drawn_once():
    def step(model, optimizer, batch):
        if model.cache is None:
            model.cache = 1 + 0.1 * torch.rand((), dtype=torch.float64)
        return stepped(model, optimizer, batch, model.cache)

    return step


def from_the_first_batch():
    def step(model, optimizer, batch):
        if model.cache is None:
            model.cache = 1 + batch[0].square().mean()
        return stepped(model, optimizer, batch, model.cache)

    return step


def returned_alone():
    """What the step trains does not depend on it, what it returns does."""
    losses = []

    def step(model, optimizer, batch):
        loss = stepped(model, optimizer, batch)
        losses.append(loss.detach())
        return loss + 0.1 * losses[0]

    return step


REFUSED = {
    "returned alone": (returned_alone, "losses", "losses", "objects="),
    "attribute from none": (lambda: attribute_from_none, "Net.cache", "model.cache = stepped", "register_buffer"),
    "length of a log": (lambda: length_of_a_log, "Net.log", "model.log", "register_buffer"),
    "enclosed tensor": (enclosed_tensor, "average", "average = 0.9", "objects="),
    "enclosed number": (enclosed_number, "count", "count [+]= 1", "objects="),
    "enclosed dict": (enclosed_dict, "kept", "kept", "objects="),
    "enclosed deque": (enclosed_deque, "kept", "kept", "objects="),
    "enclosed object": (enclosed_object, "Stats.average", "stats.average = 0.9", "objects="),
    "own attribute": (own_attribute, "step.count", "vars.step..* = getattr", "objects="),
    "class attribute": (class_attribute, "Counter.count", "Counter.count [+]= 1", "objects="),
    "default argument": (default_argument, "memo", "memo", "objects="),
    "drawn once": (drawn_once, "Net.cache", "model.cache = 1", "register_buffer"),
    "from the first batch": (from_the_first_batch, "Net.cache", "model.cache = 1", "register_buffer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_next_step_reads_elsewhere_is_refused_with_its_line(case):
    make, name, line, cure = REFUSED[case]
    training = Training(Net, plain_sgd, None, BATCHES, train_step=make())
    model, live = training.start()
    untouched = Untouched(model, live)
    fn = training.functionalize(model, live)
    with pytest.raises(CaptureError, match=rf"reads [^\n]*`{name}`[\s\S]*{line}[\s\S]*{cure}"):
        fn.step(fn.init(), BATCHES[0])
    untouched.check()
    assert model.cache is None
    assert model.log == []


def test_the_named_cures_are_some():
    """An object that is passed, and an attribute that has a first value."""
    stats = Stats()

    def step(model, optimizer, batch):
        loss = stepped(model, optimizer, batch, 1 + stats.average)
        stats.average = 0.9 * stats.average + 0.1 * loss
        return loss

    training = Training(Net, plain_sgd, None, BATCHES, train_step=step, options={"objects": {"stats": stats}})
    model, live, fn = training.functionalized()
    state, losses = fn.unroll(fn.init(), BATCHES)
    expected = live_values(model, [step(model, live, batch) for batch in BATCHES])
    assert_close([*losses, *state.params.values()], expected)

    def prepare(model):
        model.cache = torch.zeros((), dtype=torch.float64)

    training = Training(Net, plain_sgd, None, BATCHES, train_step=attribute_from_none, prepare=prepare)
    model, live, fn = training.functionalized()
    state, losses = fn.unroll(fn.init(), BATCHES)
    expected = live_values(model, [attribute_from_none(model, live, batch) for batch in BATCHES])
    assert_close([*losses, *state.params.values()], expected)


# ---------------------------------------------------------------------- what may be kept


def table(model, optimizer, batch):
    """What is kept is the same in every step."""
    if model.cache is None:
        model.cache = torch.arange(1.0, 1.0 + batch[0].shape[1], dtype=torch.float64).sum()
    return stepped(model, optimizer, batch, model.cache)


def activations(model, optimizer, batch):
    """Set by the forward pass, read by the same step."""
    model.cache = model.net[0](batch[0])
    optimizer.zero_grad()
    loss = squared_error(model, batch) + 0.1 * model.cache.square().mean()
    loss.backward()
    optimizer.step()
    return loss.detach()


def parameters_kept(model, optimizer, batch):
    """A list of the parameters, made once."""
    if model.cache is None:
        model.cache = list(model.parameters())
    optimizer.zero_grad()
    loss = squared_error(model, batch) + 0.01 * sum(p.square().sum() for p in model.cache)
    loss.backward()
    optimizer.step()
    return loss.detach()


@pytest.mark.parametrize("step", [table, activations, parameters_kept])
def test_what_makes_no_difference_is_let_be(step):
    training = Training(Net, sgd, None, BATCHES, train_step=step)
    model, live, fn = training.functionalized()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state, losses = fn.unroll(fn.init(), BATCHES)
    assert model.cache is None
    expected = live_values(model, [step(model, live, batch) for batch in BATCHES])
    assert_close([*losses, *state.params.values()], expected)


def test_a_log_that_grows_is_said_once():
    def step(model, optimizer, batch):
        loss = stepped(model, optimizer, batch)
        model.log.append(loss)
        return loss

    training = Training(Net, plain_sgd, None, BATCHES, train_step=step)
    model, _, fn = training.functionalized()
    with pytest.warns(gimli.BakedValueWarning, match="changes `Net.log`") as caught:
        fn.step(fn.init(), BATCHES[0])
    assert len(caught) == 1
    assert model.log == []
