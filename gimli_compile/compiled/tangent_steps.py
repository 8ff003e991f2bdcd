"""Compiled steps for forward mode: each with the tangents of what it makes, in one program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.argument_checks import check_constants
from gimli_compile.compiled.batches import Batches
from gimli_compile.compiled.binding import Around, Carried, pool_slots, slots_after
from gimli_compile.compiled.choice import Choice, LoopInputs, Place, capture_step
from gimli_compile.compiled.functions import Builder, CompiledFunction
from gimli_compile.compiled.halves import trace
from gimli_compile.compiled.inputs import build_state, in_order, state_slots, state_values
from gimli_compile.compiled.planning import Run, unsettled
from gimli_compile.compiled.steps import HOLDS, StepFunction
from gimli_compile.compiled.tidying import with_reshapes
from gimli_compile.forward_derivatives import jvp
from gimli_compile.loop_labels import state_slots as slots_of_state
from gimli_compile.records import opened
from gimli_compile.slot import CARRIED, Slot
from gimli_compile.state import TrainState
from gimli_compile.tangents import refused_operator
from gimli_compile.tree_slots import form

Tensor = torch.Tensor
Tangents = Mapping[Slot, Tensor]  # leads with the direction; of what tasks have of their own, then with the task
Advanced = tuple[TrainState, Any, dict[int, Tensor]]


class TangentSteps:
    """Makes and keeps the programs of steps with tangents."""

    def __init__(self, choice: Choice, build: Builder) -> None:
        self._choice = choice
        self._build = build
        self._made: dict[Any, CompiledFunction] = {}

    def loop(self, inputs: LoopInputs, batches: Sequence[Any], hyper: Mapping[str, Tensor], meta: Any) -> TangentLoop:
        """Returns what takes the steps of a loop on such inputs."""
        form_of = (inputs.order, inputs.model_key, inputs.dims, inputs.tasks)
        return TangentLoop(self, LoopInputs(Batches(list(batches), 0), dict(hyper), meta, *form_of))

    def take(self, run: Run, inputs: LoopInputs, place: Place, tangents: Tangents) -> Taken:
        """Takes one step by the first of the fitting programs whose conditions hold.

        Raises:
            CaptureError: there is none; or torch has no forward derivative of an operator.
        """
        draws = run.draws[place.index]
        for attempt in range(2):
            for step in self._choice.fitting(place, inputs, draws):
                pool = [*place.carried, *run.shared, *run.rest(place.index, step)]
                taken = self._run(step, run, inputs, place, pool, tangents)
                if HOLDS not in taken.values or bool(taken.values[HOLDS].all()):
                    return taken
            if not attempt:
                capture_step(self._choice, place, inputs, draws)
        raise unsettled()

    def _run(
        self, step: StepFunction, run: Run, inputs: LoopInputs, place: Place, pool: list[Tensor], tangents: Tangents
    ) -> Taken:
        given = dict(zip(pool_slots(place.slots, run.around, step), pool, strict=True))
        along = {
            slot: _with_task_first(tangents[slot], inputs.lane_of(slot)) for slot in step.inputs if slot in tangents
        }
        values = [*(given[slot] for slot in step.inputs), *along.values()]
        key = (step, inputs.dims, tuple(along), tuple(map(form, values)))
        if key not in self._made:
            self._made[key] = self._compile(step, inputs, tuple(along), values)
        made = self._made[key]
        found = made.plain(values)
        results = [found[number] for number in made.halves.places]
        count = len(step.results)
        floating = [slot for slot, value in zip(step.results, results, strict=False) if _moves(slot, value)]
        pairs = zip(floating if along else (), results[count:], strict=True)
        of_results = {slot: one if inputs.dims is None else one.movedim(0, 1) for slot, one in pairs}
        return Taken(step, given, dict(zip(step.results, results, strict=False)), of_results)

    def _compile(
        self, step: StepFunction, inputs: LoopInputs, along: tuple[Slot, ...], values: list[Tensor]
    ) -> CompiledFunction:
        check_constants(step.constants.values())
        step.check_derivatives(frozenset(along))
        pushed: Any = _Pushed(step, along) if along else step
        options: dict[str, Any] = {"summed": frozenset(), "lanes": None, "build": self._build}
        with refused_operator(lambda: step.programs):
            if inputs.dims is not None:
                pushed = _over_tasks(pushed, tuple(map(inputs.lane_of, (*step.inputs, *along))), values)
            return CompiledFunction(pushed, values, (), what=f"{step.title}, with tangents", **options)


@dataclass(frozen=True)
class _Pushed:
    """A step and its derivative along several directions: takes its inputs, then the tangents of those `along`."""

    step: StepFunction
    along: tuple[Slot, ...]

    def __call__(self, *given: Tensor) -> list[Tensor]:
        """Returns the results, then the tangents of the floating ones."""
        values = dict(zip(self.step.inputs, given, strict=False))
        primals = tuple(values[slot] for slot in self.along)

        def run(*moved: Tensor) -> Any:
            results = self.step.run({**values, **dict(zip(self.along, moved, strict=True))})
            return [results[slot] for slot in self.step.results if _moves(slot, results[slot])], ()

        def push(*directions: Tensor) -> Any:
            return jvp(run, primals, directions)[1]

        tangents = torch.func.vmap(push)(*given[len(values) :])
        return [*self.step(*given[: len(values)]), *tangents]


def _over_tasks(function: Any, lanes: tuple[int | None, ...], examples: list[Tensor]) -> Any:
    """Maps a function over tasks; its graph for one has views, which the layouts of many may not allow."""
    single = [value if lane is None else value.select(lane, 0) for value, lane in zip(examples, lanes, strict=True)]
    return torch.func.vmap(with_reshapes(trace(function, single)), in_dims=lanes)


def _with_task_first(tangent: Tensor, lane: int | None) -> Tensor:
    return in_order(tangent if lane is None else tangent.movedim(1, 0))


def _moves(slot: Slot, value: Tensor) -> bool:
    return slot != HOLDS and value.is_floating_point()


@dataclass(frozen=True)
class Taken:
    """One step: what it was given and what it made, by slot, and the tangents of that."""

    step: StepFunction
    given: Mapping[Slot, Tensor]
    values: Mapping[Slot, Tensor]
    tangents: Tangents


class TangentLoop:
    """Takes the steps of one loop."""

    def __init__(self, steps: TangentSteps, inputs: LoopInputs) -> None:
        self._steps = steps
        self._inputs = inputs
        shared = inputs.shared()
        self._around = Around(tuple(shared), inputs.batches.slots(), frozenset())
        self._shared = list(map(in_order, shared.values()))
        self._leaves = [list(map(in_order, leaves)) for leaves in inputs.batches.leaves()]
        self._draws: list[dict[Slot, Tensor]] = [{} for _ in self._leaves]

    def advance(self, index: int, state: TrainState, along: Tangents) -> Advanced:
        """Takes a step; returns the new state, the loss, and the tangents of both by the place of the leaf."""
        before, skeleton = Carried(state_slots(state), frozenset()), state.opt_state.skeleton
        carried = list(map(in_order, state_values(state)))
        others: dict[str, Any] = {"record": False, "same": None, "draws": self._draws}
        form_of = (skeleton, self._inputs.tasks, None)
        run = Run(before, carried, self._around, self._shared, self._leaves, *form_of, **others)
        taken = self._steps.take(run, self._inputs, Place(index, before, skeleton, carried), along)
        step = taken.step
        slots = slots_after(before.slots, step)
        everything = {**taken.given, **taken.values}
        after = build_state(slots, [everything[slot] for slot in slots], step.skeleton)
        tangents = {slot: along[slot] for slot in slots if slot in along and slot not in taken.values}
        tangents |= taken.tangents
        returned = [slot for slot in step.results if slot not in slots and slot != HOLDS and slot.role not in CARRIED]
        loss = opened(step.assemble([taken.values[slot] for slot in returned]))
        of_loss = pytree.tree_leaves(opened(step.assemble([tangents.get(slot) for slot in returned])))
        of_state = [tangents.get(slot) for slot in slots_of_state(after)]
        found = enumerate([*of_state, *of_loss])
        return after, loss, {number: one for number, one in found if isinstance(one, Tensor)}
