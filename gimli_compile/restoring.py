"""Writes a train state back into live objects."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gimli_compile.errors import InputError, compose_message
from gimli_compile.model_view import ModelView
from gimli_compile.optimizer_view import OptimizerView, plain_value, schedulers_of
from gimli_compile.snapshot import GROUPS, Again, Companion, Container, Leaf, ParamRef, freeze, is_opaque
from gimli_compile.state import TrainState


def write_back(view: OptimizerView, model: nn.Module, optimizer: Any, state: TrainState, scheduler: Any = None) -> None:
    """Copies parameters and buffers in place, and gives optimizer and scheduler the state's structure and values."""
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
    companions = _companions(view, optimizer, scheduler)
    live = ModelView(model)
    with torch.no_grad():
        for name, value in state.params.items():
            live.live_params[name].copy_(value.detach())
        for name, value in state.buffers.items():
            live.live_buffers[name].copy_(value.detach())
    _write_optimizer(view, live, optimizer, companions, state)


def _companions(view: OptimizerView, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Returns the objects to write beside the optimizer."""
    if scheduler is None and optimizer is view.optimizer:
        return view.companions
    found = [type(one) for one in schedulers_of(scheduler)]
    if found == [type(one) for one in view.schedulers]:
        return {name: scheduler for name in view.companions}
    raise InputError(
        compose_message(
            f"the state is that of {view.step_name}, and the scheduler passed is {_names(found)}",
            None,
            "A state holds the place in the schedule that its learning rates belong to.",
            "Pass the schedulers of the optimizer: `load_into(model, optimizer, state, scheduler)`.",
        )
    )


def _names(classes: list[type]) -> str:
    return ", ".join(f"a {kind.__name__}" for kind in classes) or "none"


def _write_optimizer(
    view: OptimizerView, live: ModelView, optimizer: Any, companions: dict[str, Any], state: TrainState
) -> None:
    skeleton = state.opt_state.skeleton
    there, present = freeze(optimizer, live.param_names, companions)
    targets = _owners_by_path(there.root)
    places = {id(owner): targets.get(path, owner) for path, owner in _owners_by_path(skeleton.root).items()}
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
        if part.owner is not None:
            target = made[part.index] = places[id(part.owner)]
            attributes = {key: build(item) for key, item in part.items if not _is_elsewhere(part, target, key, item)}
            if target is optimizer:
                _write_groups(optimizer, attributes.pop(GROUPS), state)
            vars(target).update({key: item for key, item in attributes.items() if not isinstance(key, Companion)})
            return target
        pairs = [(build(key) if isinstance(key, ParamRef) else key, build(item)) for key, item in part.items]
        made[part.index] = part.make(pairs)
        return made[part.index]

    build(skeleton.root)


def _owners_by_path(part: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Returns the live objects of a part of a skeleton by the keys that lead to them."""
    found = {}
    if isinstance(part, Container):
        if part.owner is not None:
            found[path] = part.owner
        for key, item in part.items:
            found.update(_owners_by_path(item, (*path, key)))
    return found


def _is_elsewhere(part: Container, target: Any, key: Any, item: Any) -> bool:
    """Tells whether an attribute is a function of the state's own object, in the place of which another has its own."""
    return target is not part.owner and is_opaque(item) and key in vars(target)


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
