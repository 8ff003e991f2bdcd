"""What a compiled loop runs on, and which captured programs fit each of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gimli_compile.compiled.batches import Batches
from gimli_compile.compiled.binding import Carried
from gimli_compile.compiled.inputs import build_state, named_slots
from gimli_compile.compiled.steps import StepFunction
from gimli_compile.loss_table import Gradient, values_of_loss
from gimli_compile.owned_generators import DrawsUndone
from gimli_compile.row_gradients import from_slots
from gimli_compile.skeleton import Skeleton
from gimli_compile.slot import Role, Slot
from gimli_compile.state import TrainState
from gimli_compile.stepping import SplitStepper, StepInputs, WholeStepper
from gimli_compile.tasks import dims_of
from gimli_compile.tree_slots import tree_form, tree_slots
from gimli_compile.update_values import StepData, UpdateInputs
from gimli_compile.variant import UpdateVariant

Tensor = torch.Tensor
Draws = dict[Slot, Tensor]


@dataclass(frozen=True)
class LoopInputs:
    """What a loop runs on besides the state: batches, hyperparameters by path, meta.

    With tasks, `dims` are 0 or None for state, batches, hyper and meta, and `tasks` is their number. `is_mixed` chooses
    mixed mode for the way back. `is_block`: these are some of the tasks of a loop (`task_blocks.py`), which may not
    draw random numbers.
    """

    batches: Batches
    hyper: Mapping[str, Tensor]
    meta: Any
    order: int
    model_key: Any
    dims: tuple[int | None, ...] | None = None
    tasks: int | None = None
    is_mixed: bool = False
    is_block: bool = False

    def shared(self) -> dict[Slot, Tensor]:
        """Returns hyperparameters and meta by slot."""
        found = dict(zip(named_slots(Role.HYPER, tuple(self.hyper)), self.hyper.values(), strict=True))
        return found if self.meta is None else {**found, **tree_slots(Role.META, self.meta)}

    def key(self) -> Any:
        """Returns what a plan depends on, besides the tensors' forms."""
        meta = None if self.meta is None else tree_form(self.meta)
        return self.batches.key(), meta, self.order, self.model_key, self.dims, self.tasks, self.is_mixed, self.is_block

    def lane_of(self, slot: Slot) -> int | None:
        """Returns the dimension of the tasks of a step's input."""
        if self.dims is None or slot.role is Role.CONSTANT:
            return None
        return {Role.BATCH: self.dims[1], Role.HYPER: self.dims[2], Role.META: self.dims[3]}.get(slot.role, 0)


class DrawnError(Exception):
    """A step of a block of tasks draws random numbers, which are made for all tasks together."""


class Choice(Protocol):
    """Finds, of the captured programs, those that fit a step."""

    def fitting(self, place: Place, inputs: LoopInputs, draws: Draws) -> list[StepFunction]:
        """Returns what is known to fit, as far as can be told before the step."""
        ...

    def capture(self, place: Place, inputs: LoopInputs, draws: Draws) -> None:
        """Takes the step uncompiled, which captures what is missing; adds the draws that it makes."""
        ...


@dataclass(frozen=True)
class Place:
    """Where a loop is: the step, and what is carried into it."""

    index: int
    slots: Carried
    skeleton: Skeleton
    carried: Sequence[Tensor]

    def state(self, values: Sequence[Tensor]) -> TrainState:
        """Returns the train state that holds these tensors."""
        return build_state(self.slots.slots, values, self.skeleton)


def capture_step(choice: Choice, place: Place, inputs: LoopInputs, draws: Draws) -> None:
    """Captures what is missing; in a block, which may not draw, generators that somebody holds stay as they were."""
    with DrawsUndone() if inputs.is_block else nullcontext():
        choice.capture(place, inputs, draws)


