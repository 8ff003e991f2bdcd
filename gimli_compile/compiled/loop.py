"""The loop over compiled steps as one node of the autograd graph: Algorithm 1 of Gimli, program by program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gimli_compile.compiled.binding import Bound
from gimli_compile.errors import InputError, compose_message

Tensor = torch.Tensor


@dataclass
class Tape:
    """The values of a loop: what each step starts from besides what is carried, and what was kept for the way back.

    `shared` are hyperparameters, meta; `rest` for each step its batch, draws and constants. `kept` are, for each step,
    its residuals, or for each segment the state that it starts from.
    """

    bound: Sequence[Bound]
    shared: list[Tensor]
    rest: list[list[Tensor]]
    segment: int | None
    kept: list[list[Tensor]] = field(default_factory=list)

    def starts_segment(self, step: int) -> bool:
        """Tells whether what is carried into a step is kept."""
        return self.segment is not None and step % self.segment == 0


def run_forward(tape: Tape, carried: list[Tensor], *, record: bool) -> tuple[list[Tensor], list[list[Tensor]], Any]:
    """Runs the steps; returns what is carried out of the last, what each returned, and whether conditions held."""
    returned, held = [], []
    for index, bound in enumerate(tape.bound):
        if record and tape.starts_segment(index):
            tape.kept.append(carried)
        pool = [*carried, *tape.shared, *tape.rest[index]]
        values = run_step(bound, pool, tape.kept if record and tape.segment is None else None)
        returned.append([values[place] for place in bound.returned])
        if bound.held is not None:
            held.append(values[bound.held])
        pool.extend(values)
        carried = [pool[place] for place in bound.carry]
    return carried, returned, held


def run_step(bound: Bound, pool: list[Tensor], kept: list[list[Tensor]] | None) -> Sequence[Tensor]:
    """Runs one step on its pool; appends its residuals to `kept` if there is one."""
    inputs = [pool[place] for place in bound.take]
    if kept is None:
        return bound.compiled.plain(inputs)
    values = bound.compiled.saving(list(inputs))
    everything = [*inputs, *values]
    kept.append([everything[place] for place in bound.compiled.halves.residuals])
    return values


@dataclass
class Adjoints:
    """The adjoints on the way back: of what is carried, of what is shared, and of each step's batch."""

    carried: list[Tensor | None]
    shared: list[Tensor | None]
    batches: list[dict[int, Tensor]]


def run_backward(tape: Tape, last: list[Tensor | None], returned: list[list[Tensor | None]]) -> Adjoints:
    """Runs the adjoint of every step, the last first; `last` and `returned` are adjoints of what the loop gave."""
    adjoints = Adjoints(list(last), [None] * len(tape.shared), [{} for _ in tape.bound])
    residuals: list[list[Tensor]] = tape.kept
    for index in reversed(range(len(tape.bound))):
        if tape.segment is not None:
            if (index + 1) % tape.segment == 0 or index == len(tape.bound) - 1:
                residuals = _recompute(tape, index - index % tape.segment, index + 1)
            saved = residuals.pop()
        else:
            saved = residuals[index]
        _step_back(tape.bound[index], saved, returned[index], adjoints, index)
    return adjoints


