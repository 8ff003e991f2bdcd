"""Unrolls loops of compiled steps."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gimli_compile.compiled.backends import BACKENDS
from gimli_compile.compiled.beginnings import Beginning, find_beginning
from gimli_compile.compiled.binding import Around, Carried
from gimli_compile.compiled.choice import Choice, LoopInputs
from gimli_compile.compiled.functions import Builder
from gimli_compile.compiled.inputs import build_state, forms, state_slots, state_values
from gimli_compile.compiled.loop import CompiledLoop, Ran, Sources, Tape, run_forward, stacked
from gimli_compile.compiled.mixed_steps import MixedSteps
from gimli_compile.compiled.native import NativeLoop
from gimli_compile.compiled.planning import Planner, Run
from gimli_compile.slot import Slot
from gimli_compile.state import TrainState

Tensor = torch.Tensor


class LoopCompiler:
    """Runs loops by compiled programs; keeps what it compiled."""

    def __init__(self, choice: Choice, backend: str, *, verify: bool, mixed: MixedSteps | None = None) -> None:
        self._choice = choice
        self._planner = Planner(Builder(BACKENDS[backend], verify), mixed)
        self._plans: dict[Any, tuple[NativeLoop, Beginning | None]] = {}
        self.has_mixed = mixed is not None

    def unroll(self, state: TrainState, inputs: LoopInputs, *, segment: int | None) -> tuple[TrainState, Any]:
        """Returns the last state, and what the steps returned, stacked in the last dimension.

        `segment` is the number of steps from one state that is kept to the next; None keeps all residuals.
        """
        run = _prepare(state, inputs, segment)
        key = (run.start, run.around, run.skeleton, forms([*run.carried, *run.shared]), inputs.key())
        with torch.no_grad():
            run, ran = self._run(run, inputs, key)
        if run.record:
            ran = _recorded(ran, run)
        last = ran.tape.bound[-1]
        return build_state(last.after.slots, ran.carried, last.step.skeleton), last.step.assemble(ran.stacked)

    def _run(self, given: Run, inputs: LoopInputs, key: Any) -> tuple[Run, Ran]:
        """Runs by the plan that is known; where there is none, or its conditions fail, while making one.

        Returns also the loop that ran: what was given, or that from the state of a `Beginning`.
        """
        plan, beginning = self._plans.get(key, (None, None))
        if plan is not None:
            run = given if beginning is None else beginning.of(given)
            rest = run.batches
            if plan.needs_more:
                rest = [run.rest(index, bound.step) for index, bound in enumerate(plan.plan)]
            tape = Tape(plan.plan, run.shared, rest, run.segment, through=plan.through)
            ran, held = _run_by(plan, tape, run)
            if held:
                return run, ran
        beginning = find_beginning(given, inputs, self._choice)
        run = given if beginning is None else beginning.of(given)
        tape, carried, returned = self._planner.run(run, inputs, self._choice)
        plan = NativeLoop(tape.bound, one_base=inputs.batches.is_uniform)
        self._plans[key] = plan, beginning
        tape.through = plan.through
        return run, Ran(tape, carried, stacked(returned))


def _run_by(plan: NativeLoop, tape: Tape, run: Run) -> tuple[Ran, bool]:
    """Runs a loop in C++ where that is possible, else in Python; returns also whether conditions held."""
    if plan.can_run(tape, record=run.record):
        return plan.run(tape, run.carried, record=run.record)
    carried, returned, held = run_forward(tape, run.carried, record=run.record)
    return Ran(tape, carried, stacked(returned)), not held or bool(torch.stack(held).all())


def _prepare(state: TrainState, inputs: LoopInputs, segment: int | None) -> Run:
    carried, common, leaves = state_values(state), inputs.shared(), inputs.batches.leaves()
    values = list(common.values())
    flags = _flags(carried, values, leaves[:1] if inputs.batches.is_uniform else leaves)
    slots, around = _around(state_slots(state), tuple(common), inputs.batches.slots(), *flags)
    return Run(
        slots,
        [value.contiguous() for value in carried],
        around,
        [value.contiguous() for value in values],
        leaves if inputs.batches.is_uniform else [[leaf.contiguous() for leaf in of_step] for of_step in leaves],
        state.opt_state.skeleton,
        inputs.tasks,
        segment,
        record=any(map(any, flags)),
    )


def _flags(*groups: Any) -> tuple[tuple[bool, ...], ...]:
    """Returns what is differentiated: of what is carried, of what is shared, and of the batches, in any step."""
    carried, shared, batches = groups
    if not torch.is_grad_enabled():
        return (False,) * len(carried), (False,) * len(shared), (False,) * len(batches[0])
    own = tuple(any(leaf.requires_grad for leaf in of) for of in zip(*batches, strict=True))
    return tuple(value.requires_grad for value in carried), tuple(value.requires_grad for value in shared), own


@functools.lru_cache(maxsize=512)
def _around(
    state: tuple[Slot, ...], shared: tuple[Slot, ...], batch: tuple[Slot, ...], *flags: tuple[bool, ...]
) -> tuple[Carried, Around]:
    active, *wanted = (
        frozenset(slot for slot, flag in zip(slots, of, strict=True) if flag)
        for slots, of in zip((state, shared, batch), flags, strict=True)
    )
    return Carried(state, active), Around(shared, batch, wanted[0] | wanted[1])


def _recorded(ran: Ran, run: Run) -> Ran:
    """Returns the results of a loop as results of one node of the autograd graph; what it only passed on, as it was."""
    carried = tuple(index for index, slot in enumerate(run.start.slots) if slot in run.start.active)
    shared = tuple(index for index, slot in enumerate(run.around.shared) if slot in run.around.wanted)
    own = [index for index, slot in enumerate(run.around.batch) if slot in run.around.wanted]
    batches = tuple(
        (step, index) for step, leaves in enumerate(run.batches) for index in own if leaves[index].requires_grad
    )
    inputs = [run.carried[index] for index in carried] + [run.shared[index] for index in shared]
    inputs += [run.batches[step][index] for step, index in batches]
    results = iter(CompiledLoop.apply(ran, Sources(carried, shared, batches), *inputs))
    through = ran.tape.through
    last = [run.carried[through[i]] if i in through else next(results) for i in range(len(ran.carried))]
    return Ran(ran.tape, last, list(results))
