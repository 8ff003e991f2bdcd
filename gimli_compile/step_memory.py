"""What one step leaves and the next one reads, in a place that is no part of the state.

The program of a step starts anew each time; live training goes on from what the step before left. Whether that makes a
difference is found by trying: a second step is taken twice, without and with what the first one left.
"""

from __future__ import annotations

import dis
import re
import warnings
from collections.abc import Iterable, Sequence
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from gimli_compile.comparison import close
from gimli_compile.contents import length_of
from gimli_compile.errors import BakedValueWarning, CaptureError, compose_message
from gimli_compile.host_draws import generators_forked, host_states
from gimli_compile.kept_attributes import methods_of
from gimli_compile.outside import reachable_from, with_inner
from gimli_compile.owned_generators import generators_kept
from gimli_compile.provenance import SourceLine, source_of
from gimli_compile.row_gradients import as_rows
from gimli_compile.side_effects import Change
from gimli_compile.skeleton import leaves_of
from gimli_compile.state import OptState, to_tensor
from gimli_compile.update_capture import returned_tensors
from gimli_compile.update_values import StepData, UpdateInputs, UpdateOutputs

if TYPE_CHECKING:
    from gimli_compile.step_view import StepView

_MOVED = 1.01


def refuse_memory(view: StepView, inputs: UpdateInputs) -> None:
    """Refuses a step that reads what the one before left outside of the state; warns of counters and logs."""
    with generators_forked(), generators_kept(inputs.opt_state.skeleton):
        first = view.replay(inputs)
        try:
            found, growing = _dependences(view, _following(inputs, first, moved=True), first)
        except CaptureError:  # the step does not take such a batch
            found, growing = _dependences(view, _following(inputs, first, moved=False), first)
    if found:
        raise _refusal(view, found)
    _warn(first.changes, growing)


def _dependences(view: StepView, inputs: UpdateInputs, first: UpdateOutputs) -> tuple[list[Change], set[str]]:
    """Returns what the second step depends on of what the first one left, and the names of what grows in each step."""
    states = host_states()
    fresh = view.replay(inputs)
    expected = _results(fresh)
    del fresh

    def differs(changes: Sequence[Change]) -> tuple[bool, set[str]]:
        with generators_forked(states):
            after = view.replay(inputs, changes, first)
        before = {(change.place.prefix, change.key): change for change in changes}
        pairs = [(before.get((change.place.prefix, change.key)), change) for change in after.changes]
        growing = {now.name for was, now in pairs if was is not None and length_of(now.after) > length_of(was.after)}
        return _differ(_results(after), expected), growing

    is_dependent, growing = differs(first.changes)
    if not is_dependent:
        return [], growing
    alone = [change for change in first.changes if differs([change])[0]] if len(first.changes) > 1 else []
    return alone or list(first.changes), growing


def _following(inputs: UpdateInputs, after: UpdateOutputs, *, moved: bool) -> UpdateInputs:
    """Returns the inputs of a second step: what the first one made, and the batch in another order."""

    def move(value: Any) -> Any:
        if not moved or not isinstance(value, torch.Tensor):
            return value
        value = value.detach().roll(1, 0) if value.dim() else value.detach()
        return value * _MOVED if value.is_floating_point() else value

    assert inputs.data is not None
    data = inputs.data
    made = {name: as_rows(grad.detach()) for name, grad in after.grads.items()}
    buffers = {name: value.detach() for name, value in after.buffers.items() if name in data.buffers}
    data = StepData(buffers, tree_map(move, data.batch), data.meta, data.form, made)
    leaves = leaves_of(after.skeleton)
    state = OptState(after.skeleton, {leaf.path: to_tensor(after.values[leaf.path], leaf.kind) for leaf in leaves})
    params = {**inputs.params, **{name: value.detach() for name, value in after.params.items()}}
    return UpdateInputs(params, {}, state, inputs.hyper, data=data)


def _results(outputs: UpdateOutputs) -> list[torch.Tensor]:
    leaves = sorted(leaves_of(outputs.skeleton), key=lambda leaf: leaf.path)
    values = [to_tensor(outputs.values[leaf.path], leaf.kind) for leaf in leaves]
    returned = returned_tensors(outputs.returned)[1].values()
    named = (*outputs.params.values(), *outputs.buffers.values(), *outputs.grads.values(), *returned)
    return [value.to_dense() if value.is_sparse else value for value in (*(v.detach() for v in named), *values)]


def _differ(after: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    if len(after) != len(expected):
        return True
    pairs = zip(after, expected, strict=True)
    return not all(close(a, b, torch.finfo(b.dtype).eps if b.is_floating_point() else 0.0) for a, b in pairs)


def _warn(changes: Iterable[Change], growing: set[str]) -> None:
    names = [c.name for c in changes if c.name in growing or (c.counts and not c.place.is_module)]
    if names:
        warnings.warn(
            f"the train step changes {', '.join(f'`{name}`' for name in dict.fromkeys(names))}, which is no part of "
            "model and optimizer. A program does not: it has what was there at capture. That is right for logs. If "
            "later steps depend on it, keep it in a buffer of the model or in the optimizer, or pass what holds it: "
            "`functionalize(..., objects={name: object})`.",
            BakedValueWarning,
            stacklevel=2,
        )


def _refusal(view: StepView, changes: Sequence[Change]) -> CaptureError:
    first, in_module = changes[0], any(change.place.is_module for change in changes)
    names = ", ".join(f"`{change.name}`" for change in changes)
    cure = (
        "Register it as a buffer (`register_buffer`), or give it a number or a tensor before `functionalize`: an "
        "attribute of the model's own class that the step assigns by name, as in `model.average = ...`, is then state."
        if in_module
        else "Keep it in an attribute of an object that is passed, `functionalize(..., objects={name: object})`, or in "
        "an attribute of the model or the optimizer."
    )
    return CaptureError(
        compose_message(
            f"a train step reads {names}, which the step before changed",
            _line_assigning(view, first.key),
            "It is no part of the state: every step of a program would begin with the value that it has now.",
            cure,
        )
    )


def _line_assigning(view: StepView, name: str) -> SourceLine | None:
    """Returns the line that assigns to a name, or uses it, in the code that a train step reaches."""
    modules = list(view.model.modules())
    reached = [found for found in reachable_from(view.train_step.function) if isinstance(found, FunctionType)]
    functions = [*reached, *(method for module in modules for method in methods_of(type(module)))]
    codes = dict.fromkeys(inner for function in functions for inner in with_inner(function.__code__))
    named = [(code, step) for code in codes for step in dis.get_instructions(code) if step.argval == name]
    for kind in (r"STORE_(?!FAST)", r"LOAD_(?!FAST)", r"LOAD_FAST"):
        for code, step in named:
            line = getattr(step.positions, "lineno", None)
            if line and re.match(kind, step.opname):
                return source_of(code, line)
    return None
