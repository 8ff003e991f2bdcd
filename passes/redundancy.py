"""Values that are computed twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from gimli_compile.graph_nodes import copy_node
from gimli_compile.metadata import frozen
from gimli_compile.program import Program


def merge_common_subexpressions(program: Program) -> Program:
    """Computes equal calls once. Draws are inputs, so every operator of a program is a function of its arguments.

    a = aten.sqrt(x)                  a = aten.sqrt(x)
    b = aten.sqrt(x)      becomes     c = aten.add(a, a)
    c = aten.add(a, b)                return (c,)
    return (c,)
    """
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    first: dict[Any, fx.Node] = {}
    for node in program.graph.nodes:
        key = node
        if node.op == "call_function":
            args, kwargs = (frozen(part, env.__getitem__) for part in (node.args, node.kwargs))
            key = (node.target, args, kwargs, node.meta.get("stop", False))
        if key not in first:
            first[key] = copy_node(graph, node, env.__getitem__)
        env[node] = first[key]
    return program if len(graph.nodes) == len(program.graph.nodes) else replace(program, graph=graph)
