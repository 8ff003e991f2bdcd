"""An optimizer seen from outside: its structure, its numbers, and one step of it on other values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from types import FunctionType
from typing import Any

import torch

from gimli_compile.assignments import assigned_paths
from gimli_compile.differentiable_forms import differentiable_forms
from gimli_compile.environment import Environment
from gimli_compile.errors import CaptureError, InputError, compose_message
from gimli_compile.host_draws import generators_forked
from gimli_compile.kept_attributes import kept_paths, read_kept
from gimli_compile.lazy_copies import lazy_copy
from gimli_compile.literals import held_functions
from gimli_compile.live_gradients import live_gradients_kept
from gimli_compile.owned_generators import generators_kept
from gimli_compile.provenance import raised_at, user_source
from gimli_compile.row_gradients import as_eager
from gimli_compile.schedulers import Schedulers
from gimli_compile.several_optimizers import members
from gimli_compile.shared_memory import refuse_shared_memory
from gimli_compile.skeleton import (
    Companion,
    Container,
    Leaf,
    Skeleton,
    Value,
    containers_of,
    leaves_of,
    opaque_of,
    owners_of,
    parts_by_parameter,
)
from gimli_compile.snapshot import GROUPS, freeze, grads_set, installed, is_number
from gimli_compile.state import OptState, Tensors, to_tensor
from gimli_compile.update_values import UpdateInputs, UpdateOutputs
from gimli_compile.watching import Watch

_MADE_UP_LOSSES = (0.0, 1.0, -1.0)  # a better and a worse one, whichever is better
_IMPLEMENTATION_FLAGS = ("fused", "differentiable")


class OptimizerView:
    """The live optimizer, read and run without being changed. Parameters are known by their names in the model."""

    def __init__(
        self,
        optimizer: Any,
        names: Mapping[int, str],
        *,
        per_parameter: bool = False,
        opaque: Collection[int] = (),
        schedulers: Schedulers | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.schedulers = Schedulers() if schedulers is None else schedulers
        self.companions = self.schedulers.companions
        self.names = names
        self.per_parameter = per_parameter
        self.opaque = opaque
        self.sparse = False
        self.environment = Environment()
        self._watch: Watch | None = None
        self.last_checked: Any = None  # what `read` gave when the options were compared last
        self.skeleton, self.values = self.read()
        self.options = self.read_options()
        self.changing = set()

    @property
    def changing(self) -> set[str]:
        """The paths of the numbers that a step was seen to change."""
        return self._changing

    @changing.setter
    def changing(self, paths: set[str]) -> None:
        self._changing = paths | kept_paths(self.skeleton)
        self._hyper_leaves = [leaf for leaf in leaves_of(self.skeleton) if self._is_hyper(leaf)]
        self.hyper_paths = {leaf.path for leaf in self._hyper_leaves}

    # ------------------------------------------------------------------ reading

    def read(self) -> tuple[Skeleton, dict[str, Value]]:
        """Returns the present structure and values of the live optimizer."""
        read_kept(self.companions)
        if self._watch is not None and self._watch.holds():
            return self._last
        visited: list[Any] = []
        with self._split_groups():
            made = freeze(self.optimizer, self.names, self.opaque, self.companions, visited)
        refuse_shared_memory({name: p for p, name in self.live_params()}, made[1], "state")
        if not self.per_parameter:  # then the groups that were read exist no longer
            self._watch, self._last = Watch(visited), made
        return made

    @contextmanager
    def _split_groups(self) -> Iterator[None]:
        """Shows every parameter as a group of its own, if that was asked for, to all who hold the groups."""
        if not self.per_parameter:
            yield
            return
        groups = self.optimizer.param_groups
        split = {id(group): [{**group, "params": [p]} for p in group["params"]] for group in groups}
        owners = owners_of(freeze(self.optimizer, self.names, self.opaque)[0])
        before = [(owner, vars(owner)[GROUPS]) for owner in owners if isinstance(vars(owner).get(GROUPS), list)]
        for owner, held in before:
            vars(owner)[GROUPS] = [part for group in held for part in split.get(id(group), [group])]
        try:
            yield
        finally:
            for owner, held in before:
                vars(owner)[GROUPS] = held

    def read_options(self) -> tuple[Any, ...]:
        """Returns what is neither number nor tensor in the parameter groups: the options a program was made for."""
        return tuple(
            (
                *((key, _option(value)) for key, value in group.items() if key != "params"),
                ("params", tuple(self.names.get(id(p), "?") for p in group["params"])),
            )
            for group in self.optimizer.param_groups
        )

    def _is_hyper(self, leaf: Leaf) -> bool:
        """Tells whether a leaf is a hyperparameter: what no step was seen to change, outside of `state`.

        That is any number, and a floating tensor that is a parameter, requires a gradient or is in a group.
        """
        return leaf.path not in self.changing and leaf.path not in self._state_paths and self._is_declared(leaf)

    def _is_declared(self, leaf: Leaf) -> bool:
        if leaf.kind != "tensor":
            return True
        value = self.values[leaf.path]
        declared = leaf.path.startswith("groups.") or leaf.is_parameter or leaf.requires_grad
        return declared and isinstance(value, torch.Tensor) and value.is_floating_point()

    @cached_property
    def _state_paths(self) -> set[str]:
        """The paths below `state`, and of all that is kept for a parameter."""
        roots = [self.skeleton.root, *map(self.part_of, members(self.optimizer))]
        state = [part for root in roots for key, part in root.items if key == "state"]
        kept = [part for part in state + parts_by_parameter(self.skeleton)]
        return {leaf.path for part in kept for leaf in leaves_of(Skeleton(part, ()))}

    def part_of(self, optimizer: Any) -> Container:
        """Returns the part of the skeleton for one of several optimizers, or for the one."""
        return next(part for part in containers_of(self.skeleton) if part.owner is optimizer)

    def hyper_leaves(self) -> list[Leaf]:
        """Returns the leaves that are hyperparameters."""
        return self._hyper_leaves

    def opt_state(self) -> OptState:
        """Returns copies of the live state."""
        skeleton, values = self.read()
        kept = [leaf for leaf in leaves_of(skeleton) if leaf.path not in self.hyper_paths]
        found = {leaf.path: to_tensor(values[leaf.path], leaf.kind) for leaf in kept}
        return OptState(skeleton, share_counters(found, {leaf.path for leaf in kept if leaf.kind == "float"}))

    def classes(self) -> list[type]:
        """Returns the classes of the objects that make up the optimizer."""
        return [type(owner) for owner in owners_of(self.skeleton)]

    def functions(self) -> list[FunctionType]:
        """Returns the functions that the optimizer and the schedulers hold."""
        return held_functions(opaque_of(self.skeleton))

    def companion_paths(self) -> set[str]:
        """Returns the paths of the values of the schedulers."""
        parts = [part for key, part in self.skeleton.root.items if isinstance(key, Companion)]
        return {leaf.path for part in parts for leaf in leaves_of(Skeleton(part, ()))}

    def group_names(self) -> list[list[str]]:
        """Returns the names of the parameters of each group, as the groups are shown."""
        groups = [[self.names[id(p)] for p in group["params"]] for group in self.optimizer.param_groups]
        return [[name] for group in groups for name in group] if self.per_parameter else groups

    def param_names(self) -> list[str]:
        """Returns the names of the optimizer's parameters, each once, in the order of its groups."""
        return list(dict.fromkeys(name for _, name in self.live_params()))

    # ------------------------------------------------------------------ running

    def observe(
        self,
        execute: Callable[[], Any],
        grads: Mapping[str, torch.Tensor | None],
        hollow: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> UpdateOutputs:
        """Runs three steps on copies, and takes the numbers that change for state. Returns what the last one left.

        With `hollow`, parameters and what is state in any case are what it makes of them, in place of copies.
        """
        live = {name: p for p, name in self.live_params()}
        changing: set[str] = set()
        open_paths = self._open_paths()
        skeleton = self.skeleton
        values = {
            path: hollow(value)
            if hollow is not None and path not in open_paths and isinstance(value, torch.Tensor) and value.numel() > 1
            else _copied(value)
            for path, value in self.values.items()
        }
        params: Tensors = {name: as_leaf(p, requires_grad=p.requires_grad, copy=hollow) for name, p in live.items()}
        after = UpdateOutputs(params, skeleton, values)
        with generators_forked():
            for count in range(3):
                steps = partial(self._observed, execute, count, changing)
                try:
                    after = self.run(after.skeleton, after.params, grads, after.values, steps)
                except CaptureError:
                    if not (count and self.companions) or hollow is not None:
                        raise
                    break  # a schedule that ends
                found = {path: value for path, value in after.values.items() if path in open_paths}
                changing |= {path for path, value in found.items() if _differs(value, self.values[path])}
        self.changing = changing & set(self.values)
        return after

    def _open_paths(self) -> set[str]:
        """Returns the paths of what is a hyperparameter unless a step changes it."""
        leaves = [leaf for leaf in leaves_of(self.skeleton) if leaf.path not in self._state_paths]
        return {leaf.path for leaf in leaves if self._is_declared(leaf)}

    def _observed(self, execute: Callable[[], Any], count: int, assigned: set[str]) -> None:
        """Takes a step; adds the paths of what the schedulers assign in the first, if only what was there before."""
        execute()
        step = partial(self.schedulers.step, torch.tensor(_MADE_UP_LOSSES[count], dtype=torch.float64))
        if count or not self.companions:
            step()
        else:
            assigned |= assigned_paths(self.skeleton, self.optimizer, step)

    def live_params(self) -> Iterator[tuple[torch.Tensor, str]]:
        """Yields the live parameters of the optimizer with their names."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                yield p, self.names[id(p)]

    def step(self) -> None:
        """Runs the optimizer's own step, and then those of the schedulers."""
        self.optimizer.step()
        self.schedulers.follow()

    @property
    def step_name(self) -> str:
        """What `step` runs, for messages."""
        parts = (*members(self.optimizer), *self.schedulers)
        return " and ".join(f"`{type(part).__name__}.step`" for part in parts)

    def run(
        self,
        skeleton: Skeleton,
        params: Mapping[str, torch.Tensor],
        grads: Mapping[str, torch.Tensor | None],
        values: Mapping[str, Any],
        execute: Callable[[], None],
        **options: Any,
    ) -> UpdateOutputs:
        """Runs `execute` with the optimizer holding these values in place of its own; live objects come back unchanged.

        `params` are copied into leaves that require gradients as the live ones do; `values` are used as they are;
        `options` are those of `installed`.
        """
        requires = {name: p.requires_grad for p, name in self.live_params()}
        leaves: dict[str, torch.Tensor] = {
            name: value
            if isinstance(value, torch.nn.Parameter)
            else as_leaf(value, requires_grad=requires[name], copy=lazy_copy)
            for name, value in params.items()
            if name in requires
        }
        names = {id(leaf): name for name, leaf in leaves.items()}
        held = {name: grads.get(name) for name in leaves}
        fill = installed(skeleton, lambda leaf: as_declared(leaf, values[leaf.path]), leaves.__getitem__, **options)
        live = live_gradients_kept([param for param, _ in self.live_params()])
        with live, generators_kept(skeleton), fill, grads_set(leaves, held), differentiable_forms():
            with flags_cleared(self.optimizer):
                self.execute(execute)
            after, found = freeze(self.optimizer, names, self.opaque, self.companions)
        refuse_shared_memory(leaves, found, "state")
        return UpdateOutputs(leaves, after, found)

    def execute(self, execute: Callable[[], Any]) -> Any:
        """Runs the user's code; what it raises is a CaptureError with its line."""
        try:
            return execute()
        except (CaptureError, InputError):
            raise
        except Exception as error:
            raise CaptureError(
                compose_message(
                    f"{self.step_name} raised {type(error).__name__}: {error}",
                    raised_at(error) or user_source(),
                    "The optimizer's own step was run on copies of its parameters and state.",
                    "Check that the same step runs in eager mode with these options and gradients.",
                )
            ) from error

    def replay(self, inputs: UpdateInputs) -> UpdateOutputs:
        """Runs the optimizer's own code, not captured, from plain values."""
        grads = {name: as_eager(grad) for name, grad in inputs.grads.items()}
        return self.run(inputs.opt_state.skeleton, inputs.params, grads, plain_values(inputs), self.step)

    def refuse_memory(self, inputs: UpdateInputs) -> None:
        """Refuses a step that reads what the step before left outside of the state; an update alone has none."""


def as_leaf(
    value: torch.Tensor, *, requires_grad: bool, copy: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> torch.nn.Parameter:
    """Returns a parameter with a copy of the value."""
    copied = value.detach().clone() if copy is None else copy(value)
    return torch.nn.Parameter(copied, requires_grad)


def plain_values(inputs: UpdateInputs) -> dict[str, Any]:
    """Returns all values of an update's optimizer as its own code has them, by path."""
    leaves = leaves_of(inputs.opt_state.skeleton)
    values = {leaf: inputs.value_of(leaf) for leaf in leaves}
    return {f.path: lazy_copy(v) if f.kind == "tensor" else plain_value(v, f.kind) for f, v in values.items()}


def as_declared(leaf: Leaf, value: Any) -> Any:
    """Returns a value as a parameter, or as a tensor that requires a gradient, where the optimizer holds one."""
    if leaf.is_parameter and not isinstance(value, torch.nn.Parameter):
        return as_leaf(value, requires_grad=leaf.requires_grad)
    if leaf.requires_grad and not value.requires_grad:
        return value.detach().clone().requires_grad_()
    return value


def plain_value(value: torch.Tensor, kind: str) -> Any:
    """Returns a leaf's value as the optimizer's own code has it."""
    if kind == "tensor":
        return value.detach().clone()
    number = value.detach().reshape(-1)[0].item()
    return int(number) if kind == "int" and number == int(number) else float(number)


def share_counters(values: Tensors, apart: Collection[str] = ()) -> Tensors:
    """Lets equal 0-dim tensors of one kind be one tensor, so that a program computes them once.

    Those of `apart` stay tensors of their own: floats, such as learning rates, are differentiated one by one.
    """
    shared: dict[Any, torch.Tensor] = {}
    made: Tensors = {}
    for path, value in values.items():
        if value.dim() == 0 and value.device.type == "cpu" and path not in apart:
            key = (path.rsplit(".", 1)[-1], value.dtype, value.item())
            value = shared.setdefault(key, value)
        made[path] = value
    return made


def _option(value: Any) -> Any:
    if is_number(value):
        return "number"
    if isinstance(value, torch.Tensor):
        return ("tensor", value.dtype, tuple(value.shape))
    if isinstance(value, (list, tuple)):
        return tuple(map(_option, value))
    return value if isinstance(value, (bool, str, type(None))) else id(value)


def _copied(value: Value) -> Value:
    return to_tensor(value, "tensor") if isinstance(value, torch.Tensor) else value


def dense_form(value: torch.Tensor) -> torch.Tensor:
    """Returns a detached tensor, a sparse one as a dense copy."""
    value = value.detach()
    return value.to_dense() if value.layout is torch.sparse_coo else value


def _differs(after: Value, before: Value) -> bool:
    if isinstance(after, torch.Tensor) and isinstance(before, torch.Tensor):
        return after.shape != before.shape or not torch.equal(dense_form(after), dense_form(before))
    if isinstance(after, torch.Tensor) or isinstance(before, torch.Tensor):
        return True
    return after != before and not (after != after and before != before)


@contextmanager
def flags_cleared(optimizer: Any) -> Iterator[None]:
    """Turns off flags of torch.optim that choose an implementation of the same mathematics without derivatives."""
    cleared = []
    defaults = [getattr(one, "defaults", {}) for one in members(optimizer)]
    for options in (*getattr(optimizer, GROUPS, ()), *defaults):
        for flag in _IMPLEMENTATION_FLAGS:
            if options.get(flag) is True:
                options[flag] = False
                cleared.append((options, flag))
    yield
    for options, flag in cleared:
        options[flag] = True
