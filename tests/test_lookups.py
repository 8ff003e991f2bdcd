"""Containers in which a number looks something up: Python's own answers, and programs that hold for other numbers."""

from collections import Counter, OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from recorded import call, trace
from torch.utils import _pytree as pytree

from gimli_compile.concolic import Number, plain
from gimli_compile.lookups import answering, answering_table
from gimli_compile.snapshot import freeze, stands_for


class Owner:
    """An object with one attribute."""

    def __init__(self, held):
        self.held = held


def answer(value) -> Any:
    """Returns the form of a container that answers numbers, as an optimizer's is made."""
    owner = Owner(value)
    return answering(dict(freeze(owner, {})[0].root.items)["held"], value)


def f64(value):
    return torch.tensor(float(value), dtype=torch.float64)


COUNTER = Counter([3, 5, 5])
TABLES = {
    "counter": (COUNTER, lambda held, n: n in held),
    "counter-value": (COUNTER, lambda held, n: held[n]),
    "dict": ({0: 1.5, 4: 2.5}, lambda held, n: held.get(n, 9.0)),
    "dict-of-texts": ({0: "a", 4: "b"}, lambda held, n: held.get(n)),
    "ordered": (OrderedDict({1: 2, 3: 4}), lambda held, n: held.get(n, 0) if n in held else -1),
    "set": ({2, 4, 6}, lambda held, n: n in held),
    "frozenset": (frozenset({2, 4}), lambda held, n: n not in held),
    "list": ([1.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5], lambda held, n: held[n]),
    "list-backwards": ([1.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5], lambda held, n: held[-n - 1]),
    "list-modulo": ([1, 1, 2], lambda held, n: held[n % 3]),
    "list-of-lists": ([[1], [2], [3]], lambda held, n: held[n % 3]),
    "list-of-one": ([1.5], lambda held, n: held[n * 0]),
    "mixed": ([1.5, 2, 3.5], lambda held, n: held[n % 3]),
    "tuple": ((1.5, 1.5, 2.5), lambda held, n: held[n // 3]),
    "slice": ([1, 2, 3, 4, 5, 6, 7], lambda held, n: sum(held[:n])),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_program_that_holds_gives_what_python_gives(name):
    """Each of the numbers 0 to 6 is traced; wherever such a program's conditions hold, its result is Python's."""
    held, function = TABLES[name]
    served = []
    for first in range(7):
        made = trace(lambda n: function(answer(held), n), numbers={"n": first})
        assert plain(made.value) == function(held, first)
        for other in range(7):
            results = call(made.program, {"n": f64(other)})
            if [bool(v) for k, v in results.items() if k.startswith("guard")] != made.outcomes:
                continue
            served.append((first, other))
            value = results["output[0]"].item() if isinstance(made.value, Number) else made.value
            assert value == function(held, other), (first, other)
    assert {(n, n) for n in range(7)} <= set(served)


@pytest.mark.parametrize("first, conditions", [(0, [False]), (3, [True]), (5, [True])])
def test_membership_is_one_condition(first, conditions):
    assert trace(lambda n: n in answer(COUNTER), numbers={"n": first}).outcomes == conditions


def test_numbers_that_are_looked_up_have_derivatives():
    def function(n, a, b):
        return answering_table([a, b, 7.0])[n] * 2

    made = trace(function, numbers={"n": 1, "a": 2.0, "b": 2.0})
    a, b = f64(2).requires_grad_(), f64(2).requires_grad_()
    values = {"n": f64(1), "a": a, "b": b}
    bound = {slot: values[slot.path] for slot in made.program.inputs if slot.path in values}
    (result,) = (v for s, v in made.program(bound).items() if str(s) == "output[0]")
    assert [0.0, 2.0] == [g.item() for g in torch.autograd.grad(result, [a, b])]


def test_an_index_beyond_the_end_raises_as_python_does():
    with pytest.raises(IndexError, match="list index out of range"):
        trace(lambda n: answer([1.0, 2.0])[n], numbers={"n": 2})
    with pytest.raises(KeyError):
        trace(lambda n: answer({0: 1.0, 1: 2.0})[n], numbers={"n": 2})


def test_a_default_that_is_stored_pins_the_key():
    held = answer(defaultdict(int, {1: 5, 2: 7}))
    made = trace(lambda n: held[n], numbers={"n": 4})
    assert made.value == 0 and dict(held) == {1: 5, 2: 7, 4: 0}
    assert made.outcomes == [False, True]


def test_assigning_pins_the_place():
    held = answer([1.0, 2.0, 3.0])

    def function(n):
        held[n] = 5.0

    assert trace(function, numbers={"n": 1}).outcomes == [True] and held == [1.0, 5.0, 3.0]


@pytest.mark.parametrize("value", [{"a": 1.0}, {}, [], {1.5: 2}, torch.ones(2), "text"])
def test_what_no_number_looks_into_stays_as_it_is(value):
    class Part:
        items = tuple((key, value[key]) for key in value) if isinstance(value, dict) else ()

    part: Any = Part()
    assert answering(part, value) is value
    assert answering_table(value) is None


def test_forms_are_of_the_class_that_they_stand_for():
    for value in (COUNTER, {1: 2}, {1, 2}, [1, 2], (1, 2)):
        made = answer(value)
        assert isinstance(made, type(value)) and made == value and stands_for(made) is type(value)
        assert freeze(Owner(made), {})[0] == freeze(Owner(value), {})[0]
    assert type(answer(COUNTER) + Counter([1])) is Counter


def test_lists_stay_pytrees():
    made = answer([1.0, (2.0, 3.0)])
    assert pytree.tree_leaves(made) == [1.0, 2.0, 3.0]
    assert type(pytree.tree_map(lambda x: x, made)) is list
    assert pytree.tree_leaves_with_path(made)[0][0] == (pytree.SequenceKey(0),)
