"""An optimizer seen from outside: its structure, its numbers, and one step of it on other values."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType
from typing import Any

import torch

from gimli_compile.assignments import assigned_paths
from gimli_compile.errors import CaptureError, InputError, compose_message
from gimli_compile.literals import held_functions
from gimli_compile.provenance import user_source
from gimli_compile.slot import Role, Slot
from gimli_compile.snapshot import (
    GROUPS,
    Companion,
    Leaf,
    Skeleton,
    Value,
    freeze,
    grads_set,
    installed,
    is_number,
    leaves_of,
    opaque_of,
    owners_of,
)
from gimli_compile.state import OptState, Tensors, to_tensor

_IMPLEMENTATION_FLAGS = ("fused", "differentiable")


@dataclass(frozen=True)
class UpdateInputs:
    """What one update starts from. `hyper` is by path; a gradient may be None; `draws` are made unless given."""

    params: Tensors
    grads: Mapping[str, torch.Tensor | None]
    opt_state: OptState
    hyper: Mapping[str, torch.Tensor]
    draws: dict[Slot, torch.Tensor] = field(default_factory=dict)

    def by_slot(self) -> dict[Slot, torch.Tensor]:
        """Returns the values by slot."""
        found = {Slot(Role.PARAM, name): value for name, value in self.params.items()}
        found.update({Slot(Role.GRAD, name): grad for name, grad in self.grads.items() if grad is not None})
        found.update({Slot(Role.STATE, path): value for path, value in self.opt_state.items()})
        found.update({Slot(Role.HYPER, path): value for path, value in self.hyper.items()})
        return found

    def value_of(self, leaf: Leaf) -> torch.Tensor:
        """Returns the value for a leaf: state comes before hyperparameters."""
        value = self.opt_state.values_by_path.get(leaf.path)
        return self.hyper[leaf.path] if value is None else value

    def role_of(self, leaf: Leaf) -> Role:
        """Tells whether a leaf's value is state or a hyperparameter."""
        return Role.STATE if leaf.path in self.opt_state.values_by_path else Role.HYPER


@dataclass(frozen=True)
class UpdateOutputs:
    """What one update ends with: parameters by name, the structure, and the values by path."""

    params: dict[str, torch.Tensor]
    skeleton: Skeleton
    values: dict[str, Value]


