"""Two programs become one: the loss with its gradient, then the update."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from gimli_compile.checker import verify
from gimli_compile.program import Program
from gimli_compile.slot import CARRIED, CROSSING, Slot


def compose(gradient: Program, update: Program) -> Program:
    """Returns the program of a whole step: the results of `gradient`, its gradients passed on to `update`.

    The gradients are values inside the step and no longer results.
    """
    graph = fx.Graph()
    placed = _place_inputs(graph, gradient, update)
    after_gradient = _copy_calls(graph, gradient, placed)
    for slot, node in zip(gradient.results, gradient.returned, strict=True):
        if slot.role in CROSSING:
            placed[slot] = after_gradient[node]
    after_update = _copy_calls(graph, update, placed)
    results: dict[Slot, fx.Node] = {}
    for slot, node in zip(gradient.results, gradient.returned, strict=True):
        if slot.role not in CROSSING:
            results[slot] = after_gradient[node]
    for slot, node in zip(update.results, update.returned, strict=True):
        results[slot] = after_update[node]
    graph.output(tuple(results.values()))
    inputs = tuple(slot for slot in placed if slot.role not in CROSSING)
    program = replace(
        update,
        title=f"{gradient.title}, then {update.title}",
        name="step",
        graph=graph,
        inputs=inputs,
        results=tuple(results),
        constants={**gradient.constants, **update.constants},
        draws={**gradient.draws, **update.draws},
    )
    for slot, node in results.items():
        if slot.role in CARRIED and node.op == "call_function" and not node.name.endswith("_next"):
            node._rename(slot.result_name)
    verify(program)
    return program


def _place_inputs(graph: fx.Graph, *programs: Program) -> dict[Slot, fx.Node]:
    placed: dict[Slot, fx.Node] = {}
    for program in programs:
        for slot, node in zip(program.inputs, program.placeholders, strict=True):
            if slot not in placed and slot.role not in CROSSING:
                placed[slot] = graph.placeholder(node.name)
                placed[slot].meta = dict(node.meta)
    return placed


def _copy_calls(graph: fx.Graph, program: Program, placed: dict[Slot, fx.Node]) -> dict[fx.Node, fx.Node]:
    env = {node: placed[slot] for slot, node in zip(program.inputs, program.placeholders, strict=True)}
    for node in program.graph.nodes:
        if node.op == "call_function":
            env[node] = graph.node_copy(node, env.__getitem__)
            env[node].meta = dict(node.meta)
    return env
