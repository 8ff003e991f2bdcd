"""The loop over compiled steps as one node of the autograd graph: Algorithm 1 of Gimli, program by program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Protocol

import torch
import torch._C._functorch as _functorch
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from gimli_compile.compiled.binding import Bound
from gimli_compile.compiled.inputs import in_order
from gimli_compile.errors import InputError, compose_message
from gimli_compile.metadata import is_differentiable

Tensor = torch.Tensor


@dataclass
class Tape:
    """The values of a loop: what each step starts from besides what is carried, and what was kept for the way back.

    `shared` are hyperparameters, meta; `rest` for each step its batch, draws and constants. `kept` are, for each step,
    its residuals, or for each segment the state that it starts from. `through` is what all steps only pass on
    (`passed_through`).
    """

    bound: Sequence[Bound]
    shared: list[Tensor]
    rest: list[list[Tensor]]
    segment: int | None
    kept: list[list[Tensor]] = field(default_factory=list)
    through: Mapping[int, int] = field(default_factory=dict)

    def starts_segment(self, step: int) -> bool:
        """Tells whether what is carried into a step is kept."""
        return self.segment is not None and step % self.segment == 0

    def recorded(self) -> tuple[Record, list[Tensor]]:
        """Returns what the way back has to know, and the tensors that autograd keeps for it."""
        # What recomputation starts from is needed only where there is any.
        parts = [*self.kept] if self.segment is None else [*self.kept, self.shared, *self.rest]
        sizes = tuple(len(part) for part in parts)
        return TapeRecord(self.bound, self.segment, sizes, self.through), list(chain.from_iterable(parts))


class AnyTape(Protocol):
    """What a loop that ran left for the way back."""

    @property
    def bound(self) -> Sequence[Bound]:
        """The steps."""
        ...

    @property
    def through(self) -> Mapping[int, int]:
        """What all steps only pass on."""
        ...

    def recorded(self) -> tuple[Record, list[Tensor]]:
        """Returns what the way back has to know, and the tensors that autograd keeps for it."""
        ...


class Record(Protocol):
    """What the way back knows of a loop besides tensors."""

    def backward(self, kept: list[Tensor], last: list[Any], stacked: Sequence[Tensor | None]) -> Adjoints:
        """Runs the adjoints of the steps on the tensors that autograd kept."""
        ...


@dataclass(frozen=True)
class TapeRecord:
    """What the way back knows of a tape; `sizes` are those of its parts."""

    bound: Sequence[Bound]
    segment: int | None
    sizes: tuple[int, ...]
    through: Mapping[int, int]

    def backward(self, kept: list[Tensor], last: list[Any], stacked: Sequence[Tensor | None]) -> Adjoints:
        """Runs the adjoints of the steps."""
        tensors, steps = iter(kept), len(self.bound)
        parts = [list(islice(tensors, size)) for size in self.sizes]
        count = steps if self.segment is None else -(-steps // self.segment)
        states, (shared, *rest) = parts[:count], parts[count:] or [[]]
        return run_backward(Tape(self.bound, shared, rest, self.segment, states, self.through), last, stacked)


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
    """The adjoints on the way back: of what is carried, of what is shared, and of each step's batch.

    What is not differentiated has None.
    """

    carried: list[Any]
    shared: list[Any]
    batches: list[dict[int, Tensor]]


def run_backward(tape: Tape, last: list[Tensor | None], stacked: Sequence[Tensor | None]) -> Adjoints:
    """Runs the adjoint of every step, the last first; `last` and `stacked` are adjoints of what the loop gave."""
    steps = len(tape.bound)
    by_step = [[None] * steps if grad is None else _by_step(grad) for grad in stacked]
    final = tape.bound[-1]
    carried = final.adjoints_of_carried(last, tape.through)
    adjoints = Adjoints(carried, final.adjoints_of_shared(), [{} for _ in range(steps)])
    residuals: list[list[Tensor]] = tape.kept
    for index in reversed(range(steps)):
        bound = tape.bound[index]
        if tape.segment is None:
            saved = residuals[index]
        else:
            if (index + 1) % tape.segment == 0 or index == steps - 1:
                residuals = _recompute(tape, index - index % tape.segment, index + 1)
            saved = residuals.pop()
        _step_back(bound, saved, bound.adjoints_of_returned([of[index] for of in by_step]), adjoints, index)
    return adjoints


def _recompute(tape: Tape, first: int, end: int) -> list[list[Tensor]]:
    """Runs a segment again from the state that was kept; returns the residuals of its steps."""
    assert tape.segment is not None
    carried = tape.kept[first // tape.segment]
    last = tape.bound[end - 1]
    steps = end - 1 if last.keeps_inputs_only else end
    part = Tape(tape.bound[first:steps], tape.shared, tape.rest[first:steps], None)
    carried = run_forward(part, carried, record=True)[0]
    if steps < end:  # what the last step computes is known
        pool = [*carried, *tape.shared, *tape.rest[end - 1]]
        part.kept.append([pool[last.take[place]] for place in last.compiled.halves.residuals])
    return part.kept


def _step_back(bound: Bound, residuals: list[Tensor], returned: list[Any], adjoints: Adjoints, index: int) -> None:
    after = adjoints.carried
    given = [*after, *returned]
    seeds = [
        given[places[0]] if len(places) == 1 else _total([given[place] for place in places]) for places in bound.seeds
    ]
    shared = adjoints.shared
    found = bound.compiled.backward([*residuals, *seeds, *(shared[place] for place in bound.accumulators)])
    before: list[Any] = [None] * len(bound.before.slots)
    for place, source in bound.passed:
        before[place] = after[source]
    for number, place in bound.to_carried:
        value = found[number]
        before[place] = value if before[place] is None else before[place] + value
    for number, place in bound.to_shared:
        shared[place] = found[number]
    for number, place in bound.to_batch:
        adjoints.batches[index][place] = found[number]
    for place in bound.unused:
        before[place] = bound.zero(place)
    adjoints.carried = before


def _total(values: Sequence[Tensor]) -> Tensor:
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


@dataclass(frozen=True)
class Sources:
    """Where the inputs of the autograd node come from: places in what is carried, shared, and in each step's batch."""

    carried: tuple[int, ...]
    shared: tuple[int, ...]
    batches: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Ran:
    """A loop that ran: its tape, what was carried out of it, and what the steps returned, stacked in the last place."""

    tape: AnyTape
    carried: list[Tensor]
    stacked: list[Tensor]


