"""What a batch may be made of."""

import enum
from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from live_training import assert_equal_tensors, copied, normal, sgd
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import gimli_compile as gimli


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Example:
    x: Any
    y: Any
    kind: Any = None

    def __post_init__(self):
        self.made = True


@dataclass(frozen=True)
class Frozen:
    pair: Any
    weights: Any = None


@dataclass
class Slotted:
    __slots__ = ("x", "y")
    x: Any
    y: Any


class Kind(dict):
    pass


class Encoding(UserDict):
    """As tokenizers return."""


class Task(enum.Enum):
    SQUARES = 1
    DISTANCES = 2


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def x_of(t):
    return normal(6, 3, seed=2 * t)


def y_of(t):
    return normal(6, 2, seed=2 * t + 1)


def by_kind(model, batch):
    return (F.mse_loss if batch[2] is Task.SQUARES else F.l1_loss)(model(batch[0]), batch[1])


CASES: dict[str, Any] = {
    "named tuple": (lambda t: Pair(x_of(t), y_of(t)), lambda m, b: F.mse_loss(m(b.x), b.y), 1),
    "dataclass": (
        lambda t: Example(x_of(t), y_of(t)),
        lambda m, b: F.mse_loss(m(b.x), b.y) * (2 if b.made and isinstance(b, Example) else 1),
        1,
    ),
    "option of a dataclass": (
        lambda t: Example(x_of(t), y_of(t), Task.SQUARES if t % 2 else Task.DISTANCES),
        lambda m, b: by_kind(m, (b.x, b.y, b.kind)),
        2,
    ),
    "dataclass in a frozen one": (
        lambda t: Frozen({"first": [Example(x_of(t), y_of(t))]}),
        lambda m, b: F.mse_loss(m(b.pair["first"][0].x), b.pair["first"][0].y),
        1,
    ),
    "dataclass with slots": (lambda t: Slotted(x_of(t), y_of(t)), lambda m, b: F.mse_loss(m(b.x), b.y), 1),
    "nested dicts": (
        lambda t: {"a": {"x": [x_of(t)]}, "b": ({"y": y_of(t)}, None)},
        lambda m, b: F.mse_loss(m(b["a"]["x"][0]), b["b"][0]["y"]),
        1,
    ),
    "ordered dict": (lambda t: OrderedDict(x=x_of(t), y=y_of(t)), lambda m, b: F.mse_loss(m(b["x"]), b["y"]), 1),
    "kind of dict": (
        lambda t: Kind(x=x_of(t), y=y_of(t)),
        lambda m, b: F.mse_loss(m(b["x"]), b["y"]) * (1 + isinstance(b, Kind)),
        1,
    ),
    "encoding": (lambda t: Encoding(x=x_of(t), y=y_of(t)), lambda m, b: F.mse_loss(m(b["x"]), b["y"]), 1),
    "enum": (lambda t: (x_of(t), y_of(t), Task.SQUARES if t % 2 else Task.DISTANCES), by_kind, 2),
    "none": (lambda t: (x_of(t), y_of(t), None), lambda m, b: F.mse_loss(m(b[0]), b[1]), 1),
    "float": (lambda t: (x_of(t), y_of(t), 0.5 + t % 2), lambda m, b: b[2] * F.mse_loss(m(b[0]), b[1]), 2),
    "int": (lambda t: (x_of(t), y_of(t), 1 + t % 2), lambda m, b: b[2] * F.mse_loss(m(b[0]), b[1]), 2),
    "dtype": (lambda t: (x_of(t).float(), y_of(t), torch.float64), lambda m, b: F.mse_loss(m(b[0].to(b[2])), b[1]), 1),
}


def step_of(loss_fn):
    def step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_batches_of_any_structure(name, is_whole):
    make, loss_fn, programs = CASES[name]
    torch.manual_seed(1)
    model = network().double()
    optimizer = sgd(model.parameters())
    step = step_of(loss_fn)
    fn = gimli.functionalize(model, optimizer, None if is_whole else loss_fn, train_step=step if is_whole else None)
    state = fn.init()
    for t in range(4):
        state, _ = fn.step(state, make(t))
    if not is_whole:
        assert len(fn.programs["grad"]) == programs
    unrolled, losses = fn.unroll(fn.init(), [make(t) for t in range(4)])
    recomputed, _ = fn.unroll(fn.init(), (make(t) for t in range(4)), checkpoint=2)
    expected = [step(model, optimizer, make(t)).detach() for t in range(4)]
    for after in (state, unrolled, recomputed):
        assert_equal_tensors(after.params, copied(model.named_parameters()))
    assert_equal_tensors({"losses": losses}, {"losses": torch.stack(expected)})


