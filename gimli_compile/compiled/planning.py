"""Runs a loop of compiled steps: by a plan that is known, or step by step while the plan is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gimli_compile.argument_checks import check_constants
from gimli_compile.compiled.binding import Around, Bound, Carried, bind
from gimli_compile.compiled.choice import Choice, DrawnError, Draws, LoopInputs, Place, capture_step
from gimli_compile.compiled.functions import Builder, CompiledFunction
from gimli_compile.compiled.halves import halves
from gimli_compile.compiled.loop import Tape, run_step
from gimli_compile.compiled.mixed import mixed_halves
from gimli_compile.compiled.mixed_steps import MixedSteps
from gimli_compile.compiled.steps import StepFunction
from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.skeleton import Skeleton
from gimli_compile.tree_slots import form

Tensor = torch.Tensor


@dataclass
class Run:
    """What a loop runs on: what is carried into it, shared, each step's batch, and each step's draws as they are made.

    `lanes` is the number of tasks, if there are tasks. `same` tells which of what is carried, and of what is shared,
    are one and the same tensor: updates are captured for that.
    """

    start: Carried
    carried: list[Tensor]
    around: Around
    shared: list[Tensor]
    batches: list[list[Tensor]]
    skeleton: Skeleton
    lanes: int | None
    segment: int | None
    record: bool
    same: Any
    draws: list[Draws] = field(default_factory=list)

    def rest(self, index: int, step: StepFunction) -> list[Tensor]:
        """Returns batch, draws and constants of a step; draws what was not drawn yet."""
        if not step.draws and not step.constants:
            return self.batches[index]
        while len(self.draws) <= index:
            self.draws.append({})
        drawn = self.draws[index]
        for slot, draw in step.draws.items():
            if slot not in drawn:
                drawn[slot] = _draw(draw, self.lanes).contiguous()
        constants = (value.detach().contiguous() for value in step.constants.values())
        return [*self.batches[index], *(drawn[slot] for slot in step.draws), *constants]


def _draw(draw: Callable[[], Tensor], lanes: int | None) -> Tensor:
    if lanes is None:
        return draw()
    return torch.func.vmap(lambda _: draw(), randomness="different")(torch.empty(lanes))


class Planner:
    """Makes plans: which step functions a loop takes, compiled and bound."""

    def __init__(self, build: Builder, mixed: MixedSteps | None) -> None:
        self._build = build
        self._mixed = mixed
        self._bound: dict[Any, Bound] = {}

    def run(self, run: Run, inputs: LoopInputs, choice: Choice) -> tuple[Tape, list[Tensor], list[list[Tensor]]]:
        """Runs a loop and checks every step; returns its tape, what is carried out of it, and what steps returned."""
        tape = Tape([], run.shared, [], run.segment)
        place = Place(0, run.start, run.skeleton, run.carried)
        returned, plan = [], []
        for index in range(len(run.batches)):
            if run.record and tape.starts_segment(index):
                tape.kept.append(list(place.carried))
            taken = self._take(run, inputs, choice, place)
            plan.append(taken.bound)
            tape.rest.append(taken.rest)
            if run.record and run.segment is None:
                tape.kept += taken.kept
            returned.append([taken.values[number] for number in taken.bound.returned])
            place = Place(index + 1, taken.bound.after, taken.bound.step.skeleton, taken.carried())
        tape.bound = plan
        return tape, list(place.carried), returned

    def _take(self, run: Run, inputs: LoopInputs, choice: Choice, place: Place) -> Taken:
        """Takes one step by the first of the fitting programs whose conditions hold."""
        while len(run.draws) <= place.index:
            run.draws.append({})
        for attempt in range(2):
            for step in choice.fitting(place, inputs, run.draws[place.index]):
                if inputs.is_block and step.draws:
                    raise DrawnError
                rest = run.rest(place.index, step)
                if inputs.is_mixed and run.record:
                    step = self._with_joint(step, run, inputs, place)
                    if step is None:
                        continue
                    rest = run.rest(place.index, step)
                pool = [*place.carried, *run.shared, *rest]
                bound = self._bind(step, place.slots, run.around, pool, inputs)
                kept: list[list[Tensor]] = []
                values = run_step(bound, pool, kept if run.record and run.segment is None else None)
                if bound.held is None or bool(values[bound.held].all()):
                    return Taken(bound, pool, values, rest, kept)
            if not attempt:
                capture_step(choice, place, inputs, run.draws[place.index])
        raise unsettled()

    def _with_joint(self, step: StepFunction, run: Run, inputs: LoopInputs, place: Place) -> StepFunction | None:
        assert self._mixed is not None
        wanted = run.around.wanted | place.slots.active
        return self._mixed.of(step, place, inputs, run.draws[place.index], wanted)

    def _bind(
        self, step: StepFunction, slots: Carried, around: Around, pool: list[Tensor], inputs: LoopInputs
    ) -> Bound:
        key = (step, slots, around, inputs.dims, tuple(map(form, pool)))
        if key not in self._bound:
            if around.wanted or slots.active:
                check_constants(step.constants.values())
                step.check_derivatives(around.wanted | slots.active)

            def build(take: Sequence[int], wanted: Sequence[int], summed: frozenset[int]) -> CompiledFunction:
                lanes = None if inputs.dims is None else tuple(map(inputs.lane_of, step.inputs))
                examples = [pool[number] for number in take]
                split = halves if step.joint is None else mixed_halves
                return CompiledFunction(
                    step, examples, wanted, summed=summed, lanes=lanes, build=self._build, what=step.title, split=split
                )

            self._bound[key] = bind(step, slots, around, pool, build)
        return self._bound[key]


@dataclass(frozen=True)
class Taken:
    """One step that was taken."""

    bound: Bound
    pool: list[Tensor]
    values: Sequence[Tensor]
    rest: list[Tensor]
    kept: list[list[Tensor]]

    def carried(self) -> list[Tensor]:
        """Returns what it carries on."""
        everything = [*self.pool, *self.values]
        return [everything[number] for number in self.bound.carry]


def unsettled() -> CaptureError:
    """Returns the error for a step that computes other outcomes than those that it was compiled for."""
    return CaptureError(
        compose_message(
            "the conditions under which a compiled step holds do not settle",
            None,
            "It computes other outcomes than the step that it was compiled from, or tasks that run together have "
            "different ones.",
            "A comparison lies within rounding: perturb the inputs or use float64. With tasks: unroll one at a time.",
        )
    )
