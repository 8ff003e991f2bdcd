"""Writes a train state back into live objects."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from gimli_compile.errors import InputError, compose_message
from gimli_compile.kept_attributes import KeptAttributes
from gimli_compile.model_view import ModelView
from gimli_compile.optimizer_view import OptimizerView, as_declared, plain_value
from gimli_compile.schedulers import SCHEDULER, Schedulers
from gimli_compile.several_optimizers import SeveralOptimizers, kind_of, members
from gimli_compile.skeleton import Again, Companion, Container, IdRef, Leaf, ParamRef, containers_of, is_opaque
from gimli_compile.snapshot import GROUPS, freeze
from gimli_compile.state import TrainState


def write_back(view: OptimizerView, live: ModelView, optimizer: Any, state: TrainState, schedulers: Schedulers) -> None:
    """Copies parameters and buffers in place, and gives optimizer and scheduler the state's structure and values."""
    each, own = members(optimizer), members(view.optimizer)
    if list(map(type, each)) != list(map(type, own)) or _places(optimizer) != _places(view.optimizer):
        raise InputError(
            compose_message(
                f"the state is that of a {kind_of(view.optimizer)}, the optimizer is a {kind_of(optimizer)}",
                None,
                "A state has the structure of the optimizer that it was made for.",
                "Pass an optimizer of the same class, over the model's parameters; several in the same structure.",
            )
        )
    if [_count(one) for one in each] != [_count(one) for one in own]:
        raise InputError(
            compose_message(
                "the optimizer has other parameter groups than the state",
                None,
                "A state has the structure of the optimizer that it was made for.",
                "Create the optimizer with the same groups.",
            )
        )
    kept = {n: one.of(live.modules_by_path()) for n, one in view.companions.items() if isinstance(one, KeptAttributes)}
    companions = {**_companions(view, optimizer, schedulers), **kept}
    with torch.no_grad():
        for name, value in state.params.items():
            live.live_params[name].copy_(value.detach())
        for name, value in state.buffers.items():
            live.live_buffers[name].copy_(value.detach())
    _write_optimizer(view, live, optimizer, companions, state)
    for one in kept.values():
        one.write()


def _places(optimizer: Any) -> list[str]:
    return list(vars(optimizer)) if isinstance(optimizer, SeveralOptimizers) else []


def _count(optimizer: Any) -> tuple[int, int]:
    return sum(len(group["params"]) for group in optimizer.param_groups), len(optimizer.param_groups)


def _companions(view: OptimizerView, optimizer: Any, schedulers: Schedulers) -> dict[str, Any]:
    """Returns the objects to write beside the optimizer."""
    if not schedulers.companions and _is_that_of(view, optimizer):
        return view.companions
    found = [type(one) for one in schedulers]
    if found == [type(one) for one in view.schedulers] and _objects(schedulers.companions) == _objects(view.companions):
        return schedulers.companions
    raise InputError(
        compose_message(
            f"the state is that of {view.step_name}{_and_names(view.companions)}, and the scheduler passed is "
            f"{_names(found)}{_and_names(schedulers.companions)}",
            None,
            "A state holds the place in the schedule that its learning rates belong to, and what objects hold.",
            "Pass those of the optimizer: `load_into(model, optimizer, state, scheduler, objects)`.",
        )
    )


def _objects(companions: Mapping[str, Any]) -> dict[str, type]:
    others = {name: one for name, one in companions.items() if not isinstance(one, KeptAttributes)}
    return {name: type(one) for name, one in others.items() if name != SCHEDULER}


def _and_names(companions: Mapping[str, Any]) -> str:
    return "".join(f" and {kind.__name__} {name!r}" for name, kind in _objects(companions).items())


def _names(classes: list[type]) -> str:
    return ", ".join(f"a {kind.__name__}" for kind in classes) or "none"