def test_tensors_inside_are_stacked_differentiated_and_given_to_tasks():
    torch.manual_seed(1)
    model = network().double()
    optimizer = sgd(model.parameters())
    fn = gimli.functionalize(model, optimizer, CASES["option of a dataclass"][1])
    x, y = (torch.stack([of(t) for t in range(3)]).requires_grad_() for of in (x_of, y_of))
    state, losses = fn.unroll(fn.init(), Example(x, y))
    listed, _ = fn.unroll(fn.init(), [Example(*pair) for pair in zip(x, y, strict=True)])
    assert_equal_tensors(state.params, listed.params, 0.0)
    (slope,) = torch.autograd.grad(losses[-1], x)
    assert slope[0].abs().max() > 0
    many, _ = fn.unroll(fn.init(), Example(torch.stack([x, 2 * x]), torch.stack([y, y])), tasks=True)
    assert_equal_tensors({name: value[0] for name, value in many.params.items()}, state.params)


def test_a_dataclass_that_the_model_and_the_step_return():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            out = self.net(x)
            return Example(out, {"size": out.abs().amax()}, "output")

    def step(model, optimizer, batch):
        optimizer.zero_grad()
        loss = F.mse_loss(model(batch.x).x, batch.y)
        loss.backward()
        optimizer.step()
        return Example(loss, loss.item())

    torch.manual_seed(1)
    model = Model().double()
    optimizer = sgd(model.parameters())
    fn = gimli.functionalize(model, optimizer, train_step=step)
    state = fn.init()
    for t in range(3):
        state, got = fn.step(state, Example(x_of(t), y_of(t)))
        expected = step(model, optimizer, Example(x_of(t), y_of(t)))
        assert isinstance(got, Example)
        assert torch.equal(got.x, expected.x.detach())
        assert float(got.y) == expected.y
    for t in range(2):  # the second from the program
        out, expected = fn(state, x_of(t)), model(x_of(t))
        assert (out.kind, isinstance(out, Example)) == ("output", True)
        assert_equal_tensors({"x": out.x, **out.y}, {"x": expected.x, **expected.y})


def test_what_holds_tensors_in_its_own_way_is_refused_by_its_place():
    class Own:
        def __init__(self, x):
            self.x = x

    model = network().double()
    fn = gimli.functionalize(model, sgd(model.parameters()), lambda m, b: m(b[0].x).mean())
    with pytest.raises(gimli.InputError, match=r"batch\[0\] is a Own[\s\S]*dataclasses"):
        fn.step(fn.init(), (Own(x_of(0)), y_of(0)))
    with pytest.raises(gimli.InputError, match=r"batch\[kind\] is a str[\s\S]*an option into an enum"):
        fn.step(fn.init(), Example(x_of(0), y_of(0), "squares"))


class Sequences(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn, self.out = kind(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        hidden, last = self.rnn(packed)
        last = last[0] if isinstance(last, tuple) else last
        return self.out(last[-1]) + self.out(pad_packed_sequence(hidden, batch_first=True)[0].sum(1))


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("are_listed", [False, True])
def test_lengths_of_packed_sequences_from_the_batch(kind, is_whole, are_listed):
    def batch_of(t):
        lengths = [[5, 3, 2], [2, 5, 4], [1, 5, 5], [4, 3, 3]][t]
        return (
            normal(3, 5, 3, seed=t), normal(3, 2, seed=9 + t), lengths if are_listed else torch.tensor(lengths)
        )  # fmt: skip

    def loss_fn(model, batch):
        return F.mse_loss(model(batch[0], batch[2]), batch[1])

    torch.manual_seed(1)
    model = Sequences(kind).double()
    optimizer, step = sgd(model.parameters()), step_of(loss_fn)
    fn = gimli.functionalize(model, optimizer, None if is_whole else loss_fn, train_step=step if is_whole else None)
    state = fn.init()
    for t in range(4):
        state, _ = fn.step(state, batch_of(t))
        step(model, optimizer, batch_of(t))
        assert_equal_tensors(state.params, copied(model.named_parameters()))
