"""How one step of a loop is bound: where its inputs come from, where its results and their adjoints go."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from gimli_compile.compiled.functions import CompiledFunction
from gimli_compile.compiled.inputs import in_order
from gimli_compile.compiled.steps import HOLDS, StepFunction
from gimli_compile.metadata import fake_like
from gimli_compile.slot import CARRIED, HELD, Role, Slot

Tensor = torch.Tensor
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
    held, if it has any. `forms` are fake tensors of the form of the pool's values.
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
    forms: tuple[Tensor, ...]

    @property
    def pool_size(self) -> int:
        """The number of values in the pool."""
        return len(self.forms)

    @cached_property
    def keeps_inputs_only(self) -> bool:
        """Tells whether its adjoint needs nothing that the step computes."""
        return all(place < len(self.take) for place in self.compiled.halves.residuals)

    @cached_property
    def seeds(self) -> tuple[tuple[int, ...], ...]:
        """For each active result, the places of its adjoints in those of what is carried on and returned, together."""
        routes = []
        for result in self.compiled.halves.active:
            carried = [index for index, place in enumerate(self.carry) if place == self.pool_size + result]
            returned = [len(self.carry) + index for index, place in enumerate(self.returned) if place == result]
            routes.append((*carried, *returned))
        return tuple(routes)

    @cached_property
    def passed(self) -> tuple[tuple[int, int], ...]:
        """Pairs of places in `before` and `after` of what the step only passes on, if it is differentiated."""
        active, slots = self.before.active, self.before.slots
        pairs = ((place, index) for index, place in enumerate(self.carry) if place < len(slots))
        return tuple((place, index) for place, index in pairs if slots[place] in active)

    def _targets(self, first: int, end: int) -> tuple[tuple[int, int], ...]:
        """Returns which adjoints that the step computes are of inputs from this part of the pool, and of which."""
        found = enumerate(self.take[index] for index in self.compiled.halves.found)
        return tuple((number, place - first) for number, place in found if first <= place < end)

    @cached_property
    def to_carried(self) -> tuple[tuple[int, int], ...]:
        """Pairs: an adjoint that the step computes, and the place in `before` that it is of."""
        return self._targets(0, len(self.before.slots))

    @cached_property
    def to_shared(self) -> tuple[tuple[int, int], ...]:
        """Pairs: an adjoint that the step computes, and the place in `shared` that it is of."""
        first = len(self.before.slots)
        return self._targets(first, first + len(self.around.shared))

    @cached_property
    def to_batch(self) -> tuple[tuple[int, int], ...]:
        """Pairs: an adjoint that the step computes, and the place in the batch that it is of."""
        first = len(self.before.slots) + len(self.around.shared)
        return self._targets(first, first + len(self.around.batch))

    @cached_property
    def accumulators(self) -> tuple[int, ...]:
        """The places in `shared` of the accumulators that the adjoint takes."""
        return tuple(self.take[index] - len(self.before.slots) for index in self.compiled.halves.summed)

    @cached_property
    def unused(self) -> tuple[int, ...]:
        """The places in `before` of what is differentiated and has no influence on the step."""
        reached = {place for place, _ in self.passed} | {place for _, place in self.to_carried}
        active = self.before.active
        return tuple(index for index, slot in enumerate(self.before.slots) if slot in active and index not in reached)

    def zero(self, place: int) -> Tensor:
        """Returns the adjoint of something in `before` that nothing depends on."""
        return _zeros(self.forms[place])

    def adjoints_of_carried(self, given: Sequence[Tensor | None], through: Collection[int]) -> list[Tensor | None]:
        """Returns adjoints of what is carried on, zeros where nothing depends on what is differentiated.

        There are none of what is not differentiated, or comes `through` all steps as it is.
        """
        made: list[Tensor | None] = []
        for index, (slot, place, value) in enumerate(zip(self.after.slots, self.carry, given, strict=True)):
            if index in through or slot not in self.after.active:
                made.append(None)
            elif value is not None:
                made.append(in_order(value))
            else:
                made.append(_zeros(self._form_of(place)))
        return made

    def adjoints_of_shared(self) -> list[Tensor | None]:
        """Returns zeros for what is shared and differentiated, which this step adds to before any other does."""
        zeros = self._small_zeros
        return [
            None if form is None else zeros[index] if index in zeros else _zeros(form)
            for index, form in enumerate(self._forms_of_shared)
        ]

    @cached_property
    def _forms_of_shared(self) -> list[Tensor | None]:
        first, wanted = len(self.before.slots), self.around.wanted
        return [self.forms[first + i] if slot in wanted else None for i, slot in enumerate(self.around.shared)]

    @cached_property
    def _small_zeros(self) -> dict[int, Tensor]:
        """Zeros of single numbers that the step's adjoint adds to: nobody else sees them, and they are made once."""
        forms = self._forms_of_shared
        found = {place: forms[place] for _, place in self.to_shared}
        return {place: _zeros(form) for place, form in found.items() if form is not None and form.numel() == 1}

    def adjoints_of_returned(self, given: Sequence[Tensor | None]) -> list[Tensor]:
        """Returns adjoints of what the step returned, zeros where there are none."""
        return [none if value is None else value for none, value in zip(self._no_adjoints, given, strict=True)]

    @cached_property
    def _no_adjoints(self) -> list[Tensor]:
        return [_zeros(self.compiled.halves.results[place]) for place in self.returned]

    def _form_of(self, place: int) -> Tensor:
        return self.forms[place] if place < self.pool_size else self.compiled.halves.results[place - self.pool_size]


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)


