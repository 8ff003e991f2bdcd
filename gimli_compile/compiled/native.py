"""The loop over compiled steps in C++ (`loop_driver.cpp`), for programs that are libraries of Inductor.

It does what `loop.py` does in Python, on the same tables. Python runs a loop where a program was not compared with its
graph yet, or is no library.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch._inductor.codecache import CppCodeCache

from gimli_compile.compiled.binding import Bound
from gimli_compile.compiled.loop import Adjoints, Ran, Record, Tape, run_backward, stacked

Tensor = torch.Tensor
Source = tuple[str, int, int]  # what a value of a loop is: "carried", "shared", "rest" or "made"; which step; which one


@functools.cache
def _driver() -> Any:
    """Builds the driver, once on a machine, and imports it."""
    source = Path(__file__).with_name("loop_driver.cpp").read_text()
    path = CppCodeCache.load(source, device_type="cpu")._name
    spec = importlib.util.spec_from_file_location("loop_driver", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class NativeLoop:
    """The plan of a loop as the tables of the driver."""

    def __init__(self, plan: Sequence[Bound], *, one_base: bool) -> None:
        """Makes the tables; `one_base` tells whether the batches of all steps are parts of the same tensors."""
        self.plan = plan
        self._one_base = one_base
        self._distinct = list(dict.fromkeys(plan))
        place = {bound: index for index, bound in enumerate(self._distinct)}
        self._order = [place[bound] for bound in plan]
        self._watched: dict[int | None, _Watched] = {}

    @functools.cached_property
    def _tables(self) -> list[Any]:
        return [_driver().step(*_table(bound)) for bound in self._distinct]

    def _entries(self) -> list[tuple[int, int, int]]:
        return [bound.compiled.entries() for bound in self._distinct]

    def can_run(self, tape: Tape, *, record: bool) -> bool:
        """Tells whether the driver can run this loop forward.

        Hooks on saved tensors want to see all tensors that autograd keeps: they see those of the loop in Python.
        """
        if record and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return False
        saves = record and tape.segment is None
        return all(saving if saves else plain for plain, saving, _ in self._entries())

    def can_run_back(self, segment: int | None) -> bool:
        """Tells whether the driver can run the adjoints of a loop."""
        return all(backward and (segment is None or saving) for _, saving, backward in self._entries())

    def _arguments(self, segment: int | None) -> tuple[Any, ...]:
        return self._tables, self._entries(), self._order, segment or 0

    def run(self, tape: Tape, carried: list[Tensor], *, record: bool) -> tuple[Ran, list[Tensor]]:
        """Runs a loop; returns what it gave, and whether the conditions of its steps held."""
        watched = self._watched_at(tape.segment)
        rest = [_capsules(of_step) for of_step in tape.rest]
        given = (int(record), _capsules(carried), _capsules(tape.shared), rest, watched.made)
        capsules, kept = _driver().forward(*self._arguments(tape.segment), *given)
        found = iter(_tensors(capsules))
        last = list(islice(found, len(self.plan[-1].carry)))
        returned = [list(islice(found, len(bound.returned))) for bound in self.plan]
        inputs = [_value(source, carried, tape) for source in watched.inputs] if record else []
        native = NativeTape(self, tape.segment, kept, inputs, watched.results)
        return Ran(native, last, stacked(returned)), list(found)

    def backward(self, kept: Any, segment: int | None, last: list[Any], returned: Sequence[list[Any]]) -> Adjoints:
        """Runs the adjoints of all steps on the tape that the driver made."""
        final = self.plan[-1]
        if not self.can_run_back(segment):
            residuals, shared, rest = _driver().contents(kept)
            parts = [list(map(_tensors, part)) for part in (rest, residuals)]
            return run_backward(Tape(self.plan, _tensors(shared), parts[0], segment, parts[1]), last, returned)
        adjoints = (final.adjoints_of_carried(last), final.adjoints_of_shared())
        of_steps = _capsules([grad for of_step in returned for grad in of_step])
        given = iter(of_steps)
        grads = [list(islice(given, len(of_step))) for of_step in returned]
        found = iter(_tensors(_driver().backward(*self._arguments(segment), kept, *map(_capsules, adjoints), grads)))
        carried = list(islice(found, len(self.plan[0].before.slots)))
        shared = list(islice(found, len(adjoints[1])))
        batches = [dict(enumerate(islice(found, len(bound.around.batch)))) for bound in self.plan]
        return Adjoints(carried, shared, batches)

    def _watched_at(self, segment: int | None) -> _Watched:
        if segment not in self._watched:
            self._watched[segment] = _watched(self.plan, segment, one_base=self._one_base)
        return self._watched[segment]


@dataclass(frozen=True)
class NativeTape:
    """What the driver kept of a loop, and which tensors of it others see as well.

    Autograd watches whether those change: `inputs`, and the loop's results at the places `results`.
    """

    loop: NativeLoop
    segment: int | None
    kept: Any
    inputs: list[Tensor]
    results: tuple[int, ...]

    @property
    def bound(self) -> Sequence[Bound]:
        """The steps."""
        return self.loop.plan

    def recorded(self, results: Sequence[Tensor]) -> tuple[Record, list[Tensor]]:
        """Returns what the way back has to know, and the tensors that autograd keeps for it.

        The last of these has no elements. It holds the tape, which goes when autograd lets go of what it keeps.
        """
        holder = torch.empty(0)
        holder.kept_by_the_loop = self.kept  # pyright: ignore[reportAttributeAccessIssue]
        return NativeRecord(self.loop, self.segment), [
            *self.inputs,
            *(results[place] for place in self.results),
            holder,
        ]


@dataclass(frozen=True)
class NativeRecord:
    """What the way back knows of a loop of the driver."""

    loop: NativeLoop
    segment: int | None

    def backward(self, kept: list[Tensor], last: list[Any], returned: Sequence[list[Any]]) -> Adjoints:
        """Runs the adjoints of the steps."""
        return self.loop.backward(kept[-1].kept_by_the_loop, self.segment, last, returned)  # pyright: ignore[reportAttributeAccessIssue]


def _capsules(tensors: Sequence[Tensor | None]) -> list[Any]:
    """Returns tensors as the driver takes them; it owns them from then on."""
    made = torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([tensor for tensor in tensors if tensor is not None])
    if len(made) == len(tensors):
        return made
    found = iter(made)
    return [None if tensor is None else next(found) for tensor in tensors]


def _tensors(capsules: Sequence[Any]) -> list[Any]:
    """Returns the tensors that the driver gave."""
    found = iter(torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([one for one in capsules if one is not None]))
    return [None if one is None else next(found) for one in capsules]


def _table(bound: Bound) -> tuple[Any, ...]:
    """Returns the tables of a step, as `step` in the driver takes them."""
    halves, returned = bound.compiled.halves, [bound.compiled.halves.results[place] for place in bound.returned]
    sizes = (bound.pool_size, len(bound.before.slots), len(bound.around.batch))
    results = (len(halves.results), _count_saved(bound), len(halves.found))
    return (
        (*sizes, *results, -1 if bound.held is None else bound.held),
        *(bound.take, bound.carry, bound.returned, halves.residuals, bound.accumulators, bound.seeds),
        *(bound.passed, bound.to_carried, bound.to_shared, bound.to_batch, bound.unused),
        _capsules([bound.zero(place) for place in bound.unused]),
        _capsules(bound.adjoints_of_returned([None] * len(returned))),
    )


def _count_saved(bound: Bound) -> int:
    """Returns how many values a step computes for the way back: its results, and the fresh residuals."""
    results = len(bound.compiled.halves.results)
    return max((len(bound.take) + results, *(place + 1 for place in bound.compiled.halves.residuals))) - len(bound.take)


@dataclass(frozen=True)
class _Watched:
    """What of a loop's tape others see: values that it was given, and results at these places.

    `made` are the places of all results that steps made.
    """

    inputs: tuple[Source, ...]
    results: tuple[int, ...]
    made: tuple[int, ...]


def _watched(plan: Sequence[Bound], segment: int | None, *, one_base: bool) -> _Watched:
    """Follows the values of a loop through its steps."""
    carried: list[Source] = [("carried", 0, place) for place in range(len(plan[0].before.slots))]
    kept: dict[Source, None] = {}
    for index, bound in enumerate(plan):
        pool = [*carried, *_given(bound, index)]
        made: list[Source] = [("made", index, place) for place in range(_count_saved(bound))]
        if segment is None:
            inputs = [pool[place] for place in bound.take]
            kept.update(dict.fromkeys([*inputs, *made][place] for place in bound.compiled.halves.residuals))
        elif index % segment == 0:
            kept.update(dict.fromkeys(carried))
        if segment is not None:
            kept.update(dict.fromkeys(_given(bound, index)))
        carried = [[*pool, *made][place] for place in bound.carry]
    if one_base:  # parts of one tensor change together
        batch = len(plan[0].around.batch)
        kept = dict.fromkeys(
            ("rest", 0, at) if kind == "rest" and at < batch else (kind, step, at) for kind, step, at in kept
        )
    return _Watched(
        tuple(source for source in kept if source[0] != "made"),
        tuple(place for place, source in enumerate(carried) if source[0] == "made" and source in kept),
        tuple(place for place, source in enumerate(carried) if source[0] == "made"),
    )


def _given(bound: Bound, index: int) -> Iterator[Source]:
    """Yields what a step's pool has besides what is carried."""
    shared = len(bound.around.shared)
    yield from (("shared", 0, place) for place in range(shared))
    yield from (("rest", index, place) for place in range(bound.pool_size - len(bound.before.slots) - shared))


def _value(source: Source, carried: Sequence[Tensor], tape: Tape) -> Tensor:
    kind, step, place = source
    return carried[place] if kind == "carried" else tape.shared[place] if kind == "shared" else tape.rest[step][place]
