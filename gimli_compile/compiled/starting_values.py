"""The state from which later steps of an optimizer do what its first step does without any: proven on the programs.

Adam's first step makes its moments and its counter, and goes on as every step does. Its program is then that of the
later steps with these values in place of the state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from gimli_compile.program import Program
from gimli_compile.slot import Role, Slot
from gimli_compile.variant import Condition, UpdateVariant

Tensor = torch.Tensor
aten = torch.ops.aten
# What makes a tensor of the form of another, of which it does not read the values.
_OF_FORM = {getattr(aten, f"{name}_like").default for name in ("zeros", "ones", "full")}
_OF_FORM |= {getattr(aten, f"new_{name}").default for name in ("zeros", "ones", "full")}
_UNDEFINED = (aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided)


def starting_values(first: Program, later: Program, known: frozenset[Slot]) -> dict[Slot, Tensor] | None:
    """Returns values of the state that `later` takes and `first` does not, with which both compute the same.

    None if that is not found to be so. `known` is the state that both take.

        def first(param, grad):                             def later(param, grad, momentum):
            zeros = aten.zeros_like(param)
            momentum = aten.lerp(zeros, grad, 0.1)    is        momentum = aten.lerp(momentum, grad, 0.1)     at zeros
            return param - momentum, momentum                   return param - momentum, momentum
    """
    shared = [slot for slot in first.results if slot in later.results]
    if len(shared) < len(first.results) or len(shared) < len(later.results):
        return None
    pairs = [(later.result_of(slot), first.result_of(slot)) for slot in shared]
    return _Comparison(first, later, known).values(pairs)


def covers(later: UpdateVariant, first: UpdateVariant, known: frozenset[Slot]) -> bool:
    """Tells whether what `later` holds under is all that `first` holds under."""
    if any(later.pins.get(slot) != pin for slot, pin in first.pins.items()):
        return False
    if not _have_equals(first.after, later.after, first.program, later.program, known):
        return False
    if first.decide is None or later.decide is None:
        return first.decide is None
    return _have_equals(first.before, later.before, first.decide, later.decide, known)


def _have_equals(
    wanted: tuple[Condition, ...],
    given: tuple[Condition, ...],
    first: Program,
    later: Program,
    known: frozenset[Slot],
) -> bool:
    """Tells whether each of the conditions of one program is a condition of the other, computed from the same."""
    for one in wanted:
        same = (other for other in given if (other.text, other.outcome) == (one.text, one.outcome))
        pairs = ([(later.result_of(other.slot), first.result_of(one.slot))] for other in same)
        if not any(_Comparison(first, later, known).values(pair) is not None for pair in pairs):
            return False
    return True


class _Comparison:
    """Compares what two programs compute, node by node, and finds out which state makes it the same."""

    def __init__(self, first: Program, later: Program, known: frozenset[Slot]) -> None:
        self._slots_of_first = dict(zip(first.placeholders, first.inputs, strict=True))
        self._slots_of_later = dict(zip(later.placeholders, later.inputs, strict=True))
        self._known = known
        self._made: dict[fx.Node, fx.Node] = {}  # what the first program has in place of a state
        self._to_compare: list[tuple[fx.Node, Any]] = []  # values that follow from the state, and others
        self._seen: set[tuple[fx.Node, fx.Node]] = set()
        self._open: list[tuple[Any, Any]] = []

    def values(self, pairs: list[tuple[fx.Node, fx.Node]]) -> dict[Slot, Tensor] | None:
        """Returns the state with which the first of each pair is the second; None if there is none."""
        self._open = list(pairs)
        while self._open:
            if not self._agree(*self._open.pop()):
                return None
        values: dict[fx.Node, Tensor | None] = {node: constant(made, {}) for node, made in self._made.items()}
        if any(value is None for value in values.values()):
            return None
        if not all(self._same_value(one, other, values) for one, other in self._to_compare):
            return None
        return {self._slots_of_later[node]: value for node, value in values.items() if value is not None}

    def _agree(self, one: Any, other: Any) -> bool:
        """Tells whether an argument in the later program can be one in the first, as far as can be told at once."""
        if not isinstance(one, fx.Node):
            return self._same_literals(one, other)
        if (one, other) in self._seen:
            return True
        if isinstance(other, fx.Node):
            self._seen.add((one, other))
            if _form(one) != _form(other):
                return False
            if one.op == "placeholder":
                return self._same_input(one, other)
            if self._same_call(one, other):
                return True
        self._to_compare.append((one, other))
        return isinstance(other, (fx.Node, int, float)) and one.op == "call_function"

    def _same_literals(self, one: Any, other: Any) -> bool:
        if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
            self._open.extend(zip(one, other, strict=True))
            return True
        return type(one) is type(other) and one == other and not isinstance(one, fx.Node)

    def _same_input(self, one: fx.Node, other: fx.Node) -> bool:
        slot = self._slots_of_later[one]
        if slot.role is Role.STATE and slot not in self._known:
            return self._made.setdefault(one, other) is other
        return self._slots_of_first.get(other) == slot

    def _same_call(self, one: fx.Node, other: fx.Node) -> bool:
        """Tells whether both nodes make the same call if their arguments are the same, which is looked at later.

        A number in one program may be a tensor of one element in the other.
        """
        if one.op != other.op or one.kwargs.keys() != other.kwargs.keys() or len(one.args) != len(other.args):
            return False
        if one.target is not other.target and not _is_form_of_same(one, other):
            return False
        self._open.extend(zip(one.args, other.args, strict=True))
        self._open.extend((value, other.kwargs[name]) for name, value in one.kwargs.items())
        return True

    def _same_value(self, one: fx.Node, other: Any, values: Mapping[fx.Node, Tensor | None]) -> bool:
        found = constant(one, values)
        expected = constant(other, {}) if isinstance(other, fx.Node) else other
        if found is None or expected is None:
            return False
        if isinstance(expected, Tensor):
            return torch.equal(found, expected)
        return found.dim() == 0 and found.item() == expected


def _is_form_of_same(one: fx.Node, other: fx.Node) -> bool:
    """Tells whether two operators are one, for tensors and for numbers."""
    packets = [
        node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else None for node in (one, other)
    ]
    return packets[0] is not None and packets[0] is packets[1]


def constant(node: fx.Node, values: Mapping[fx.Node, Tensor | None]) -> Tensor | None:
    """Returns what a node computes from `values` alone, whatever the inputs are; None if it is not constant."""
    found: dict[fx.Node, Tensor | None] = dict(values)
    open_nodes = [node]
    while open_nodes:
        current = open_nodes[-1]
        missing = [] if current in found or not _is_operator(current) else _unknown(current, found)
        if missing:
            open_nodes.extend(missing)
            continue
        open_nodes.pop()
        if current not in found:
            found[current] = _computed(current, found)
    return found[node]


def _is_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _unknown(node: fx.Node, found: Mapping[fx.Node, Any]) -> list[fx.Node]:
    of_form = node.target in _OF_FORM
    return [one for one in node.all_input_nodes if one not in found and not (of_form and one is node.args[0])]


def _computed(node: fx.Node, found: Mapping[fx.Node, Tensor | None]) -> Tensor | None:
    target: Any = node.target
    if not _is_operator(node) or not isinstance(node.meta["val"], Tensor) or target.overloadpacket in _UNDEFINED:
        return None
    args: Any = node.args
    kwargs: Any = node.kwargs
    if target in _OF_FORM:
        form = args[0].meta["val"]
        shaped = torch.empty_strided(form.shape, form.stride(), dtype=form.dtype, device=form.device)
        args = (shaped, *args[1:])
    elif any(found[one] is None for one in node.all_input_nodes):
        return None
    return target(*fx.map_arg(args, found.__getitem__), **fx.map_arg(kwargs, found.__getitem__))


def _form(node: fx.Node) -> Any:
    value = node.meta.get("val")
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else type(value)
