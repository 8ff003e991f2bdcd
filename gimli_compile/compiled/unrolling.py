"""Unrolls loops of compiled steps."""

from __future__ import annotations

import functools
from typing import Any

import torch

from gimli_compile.compiled.backends import BACKENDS
from gimli_compile.compiled.beginnings import Beginning, find_beginning
from gimli_compile.compiled.binding import Around, Carried
from gimli_compile.compiled.call_reading import Call
from gimli_compile.compiled.choice import Choice, LoopInputs
from gimli_compile.compiled.device_graphs import DeviceGraphs, numbers_on_device
from gimli_compile.compiled.functions import Builder
from gimli_compile.compiled.inputs import build_state, forms, in_order, state_slots, state_values
from gimli_compile.compiled.loop import CompiledLoop, Ran, Sources, Tape, run_forward, stacked
from gimli_compile.compiled.mixed_steps import MixedSteps
from gimli_compile.compiled.native import NativeLoop
from gimli_compile.compiled.planning import Planner, Run
from gimli_compile.compiled.replays import Replay, replay_of
from gimli_compile.compiled.tangent_steps import TangentSteps
from gimli_compile.compiled.task_blocks import TaskBlocks, unroll_blocks
from gimli_compile.slot import Slot
from gimli_compile.state import TrainState
from gimli_compile.update_table import partition

Tensor = torch.Tensor
_REPLAYS = 256  # calls that are remembered


class LoopCompiler:
    """Runs loops by compiled programs; keeps what it compiled."""

    def __init__(
        self, choice: Choice, backend: str, *, verify: bool, mixed: MixedSteps | None = None, records: bool = False
    ) -> None:
        """Compiles by a backend; `records` loops as graphs of the device, where it has such."""
        self._choice = choice
        build = Builder(BACKENDS[backend], verify)
        self._planner = Planner(build, mixed)
        self.tangents = TangentSteps(choice, build)
        self._graphs = DeviceGraphs() if records else None
        self._blocks = TaskBlocks(choice)
        self._plans: dict[Any, tuple[NativeLoop, Beginning | None]] = {}
        self._replays: dict[Any, Replay] = {}
        self.has_mixed = mixed is not None

    def replay(self, call: Call | None) -> tuple[TrainState, Any] | None:
        """Returns what `unroll` does, if it ran for such a call before, and the driver can run it alone."""
        known = None if call is None else self.known(call)
        return None if known is None or call is None else known(call.tensors)

    def known(self, call: Call) -> Replay | None:
        """Returns what replays a call; None where such a call did not run before, or cannot be replayed."""
        found = self._replays.get(call.key)
        return None if found is None or not found.fits(call) else found

    def together(self, state: TrainState, inputs: LoopInputs) -> int | None:
        """Returns how many tasks run together; None if all do."""
        return self._blocks.size(state, inputs)

    def unroll(
        self,
        state: TrainState,
        inputs: LoopInputs,
        *,
        segment: int | None,
        call: Call | None = None,
        single: bool = False,
    ) -> tuple[TrainState, Any]:
        """Returns the last state, and what the steps returned, stacked in the last dimension.

        Large tasks run in blocks.

        Args:
            state: where the loop starts.
            inputs: what it runs on.
            segment: the number of steps from one state that is kept to the next; None keeps all residuals.
            call: what others like it are known by, if they may be replayed.
            single: there is one step, and what it returned has no dimension for steps.
        """
        size = self.together(state, inputs)
        if size is not None:
            unroll = functools.partial(self._unroll, segment=segment, call=None, single=single)
            found = unroll_blocks(unroll, state, inputs, size)
            if found is not None:
                return found
        return self._unroll(state, inputs, segment=segment, call=call, single=single)

    def _unroll(
        self, state: TrainState, inputs: LoopInputs, *, segment: int | None, call: Call | None, single: bool
    ) -> tuple[TrainState, Any]:
        state, inputs = numbers_on_device(state, inputs)
        run = _prepare(state, inputs, segment)
        key = (run.start, run.around, run.skeleton, forms([*run.carried, *run.shared]), run.same, inputs.key())
        with torch.no_grad():
            run, ran = self._run(run, inputs, key)
        if call is not None:
            self._remember(call, run, inputs, self._plans[key][0], single=single)
        if run.record:
            ran = _recorded(ran, run)
        last = ran.tape.bound[-1]
        returned = [value.squeeze(-1) for value in ran.stacked] if single else ran.stacked
        return build_state(last.after.slots, ran.carried, last.step.skeleton), last.step.assemble(returned)

    def _remember(self, call: Call, run: Run, inputs: LoopInputs, plan: NativeLoop, *, single: bool) -> None:
        known = self._replays.get(call.key)
        if known is not None and known.refit(call, plan):
            return
        made = replay_of(call, run, inputs, plan, single=single)
        if made is None:
            return
        self._replays.pop(call.key, None)
        if len(self._replays) == _REPLAYS:
            del self._replays[next(iter(self._replays))]
        self._replays[call.key] = made

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
            found = None if self._graphs is None else self._graphs.run(plan, tape, run.carried, record=run.record)
            ran, held = found or _run_by(plan, tape, run)
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
        list(map(in_order, carried)),
        around,
        list(map(in_order, values)),
        leaves if inputs.batches.is_uniform else [list(map(in_order, of_step)) for of_step in leaves],
        state.opt_state.skeleton,
        inputs.tasks,
        segment,
        record=any(map(any, flags)),
        same=(partition(carried), partition(values)),
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
