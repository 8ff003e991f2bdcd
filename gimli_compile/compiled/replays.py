"""Loops like one that ran before, from the tensors of a call straight to the driver.

In loops of few steps, reading, checking and arranging arguments takes longer than the steps. A call that differs from
an earlier one in nothing but the values of its tensors (`call_reading.py`) needs none of that again: the driver knows
the forms that the tensors had, and where each of them goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_, itemgetter
from typing import Any, cast

import torch
import torch._C._aoti as _aoti
import torch._C._autograd as _autograd

from gimli_compile.compiled.call_reading import Call
from gimli_compile.compiled.choice import LoopInputs
from gimli_compile.compiled.inputs import build_state, layout
from gimli_compile.compiled.lean import driver
from gimli_compile.compiled.loop import once, refuse_batched
from gimli_compile.compiled.native import NativeLoop, capsules, holder_of, tape_of
from gimli_compile.compiled.planning import Run
from gimli_compile.metadata import is_differentiable
from gimli_compile.state import OptState, TrainState

Tensor = torch.Tensor


def replay_of(call: Call, run: Run, inputs: LoopInputs, plan: NativeLoop, *, single: bool) -> Replay | None:
    """Returns what runs calls like this one, which just ran by a plan; None where that takes more than the driver.

    With `single`, the loop is one step, and what it returns has no dimension for steps.
    """
    batch_is_wanted = any(slot in run.around.wanted for slot in run.around.batch)
    if plan.needs_more or batch_is_wanted or not plan.is_complete(run.segment, record=run.record):
        return None
    order = _order(call, run)
    if order is None or any(tensor.is_complex() for tensor in (*call.tensors, *run.carried)):
        return None
    if call.leads and any(
        flag and value.dtype not in _SUMMED for flag, value in zip(call.flags, run.carried, strict=False)
    ):
        return None
    return Replay(call, run, inputs, plan, order, single=single)


_SUMMED = (torch.float32, torch.float64)  # what the driver adds up over tasks


def _order(call: Call, run: Run) -> list[Tensor | int] | None:
    """Returns where what the driver takes is among the tensors of a call, or what it is; None if that is not clear.

    A loop may begin with more state than the call has (`beginnings.py`), the same in every such call.
    """
    count, batches = call.state, call.batches
    added = [value[0] if call.leads else value for value in run.carried[count:]]
    found: list[Tensor | int] = [*range(count), *added]
    after = count + batches
    places = {id(tensor): place for place, tensor in enumerate(call.tensors[after:], after)}
    for value in run.shared:
        if id(value) not in places and not call.reader.is_live_number(value):
            return None
        found.append(places.get(id(value), value))
    return [*found, *range(count, count + batches)]


def _picking(places: list[int]) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    return itemgetter(*places) if len(places) > 1 else lambda tensors: [tensors[place] for place in places]


class Replay:
    """A loop that ran, as tables for others like it."""

    def __init__(
        self, call: Call, run: Run, inputs: LoopInputs, plan: NativeLoop, order: list[Tensor | int], *, single: bool
    ) -> None:
        final = plan.plan[-1]
        self.token = call.token
        self.plan = plan
        self.record, self._single = run.record, single
        self.more = [value for value in order if isinstance(value, Tensor)]
        more = iter(range(len(call.tensors), len(call.tensors) + len(self.more)))
        self.origins = [place if isinstance(place, int) else next(more) for place in order]
        self._pick = _picking(self.origins)
        self._tasks = run.lanes if call.leads else None
        self.through, slots = plan.through, final.after.slots
        self.made = [place for place in range(len(slots)) if place not in plan.through]
        self._count, self.carried = len(self.made), len(slots)
        self.kinds = [final.compiled.halves.results[place] for place in final.returned]
        self._still = [index for index, place in enumerate(self.made) if slots[place] not in final.after.active]
        self._still += [self._count + i for i, kind in enumerate(self.kinds) if not is_differentiable(kind)]
        flags = call.flags if run.record else (False,) * len(call.tensors)
        self.sources = [place for place, origin in enumerate(order) if isinstance(origin, int) and flags[origin]]
        self._slots, self._names, self._skeleton = slots, layout(slots), final.step.skeleton
        self._assemble = final.step.assemble
        parts = run.batches[0] if run.batches else []
        adjoints = (final.adjoints_of_carried([None] * len(slots), plan.through), final.adjoints_of_shared())
        given, parts, *adjoints = capsules([self.picked(call.tensors), parts, *adjoints])
        self.native = driver().replay(
            *plan.arguments(run.segment),
            *(int(run.record), int(not single), len(run.carried), len(run.shared)),
            *(given, self._tasks or 0, inputs.batches.dim if inputs.batches.is_uniform else -1),
            *(parts, self.made, self.sources, *adjoints),
        )

    def picked(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns what the driver is given, of the tensors of a call."""
        return self._pick([*tensors, *self.more])

    def places_of_model(self) -> list[int]:
        """Returns where parameters and buffers are in what is carried on, in the order of the last state."""
        return [place for _, places in self._names[:2] for place in places]

    def fits(self, call: Call) -> bool:
        """Tells whether the live objects hold what they held when the loop ran."""
        return all(map(is_, self.token, call.token))

    def refit(self, call: Call, plan: NativeLoop) -> bool:
        """Takes what the live objects hold now for what they held, where only that changed; tells whether it did."""
        if plan is not self.plan or self.more:
            return False
        self.token = call.token
        return True

    def __call__(self, tensors: Sequence[Tensor]) -> tuple[TrainState, Any] | None:
        """Runs the loop on the tensors of a call; returns nothing where it has to run in another way."""
        # Hooks on saved tensors see those of the loop in Python.
        if self.record and _autograd._top_saved_tensors_default_hooks(True) is not None:
            return None
        given = list(self.picked(tensors))
        found = driver().play(self.native, _aoti.unsafe_alloc_void_ptrs_from_tensors(given))
        if found is None and not all(map(Tensor.is_contiguous, given)):
            given = list(map(Tensor.contiguous, given))
            found = driver().play(self.native, _aoti.unsafe_alloc_void_ptrs_from_tensors(given))
        if found is None:
            return None
        results: Sequence[Tensor] = _aoti.alloc_tensors_by_stealing_from_void_ptrs(found[0])
        if self.record:
            results = _apply(self, results, [*(given[place] for place in found[1]), holder_of(found[2])], given)
        made = iter(results)
        last = [self._passed(given, place) if place in self.through else next(made) for place in range(self.carried)]
        return self._state(last), self._assemble(list(made))

    def _state(self, values: list[Tensor]) -> TrainState:
        *parts, held = self._names
        if held[0]:
            return build_state(self._slots, values, self._skeleton)
        params, buffers, state = [
            dict(zip(names, [values[place] for place in places], strict=True)) for names, places in parts
        ]
        return TrainState(params, buffers, OptState(self._skeleton, state))

    def _passed(self, given: Sequence[Tensor], place: int) -> Tensor:
        value = given[self.through[place]]
        return value if self._tasks is None else value.expand(self._tasks, *value.shape)

    def differentiated(self, given: Sequence[Tensor]) -> list[Tensor]:
        """Returns those of what the driver is given that are differentiated."""
        return [given[place] for place in self.sources]

    def still(self, results: Sequence[Tensor]) -> list[Tensor]:
        """Returns the results that do not depend on what is differentiated."""
        return [results[index] for index in self._still]

    def backward(self, tape: Any, grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """Returns the adjoints of what is differentiated, from those of the results."""
        given = [grad for grad in grads[: self._count] if grad is not None]
        given += [self._by_step(grad) for grad in grads[self._count :] if grad is not None]
        if any(map(Tensor.is_neg, given)):  # none is complex
            given = list(map(Tensor.resolve_neg, given))
        capsules_of: list[Any] = _aoti.unsafe_alloc_void_ptrs_from_tensors(list(map(Tensor.contiguous, given)))
        if len(given) < len(grads):
            made = iter(capsules_of)
            capsules_of = [None if grad is None else next(made) for grad in grads]
        found = driver().play_back(self.native, tape, capsules_of[: self._count], capsules_of[self._count :])
        if None not in found:
            return _aoti.alloc_tensors_by_stealing_from_void_ptrs(found)
        tensors = iter(_aoti.alloc_tensors_by_stealing_from_void_ptrs([one for one in found if one is not None]))
        return [None if one is None else next(tensors) for one in found]

    def _by_step(self, grad: Tensor) -> Tensor:
        return grad[None] if self._single else grad.movedim(-1, 0)


class ReplayedLoop(torch.autograd.Function):
    """A loop that the driver ran, as one node: `CompiledLoop` with nothing to arrange."""

    @staticmethod
    def forward(ctx: Any, replay: Replay, results: list[Tensor], kept: list[Tensor], *inputs: Tensor) -> Any:
        """Returns what the driver made."""
        ctx.replay, ctx.inputs = replay, inputs
        ctx.save_for_backward(*kept)
        still = replay.still(results)
        if still:
            ctx.mark_non_differentiable(*still)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Runs the adjoints of the steps."""
        refuse_batched(grads)
        holder = ctx.saved_tensors[-1]
        if not torch.is_grad_enabled():
            return (None, None, None, *ctx.replay.backward(tape_of(holder), grads))
        with torch.no_grad():
            found = ctx.replay.backward(tape_of(holder), grads)
        return (None, None, None, *(once(grad, ctx.inputs) for grad in found))


# No transform of torch.func is active, which is what `ReplayedLoop.apply` would look for.
_apply_function: Any = cast("Any", super(torch.autograd.Function, ReplayedLoop)).apply


def _apply(replay: Replay, results: Sequence[Tensor], kept: list[Tensor], given: Sequence[Tensor]) -> Sequence[Tensor]:
    return _apply_function(replay, results, kept, *replay.differentiated(given))
