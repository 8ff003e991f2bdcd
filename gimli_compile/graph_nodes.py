"""Nodes of fx graphs, made and copied without a search for symbolic numbers, of which programs have none.

`Graph.create_node` looks through all arguments that it is given, which takes half of its time; setting them does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx


def add_node(graph: fx.Graph, op: str, target: Any, args: Any, kwargs: Any, *, name: str) -> fx.Node:
    """Adds a node to a graph at its insertion point."""
    node = graph.create_node(op, target, name=name)
    node.args = args
    if kwargs:
        node.kwargs = kwargs
    return node


def copy_node(graph: fx.Graph, node: fx.Node, change: Callable[[fx.Node], Any], *, name: str | None = None) -> fx.Node:
    """Adds a copy of a node, its notes included; `change` gives what stands for each of its arguments."""
    args, kwargs = fx.map_arg(node.args, change), fx.map_arg(node.kwargs, change)
    copied = add_node(graph, node.op, node.target, args, kwargs, name=name or node.name)
    copied.meta.update(node.meta)
    return copied
