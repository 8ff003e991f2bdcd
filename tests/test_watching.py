"""Whether live objects still hold what they held: every kind of change is seen, and equal is not the same."""

from collections import OrderedDict, deque

import pytest
import torch

from gimli_compile.watching import Watch


class Named(dict):
    """A dict with attributes."""


class Plain:
    """An object with attributes."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)


def objects():
    first, second = torch.zeros(2), torch.zeros(2)
    return {
        "dict": {"a": 1000.5, "b": first},
        "ordered": OrderedDict(a=first),
        "named": Named(a=2.5),
        "list": [first, second],
        "other list": [torch.ones(1)],
        "deque": deque([1, 2]),
        "set": {"x", "y"},
        "object": Plain(rate=0.1, part=first),
        "tensor": first,
    }


def replace_attributes(live):
    live["object"].__dict__ = dict(live["object"].__dict__)


CHANGES = {
    "a value": lambda live: live["dict"].update(a=2000.5),
    "an equal value": lambda live: live["dict"].update(a=float("1000.5")),
    "an equal tensor": lambda live: live["ordered"].update(a=torch.zeros(1)),
    "a key": lambda live: live["dict"].update(c=1),
    "a key for another": lambda live: live["dict"].update(c=live["dict"].pop("b")),
    "one less": lambda live: live["list"].pop(),
    "from one list to the next": lambda live: live["other list"].insert(0, live["list"].pop()),
    "the order": lambda live: live["list"].reverse(),
    "a deque": lambda live: live["deque"].append(3),
    "a set": lambda live: live["set"].add("z"),
    "an attribute": lambda live: setattr(live["object"], "rate", 0.2),
    "an attribute of a dict": lambda live: setattr(live["named"], "rate", 0.2),
    "all attributes at once": replace_attributes,
    "what is differentiated": lambda live: live["tensor"].requires_grad_(),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name):
    live = objects()
    watch = Watch(live.values())
    assert watch.holds() and watch.holds()
    CHANGES[name](live)
    assert not watch.holds()


def test_values_in_the_memory_of_tensors_are_not_watched():
    live = objects()
    watch = Watch(live.values())
    live["tensor"].add_(1)
    assert watch.holds()


def test_what_cannot_be_read_never_holds():
    assert not Watch([5]).holds()
    assert not Watch([object()]).holds()