class OptimizerView:
    """The live optimizer, read and run without being changed. Parameters are known by their names in the model."""

    def __init__(
        self, optimizer: Any, names: Mapping[int, str], *, per_parameter: bool = False, scheduler: Any = None
    ) -> None:
        self.optimizer = optimizer
        self.companions = {} if scheduler is None else {"scheduler": scheduler}
        self.schedulers = schedulers_of(scheduler)
        self.names = names
        self.per_parameter = per_parameter
        self.skeleton, self.values = self.read()
        self.options = self.read_options()
        self.changing = self._observe()

    # ------------------------------------------------------------------ reading

    def read(self) -> tuple[Skeleton, dict[str, Value]]:
        """Returns the present structure and values of the live optimizer."""
        with self._split_groups():
            return freeze(self.optimizer, self.names, self.companions)

    @contextmanager
    def _split_groups(self) -> Iterator[None]:
        """Shows every parameter as a group of its own, if that was asked for."""
        if not self.per_parameter:
            yield
            return
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [{**group, "params": [p]} for group in groups for p in group["params"]]
        try:
            yield
        finally:
            self.optimizer.param_groups = groups

    def read_options(self) -> tuple[Any, ...]:
        """Returns what is neither number nor tensor in the parameter groups: the options a program was made for."""
        return tuple(
            (
                *((key, _option(value)) for key, value in group.items() if key != "params"),
                ("params", tuple(self.names.get(id(p), "?") for p in group["params"])),
            )
            for group in self.optimizer.param_groups
        )

    def is_hyper(self, leaf: Leaf) -> bool:
        """Tells whether a leaf is a hyperparameter: a number that no step was seen to change, outside of `state`."""
        if leaf.path in self.changing or leaf.path in self._state_paths():
            return False
        if leaf.kind != "tensor":
            return True
        value = self.values[leaf.path]
        return leaf.path.startswith("groups.") and isinstance(value, torch.Tensor) and value.is_floating_point()

    def _state_paths(self) -> set[str]:
        if not hasattr(self, "_paths_in_state"):
            found = {key: part for key, part in self.skeleton.root.items}
            state = found.get("state")
            self._paths_in_state = (
                {leaf.path for leaf in leaves_of(Skeleton(state, ()))} if state is not None else set()
            )
        return self._paths_in_state

    def hyper_leaves(self) -> list[Leaf]:
        """Returns the leaves that are hyperparameters."""
        return [leaf for leaf in leaves_of(self.skeleton) if self.is_hyper(leaf)]

    def opt_state(self) -> OptState:
        """Returns copies of the live state."""
        skeleton, values = self.read()
        kept = [leaf for leaf in leaves_of(skeleton) if not self._is_live_hyper(leaf)]
        found = {leaf.path: to_tensor(values[leaf.path], leaf.kind) for leaf in kept}
        return OptState(skeleton, share_counters(found, {leaf.path for leaf in kept if leaf.kind == "float"}))

    def _is_live_hyper(self, leaf: Leaf) -> bool:
        return leaf.path in self.values and self.is_hyper(leaf)

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
        """Returns the names of the optimizer's parameters, in the order of its groups."""
        return [self.names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    # ------------------------------------------------------------------ running

    def _observe(self) -> set[str]:
        """Runs steps on copies with made-up gradients and returns the paths of the numbers that change."""
        live = {name: p for p, name in self.live_params()}
        generator = torch.Generator().manual_seed(0)
        grads = {name: made_up_gradient(p, generator) for name, p in live.items() if p.requires_grad}
        changing: set[str] = set()
        skeleton, values = self.skeleton, {path: _copied(value) for path, value in self.values.items()}
        params = {name: p.detach().clone() for name, p in live.items()}
        with torch.random.fork_rng(devices=[]):
            for count in range(3):
                watched = self.schedulers and not count
                execute = partial(self._watch_schedulers, changing) if watched else self.step
                try:
                    after = self.run(skeleton, params, grads, values, execute)
                except CaptureError:
                    if not (count and self.schedulers):
                        raise
                    break  # a schedule that ends
                changing |= {p for p, value in after.values.items() if _differs(value, self.values.get(p, value))}
                skeleton, values, params = after.skeleton, after.values, after.params
        return changing & set(self.values)

    def _watch_schedulers(self, assigned: set[str]) -> None:
        """Takes a step and adds the paths of what the schedulers assign, if only what was there before."""
        self.optimizer.step()
        assigned |= assigned_paths(self.skeleton, self.optimizer, self._step_schedulers)

    def live_params(self) -> Iterator[tuple[torch.Tensor, str]]:
        """Yields the live parameters of the optimizer with their names."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                yield p, self.names[id(p)]

    def step(self) -> None:
        """Runs the optimizer's own step, and then those of the schedulers."""
        self.optimizer.step()
        self._step_schedulers()

    def _step_schedulers(self) -> None:
        for scheduler in self.schedulers:
            scheduler.step()

    @property
    def step_name(self) -> str:
        """What `step` runs, for messages."""
        return " and ".join(f"`{type(part).__name__}.step`" for part in (self.optimizer, *self.schedulers))

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
            name: value if isinstance(value, torch.nn.Parameter) else as_leaf(value, requires_grad=requires[name])
            for name, value in params.items()
            if name in requires
        }
        names = {id(leaf): name for name, leaf in leaves.items()}
        held = {name: grads.get(name) for name in leaves}
        inside = installed(skeleton, lambda leaf: values[leaf.path], leaves.__getitem__, **options)
        with inside, grads_set(leaves, held):
            flags = _clear_flags(self.optimizer)
            self._execute(execute)
            _restore_flags(self.optimizer, flags)
            after, found = freeze(self.optimizer, names, self.companions)
        return UpdateOutputs(leaves, after, found)

    def _execute(self, execute: Callable[[], None]) -> None:
        try:
            execute()
        except (CaptureError, InputError):
            raise
        except Exception as error:
            raise CaptureError(
                compose_message(
                    f"{self.step_name} raised {type(error).__name__}: {error}",
                    _where(error) or user_source(),
                    "The optimizer's own step was run on copies of its parameters and state.",
                    "Check that the same step runs in eager mode with these options and gradients.",
                )
            ) from error

    def replay(self, inputs: UpdateInputs) -> UpdateOutputs:
        """Runs the optimizer's own code, not captured, from plain values."""
        leaves = {leaf.path: leaf for leaf in leaves_of(inputs.opt_state.skeleton)}
        values = {path: plain_value(inputs.value_of(leaf), leaf.kind) for path, leaf in leaves.items()}
        grads = {name: None if g is None else g.detach().clone() for name, g in inputs.grads.items()}
        return self.run(inputs.opt_state.skeleton, inputs.params, grads, values, self.step)


def schedulers_of(scheduler: Any) -> list[Any]:
    """Returns the schedulers that are stepped, in order."""
    if scheduler is None:
        return []
    return list(scheduler) if isinstance(scheduler, (list, tuple)) else [scheduler]


def made_up_gradient(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns normal noise of the form of a parameter."""
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return noise.to(value.device, value.dtype)


def as_leaf(value: torch.Tensor, *, requires_grad: bool) -> torch.nn.Parameter:
    """Returns a parameter with a copy of the value."""
    return torch.nn.Parameter(value.detach().clone(), requires_grad)


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
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _differs(after: Value, before: Value) -> bool:
    if isinstance(after, torch.Tensor) and isinstance(before, torch.Tensor):
        return after.shape != before.shape or not torch.equal(after, before)
    if isinstance(after, torch.Tensor) or isinstance(before, torch.Tensor):
        return True
    return after != before and not (after != after and before != before)


def _clear_flags(optimizer: Any) -> list[tuple[dict[str, Any], str]]:
    """Turns off flags of torch.optim that choose an implementation of the same mathematics without derivatives."""
    cleared = []
    for options in (*getattr(optimizer, GROUPS, ()), getattr(optimizer, "defaults", {})):
        for flag in _IMPLEMENTATION_FLAGS:
            if options.get(flag) is True:
                options[flag] = False
                cleared.append((options, flag))
    return cleared


def _restore_flags(optimizer: Any, cleared: list[tuple[dict[str, Any], str]]) -> None:
    for options, flag in cleared:
        options[flag] = True


def _where(error: BaseException) -> str | None:
    trace = error.__traceback__
    last = None
    while trace is not None:
        code = trace.tb_frame.f_code
        if "gimli_compile" not in code.co_filename:
            last = f"{'/'.join(code.co_filename.split('/')[-3:])}:{trace.tb_lineno} in {code.co_name}"
        trace = trace.tb_next
    return last