def stacked(returned: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Returns what the steps returned, stacked in the last place."""
    return [torch.stack(values, -1) for values in zip(*returned, strict=True)]


class CompiledLoop(torch.autograd.Function):
    """The whole loop as one node: the backward pass runs the adjoint programs."""

    @staticmethod
    def forward(ctx: Any, ran: Ran, sources: Sources, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns what the steps made of what is carried, then what they returned."""
        tape = ran.tape
        slots, active = tape.bound[-1].after.slots, tape.bound[-1].after.active
        ctx.sources, ctx.count = sources, len(ran.carried)
        ctx.made = [index for index in range(ctx.count) if index not in tape.through]
        taken = {id(tensor) for tensor in inputs}
        results = []
        for value in (*(ran.carried[index] for index in ctx.made), *ran.stacked):
            results.append(value.clone() if id(value) in taken else value)
            taken.add(id(results[-1]))
        ctx.record, kept = tape.recorded()
        ctx.save_for_backward(*inputs, *kept)
        still = [value for value, index in zip(results, ctx.made, strict=False) if slots[index] not in active]
        ctx.mark_non_differentiable(*still, *(value for value in results if not is_differentiable(value)))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Runs the adjoints of the steps."""
        refuse_batched(grads)
        saved, given = ctx.saved_tensors, len(ctx.needs_input_grad) - 2
        inputs, kept = list(saved[:given]), list(saved[given:])
        last: list[Tensor | None] = [None] * ctx.count
        for index, grad in zip(ctx.made, grads, strict=False):
            last[index] = grad
        with torch.no_grad():
            adjoints = ctx.record.backward(kept, last, grads[len(ctx.made) :])
        sources: Sources = ctx.sources
        found = [
            *(adjoints.carried[place] for place in sources.carried),
            *(adjoints.shared[place] for place in sources.shared),
            *(adjoints.batches[step].get(place) for step, place in sources.batches),
        ]
        return (None, None, *(once(grad, inputs) for grad in found))


def _by_step(grad: Tensor) -> Sequence[Tensor]:
    return in_order(grad.movedim(-1, 0)).unbind(0)


class _Once(torch.autograd.Function):
    """The identity on a compiled gradient; its own derivative does not exist, and says so."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *inputs: Tensor) -> Tensor:
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


def once(grad: Tensor | None, inputs: list[Tensor]) -> Tensor | None:
    """Returns a gradient that refuses to be differentiated, where gradients of gradients are recorded."""
    if grad is None or not torch.is_grad_enabled():
        return grad
    return _Once.apply(grad, *inputs)


def refuse_transforms(inputs: Any) -> None:
    """Refuses tensors that belong to a transform of torch.func, or carry tangents."""
    if _functorch.peek_interpreter_stack() is None and forward_ad._current_level < 0:
        return
    tensors = (leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    if any(map(_is_transformed, tensors)):
        raise InputError(
            compose_message(
                "a compiled program runs under a transform of torch.func, or in forward mode",
                None,
                "Transforms of torch.func trace Python code, and compiled code cannot be traced.",
                "Use `unroll(..., tasks=True)` for many tasks and `backward()` for gradients, or unroll uncompiled.",
            )
        )


def _is_transformed(tensor: Tensor) -> bool:
    if _functorch.is_functorch_wrapped_tensor(tensor):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def refuse_batched(grads: Sequence[Tensor | None]) -> None:
    """Refuses adjoints of many results at once, as `is_grads_batched` of torch.autograd.grad has them."""
    for grad in grads:
        if grad is not None and _functorch.is_legacy_batchedtensor(grad):
            break
    else:
        return refuse_transforms(grads)
    raise InputError(
        compose_message(
            "a compiled loop is differentiated along several directions at once",
            None,
            "Its adjoint is compiled code for one, which `is_grads_batched` cannot trace.",
            "Differentiate once for each direction, or use the functions of `functionalize` uncompiled.",
        )
    )
