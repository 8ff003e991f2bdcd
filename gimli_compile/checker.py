"""The one verifier: nothing leaves a pass unchecked."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator

import torch
from torch import fx

from gimli_compile.errors import ProgramError
from gimli_compile.printing import print_excerpt
from gimli_compile.program import Program
from gimli_compile.slot import CARRIED, Role


def verify(program: Program) -> None:
    """Raises ProgramError unless the program keeps every invariant.

    1. nodes are placeholders, calls and one output at the end; placeholders come first;
    2. there is one placeholder for each input slot, in order, and no slot twice;
    3. there is one returned node for each result slot, and no slot twice;
    4. every argument is a node of this graph that comes earlier;
    5. calls go to aten operators, `getitem` or custom autograd functions, and from the stage "functional" on no
       operator changes its arguments;
    6. every node knows what its value looks like (`meta["val"]`) and has a source line entry (`meta["source"]`);
    7. every input of role CONSTANT has its tensor, every input of role NOISE its draw;
    8. a carried slot (parameter, buffer, state) that is input and result has one dtype and one shape, but for the
       shape of state: an optimizer may keep what another mask selects.
    """
    for rule in _RULES:
        for node, fault in rule(program):
            excerpt = print_excerpt(program, node) if node is not None else ""
            raise ProgramError(f"{program.title}: {fault}\n{excerpt}")


Fault = tuple[fx.Node | None, str]


def _check_order(program: Program) -> Iterator[Fault]:
    stage = "placeholder"
    rank = {"placeholder": 0, "call_function": 1, "output": 2}
    for node in program.graph.nodes:
        if node.op not in rank:
            yield node, f"a node of kind {node.op}"
        elif rank[node.op] < rank[stage] or (stage == "output"):
            yield node, f"a {node.op} after a {stage}"
        else:
            stage = node.op
    if stage != "output":
        yield None, "no output"


def _check_inputs(program: Program) -> Iterator[Fault]:
    if len(program.placeholders) != len(program.inputs):
        yield None, f"{len(program.placeholders)} placeholders for {len(program.inputs)} inputs"
    if len(set(program.inputs)) != len(program.inputs):
        yield None, "an input slot occurs twice"


def _check_results(program: Program) -> Iterator[Fault]:
    if len(program.returned) != len(program.results):
        yield program.output, f"{len(program.returned)} returned values for {len(program.results)} results"
    if len(set(program.results)) != len(program.results):
        yield program.output, "a result slot occurs twice"
    for value in program.returned:
        if not isinstance(value, fx.Node):
            yield program.output, f"the result {value!r} is no node"


def _check_arguments(program: Program) -> Iterator[Fault]:
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        for argument in node.all_input_nodes:
            if argument not in seen:
                yield node, f"argument {argument.name} is not computed before it is used"
        seen.add(node)


def _check_targets(program: Program) -> Iterator[Fault]:
    for node in program.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        if isinstance(node.target, torch._ops.OpOverload):
            if program.stage != "captured" and node.target._schema.is_mutable:
                yield node, f"{node.target} changes its arguments"
        elif not getattr(node.target, "is_custom_function", False):
            yield node, f"a call of {node.target}, which is no operator"


def _check_meta(program: Program) -> Iterator[Fault]:
    for node in program.graph.nodes:
        if node.op != "output" and node.meta.get("val") is None:
            yield node, "no value description"
        if node.op != "output" and "source" not in node.meta:
            yield node, "no source line entry"


def _check_bindings(program: Program) -> Iterator[Fault]:
    for slot in program.inputs:
        if slot.role is Role.CONSTANT and slot not in program.constants:
            yield program.node_of(slot), "a constant without its tensor"
        if slot.role is Role.NOISE and slot not in program.draws:
            yield program.node_of(slot), "noise without its draw"


_OF_NUMBERS = (torch.float64, torch.int64)  # the dtypes of Python's numbers


def _check_carried(program: Program) -> Iterator[Fault]:
    inputs = dict(zip(program.inputs, program.placeholders, strict=True))
    for slot, node in zip(program.results, program.returned, strict=True):
        if slot.role in CARRIED and slot in inputs:
            before, after = inputs[slot].meta["val"], node.meta["val"]
            is_state = slot.role is Role.STATE
            is_number = is_state and before.dim() == 0 and before.dtype in _OF_NUMBERS  # which may become a tensor
            if (before.dtype != after.dtype and not is_number) or not (is_state or before.shape == after.shape):
                yield node, f"{slot} changes from {before.dtype} {tuple(before.shape)}"


_RULES: tuple[Callable[[Program], Iterator[Fault]], ...] = (
    _check_order,
    _check_inputs,
    _check_results,
    _check_arguments,
    _check_targets,
    _check_meta,
    _check_bindings,
    _check_carried,
)
