"""The halves of a step in mixed mode: its adjoint is made from what the step starts from, forward over reverse.

Nothing is kept of a step but its inputs, which are the state between steps; and, where blocks of the model are computed
again, its inner gradient. The update goes back in reverse, the inner gradient by the derivative of the joint gradient
of the loss along its adjoint, which is a product with second derivatives (MixFlow-MG, arXiv 2505.00793).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from gimli_compile.compiled.halves import (
    Halves,
    Lanes,
    Start,
    accumulate,
    contiguous,
    keep_fresh_only,
    outputs,
    over_tasks,
    trace,
    trace_results,
    with_contiguous_results,
    without_detach,
)
from gimli_compile.compiled.steps import StepFunction
from gimli_compile.compiled.tidying import computed_once, without_names, without_zeros
from gimli_compile.forward_derivatives import push_forward
from gimli_compile.joint_capture import CURE, gradient_slot, refuse_complex
from gimli_compile.passes.redundancy import merge_common_subexpressions
from gimli_compile.pulling_back import Values, added, pull_back
from gimli_compile.slot import CROSSING, Role, Slot

Tensor = torch.Tensor
_LOSS = Slot(Role.LOSS)


def mixed_halves(
    step: StepFunction, examples: Sequence[Tensor], wanted: Sequence[int], summed: frozenset[int], lanes: Lanes
) -> Halves:
    """Splits a step into its halves: see `halves`, which does so in reverse mode."""
    refuse_complex(step.inputs[index] for index in wanted if examples[index].is_complex())
    start = trace_results(step, examples, wanted, lanes)
    if not start.active:
        return start.without_adjoints()
    crossing = _kept_crossing(step)
    has_blocks = bool(crossing)
    back, found, crossing = _trace_adjoint(step, start, wanted, crossing)
    saving, kept = _saving(step, start, crossing, examples, lanes)
    given = [*examples, *(node.meta["val"] for node in outputs(saving))]
    tangents = [start.results[place] for place in start.active]
    whole = contiguous(over_tasks(back, lanes, found, len(crossing) + len(tangents)))
    backward = trace(torch.func.functionalize(whole), [*examples, *(given[place] for place in kept), *tangents])
    backward = without_names(backward)
    backward = without_zeros(backward if has_blocks else computed_once(backward))
    residuals = (*_drop_unused(backward, range(len(examples))), *kept)
    accumulate(backward, [position for position, index in enumerate(found) if index in summed])
    added_up = tuple(index for index in found if index in summed)
    return Halves(start.plain, saving, backward, start.places, residuals, start.active, found, added_up, start.results)


def _kept_crossing(step: StepFunction) -> tuple[Slot, ...]:
    """Returns what is kept of the inner gradient: all, if blocks of the joint gradient are computed again.

    It would have to be computed before its derivative, which gives it as well. Where nothing is computed again, both
    are made of the same values.
    """
    assert step.joint is not None and step.gradient is not None
    if merge_common_subexpressions(step.joint) is step.joint:
        return ()
    return tuple(slot for slot in step.programs[0].results if slot.role in CROSSING)


def _trace_adjoint(
    step: StepFunction, start: Start, wanted: Sequence[int], crossing: tuple[Slot, ...]
) -> tuple[fx.GraphModule, tuple[int, ...], tuple[Slot, ...]]:
    """Returns the graph of the adjoint for one task, the inputs that have one, and what it needs of what crosses."""
    seeded = tuple(step.results[start.places.index(place)] for place in start.active)
    adjoint = _Adjoint(step, wanted, crossing, seeded)
    found: list[int] = []

    def run(*values: Tensor) -> list[Tensor]:
        made = adjoint(values)
        found[:] = made
        return list(made.values())

    fakes = [step.programs[0].result_of(slot).meta["val"] for slot in crossing]
    seeds = [outputs(start.forward)[place].meta["val"] for place in start.active]
    module = trace(run, [*start.single, *fakes, *seeds])
    first = len(start.single)
    used = _drop_unused(module, range(first, first + len(crossing)))
    return module, tuple(found), tuple(crossing[index - first] for index in used)


def _saving(
    step: StepFunction, start: Start, crossing: Sequence[Slot], examples: Sequence[Tensor], lanes: Lanes
) -> tuple[fx.GraphModule, tuple[int, ...]]:
    """Returns the graph of the results and of what crosses, and where the latter is to be found: see `Halves`."""
    if not crossing:
        return start.plain, ()
    distinct = [step.results[start.places.index(place)] for place in range(len(start.results))]

    def run(*values: Tensor) -> list[Tensor]:
        found = step.run(dict(zip(step.inputs, values, strict=True)))
        return [found[slot] for slot in (*distinct, *crossing)]

    single = trace(run, start.single)
    mapped = single if lanes is None else torch.func.vmap(single, in_dims=lanes)
    saving = without_detach(with_contiguous_results(mapped, examples))
    return saving, keep_fresh_only(saving, len(examples), len(start.results))


@dataclass(frozen=True)
class _Adjoint:
    """The adjoint of a step: takes its inputs, then what is kept of the inner gradient, then adjoints of results.

    `wanted` are places of inputs, `seeded` are results.
    """

    step: StepFunction
    wanted: Sequence[int]
    crossing: tuple[Slot, ...]
    seeded: tuple[Slot, ...]

    def __call__(self, given: Sequence[Tensor]) -> dict[int, Tensor]:
        """Returns the adjoints of inputs by their places."""
        values = dict(zip((*self.step.inputs, *self.crossing), given, strict=False))
        seeds = dict(zip(self.seeded, given[len(values) :], strict=True))
        wanted = [self.step.inputs[index] for index in self.wanted]
        of_update, along = self._through_update(values, seeds, wanted)
        found = added(
            of_update,
            self._through_gradient(values, along, seeds, wanted),
            self._through_buffers(values, seeds, wanted),
        )
        return {index: found[slot] for index, slot in zip(self.wanted, wanted, strict=True) if slot in found}

    def _through_update(self, values: Values, seeds: Values, wanted: Sequence[Slot]) -> tuple[Values, Values]:
        """Returns the adjoints of what the update starts from, and of the inner gradient by parameter."""
        update = self.step.programs[1]
        known = {**values, **self._inner_gradient(values)}
        given = {slot: known[slot] for slot in update.inputs}
        of_update = {slot: seed for slot, seed in seeds.items() if slot in update.results}
        sources = {slot for slot in given if slot in wanted or slot.role is Role.GRAD}
        found = pull_back(update, given, sources, of_update)
        along = {Slot(Role.PARAM, slot.path): found.pop(slot) for slot in list(found) if slot.role is Role.GRAD}
        return found, along

    def _inner_gradient(self, values: Values) -> Values:
        """Returns what crosses from the loss to the update where it was not kept."""
        if self.crossing:
            return {}
        gradient, joint = self.step.programs[0], self.step.joint
        assert joint is not None
        paths = [slot.path for slot in gradient.results if slot.role is Role.GRAD]
        params = {Slot(Role.PARAM, path): values[Slot(Role.PARAM, path)] for path in paths}
        made = push_forward(joint, values, params, CURE)[0]  # along anything: the same calls as in `_through_gradient`
        grads = {Slot(Role.GRAD, slot.path): made[gradient_slot(slot)] for slot in params}
        if not any(slot.role is Role.ROWS for slot in gradient.results):
            return grads
        return {**grads, **{slot: value for slot, value in gradient(values).items() if slot.role is Role.ROWS}}

    def _through_gradient(self, values: Values, along: Values, seeds: Values, wanted: Sequence[Slot]) -> Values:
        """Returns what the adjoints of the inner gradient, and of the loss itself, are in the inputs of the loss."""
        joint, of_loss = self.step.joint, seeds.get(_LOSS)
        assert joint is not None
        if not along and of_loss is None:
            return {}
        results, tangents = push_forward(joint, values, along, CURE)
        parts = [_by_input(tangents, wanted)]
        if of_loss is not None:
            parts.append({slot: value * of_loss for slot, value in _by_input(results, wanted).items()})
        return added(*parts)

    def _through_buffers(self, values: Values, seeds: Values, wanted: Sequence[Slot]) -> Values:
        """Returns the adjoints of what new buffers depend on, in reverse."""
        of_buffers = {slot: seed for slot, seed in seeds.items() if slot.role is Role.BUFFER}
        return pull_back(self.step.programs[0], values, wanted, of_buffers) if of_buffers else {}


def _by_input(made: Values, wanted: Sequence[Slot]) -> dict[Slot, Tensor]:
    return {slot: made[gradient_slot(slot)] for slot in wanted if gradient_slot(slot) in made}


def _drop_unused(module: fx.GraphModule, places: range) -> tuple[int, ...]:
    """Drops the inputs of a graph at these places that nothing uses; returns the places of those that stay."""
    placeholders = list(module.graph.find_nodes(op="placeholder"))
    for place in places:
        if not placeholders[place].users:
            module.graph.erase_node(placeholders[place])
    module.recompile()
    return tuple(place for place in places if placeholders[place].users)