def _write_optimizer(
    view: OptimizerView, live: ModelView, optimizer: Any, companions: dict[str, Any], state: TrainState
) -> None:
    root = state.opt_state.skeleton.root
    opaque = set(map(id, live.modules()))
    _, present = freeze(optimizer, live.param_names, opaque, companions)
    present = {**view.values, **present}
    writing = _Writing(state, live.live_params, present, elsewhere=not _is_that_of(view, optimizer))
    writing.made[root.index] = optimizer
    start = 0
    for one, own in zip(members(optimizer), members(view.optimizer), strict=True):
        part = next(part for part in containers_of(state.opt_state.skeleton) if part.owner is own)
        writing.made[part.index] = one
        attributes = writing.attributes_of(part, one)
        groups = attributes.pop(GROUPS)
        _write_groups(one, groups, state, start)
        vars(one).update(attributes)
        start += len(groups)
    for key, item in root.items:
        if isinstance(key, Companion):
            writing.build(item, companions[key.name])


def _is_that_of(view: OptimizerView, optimizer: Any) -> bool:
    return all(one is own for one, own in zip(members(optimizer), members(view.optimizer), strict=True))


class _Writing:
    """Builds what a live optimizer is to hold; its own objects and parameters are filled, not replaced.

    An optimizer elsewhere, not that of the state, also keeps its own functions, and what else is known by identity.
    """

    def __init__(
        self, state: TrainState, params: Mapping[str, torch.Tensor], present: Mapping[str, Any], *, elsewhere: bool
    ) -> None:
        self.state = state.opt_state
        self.params = params
        self.present = present
        self.elsewhere = elsewhere
        self.made: dict[int, Any] = {}
        self.values: dict[str, Any] = {}

    def build(self, part: Any, there: Any) -> Any:
        """Builds a part; `there` is what the optimizer has in its place, and None if there is nothing."""
        if isinstance(part, Leaf):
            if part.path not in self.values:
                self.values[part.path] = self._value_of(part, there)
            return self.values[part.path]
        if isinstance(part, ParamRef):
            return self.params[part.name]
        if isinstance(part, IdRef):
            return id(self.params[part.name])
        if isinstance(part, Again):
            return self.made[part.index]
        if isinstance(part, Container):
            return self._container(part, there)
        return there if self.elsewhere and is_opaque(part) and type(there) is type(part) else part

    def _value_of(self, leaf: Leaf, there: Any) -> Any:
        if leaf.path not in self.state.values_by_path:
            return self.present.get(leaf.path)
        value = plain_value(self.state[leaf.path], leaf.kind)
        if not isinstance(there, nn.Parameter):
            return as_declared(leaf, value)
        with torch.no_grad():
            return there.copy_(value)

    def _container(self, part: Container, there: Any) -> Any:
        if part.owner is not None:
            owner = there if type(there) is type(part.owner) else object.__new__(type(part.owner))
            self.made[part.index] = owner
            vars(owner).update(self.attributes_of(part, owner))
            return owner
        pairs = [(self.build(key, None), item) for key, item in part.items]
        self.made[part.index] = part.make([(key, self.build(item, _item(there, key))) for key, item in pairs])
        return self.made[part.index]

    def attributes_of(self, part: Container, owner: Any) -> dict[str, Any]:
        """Builds the attributes of an object."""
        pairs = [(key, item) for key, item in part.items if not isinstance(key, Companion)]
        return {key: self.build(item, vars(owner).get(key)) for key, item in pairs}


def _item(container: Any, key: Any) -> Any:
    """Returns what a live container has at a key, None if it has nothing there."""
    if isinstance(container, dict):
        return container.get(key)
    if isinstance(container, (list, tuple, deque)) and key < len(container):
        return container[key]
    return getattr(container, key) if isinstance(container, partial) else None


def _write_groups(optimizer: Any, groups: list[dict[str, Any]], state: TrainState, start: int) -> None:
    """Writes the entries of the groups that are state; with a group for each parameter, from the first of each.

    `start` is the number of the first group.
    """
    at = 0
    for index, group in enumerate(optimizer.param_groups):
        source = groups[at] if len(groups) != len(optimizer.param_groups) else groups[index]
        place = start + (at if len(groups) != len(optimizer.param_groups) else index)
        group.update({key: value for key, value in source.items() if _is_state(f"groups.{place}.{key}", state)})
        at += len(group["params"])


def _is_state(path: str, state: TrainState) -> bool:
    return any(known == path or known.startswith(path + ".") for known in state.opt_state)
