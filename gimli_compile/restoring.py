"""Writes a train state back into live objects."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gimli_compile.errors import InputError, compose_message
from gimli_compile.model_view import ModelView
from gimli_compile.optimizer_view import OptimizerView, as_declared, plain_value
from gimli_compile.snapshot import GROUPS, Again, Container, Leaf, ParamRef, freeze
from gimli_compile.state import TrainState


def write_back(view: OptimizerView, live: ModelView, optimizer: Any, state: TrainState) -> None:
    """Copies parameters and buffers in place, and gives the optimizer the state's structure and values."""
    if type(optimizer) is not type(view.optimizer):
        raise InputError(
            compose_message(
                f"the state is that of a {type(view.optimizer).__name__}, "
                f"the optimizer is a {type(optimizer).__name__}",
                None,
                "A state has the structure of the optimizer that it was made for.",
                "Pass an optimizer of the same class, over the model's parameters.",
            )
        )
    groups = sum(len(g["params"]) for g in optimizer.param_groups), len(optimizer.param_groups)
    if groups != (sum(len(g["params"]) for g in view.optimizer.param_groups), len(view.optimizer.param_groups)):
        raise InputError(
            compose_message(
                "the optimizer has other parameter groups than the state",
                None,
                "A state has the structure of the optimizer that it was made for.",
                "Create the optimizer with the same groups.",
            )
        )
    with torch.no_grad():
        for name, value in state.params.items():
            live.live_params[name].copy_(value.detach())
        for name, value in state.buffers.items():
            live.live_buffers[name].copy_(value.detach())
    _write_optimizer(view, live, optimizer, state)


def _write_optimizer(view: OptimizerView, live: ModelView, optimizer: Any, state: TrainState) -> None:
    root = state.opt_state.skeleton.root
    _, present = freeze(optimizer, live.param_names)
    writing = _Writing(state, live.live_params, {**view.values, **present})
    writing.made[root.index] = optimizer
    attributes = writing.attributes_of(root, optimizer)
    _write_groups(optimizer, attributes.pop(GROUPS), state)
    vars(optimizer).update(attributes)


class _Writing:
    """Builds what a live optimizer is to hold; its own objects and parameters are filled, not replaced."""

    def __init__(self, state: TrainState, params: Mapping[str, torch.Tensor], present: Mapping[str, Any]) -> None:
        self.state = state.opt_state
        self.params = params
        self.present = present
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
        if isinstance(part, Again):
            return self.made[part.index]
        return self._container(part, there) if isinstance(part, Container) else part

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
        pairs = [(self.build(key, None) if isinstance(key, ParamRef) else key, item) for key, item in part.items]
        self.made[part.index] = part.make([(key, self.build(item, _item(there, key))) for key, item in pairs])
        return self.made[part.index]

    def attributes_of(self, part: Container, owner: Any) -> dict[str, Any]:
        """Builds the attributes of an object."""
        return {key: self.build(item, vars(owner).get(key)) for key, item in part.items}


def _item(container: Any, key: Any) -> Any:
    """Returns what a live container has at a key, None if it has nothing there."""
    if isinstance(container, dict):
        return container.get(key)
    if isinstance(container, (list, tuple, deque)) and key < len(container):
        return container[key]
    return None


def _write_groups(optimizer: Any, groups: list[dict[str, Any]], state: TrainState) -> None:
    """Writes the entries of the groups that are state; with a group for each parameter, from the first of each."""
    at = 0
    for index, group in enumerate(optimizer.param_groups):
        source = groups[at] if len(groups) != len(optimizer.param_groups) else groups[index]
        place = at if len(groups) != len(optimizer.param_groups) else index
        group.update({key: value for key, value in source.items() if _is_state(f"groups.{place}.{key}", state)})
        at += len(group["params"])


def _is_state(path: str, state: TrainState) -> bool:
    return any(known == path or known.startswith(path + ".") for known in state.opt_state)
