"""Checks a captured update against the optimizer's own code: at the captured values, and at other numbers.

A number that escaped the capture (through code that no interception sees) makes the program differ from eager once the
number changes. So each number is changed a little, and both run: what differs is pinned and reported.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_map

from gimli_compile.comparison import ROUNDINGS, close, largest_change, sampled
from gimli_compile.errors import BakedValueWarning, CaptureError, compose_message
from gimli_compile.findings import Baked
from gimli_compile.host_draws import generators_forked
from gimli_compile.optimizer_view import OptimizerView, dense_form
from gimli_compile.owned_generators import generators_kept
from gimli_compile.passes.liveness import compute_only
from gimli_compile.program import Program
from gimli_compile.row_gradients import as_rows
from gimli_compile.row_gradients import by_slot as gradients_by_slot
from gimli_compile.several_optimizers import kind_of
from gimli_compile.skeleton import Leaf, leaves_of
from gimli_compile.slot import HELD, Role, Slot
from gimli_compile.state import to_tensor
from gimli_compile.update_capture import returned_tensors
from gimli_compile.update_values import UpdateInputs
from gimli_compile.variant import UpdateVariant

_STEP = 0.01
_JITTERS = 3
_PARTS = 8
_SMALL = 1 << 26  # bytes of results that are computed at once in any case


def validate(view: OptimizerView, inputs: UpdateInputs, variant: UpdateVariant) -> UpdateVariant:
    """Returns the variant with every number pinned that eager depends on and the program does not.

    Raises CaptureError if the program does not reproduce the optimizer's step on the very values of the capture.
    """
    if any(value.dim() and leaf.kind != "tensor" for leaf, value in _leaf_values(inputs)):
        return variant  # eager has no step with a number for each element; the program is that of the plain number
    expected = eager_results(view, inputs)
    base = {slot: sampled(value) for slot, value in expected.items()}
    parts = _in_parts(variant.program)
    found = _differing(variant, parts, inputs, expected)
    if found:
        found = _beyond_rounding(view, inputs, variant, expected, found)
    if found:
        raise _not_reproduced(view, found) if variant.held(program_results(variant, inputs)) else _drawn(view, variant)
    numbers = _numbers(variant, inputs)
    del expected
    if not numbers or not _escaped(view, inputs, variant, parts, numbers, base):
        return variant
    escaped = [slot for slot in numbers if _escaped(view, inputs, variant, parts, [slot], base)]
    values = inputs.by_slot()
    pins = dict(variant.pins)
    baked = list(variant.baked)
    for slot in escaped:
        pins[slot] = float(values[slot])
        baked.append(
            Baked(f"{slot} is a constant of the program: the step depends on it in a way that no capture sees", None)
        )
    return replace(variant, pins=pins, baked=tuple(baked))


def reproduces(view: OptimizerView, inputs: UpdateInputs, variant: UpdateVariant, *, smooth: bool = False) -> bool:
    """Tells whether the program gives the optimizer's own results on these values.

    State that the eager step leaves alone or does not have is not compared: at a momentum of exactly zero the buffer
    that the program keeps is dead weight in eager. Nor are parameters that neither changes. `smooth` compares only
    results that have derivatives: a count that was moved off its whole number stays one in the program, but not in
    eager.
    """
    before = inputs.by_slot()
    eager = eager_results(view, inputs)
    made = set(variant.program.results)
    kept = {s for s, v in eager.items() if _is_same(v, _before(before, s))}
    touched = {s: v for s, v in eager.items() if s not in kept or (s.role is Role.PARAM and s in made)}
    if not made.issuperset(touched):
        return False
    results = zip(variant.program.results, variant.program.returned, strict=True)
    counts = {slot for slot, node in results if smooth and not node.meta["val"].is_floating_point()}
    expected = {slot: value for slot, value in touched.items() if slot not in counts}
    found = _differing(variant, _in_parts(variant.program), inputs, expected)
    return not (found and _beyond_rounding(view, inputs, variant, expected, found))


def _before(values: Mapping[Slot, torch.Tensor], slot: Slot) -> torch.Tensor | None:
    """Returns what a slot held before the step: a result does not tell state from hyperparameters."""
    return values.get(slot, values.get(Slot(Role.HYPER, slot.path)))


def _is_same(value: torch.Tensor, before: torch.Tensor | None) -> bool:
    return before is not None and value.shape == before.shape and torch.equal(value, before.to(value.dtype))


def eager_results(view: OptimizerView, inputs: UpdateInputs) -> dict[Slot, torch.Tensor]:
    """Runs the optimizer's own step and returns its results by slot."""
    with generators_forked(), torch.no_grad():
        outputs = view.replay(inputs)
    found = {Slot(Role.PARAM, name): value.detach() for name, value in outputs.params.items()}
    for leaf in leaves_of(outputs.skeleton):
        value = outputs.values[leaf.path]  # made by this run: no copy is needed
        kept = dense_form(value) if isinstance(value, torch.Tensor) else to_tensor(value, leaf.kind)
        found[Slot(Role.STATE, leaf.path)] = kept
    found.update({Slot(Role.BUFFER, name): value.detach() for name, value in outputs.buffers.items()})
    held = {name: as_rows(grad.detach()) for name, grad in outputs.grads.items()}
    found.update(gradients_by_slot(held, HELD))
    found.update({slot: value.detach() for slot, value in returned_tensors(outputs.returned)[1].items()})
    return found


