"""From the arguments of `unroll` and `step` to a compiled loop."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.compiled.batches import Batches
from gimli_compile.compiled.call_reading import Call, CallReader
from gimli_compile.compiled.choice import LoopInputs, StepChoice
from gimli_compile.compiled.forwarding import ForwardChoice, forward_compiled
from gimli_compile.compiled.loop import refuse_transforms
from gimli_compile.compiled.meta_gradients import GradientLoops
from gimli_compile.compiled.mixed_steps import MixedSteps
from gimli_compile.compiled.unrolling import LoopCompiler
from gimli_compile.errors import InputError
from gimli_compile.forward_mode import unroll_forward
from gimli_compile.implicit_mode import Implicit, unroll_implicit
from gimli_compile.loop_options import LoopOptions
from gimli_compile.loop_steps import LoopSteps, whole_step_error
from gimli_compile.loss_table import Asked, LossTable
from gimli_compile.records import opened, rebuilt
from gimli_compile.state import Tensors, TrainState
from gimli_compile.stepping import SplitStepper, StepInputs, WholeStepper
from gimli_compile.tasks import Loop, TaskSteps, lead_with_tasks
from gimli_compile.unrolling import planned, segment_length, stack_losses


class Compiler:
    """What `Functional.compile` adds: compiled loops and compiled forward passes."""

    def __init__(
        self,
        stepper: SplitStepper | WholeStepper,
        losses: LossTable,
        reader: CallReader,
        backend: str,
        *,
        verify: bool,
        mode: str | None = None,
    ) -> None:
        options: Any = {"verify": verify, "records": _records(mode)}
        mixed = MixedSteps(stepper) if isinstance(stepper, SplitStepper) else None
        self.loops = LoopCompiler(StepChoice(stepper), backend, mixed=mixed, **options)
        self.forwards = LoopCompiler(ForwardChoice(losses, is_loss=False), backend, **options)
        self.losses = LoopCompiler(ForwardChoice(losses, is_loss=True), backend, **options)
        self.reader = reader
        self.gradients = GradientLoops(reader, self.loops, self.losses)


def _records(mode: str | None) -> bool:
    """Tells whether loops are recorded as graphs of the device."""
    if mode not in (None, "reduce-overhead"):
        raise InputError(f"mode={mode!r} is not an option. Use None, or 'reduce-overhead' for CUDA graphs.")
    return mode is not None


def replay(
    compiler: Compiler | None,
    state: Any,
    batches: Any,
    hyper: Any,
    meta: Any,
    options: LoopOptions,
    *,
    single: bool = False,
) -> tuple[Call | None, tuple[TrainState, Any] | None]:
    """Reads the arguments of `unroll`, or with `single` of `step`; returns also the results, if such a call ran before.

    A call that cannot be read, or a loop that does not exist compiled, has None.
    """
    if compiler is None:
        return None, None
    call = compiler.reader.loop(state, batches, (hyper, meta), options, single=single)
    return call, compiler.loops.replay(call)


def unroll_compiled(
    compiler: LoopCompiler, loop: Loop, options: LoopOptions, steps: LoopSteps, call: Call | None
) -> tuple[TrainState, Any]:
    """Runs a loop by compiled programs: see `Functional.unroll`. `steps` are the uncompiled ones.

    What calls like this one are known by is `call`.
    """
    loop, inputs = _inputs_of(loop, options, steps.model_key)
    first = 0 if options.truncate is None else max(0, len(inputs.batches) - options.truncate)
    taken = steps if inputs.dims is None else TaskSteps(steps, inputs.dims)
    if options.backward in ("forward", "implicit"):
        return _run_as_node(compiler, loop, inputs, options, taken, first)
    if options.backward == "auto":
        differentiated = replace(loop, batches=inputs.batches.part(first, len(inputs.batches)))
        options = planned(steps, taken, differentiated, options, compiler.together(loop.state, inputs))
    return _run(compiler, loop.state, inputs, options, first, call)


def step_compiled(compiler: LoopCompiler, given: StepInputs, call: Call | None) -> tuple[TrainState, Any]:
    """Takes one step by compiled programs: see `Functional.step`."""
    options = LoopOptions()
    loop, inputs = _inputs_of(Loop(given.state, [given.batch], dict(given.hyper), given.meta), options, given.model_key)
    return compiler.unroll(loop.state, inputs, segment=None, call=call, single=True)


def _inputs_of(loop: Loop, options: LoopOptions, model_key: Any) -> tuple[Loop, LoopInputs]:
    """Returns a loop in which what differs between tasks leads with the task, and what it runs on."""
    refuse_transforms((loop.state, loop.batches, loop.hyper, loop.meta))
    loop = replace(loop, batches=opened(loop.batches), meta=opened(loop.meta))
    dims, count, step_dim = None, None, 0
    if options.tasks is not False:
        given = (None, 0, None, None) if options.tasks is True else options.tasks
        loop = lead_with_tasks(loop, given)
        count = next(iter(loop.state.params.values())).shape[0]
        step_dim = 0 if given[1] is None else 1
        dims = (0, *(None if dim is None else 0 for dim in given[1:]))
    batches = Batches(loop.batches, step_dim)
    return loop, LoopInputs(batches, loop.hyper, loop.meta, options.order, model_key, dims, count)


def _run(
    compiler: LoopCompiler,
    state: TrainState,
    inputs: LoopInputs,
    options: LoopOptions,
    first: int,
    call: Call | None,
) -> tuple[TrainState, Any]:
    """Runs a loop of which the steps from `first` on are differentiated."""
    count = len(inputs.batches)
    inputs = replace(inputs, is_mixed=options.backward == "mixed")
    length = segment_length(options.checkpoint, count - first)
    if inputs.is_mixed and not compiler.has_mixed:
        raise whole_step_error()
    if inputs.is_mixed and length == 1:
        length = None  # what is kept of a step is the state that it starts from
    if not first:
        return compiler.unroll(state, inputs, segment=length, call=call)
    with torch.no_grad():
        state, losses = compiler.unroll(state, replace(inputs, batches=inputs.batches.part(0, first)), segment=None)
    state, last = compiler.unroll(state, replace(inputs, batches=inputs.batches.part(first, count)), segment=length)
    return state, _joined([losses, last])


def _run_as_node(
    compiler: LoopCompiler,
    loop: Loop,
    inputs: LoopInputs,
    options: LoopOptions,
    steps: LoopSteps | TaskSteps,
    first: int,
) -> tuple[TrainState, Any]:
    """Runs a loop in forward or implicit mode; its steps from `first` on are differentiated."""
    losses: list[Any] = []
    if first:
        with torch.no_grad():
            cut = replace(inputs, batches=inputs.batches.part(0, first))
            state, before = compiler.unroll(loop.state, cut, segment=None)
        loop = replace(loop, state=pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, state))
        losses.append(before)
    loop = replace(loop, batches=[inputs.batches[index] for index in range(first, len(inputs.batches))])
    if options.backward == "forward":
        state, made = unroll_forward(partial(compiler.tangents.loop, inputs), loop)
    else:
        run = partial(_run_plain, compiler, inputs)
        state, made = unroll_implicit(steps, loop, options.implicit or Implicit(), run)
    return state, _joined([*losses, stack_losses(made)])


def _run_plain(
    compiler: LoopCompiler, inputs: LoopInputs, state: TrainState, batches: Any, hyper: Any, meta: Any
) -> tuple[TrainState, list[Any]]:
    """Runs a loop that nothing is differentiated in; returns the losses of each step."""
    given = replace(inputs, batches=Batches(list(batches), 0), hyper=hyper, meta=meta)
    state, losses = compiler.unroll(state, given, segment=None)
    losses = opened(losses)
    count = len(given.batches)
    return state, [pytree.tree_map_only(torch.Tensor, lambda of, i=i: of[..., i], losses) for i in range(count)]


def evaluate_compiled(
    compiler: LoopCompiler, asked: Asked, model_key: Any, call: Call | None, *, tasks: bool = False
) -> tuple[Any, Tensors]:
    """Evaluates the model or the loss by compiled programs: see `Functional.forward` and `Functional.loss`."""
    refuse_transforms((asked.params, asked.buffers, asked.batch, asked.meta))
    return forward_compiled(compiler, asked, model_key, call, tasks=tasks)


def _joined(parts: list[Any]) -> Any:
    """Returns what the steps of several loops returned as if there had been one."""
    parts = list(map(opened, parts))
    leaves = [pytree.tree_leaves(part) for part in parts]
    made = [torch.cat(of, -1) if isinstance(of[0], torch.Tensor) else of[0] for of in zip(*leaves, strict=True)]
    return rebuilt(pytree.tree_unflatten(made, pytree.tree_structure(parts[0])))
