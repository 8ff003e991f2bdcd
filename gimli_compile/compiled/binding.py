"""How one step of a loop is bound: where its inputs come from, where its results and their adjoints go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from gimli_compile.compiled.functions import CompiledFunction
from gimli_compile.compiled.steps import HELD, StepFunction
from gimli_compile.slot import CARRIED, Role, Slot

Build = Callable[[tuple[int, ...], Sequence[int], frozenset[int]], CompiledFunction]


@dataclass(frozen=True)
class Carried:
    """The slots that go from one step to the next, in order, and those that depend on what is differentiated."""

    slots: tuple[Slot, ...]
    active: frozenset[Slot]


@dataclass(frozen=True)
class Around:
    """The slots around a step: hyperparameters and meta, shared by all steps; the batch; those differentiated."""

    shared: tuple[Slot, ...]
    batch: tuple[Slot, ...]
    wanted: frozenset[Slot]


@dataclass(frozen=True, eq=False)
class Bound:
    """A step at its place in a loop.

    The *pool* of a step is what is carried into it, what is shared, its batch, its draws, its constants, in this order.
    `take` are the places of the step's inputs in the pool; `carry` the places, in pool and results together, of what is
    carried on; `returned` the results that the step returns; `held` the result that tells whether its conditions
    held, if it has any.
    """

    step: StepFunction
    compiled: CompiledFunction
    before: Carried
    after: Carried
    around: Around
    take: tuple[int, ...]
    carry: tuple[int, ...]
    returned: tuple[int, ...]
    held: int | None
    pool_size: int

    @cached_property
    def seeds(self) -> tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]:
        """For each active result: its place, the places in `after` that it is carried to, and those in `returned`."""
        made = []
        for result in self.compiled.halves.active:
            carried = tuple(i for i, place in enumerate(self.carry) if place == self.pool_size + result)
            returned = tuple(i for i, place in enumerate(self.returned) if place == result)
            made.append((result, carried, returned))
        return tuple(made)

    @cached_property
    def passed(self) -> tuple[tuple[int, int], ...]:
        """Pairs of places in `before` and `after` of what the step only passes on, if it is differentiated."""
        active, slots = self.before.active, self.before.slots
        pairs = ((place, index) for index, place in enumerate(self.carry) if place < len(slots))
        return tuple((place, index) for place, index in pairs if slots[place] in active)

    @cached_property
    def targets(self) -> tuple[tuple[int, int, int], ...]:
        """For each adjoint that the step computes: its place in `before`, or in `shared`, or in the batch; else -1."""
        carried, shared = len(self.before.slots), len(self.around.shared)
        made = []
        for index in self.compiled.halves.found:
            place = self.take[index]
            if place < carried:
                made.append((place, -1, -1))
            elif place < carried + shared:
                made.append((-1, place - carried, -1))
            else:
                made.append((-1, -1, place - carried - shared))
        return tuple(made)

    @cached_property
    def accumulators(self) -> tuple[int, ...]:
        """The places in `shared` of the accumulators that the adjoint takes."""
        return tuple(self.take[index] - len(self.before.slots) for index in self.compiled.halves.summed)


def pool_slots(before: Carried, around: Around, step: StepFunction) -> tuple[Slot, ...]:
    """Returns what the values of a step's pool are."""
    return (*before.slots, *around.shared, *around.batch, *step.draws, *step.constants)


def bind(step: StepFunction, before: Carried, around: Around, build: Build) -> Bound:
    """Binds a step that starts from `before`.

    `build` gets the places of the step's inputs in the pool, and which inputs are differentiated and shared by all steps.
    """
    slots = pool_slots(before, around, step)
    pool = {slot: index for index, slot in enumerate(slots)}
    shared = set(around.shared)
    wanted = [index for index, slot in enumerate(step.inputs) if slot in before.active or slot in around.wanted]
    summed = frozenset(index for index, slot in enumerate(step.inputs) if slot in shared)
    take = tuple(pool[slot] for slot in step.inputs)
    compiled = build(take, wanted, summed)
    result = dict(zip(step.results, compiled.halves.places, strict=True))
    place = {**pool, **{slot: len(slots) + index for slot, index in result.items() if slot.role in CARRIED}}
    after = _slots_after(before.slots, step)
    active = {slot for slot, index in result.items() if slot.role in CARRIED and index in compiled.halves.active}
    passed = {slot for slot in after if slot not in result and slot in before.active}
    return Bound(
        step,
        compiled,
        before,
        Carried(after, frozenset(active | passed)),
        around,
        take=take,
        carry=tuple(place[slot] for slot in after),
        returned=tuple(index for slot, index in result.items() if slot.role not in CARRIED and slot != HELD),
        held=result.get(HELD),
        pool_size=len(slots),
    )


def _slots_after(before: Sequence[Slot], step: StepFunction) -> tuple[Slot, ...]:
    """Returns what a step carries on: parameters and buffers as before, and the state that it makes."""
    stay = [slot for slot in before if slot.role is not Role.STATE]
    return (*stay, *(slot for slot in step.results if slot.role is Role.STATE))
