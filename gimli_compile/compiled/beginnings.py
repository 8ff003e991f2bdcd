"""Loops that begin with the program of all later steps: an optimizer's first step would take programs of its own.

The first step of many optimizers makes the state that later ones take. Where `starting_values` finds a state from which
a later step does the same, a loop starts from that, and half of the programs need not be built. Nor need they where the
first step differs only in that no derivatives are wanted in the state that it starts from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from gimli_compile.compiled.binding import Carried, pool_slots, slots_after
from gimli_compile.compiled.choice import Choice, DrawnError, LoopInputs, Place, capture_step
from gimli_compile.compiled.planning import Run
from gimli_compile.compiled.starting_values import covers, starting_values
from gimli_compile.compiled.steps import HOLDS, StepFunction
from gimli_compile.metadata import FAKE
from gimli_compile.program import Program
from gimli_compile.skeleton import Skeleton
from gimli_compile.slot import CROSSING, Role, Slot

Tensor = torch.Tensor


@dataclass(frozen=True)
class Beginning:
    """The state that a loop starts from besides what it is given."""

    start: Carried
    added: list[Tensor]
    skeleton: Skeleton

    def of(self, run: Run) -> Run:
        """Returns a loop that starts with the state."""
        return replace(run, start=self.start, carried=[*run.carried, *self.added], skeleton=self.skeleton)


def find_beginning(run: Run, inputs: LoopInputs, choice: Choice) -> Beginning | None:
    """Returns the state with which a loop's later steps do what its first does; None if it has to take another."""
    if len(run.batches) < 2:
        return None
    place = Place(0, run.start, run.skeleton, run.carried)
    first = _fitting(run, inputs, choice, place)
    if first is None:
        return None
    if inputs.is_block and first.draws:
        raise DrawnError
    if slots_after(run.start.slots, first) == run.start.slots:
        return _with_derivatives(first, run)
    if not _adds_state_only(first, run.start):
        return None
    following = _after(first, place, run, inputs)
    later = None if following is None else _fitting(run, inputs, choice, following)
    if following is None or later is None or (later.gradient, later.results) != (first.gradient, first.results):
        return None
    added = _added_state(first, later, run)
    if added is None:
        return None
    slots = following.slots.slots
    active = run.start.active | _active(later, run)
    values = [_over_tasks(added[slot], run.lanes) for slot in slots[len(run.start.slots) :]]
    beginning = Beginning(Carried(slots, active), values, first.skeleton)
    begun = beginning.of(run)
    holds = later in choice.fitting(Place(0, begun.start, begun.skeleton, begun.carried), inputs, run.draws[0])
    return beginning if holds else None


def _fitting(run: Run, inputs: LoopInputs, choice: Choice, place: Place) -> StepFunction | None:
    while len(run.draws) <= place.index:
        run.draws.append({})
    draws = run.draws[place.index]
    if not choice.fitting(place, inputs, draws):
        capture_step(choice, place, inputs, draws)
    return next(iter(choice.fitting(place, inputs, draws)), None)


def _with_derivatives(step: StepFunction, run: Run) -> Beginning | None:
    """Returns the state as it is, with derivatives where later steps have them; None if that changes nothing."""
    active = run.start.active | _active(step, run)
    if active == run.start.active:
        return None
    return Beginning(Carried(run.start.slots, active), [], run.skeleton)


def _adds_state_only(step: StepFunction, start: Carried) -> bool:
    after = slots_after(start.slots, step)
    before, new = after[: len(start.slots)], after[len(start.slots) :]
    return before == start.slots and bool(new) and all(slot.role is Role.STATE for slot in new)


def _after(step: StepFunction, place: Place, run: Run, inputs: LoopInputs) -> Place | None:
    """Takes a step uncompiled; None if its conditions do not hold."""
    pool = [*run.carried, *run.shared, *run.rest(place.index, step)]
    given = dict(zip(pool_slots(run.start, run.around, step), pool, strict=True))
    call: Any = step
    if inputs.dims is not None:
        call = torch.func.vmap(step, in_dims=tuple(map(inputs.lane_of, step.inputs)), randomness="different")
    made = dict(zip(step.results, call(*(given[slot] for slot in step.inputs)), strict=True))
    if HOLDS in made and not bool(made[HOLDS].all()):
        return None
    slots = slots_after(run.start.slots, step)
    carried = [made[slot] if slot in made else given[slot] for slot in slots]
    return Place(place.index + 1, Carried(slots, frozenset()), step.skeleton, carried)


def _added_state(first: StepFunction, later: StepFunction, run: Run) -> dict[Slot, Tensor] | None:
    """Returns the state that makes `later` do what `first` does; values that are one for the optimizer are one."""
    known = frozenset(slot for slot in run.start.slots if slot.role is Role.STATE)
    if not covers(later.variant, first.variant, known):
        return None
    program, other = first.programs[-1], later.programs[-1]
    found = starting_values(program, other, known)
    if found is None:
        return None
    by_node = {program.result_of(slot): value.clone() for slot, value in found.items() if slot in program.results}
    new = [slot for slot in first.results if slot.role is Role.STATE and slot not in known]
    if any(program.result_of(slot) not in by_node or _is_passed_on(other, slot) for slot in new):
        return None
    return {slot: by_node[program.result_of(slot)] for slot in new}


def _is_passed_on(program: Program, slot: Slot) -> bool:
    """Tells whether the value that a loop starts from would be its result: whoever gets that may write to it."""
    return program.result_of(slot).op == "placeholder"


def _over_tasks(value: Tensor, lanes: int | None) -> Tensor:
    return value.contiguous() if lanes is None else value.expand(lanes, *value.shape).contiguous()


def _active(step: StepFunction, run: Run) -> frozenset[Slot]:
    """Returns the state that carries derivatives from one step to the next, with which all steps are alike."""
    update, active = step.programs[-1], frozenset[Slot]()
    if not run.record or not any(slot.role is Role.STATE for slot in update.results):
        return active
    wanted = run.start.active | run.around.wanted
    while True:
        found = _differentiated(update, wanted | active)
        if found == active:
            return active
        active = found


def _differentiated(update: Program, wanted: frozenset[Slot]) -> frozenset[Slot]:
    with FAKE, torch.enable_grad():
        given = {}
        for slot, node in zip(update.inputs, update.placeholders, strict=True):
            form = node.meta["val"]
            given[slot] = torch.empty(form.shape, dtype=form.dtype, device=form.device)
            if (slot in wanted or slot.role in CROSSING) and form.is_floating_point():
                given[slot].requires_grad_()
        made = update(given)
    return frozenset(slot for slot, value in made.items() if slot.role is Role.STATE and value.requires_grad)
