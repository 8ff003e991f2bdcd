"""Writes a train state back into live objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gimli_compile.errors import InputError, compose_message
from gimli_compile.model_view import ModelView
from gimli_compile.optimizer_view import OptimizerView, plain_value
from gimli_compile.snapshot import GROUPS, Again, Container, Leaf, ParamRef, freeze
from gimli_compile.state import TrainState


def write_back(view: OptimizerView, model: nn.Module, optimizer: Any, state: TrainState) -> None:
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
    live = ModelView(model)
    with torch.no_grad():
        for name, value in state.params.items():
            live.live_params[name].copy_(value.detach())
        for name, value in state.buffers.items():
            live.live_buffers[name].copy_(value.detach())
    _write_optimizer(view, live, optimizer, state)


def _write_optimizer(view: OptimizerView, live: ModelView, optimizer: Any, state: TrainState) -> None:
    skeleton = state.opt_state.skeleton
    _, present = freeze(optimizer, live.param_names)
    params = live.live_params
    made: dict[int, Any] = {}

    def value_of(leaf: Leaf) -> Any:
        if leaf.path in state.opt_state.values_by_path:
            return plain_value(state.opt_state[leaf.path], leaf.kind)
        return present.get(leaf.path, view.values.get(leaf.path))

    def build(part: Any) -> Any:
        if isinstance(part, Leaf):
            return value_of(part)
        if isinstance(part, ParamRef):
            return params[part.name]
        if isinstance(part, Again):
            return made[part.index]
        if not isinstance(part, Container):
            return part
        if part.owner is not None and part.owner is not view.optimizer:
            made[part.index] = part.owner
            vars(part.owner).update({key: build(item) for key, item in part.items})
            return part.owner
        pairs = [(build(key) if isinstance(key, ParamRef) else key, build(item)) for key, item in part.items]
        made[part.index] = part.make(pairs)
        return made[part.index]

    attributes = build(skeleton.root)
    groups = attributes.pop(GROUPS)
    _write_groups(optimizer, groups, state)
    vars(optimizer).update(attributes)


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
