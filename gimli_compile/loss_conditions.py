"""The conditions under which a program of the model, or of the loss, holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx

from gimli_compile.condition_text import expression
from gimli_compile.program import Program
from gimli_compile.slot import Role, Slot
from gimli_compile.transforms import is_everywhere
from gimli_compile.update_capture import ancestors
from gimli_compile.variant import Condition, split_guards


@dataclass(frozen=True)
class Captured:
    """A captured program and the conditions under which it holds.

    They are branches on integers and buffers, and in torch's own checks; how many elements a mask selects; and, where
    the user allows it, branches on values. `decide` computes those `before` that follow from batch and buffers alone.
    """

    program: Program
    before: tuple[Condition, ...]
    after: tuple[Condition, ...]
    decide: Program | None

    def fits(self, values: Mapping[Slot, torch.Tensor], draws: Mapping[Slot, torch.Tensor]) -> bool:
        """Tells, before it runs, whether the program is the one for these inputs, as far as they say."""
        made = ((node.meta["val"].shape, draws[slot].shape) for slot, node in self._noise if slot in draws)
        if any(own != shape for own, shape in made):
            return False
        if self.decide is None:
            return True
        with torch.no_grad():
            found = self.decide(values)
        return _hold(self.before, found)

    def held(self, results: Mapping[Slot, torch.Tensor]) -> bool:
        """Tells whether the other conditions came out as they did at capture."""
        return _hold(self.after, results)

    @property
    def guards(self) -> tuple[str, ...]:
        """The conditions as text."""
        return tuple(dict.fromkeys(map(str, (*self.before, *self.after))))

    @cached_property
    def _noise(self) -> list[tuple[Slot, fx.Node]]:
        pairs = zip(self.program.inputs, self.program.placeholders, strict=True)
        return [(slot, node) for slot, node in pairs if slot.role is Role.NOISE]


def _hold(conditions: Iterable[Condition], found: Mapping[Slot, torch.Tensor]) -> bool:
    return all(is_everywhere(found[one.slot].detach(), one.outcome) for one in conditions)


def with_conditions(program: Program, outcomes: Mapping[Slot, bool]) -> Captured:
    """Sorts the conditions of a program by whether they can be decided before it runs."""
    slot_of = dict(zip(program.placeholders, program.inputs, strict=True))
    ancestry = ancestors(program)
    before: dict[Any, Condition] = {}
    after: dict[Any, Condition] = {}
    for slot in (slot for slot in program.results if slot.role is Role.GUARD):
        node, outcome = program.result_of(slot), outcomes.get(slot, True)
        roles = {slot_of[leaf].role for leaf in ancestry[node]}
        if not roles and not node.meta.get("fixed"):
            continue
        found = before if roles <= {Role.BATCH, Role.BUFFER} else after
        found.setdefault((node, outcome), Condition(slot, outcome, expression(node)))
    main, decide = split_guards(program, list(before.values()))
    return Captured(main, tuple(before.values()), tuple(after.values()), decide)
