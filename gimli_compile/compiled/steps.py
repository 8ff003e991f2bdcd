"""One inner step as one pure function: the loss with its gradient, the update, and whether its conditions held."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from gimli_compile.loss_conditions import Captured
from gimli_compile.passes.differentiability import check_derivatives
from gimli_compile.pipeline import first_order
from gimli_compile.program import Draw, Program
from gimli_compile.skeleton import Skeleton
from gimli_compile.slot import CARRIED, CROSSING, Role, Slot
from gimli_compile.variant import UpdateVariant

Tensor = torch.Tensor
HOLDS = Slot(Role.GUARD, "holds")


@dataclass(frozen=True, eq=False)
class StepFunction:
    """The programs that one step takes. `gradient` is None where one program is the whole step.

    With `keeps_buffers`, new buffers are no results. `joint` is the joint gradient of the loss, by which mixed mode
    goes back (`mixed.py`).

    If there are conditions under which the programs hold, the last result is `HOLDS`: whether all came out as at
    capture.
    """

    gradient: Captured | None
    variant: UpdateVariant
    order: int = 2
    keeps_buffers: bool = False
    joint: Program | None = None

    @cached_property
    def programs(self) -> tuple[Program, ...]:
        """The programs in the order in which they run."""
        update = self.variant.program if self.order == 2 or self.gradient is not None else self.variant.first_order
        if self.gradient is None:
            return (update,)
        gradient = self.gradient.program if self.order == 2 else first_order(self.gradient.program)
        return gradient, update

    @cached_property
    def _all_programs(self) -> tuple[Program, ...]:
        """Those of the step, what decides about conditions, and the joint gradient of mixed mode."""
        owners = (self.variant,) if self.gradient is None else (self.gradient, self.variant)
        deciders = [owner.decide for owner in owners if owner.decide is not None]
        return (*self.programs, *deciders, *(() if self.joint is None else (self.joint,)))

    @cached_property
    def inputs(self) -> tuple[Slot, ...]:
        """What the step takes: parameters, buffers, state, hyperparameters, batch, meta, draws and constants."""
        slots = [slot for program in self._all_programs for slot in program.inputs]
        return tuple(dict.fromkeys(slot for slot in (*slots, *self.variant.pins) if slot.role not in CROSSING))

    @cached_property
    def results(self) -> tuple[Slot, ...]:
        """What the step computes: new parameters, buffers and state, the loss or what a train step returns."""
        slots = [slot for program in self.programs for slot in program.results]
        hidden = (*CROSSING, Role.GUARD, Role.BUFFER) if self.keeps_buffers else (*CROSSING, Role.GUARD)
        made = dict.fromkeys(slot for slot in slots if slot.role not in hidden)
        return (*made, HOLDS) if self.has_conditions else tuple(made)

    @property
    def has_conditions(self) -> bool:
        """Tells whether there is anything under which the programs hold."""
        owners = (self.variant,) if self.gradient is None else (self.gradient, self.variant)
        return bool(self.variant.pins) or any(owner.before or owner.after for owner in owners)

    @cached_property
    def draws(self) -> dict[Slot, Draw]:
        """The random draws, in the order in which they are made."""
        return {slot: draw for program in self.programs for slot, draw in program.draws.items()}

    @cached_property
    def constants(self) -> dict[Slot, Tensor]:
        """The tensors that the programs hold."""
        return {slot: value for program in self._all_programs for slot, value in program.constants.items()}

    @property
    def skeleton(self) -> Skeleton:
        """The structure of the optimizer's state after the step."""
        return self.variant.skeleton

    @property
    def title(self) -> str:
        """What the programs are, for messages."""
        return ", then ".join(program.title for program in self.programs)

    def assemble(self, returned: Sequence[Any]) -> Any:
        """Returns the loss, or what a whole train step returns, from the results that are neither state nor `HOLDS`."""
        if self.variant.returned is None:
            return returned[0]
        slots = [slot for slot in self.results if slot.role not in CARRIED and slot != HOLDS]
        return self.variant.returned.assemble(dict(zip(slots, returned, strict=True)))

    def __call__(self, *values: Tensor) -> Sequence[Tensor]:
        """Takes one tensor for each of `inputs` and returns one for each of `results`."""
        results = self.run(dict(zip(self.inputs, values, strict=True)))
        return [results[slot] for slot in self.results]

    def run(self, given: Mapping[Slot, Tensor]) -> dict[Slot, Tensor]:
        """Returns everything that the programs compute, also what crosses from one to the other, and `HOLDS`."""
        results: dict[Slot, Tensor] = {}
        conditions = _Conditions()
        self._before(given, conditions)
        for index, program in enumerate(self.programs):
            is_gradient = index < len(self.programs) - 1
            found = program({**given, **{slot: value for slot, value in results.items() if slot.role in CROSSING}})
            owner = self.gradient if is_gradient and self.gradient is not None else self.variant
            for one in owner.after:
                conditions.add(found[one.slot], one.outcome)
            results.update(found)
        if self.has_conditions:
            results[HOLDS] = conditions.all()
        return results

    def _before(self, given: Mapping[Slot, Tensor], conditions: _Conditions) -> None:
        """Adds the conditions that follow from what the step starts with."""
        for owner in (self.gradient, self.variant):
            if owner is not None and owner.decide is not None:
                found = owner.decide(given)
                for one in owner.before:
                    conditions.add(found[one.slot], one.outcome)
        for slot, pin in self.variant.pins.items():
            conditions.add(given[slot] == pin, True)

    def check_derivatives(self, asked: Collection[Slot]) -> None:
        """Refuses to differentiate by the inputs `asked` where an operator has no derivative."""
        update = self.programs[-1]
        crossing = [slot for slot in update.inputs if slot.role in CROSSING]
        check_derivatives(update, frozenset((*asked, *crossing)))


class _Conditions:
    """Conditions with their outcomes, put together with one operator for each: an optimizer may have hundreds."""

    def __init__(self) -> None:
        self._joined: dict[bool, Tensor] = {}

    def add(self, condition: Tensor, outcome: bool) -> None:
        """Adds a condition, which all entries of a tensor have to meet."""
        if condition.dim():
            condition = condition.all() if outcome else condition.any()
        known = self._joined.get(outcome)
        if known is not None:
            condition = condition.to(known.device)
            condition = known & condition if outcome else known | condition
        self._joined[outcome] = condition

    def all(self) -> Tensor:
        """Returns whether all came out as they should."""
        if False not in self._joined:
            return self._joined[True]
        others = self._joined[False].logical_not()
        return self._joined[True] & others.to(self._joined[True].device) if True in self._joined else others
