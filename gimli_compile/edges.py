"""Hyperparameters on the edge of a condition: a weight decay of exactly zero, a mixing weight of exactly one.

`if weight_decay != 0:` takes another branch at zero, and a program of that branch does not know the weight decay. Where
the branch that values beside the edge take is the same function on the edge, a program of it is right there too, and
has the derivative.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from gimli_compile.errors import CaptureError
from gimli_compile.metadata import insert_call
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.program import Program
from gimli_compile.skeleton import leaves_of
from gimli_compile.slot import Role, Slot
from gimli_compile.update_capture import ancestors
from gimli_compile.update_values import UpdateInputs
from gimli_compile.validation import perturbed, program_results, reproduces
from gimli_compile.variant import UpdateVariant, split_guards

_BESIDE = 0.01
_NEAR = 1e-6


def edges_of(variant: UpdateVariant, inputs: UpdateInputs) -> frozenset[str]:
    """Returns the hyperparameters of which the smallest change turns a condition of the variant over."""
    if variant.decide is None:
        return frozenset()
    branching = replace(variant, before=tuple(condition for condition in variant.before if not condition.fixed))
    found = set()
    for slot in variant.decide.inputs:
        if slot.role is Role.HYPER and any(_turns(branching, inputs, slot, sign) for sign in (1, -1)):
            found.add(slot.path)
    return frozenset(found)


def _turns(variant: UpdateVariant, inputs: UpdateInputs, slot: Slot, sign: int) -> bool:
    value = inputs.hyper[slot.path]
    if bool((value != 0).all()) and bool((value == value.round()).all()) and bool((value.abs() > 1).any()):
        return False  # a count, which no derivative is asked of
    near = torch.where(value == 0, sign * _NEAR, value * (1 + sign * _NEAR)).to(value.dtype)
    return not variant.holds(replace(inputs, hyper={**inputs.hyper, slot.path: near}).by_slot())


def lift_edges(
    view: OptimizerView,
    inputs: UpdateInputs,
    plain: UpdateVariant,
    paths: frozenset[str],
    capture: Callable[[UpdateInputs], UpdateVariant],
) -> tuple[UpdateVariant, frozenset[str]]:
    """Lifts as many hyperparameters off their edges as can be: all at once, or else one after the other.

    `plain` is the variant captured on the edge, `capture` gives validated ones. Returns the variant and the paths that
    were lifted.
    """
    together = _lift(view, inputs, plain, paths, capture)
    if together is not None:
        return together, paths
    best, lifted = plain, frozenset[str]()
    for path in sorted(paths) if len(paths) > 1 else ():
        more = _lift(view, inputs, plain, lifted | {path}, capture)
        if more is not None:
            best, lifted = more, lifted | {path}
    return best, lifted


def _lift(
    view: OptimizerView,
    inputs: UpdateInputs,
    plain: UpdateVariant,
    paths: frozenset[str],
    capture: Callable[[UpdateInputs], UpdateVariant],
) -> UpdateVariant | None:
    """Returns the variant that values beside those of `paths` take, if it is the same function on the edge; else None.

    A number that the step ignores there but not beside it (a dampening without momentum) gets no gradient and is pinned
    to its value: on the edge its derivative is zero.
    """
    moved = replace(inputs, hyper={p: _beside(v) if p in paths else v for p, v in inputs.hyper.items()})
    try:
        variant = capture(moved)
    except CaptureError:
        return None
    variant = _without_guards_on(variant, paths)
    if not variant.holds(inputs.by_slot()) or not reproduces(view, inputs, variant):
        return None
    ignored = _ignored_at_edge(view, inputs, variant, paths)
    if any(slot in _used(plain.program) for slot in ignored):
        return None
    values = inputs.by_slot()
    pins = {**variant.pins, **{slot: float(values[slot]) for slot in ignored}}
    return replace(variant, program=_cut(variant.program, ignored), pins=pins)


def _beside(value: torch.Tensor) -> torch.Tensor:
    return torch.where(value == 0, _BESIDE, value * (1 - _BESIDE)).to(value.dtype)


def _ignored_at_edge(
    view: OptimizerView, inputs: UpdateInputs, variant: UpdateVariant, paths: frozenset[str]
) -> list[Slot]:
    """Returns the hyperparameters in which eager and the variant part once they change.

    Whole numbers but zero are counts: eager may look at their type, and no derivative is asked of them.
    """
    counts = {leaf.path for leaf in leaves_of(inputs.opt_state.skeleton) if leaf.kind == "int"}
    counts = {path for path in counts & inputs.hyper.keys() if bool((inputs.hyper[path] != 0).all())}
    used = sorted(_used(variant.program), key=str)
    others = [s for s in used if s.role is Role.HYPER and s.path not in paths | counts]

    def part(slots: set[Slot]) -> bool:
        changed = perturbed(inputs, slots)
        return variant.holds(changed.by_slot()) and _parts(view, changed, variant)

    together = perturbed(inputs, set(others))
    if variant.holds(together.by_slot()) and not _parts(view, together, variant):
        return []  # one look at all of them, since most often there is none
    return [slot for slot in others if part({slot})]


def _parts(view: OptimizerView, inputs: UpdateInputs, variant: UpdateVariant) -> bool:
    """Tells whether eager runs on these values and gives other results than the variant, where that holds."""
    try:
        held = variant.held(program_results(variant, inputs))
        return held and not reproduces(view, inputs, variant, smooth=True)
    except CaptureError:
        return False


def _used(program: Program) -> set[Slot]:
    return {slot for slot, node in zip(program.inputs, program.placeholders, strict=True) if node.users}


def _cut(program: Program, slots: list[Slot]) -> Program:
    """Stops the gradient at some inputs."""
    copied = program.copy()
    for slot in slots:
        node = copied.node_of(slot)
        users = list(node.users)
        with copied.graph.inserting_before(copied.placeholders[-1].next):
            stop = insert_call(copied.graph, torch.ops.aten.detach.default, (node,), like=node)
        stop.meta["stop"] = True
        for user in users:
            user.replace_input_with(node, stop)
    return copied


def _without_guards_on(variant: UpdateVariant, paths: frozenset[str]) -> UpdateVariant:
    """Returns the variant without the conditions that depend on nothing but these hyperparameters."""
    if variant.decide is None:
        return variant
    slot_of = dict(zip(variant.decide.placeholders, variant.decide.inputs, strict=True))
    ancestry = ancestors(variant.decide)
    kept = []
    for condition in variant.before:
        leaves = {slot_of[node].path for node in ancestry[variant.decide.result_of(condition.slot)]}
        if condition.fixed or not leaves <= paths:
            kept.append(condition)
    _, decide = split_guards(variant.decide, kept)
    return replace(variant, before=tuple(kept), decide=decide)
