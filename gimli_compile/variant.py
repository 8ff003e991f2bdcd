"""Variants: one captured update for each structure of the state and each outcome of the guards."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from gimli_compile.findings import Baked
from gimli_compile.gradient_flow import carried_buffers
from gimli_compile.passes.differentiability import check_derivatives
from gimli_compile.passes.liveness import compute_only
from gimli_compile.pipeline import first_order
from gimli_compile.program import Program
from gimli_compile.recording import HOST_DRAW
from gimli_compile.skeleton import Skeleton
from gimli_compile.slot import Role, Slot
from gimli_compile.transforms import is_differentiated, is_everywhere, outside_transforms
from gimli_compile.tree_slots import Returned


@dataclass(frozen=True)
class Condition:
    """One guard of a variant: the result slot that computes it, what it must be, and its text.

    A `fixed` one says that a number is the one of the capture; others choose a branch.
    """

    slot: Slot
    outcome: bool
    text: str
    fixed: bool = False

    def __str__(self) -> str:
        return self.text if self.outcome else f"not ({self.text})"


@dataclass(frozen=True)
class UpdateVariant:
    """A program for one update, the structure of the state that it makes, and when it holds.

    `decide` computes the conditions that follow from counters and hyperparameters, before the step; `after` are
    conditions on tensor values, which the program itself computes and which are checked after the step. `pins` are
    numbers that the program holds as constants. `edges` are hyperparameters whose captured value lies on the edge of a
    condition, so that values beside it take another branch; of those, the program has the derivatives in `relaxed`.
    `returned` is the structure of what a whole train step returns.
    """

    program: Program
    skeleton: Skeleton
    before: tuple[Condition, ...]
    after: tuple[Condition, ...]
    decide: Program | None
    pins: Mapping[Slot, float] = field(default_factory=dict)
    edges: frozenset[str] = frozenset()
    relaxed: frozenset[str] = frozenset()
    baked: tuple[Baked, ...] = ()
    returned: Returned | None = None

    @cached_property
    def first_order(self) -> Program:
        """The program in which the inner gradients are constants."""
        return first_order(self.program)

    @cached_property
    def _differentiable(self) -> set[tuple[int, frozenset[Slot]]]:
        """The order, and the inputs, that derivatives were asked for and are there."""
        return set()

    def check_derivatives(self, values: Mapping[Slot, torch.Tensor], order: int) -> None:
        """Refuses to run where derivatives are asked for that the program of this order does not have."""
        if not torch.is_grad_enabled():
            return
        asked = frozenset(slot for slot, value in values.items() if is_differentiated(value))
        if asked and (order, asked) not in self._differentiable:
            with outside_transforms():
                check_derivatives(self.program if order == 2 else self.first_order, asked)
            self._differentiable.add((order, asked))

    def holds(self, values: Mapping[Slot, torch.Tensor], watched: frozenset[str] = frozenset()) -> bool:
        """Tells, before the step, whether this variant is right for these values.

        `watched` are the hyperparameters that are differentiated.
        """
        if not self.edges & watched <= self.relaxed:
            return False
        if any(not _is_pinned(values[slot], pin) for slot, pin in self.pins.items()):
            return False
        if self.decide is None:
            return True
        with torch.no_grad():
            found = self.decide(values)
        return all(is_everywhere(found[condition.slot], condition.outcome) for condition in self.before)

    def held(self, results: Mapping[Slot, torch.Tensor]) -> bool:
        """Tells, after the step, whether the conditions on tensor values held."""
        return all(is_everywhere(results[condition.slot].detach(), condition.outcome) for condition in self.after)

    @cached_property
    def carried_buffers(self) -> frozenset[str]:
        """The names of the buffers whose new values carry derivatives."""
        return carried_buffers(self.program)

    @property
    def draws_on_host(self) -> bool:
        """Tells whether the program takes numbers from the generators of Python or NumPy."""
        return any(HOST_DRAW in slot.path for slot in self.program.draws)

    @property
    def guards(self) -> tuple[str, ...]:
        """The conditions as text."""
        shown = {slot: value for slot, value in self.pins.items() if not slot.path.startswith("defaults.")}
        pins = tuple(f"{slot.name} == {value:g}" for slot, value in shown.items())
        return tuple(map(str, (*self.before, *self.after))) + pins


def _is_pinned(value: torch.Tensor, pin: float) -> bool:
    return is_everywhere(value == pin, True)


def split_guards(
    program: Program, before: Collection[Condition], without: Collection[Slot] = ()
) -> tuple[Program, Program | None]:
    """Returns the program without the conditions that are decided before it runs, and the program that decides them.

    `without` are results of neither. Hyperparameters and constants that a program does not need are no inputs of it.
    """
    decided = {condition.slot for condition in before}
    main = [index for index, slot in enumerate(program.results) if slot not in decided and slot not in without]
    made = compute_only(program, main, dropping=(Role.CONSTANT, Role.HYPER))
    if not before:
        return made, None
    conditions = [index for index, slot in enumerate(program.results) if slot in decided]
    return made, compute_only(program, conditions, dropping=tuple(Role))


def result_paths(program: Program, role: Role) -> dict[str, Slot]:
    """Returns the result slots of a role, by path."""
    return {slot.path: slot for slot in program.results if slot.role is role}
