"""The loop over compiled steps in C++ (`loop_driver.cpp`), for lean programs (`lean.py`).

It does what `loop.py` does in Python, on the same tables. Python runs a loop where a program was not compared with its
graph yet, or is not lean.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch._C._aoti as _aoti
import torch._C._autograd as _autograd

from gimli_compile.compiled.binding import Bound, passed_through
from gimli_compile.compiled.inputs import forms, in_order
from gimli_compile.compiled.lean import driver
from gimli_compile.compiled.loop import Adjoints, Ran, Record, Tape, run_backward

Tensor = torch.Tensor
_PLAIN, _SAVING, _BACKWARD = range(3)  # places in what `CompiledFunction.entries` returns


class NativeLoop:
    """The plan of a loop as the tables of the driver."""

    def __init__(self, plan: Sequence[Bound], *, one_base: bool) -> None:
        """Makes the tables; `one_base` tells whether the batches of all steps are parts of the same tensors."""
        self.plan = plan
        self._one_base = one_base
        self._distinct = list(dict.fromkeys(plan))
        place = {bound: index for index, bound in enumerate(self._distinct)}
        self._order = [place[bound] for bound in plan]
        self._to_batches = any(bound.to_batch for bound in self._distinct)
        self._entries = [(0, 0, 0)] * len(self._distinct)
        self.through = passed_through(plan)
        self.needs_more = any(bound.step.draws or bound.step.constants for bound in self._distinct)
        # Results of other forms do not stack, or not as they are: `loop.py` finds out.
        self._stacks = len({forms(_returned(bound)) for bound in self._distinct}) == 1

    @functools.cached_property
    def _tables(self) -> list[Any]:
        return [driver().step(*_table(bound)) for bound in self._distinct]

    def _have(self, *kinds: int) -> bool:
        """Tells whether all steps have lean programs of these kinds, as `entries` counts them."""
        if not all(entries[kind] for entries in self._entries for kind in kinds):
            self._entries = [bound.compiled.entries() for bound in self._distinct]
        return all(entries[kind] for entries in self._entries for kind in kinds)

    def can_run(self, tape: Tape, *, record: bool) -> bool:
        """Tells whether the driver can run this loop forward.

        Hooks on saved tensors want to see all tensors that autograd keeps: they see those of the loop in Python.
        """
        if record and _autograd._top_saved_tensors_default_hooks(True) is not None:
            return False
        return self._stacks and self._have(_SAVING if record and tape.segment is None else _PLAIN)

    def can_run_back(self, segment: int | None) -> bool:
        """Tells whether the driver can run the adjoints of a loop."""
        return self._have(_BACKWARD) if segment is None else self._have(_BACKWARD, _SAVING)

    def is_complete(self, segment: int | None, *, record: bool) -> bool:
        """Tells whether the driver can run all that such a loop takes, there and back."""
        recomputes = record and segment is not None
        kinds = (_PLAIN,) * (recomputes or not record) + (_SAVING, _BACKWARD) * record
        return self._stacks and self._have(*kinds)

    def arguments(self, segment: int | None) -> tuple[Any, ...]:
        """Returns tables, programs, order and segment, as the driver takes them."""
        return self._tables, self._entries, self._order, segment or 0

    def run(self, tape: Tape, carried: list[Tensor], *, record: bool) -> tuple[Ran, bool]:
        """Runs a loop; returns what it gave, and whether the conditions of all steps held."""
        given, common, *rest = capsules([carried, tape.shared, *tape.rest])
        arguments = (int(record), given, common, rest, int(self._one_base))
        *found, held, kept = driver().forward(*self.arguments(tape.segment), *arguments)
        last, stacked, watched = _tensors(found)
        return Ran(NativeTape(self, tape.segment, kept, watched), last, stacked), held

    def backward(self, kept: Any, segment: int | None, last: list[Any], stacked: Sequence[Tensor | None]) -> Adjoints:
        """Runs the adjoints of all steps on the tape that the driver made."""
        if not self.can_run_back(segment):
            residuals, shared, rest = driver().contents(kept)
            parts = [_tensors(part) for part in (rest, residuals)]
            tape = Tape(self.plan, _tensors([shared])[0], parts[0], segment, parts[1], self.through)
            return run_backward(tape, last, stacked)
        final = self.plan[-1]
        adjoints = (final.adjoints_of_carried(last, self.through), final.adjoints_of_shared())
        by_step = [None if grad is None else in_order(grad.movedim(-1, 0)) for grad in stacked]
        given = capsules([*adjoints, by_step])
        found = iter(_tensors([driver().backward(*self.arguments(segment), kept, *given)])[0])
        carried = list(islice(found, len(self.plan[0].before.slots)))
        shared = list(islice(found, len(adjoints[1])))
        of_steps = self.plan if self._to_batches else ()
        return Adjoints(carried, shared, [dict(enumerate(islice(found, len(one.around.batch)))) for one in of_steps])


@dataclass(frozen=True)
class NativeTape:
    """What the driver kept of a loop, and the tensors of it that others may change, which autograd notices."""

    loop: NativeLoop
    segment: int | None
    kept: Any
    watched: list[Tensor]

    @property
    def bound(self) -> Sequence[Bound]:
        """The steps."""
        return self.loop.plan

    @property
    def through(self) -> Mapping[int, int]:
        """What all steps only pass on."""
        return self.loop.through

    def recorded(self) -> tuple[Record, list[Tensor]]:
        """Returns what the way back has to know, and the tensors that autograd keeps for it.

        The last of these has no elements. It holds the tape, which goes when autograd lets go of what it keeps.
        """
        return NativeRecord(self.loop, self.segment), [*self.watched, holder_of(self.kept)]


class _Holder(Tensor):
    """A tensor without elements, and a tape."""

    tape: Any


_EMPTY = torch.empty(0)


def holder_of(tape: Any) -> Tensor:
    """Returns a tensor without elements that holds a tape for as long as autograd keeps it."""
    holder = _EMPTY.as_subclass(_Holder)
    holder.tape = tape
    return holder


def tape_of(holder: Tensor) -> Any:
    """Returns what a tensor of `holder_of` holds."""
    assert isinstance(holder, _Holder)
    return holder.tape


@dataclass(frozen=True)
class NativeRecord:
    """What the way back knows of a loop of the driver."""

    loop: NativeLoop
    segment: int | None

    def backward(self, kept: list[Tensor], last: list[Any], stacked: Sequence[Tensor | None]) -> Adjoints:
        """Runs the adjoints of the steps."""
        return self.loop.backward(tape_of(kept[-1]), self.segment, last, stacked)


def capsules(lists: Sequence[Sequence[Tensor | None]]) -> list[list[Any]]:
    """Returns lists of tensors as the driver takes them; it owns them from then on."""
    made = iter(_aoti.unsafe_alloc_void_ptrs_from_tensors([one for part in lists for one in part if one is not None]))
    return [[None if one is None else next(made) for one in part] for part in lists]


def _tensors(lists: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Returns the tensors that the driver gave, in lists."""
    capsules = [one for part in lists for one in part if one is not None]
    found = iter(_aoti.alloc_tensors_by_stealing_from_void_ptrs(capsules))
    return [[None if one is None else next(found) for one in part] for part in lists]


def _returned(bound: Bound) -> list[Tensor]:
    """Returns fake tensors of the form of what a step returns."""
    return [bound.compiled.halves.results[place] for place in bound.returned]


def _table(bound: Bound) -> tuple[Any, ...]:
    """Returns the tables of a step, as `step` in the driver takes them."""
    halves, returned = bound.compiled.halves, _returned(bound)
    sizes = (bound.pool_size, len(bound.before.slots), len(bound.around.batch))
    results = (len(halves.results), _count_saved(bound), len(halves.found))
    return (
        (*sizes, *results, -1 if bound.held is None else bound.held),
        *(bound.take, bound.carry, bound.returned, halves.residuals, bound.accumulators, bound.seeds),
        *(bound.passed, bound.to_carried, bound.to_shared, bound.to_batch, bound.unused),
        *capsules([[bound.zero(place) for place in bound.unused], bound.adjoints_of_returned([None] * len(returned))]),
    )


def _count_saved(bound: Bound) -> int:
    """Returns how many values a step computes for the way back: its results, and the fresh residuals."""
    results = len(bound.compiled.halves.results)
    return max((len(bound.take) + results, *(place + 1 for place in bound.compiled.halves.residuals))) - len(bound.take)