def _recompute(tape: Tape, first: int, end: int) -> list[list[Tensor]]:
    """Runs a segment again from the state that was kept; returns the residuals of its steps."""
    assert tape.segment is not None
    carried = tape.kept[first // tape.segment]
    part = Tape(tape.bound[first:end], tape.shared, tape.rest[first:end], None)
    run_forward(part, carried, record=True)
    return part.kept


def _step_back(
    bound: Bound, residuals: list[Tensor], returned: list[Tensor | None], adjoints: Adjoints, index: int
) -> None:
    after = adjoints.carried
    before: list[Tensor | None] = [None] * len(bound.before.slots)
    for place, source in bound.passed:
        before[place] = _sum(before[place], after[source])
    seeds = [_total([*(after[i] for i in carried), *(returned[i] for i in given)]) for _, carried, given in bound.seeds]
    if any(seed is not None for seed in seeds):
        compiled, shared = bound.compiled, adjoints.shared
        inputs = list(residuals)
        for (result, _, _), seed in zip(bound.seeds, seeds, strict=True):
            inputs.append(compiled.zeros(result) if seed is None else seed)
        for place, step_input in zip(bound.accumulators, compiled.halves.summed, strict=True):
            total = shared[place]
            inputs.append(compiled.zero_adjoint(step_input) if total is None else total)
        found = compiled.backward(inputs)
        for (carried, common, own), value in zip(bound.targets, found, strict=True):
            if carried >= 0:
                before[carried] = _sum(before[carried], value)
            elif common >= 0:
                shared[common] = value
            else:
                adjoints.batches[index][own] = value
    adjoints.carried = before


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    if first is None or second is None:
        return first if second is None else second
    return first + second


def _total(values: Sequence[Tensor | None]) -> Tensor | None:
    total: Tensor | None = None
    for value in values:
        total = _sum(total, value)
    return total if total is None else total.contiguous()


@dataclass(frozen=True)
class Sources:
    """Where the inputs of the autograd node come from: places in what is carried, shared, and in each step's batch."""

    carried: tuple[int, ...]
    shared: tuple[int, ...]
    batches: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Ran:
    """A loop that ran: its tape, what was carried out of it, and what the steps returned, stacked in the last place."""

    tape: Tape
    carried: list[Tensor]
    stacked: list[Tensor]


class CompiledLoop(torch.autograd.Function):
    """The whole loop as one node: the backward pass runs the adjoint programs."""

    @staticmethod
    def forward(ctx: Any, ran: Ran, sources: Sources, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns what is carried out of the last step, then what the steps returned."""
        tape, last = ran.tape, ran.tape.bound[-1].after
        ctx.sources, ctx.bound, ctx.segment, ctx.count = sources, tape.bound, tape.segment, len(ran.carried)
        parts = [tape.shared, *tape.rest, *tape.kept]
        ctx.sizes = [len(part) for part in parts]
        ctx.save_for_backward(*(value for part in parts for value in part))
        taken = {id(tensor) for tensor in inputs}
        results = []
        for value in (*ran.carried, *ran.stacked):
            results.append(value.clone() if id(value) in taken else value)
            taken.add(id(results[-1]))
        still = [value for value, slot in zip(results, last.slots, strict=False) if slot not in last.active]
        ctx.mark_non_differentiable(*still, *(value for value in results if not value.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Runs the adjoints of the steps."""
        saved = iter(ctx.saved_tensors)
        shared, *parts = ([next(saved) for _ in range(size)] for size in ctx.sizes)
        steps = len(ctx.bound)
        tape = Tape(ctx.bound, shared, parts[:steps], ctx.segment, parts[steps:])
        stacked = [None if grad is None else grad.unbind(-1) for grad in grads[ctx.count :]]
        returned = [[None if of is None else of[step] for of in stacked] for step in range(steps)]
        with torch.no_grad():
            adjoints = run_backward(tape, list(grads[: ctx.count]), returned)
        sources: Sources = ctx.sources
        found = [
            *(adjoints.carried[place] for place in sources.carried),
            *(adjoints.shared[place] for place in sources.shared),
            *(adjoints.batches[step].get(place) for step, place in sources.batches),
        ]
        return (None, None, *map(_once, found))


class _Once(torch.autograd.Function):
    """The identity on a compiled gradient; its own derivative does not exist, and says so."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise InputError(
            compose_message(
                "a compiled loop is differentiated twice",
                None,
                "Its adjoint is compiled code, which has no derivative of its own.",
                "Use the functions of `functionalize` uncompiled: they can be differentiated to any order.",
            )
        )


def _once(grad: Tensor | None) -> Tensor | None:
    """Returns a gradient that refuses to be differentiated, where gradients of gradients are recorded."""
    if grad is None or not torch.is_grad_enabled():
        return grad
    return _Once.apply(grad, torch.zeros((), requires_grad=True))