def program_results(variant: UpdateVariant, inputs: UpdateInputs) -> dict[Slot, torch.Tensor]:
    """Runs the program from the same draws as `eager_results`."""
    return _run(variant.program, inputs)


def _run(
    program: Program, inputs: UpdateInputs, values: Mapping[Slot, torch.Tensor] | None = None
) -> dict[Slot, torch.Tensor]:
    """Runs a program; `values` are those of the inputs, if the caller knows them."""
    with generators_forked(), generators_kept(inputs.opt_state.skeleton), torch.no_grad():
        return program(inputs.by_slot() if values is None else values)


def _in_parts(program: Program) -> list[Program]:
    """Returns programs of a few results each for one with large ones, these last; the first has all conditions."""
    sizes = [node.meta["val"].nbytes for node in program.returned]
    limit = max(_SMALL, sum(sizes) // _PARTS)
    if sum(sizes) <= limit:
        return [program]
    guards = [index for index, slot in enumerate(program.results) if slot.role is Role.GUARD]
    parts, size = [guards], 0
    for index in sorted(range(len(sizes)), key=sizes.__getitem__):
        if size + sizes[index] > limit and parts[-1]:
            parts.append([])
            size = 0
        if index not in guards:
            parts[-1].append(index)
            size += sizes[index]
    every = tuple(role for role in Role if role is not Role.NOISE)  # each part makes all draws, as the step does
    return [compute_only(program, part, dropping=every) for part in parts]


def _differing(
    variant: UpdateVariant, parts: list[Program], inputs: UpdateInputs, expected: dict[Slot, torch.Tensor]
) -> list[Slot]:
    """Returns the slots whose results are others than expected; those that are the same are not kept any longer."""
    eps = _coarsest(variant)
    values = inputs.by_slot()
    found: list[Slot] = []
    for part in parts:
        results = _run(part, inputs, values)
        for slot in results.keys() & expected.keys():
            if close(results[slot], expected[slot], eps):
                del expected[slot]
            else:
                found.append(slot)
    return [slot for slot in variant.program.results if slot in found]


def _beyond_rounding(
    view: OptimizerView,
    inputs: UpdateInputs,
    variant: UpdateVariant,
    expected: Mapping[Slot, torch.Tensor],
    slots: list[Slot],
) -> list[Slot]:
    """Returns those of the results that differ by more than eager's own do when its inputs change in the last place.

    What cancels to zero is nothing but rounding: the gradient of a bias before a normalization.
    """
    spread = dict.fromkeys(slots, 0.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_JITTERS):
        try:
            moved = eager_results(view, _jittered(inputs, generator))
        except CaptureError:
            return slots
        for slot in slots:
            if moved[slot].shape == expected[slot].shape:
                spread[slot] = max(spread[slot], largest_change(moved[slot], expected[slot]))
    results = program_results(variant, inputs)
    eps = _coarsest(variant)
    return [s for s in slots if not close(results[s], expected[s], eps, ROUNDINGS * 100 * spread[s])]


def _jittered(inputs: UpdateInputs, generator: torch.Generator) -> UpdateInputs:
    """Returns inputs whose tensors are changed in the last place."""

    def jitter(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or not value.dim():
            return value
        signs = torch.randint(0, 2, value.shape, generator=generator).to(value.device, value.dtype) * 2 - 1
        return value.detach() * (1 + signs * torch.finfo(value.dtype).eps)

    data = inputs.data
    if data is not None:
        batch, buffers, held = tree_map(jitter, (data.batch, data.buffers, dict(data.grads)))
        data = replace(data, batch=batch, buffers=buffers, grads=held)
    grads = {name: jitter(grad) for name, grad in inputs.grads.items()}
    return replace(inputs, params={name: jitter(p) for name, p in inputs.params.items()}, grads=grads, data=data)


def _coarsest(variant: UpdateVariant) -> float:
    """Returns the largest rounding of the floating dtypes that the program computes in."""
    found = 0.0
    for node in variant.program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found = max(found, torch.finfo(value.dtype).eps)
    return found


def _leaf_values(inputs: UpdateInputs) -> list[tuple[Leaf, torch.Tensor]]:
    return [(leaf, inputs.value_of(leaf)) for leaf in leaves_of(inputs.opt_state.skeleton)]


def _numbers(variant: UpdateVariant, inputs: UpdateInputs) -> list[Slot]:
    """Returns the floats, and the counters of the state, among the inputs that are not pinned already."""
    found = []
    for leaf in leaves_of(inputs.opt_state.skeleton):
        slot = Slot(inputs.role_of(leaf), leaf.path)
        counts = leaf.kind == "int" and slot.role is Role.STATE
        if (leaf.kind == "float" or counts) and slot not in variant.pins:
            found.append(slot)
    return found


def _escaped(
    view: OptimizerView,
    inputs: UpdateInputs,
    variant: UpdateVariant,
    parts: list[Program],
    slots: Iterable[Slot],
    base: Mapping[Slot, torch.Tensor],
) -> bool:
    """Tells whether eager and program part when these numbers change; `base` are samples of eager's results before."""
    changed = perturbed(inputs, set(slots))
    values = changed.by_slot()
    if not variant.holds(values):
        return False
    try:
        expected = eager_results(view, changed)
    except CaptureError:
        return False
    found: list[Slot] = []
    eps = _coarsest(variant)
    for index, part in enumerate(parts):
        results = _run(part, changed, values)
        if index == 0 and not variant.held(results):
            return False
        for slot in results.keys() & expected.keys() & base.keys():
            change = largest_change(sampled(expected[slot]), base[slot])
            if close(results[slot], expected[slot], eps, change):
                del expected[slot]
            else:
                found.append(slot)
    return bool(found and _beyond_rounding(view, changed, variant, expected, found))


def perturbed(inputs: UpdateInputs, slots: set[Slot]) -> UpdateInputs:
    """Returns inputs in which these numbers are a little different."""

    def change(value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value + 1
        return torch.where(value == 0, _STEP, value * (1 - _STEP)).to(value.dtype)

    hyper = {p: change(v) if Slot(Role.HYPER, p) in slots else v for p, v in inputs.hyper.items()}
    state = {p: change(v) if Slot(Role.STATE, p) in slots else v for p, v in inputs.opt_state.items()}
    return replace(inputs, hyper=hyper, opt_state=type(inputs.opt_state)(inputs.opt_state.skeleton, state))


def _not_reproduced(view: OptimizerView, slots: list[Slot]) -> CaptureError:
    name = kind_of(view.optimizer)
    return CaptureError(
        compose_message(
            f"the program captured from `{name}.step` does not give its results: "
            f"{', '.join(map(str, slots[:4]))} differ",
            None,
            "The step uses something that the capture could not follow.",
            "Please report the optimizer; its own step in eager mode is not affected.",
        )
    )


def _drawn(view: OptimizerView, variant: UpdateVariant) -> CaptureError:
    return CaptureError(
        compose_message(
            f"a branch or a shape in `{kind_of(view.optimizer)}.step` depends on a random draw",
            None,
            f"The program holds only under {', '.join(map(str, variant.after))}, and every step draws anew.",
            "Use `torch.where` with the drawn mask in place of the branch or the selection.",
        )
    )


def warn_of_baked(baked: Iterable[Baked]) -> None:
    """Warns of every number that became a constant."""
    for entry in baked:
        warnings.warn(str(entry), BakedValueWarning, stacklevel=3)
