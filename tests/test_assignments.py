"""What code assigns to groups and objects, told apart from what it only reads."""

from typing import Any

import torch

from gimli_compile.assignments import assigned_paths
from gimli_compile.snapshot import freeze


class Schedule:
    """Something that runs after an optimizer."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.rates = [0.1, 0.2]
        self.limit = 0.5
        self.inner: Any = None


def assigned(change, **group):
    """Returns what `change(schedule, group)` assigns."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.param_groups[0].update(group)
    schedule = Schedule(optimizer)
    schedule.inner = Schedule(optimizer)
    groups = [*optimizer.param_groups]
    skeleton, _ = freeze(optimizer, {id(weight): "w"}, companions={"scheduler": schedule})
    found = assigned_paths(skeleton, optimizer, lambda: change(schedule, optimizer.param_groups[0]))
    assert all(map(lambda now, before: now is before, optimizer.param_groups, groups))
    assert type(optimizer.param_groups[0]) is dict
    return found, optimizer.param_groups[0], schedule


def test_a_key_that_is_assigned_what_it_had():
    def change(schedule, group):
        group["lr"] = group["lr"]
        group.update(momentum=group["momentum"])

    assert assigned(change)[0] == {"groups.0.lr", "groups.0.momentum"}


def test_new_values_reach_the_group():
    def change(schedule, group):
        group["lr"] = 0.7
        del group["momentum"]

    _, group, _ = assigned(change)
    assert group["lr"] == 0.7 and "momentum" not in group


def test_of_a_tuple_only_what_is_another_object():
    def change(schedule, group):
        group["betas"] = (group["betas"][0] * 1.0 + 0.0, group["betas"][1])

    found, _, _ = assigned(change, betas=(0.5, 0.9))
    assert found == {"groups.0.betas.0"}


def test_a_tensor_that_is_written_in_place():
    def change(schedule, group):
        group["lr"].fill_(group["lr"].clone())

    assert assigned(change, lr=torch.tensor(0.1))[0] == {"groups.0.lr"}


def test_attributes_that_are_other_objects():
    def change(schedule, group):
        schedule.rates = list(schedule.rates)
        schedule.inner.limit = schedule.limit * 2

    assert assigned(change)[0] == {"scheduler.rates.0", "scheduler.rates.1", "scheduler.inner.limit"}


def test_reading_assigns_nothing():
    def change(schedule, group):
        return group["lr"] * schedule.limit + schedule.rates[0] + group.get("nothing", 0)

    assert assigned(change)[0] == set()


def test_groups_come_back_when_the_code_raises():
    def change(schedule, group):
        group["lr"] = 0.7
        raise ValueError("no")

    try:
        assigned(change)
    except ValueError as error:
        assert str(error) == "no"
    else:
        raise AssertionError("it raised nothing")