def pool_slots(before: Carried, around: Around, step: StepFunction) -> tuple[Slot, ...]:
    """Returns what the values of a step's pool are."""
    return (*before.slots, *around.shared, *around.batch, *step.draws, *step.constants)


def bind(step: StepFunction, before: Carried, around: Around, pool: Sequence[Tensor], build: Build) -> Bound:
    """Binds a step that starts from `before`.

    `build` gets the places of the step's inputs in the pool, and which inputs are differentiated and shared by all
    steps. Of the values in `pool`, only the form matters.
    """
    slots = pool_slots(before, around, step)
    place_of = {slot: index for index, slot in enumerate(slots)}
    shared = set(around.shared)
    wanted = [index for index, slot in enumerate(step.inputs) if slot in before.active or slot in around.wanted]
    summed = frozenset(index for index, slot in enumerate(step.inputs) if slot in shared)
    take = tuple(place_of[slot] for slot in step.inputs)
    compiled = build(take, wanted, summed)
    result = dict(zip(step.results, compiled.halves.places, strict=True))
    place = {**place_of, **{slot: len(slots) + index for slot, index in result.items() if slot.role in CARRIED}}
    after = slots_after(before.slots, step)
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
        returned=tuple(index for slot, index in result.items() if slot.role not in CARRIED and slot != HOLDS),
        held=result.get(HOLDS),
        forms=tuple(map(fake_like, pool)),
    )


def slots_after(before: Sequence[Slot], step: StepFunction) -> tuple[Slot, ...]:
    """Returns what a step carries on: parameters and buffers as before, the state and gradients that it makes."""
    made = (Role.STATE, *HELD)  # the step makes all that there is of these
    stay = [slot for slot in before if slot.role not in made]
    return (*stay, *(slot for slot in step.results if slot.role in made))


def passed_through(plan: Sequence[Bound]) -> dict[int, int]:
    """Returns what all steps of a loop only pass on: the places behind the last step, and before the first."""
    origin: list[int | None] = list(range(len(plan[0].before.slots)))
    for bound in plan:
        origin = [origin[place] if place < len(origin) else None for place in bound.carry]
    return {index: place for index, place in enumerate(origin) if place is not None}