class StepChoice:
    """Makes step functions of captured programs, one for each combination."""

    def __init__(self, stepper: SplitStepper | WholeStepper) -> None:
        self._stepper = stepper
        self._made: dict[Any, StepFunction] = {}

    def fitting(self, place: Place, inputs: LoopInputs, draws: Draws) -> list[StepFunction]:
        """Returns what is known to fit, as far as can be told before the step."""
        find = self._split if isinstance(self._stepper, SplitStepper) else self._whole
        return at_place(place, inputs, draws, lambda given: list(find(given)))

    def capture(self, place: Place, inputs: LoopInputs, draws: Draws) -> None:
        """Takes the step uncompiled, which captures what is missing; adds the draws that it makes."""
        at_place(place, inputs, draws, self._stepper.step)

    def _split(self, inputs: StepInputs) -> Iterator[StepFunction]:
        stepper, state = self._stepper, inputs.state
        assert isinstance(stepper, SplitStepper)
        known = stepper.losses.known_gradients(state, inputs.batch, inputs.meta, stepper.trained, inputs.model_key)
        values = values_of_loss(state, inputs.batch, inputs.meta)
        for gradient in known:
            if not gradient.captured.fits(values, inputs.draws or {}):
                continue
            grads = _forms_of(gradient, stepper.trained)
            given = UpdateInputs(state.params, grads, state.opt_state, inputs.hyper)
            for variant in stepper.updates.fitting(given):
                yield self._step(gradient, variant, inputs.order)

    def _whole(self, inputs: StepInputs) -> Iterator[StepFunction]:
        stepper, state = self._stepper, inputs.state
        assert isinstance(stepper, WholeStepper)
        data = StepData(state.buffers, inputs.batch, inputs.meta, inputs.model_key, state.grads)
        given = UpdateInputs(state.params, {}, state.opt_state, inputs.hyper, data=data)
        for variant in stepper.table.fitting(given):
            yield self._step(None, variant, inputs.order)

    def _step(self, gradient: Gradient | None, variant: UpdateVariant, order: int) -> StepFunction:
        key = (gradient, id(variant), order)
        if key not in self._made:
            captured = None if gradient is None else gradient.captured
            self._made[key] = StepFunction(captured, variant, order, self._stepper.keeps_buffers)
        return self._made[key]


def _forms_of(gradient: Gradient, trained: list[str]) -> dict[str, Any]:
    """Returns fake tensors of the form of the gradients that a program computes, one object for each value."""
    program = gradient.exact
    fakes = {node: node.meta["val"].detach() for node in program.returned}  # the fakes of two nodes may be one object
    pairs = zip(program.results, program.returned, strict=True)
    return from_slots({slot: fakes[node] for slot, node in pairs}, trained)


def at_place(place: Place, inputs: LoopInputs, draws: Draws, call: Callable[[StepInputs], Any]) -> Any:
    """Calls a function with the inputs of one step; with tasks, as one of the tasks of `torch.vmap`."""
    batch = inputs.batches[place.index]

    def given(values: Sequence[Tensor], batch: Any, hyper: Any, meta: Any, noise: Draws) -> StepInputs:
        return StepInputs(place.state(values), batch, hyper, meta, inputs.order, noise, inputs.model_key)

    if inputs.dims is None:
        return call(given(place.carried, batch, inputs.hyper, inputs.meta, draws))
    results: list[Any] = []

    def one(values: Any, batch: Any, hyper: Any, meta: Any, noise: Draws) -> Draws:
        noise = dict(noise)
        results.append(call(given(values, batch, hyper, meta, noise)))
        return noise

    parts = zip((batch, dict(inputs.hyper), inputs.meta), inputs.dims[1:], strict=True)
    dims = (dims_of(part, dim) for part, dim in parts)
    run = torch.func.vmap(one, in_dims=(0, *dims, dict.fromkeys(draws, 0)), randomness="different")
    made = run(list(place.carried), batch, dict(inputs.hyper), inputs.meta, dict(draws))
    draws.update(made)
    return results[0]
