"""Dead-code elimination."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import fx

from gimli_compile.graph_nodes import copy_node
from gimli_compile.program import Program
from gimli_compile.slot import Role, Slot


def eliminate_dead_code(program: Program) -> Program:
    """Removes nodes whose values reach no result, and constants that nothing uses.

    Inputs stay, draws among them: dropping a draw would change every later one.

        a = aten.sin(x)
        b = aten.cos(x)      becomes      a = aten.sin(x)
        return (a,)                       return (a,)
    """
    live = _needed(program.returned)
    slots = zip(program.inputs, program.placeholders, strict=True)
    unused = any(slot.role is Role.CONSTANT and node not in live for slot, node in slots)
    if not unused and all(node in live for node in program.graph.nodes if node.op == "call_function"):
        return program
    return compute_only(program, range(len(program.results)), dropping=(Role.CONSTANT,))


def compute_only(program: Program, keep: Sequence[int], *, dropping: tuple[Role, ...] = ()) -> Program:
    """Returns the program of the results at these positions: small for few results of a large one.

    It has all inputs but those of the roles `dropping` that these results do not need.
    """
    wanted = [program.returned[index] for index in keep]
    live = _needed(wanted)
    slots = zip(program.inputs, program.placeholders, strict=True)
    kept = {node: slot for slot, node in slots if node in live or slot.role not in dropping}
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        if node in kept or (node in live and node.op != "placeholder"):
            env[node] = copy_node(graph, node, env.__getitem__)
    graph.output(tuple(env[node] for node in wanted))
    return replace(
        _with_inputs(program, kept.values()), graph=graph, results=tuple(program.results[index] for index in keep)
    )


def _needed(wanted: Iterable[fx.Node]) -> set[fx.Node]:
    """Returns the nodes that these depend on, themselves included."""
    pending = list(wanted)
    needed = set(pending)
    while pending:
        new = [argument for argument in pending.pop().all_input_nodes if argument not in needed]
        needed.update(new)
        pending.extend(new)
    return needed


def _with_inputs(program: Program, kept: Iterable[Slot]) -> Program:
    """Returns a program of the same graph that names only these inputs."""
    inputs = dict.fromkeys(kept)
    constants = {slot: value for slot, value in program.constants.items() if slot in inputs}
    draws = {slot: draw for slot, draw in program.draws.items() if slot in inputs}
    return replace(program, inputs=tuple(inputs), constants=constants, draws=draws)
