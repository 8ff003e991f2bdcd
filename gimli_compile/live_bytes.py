"""How much memory a program's values take, by the shapes that its nodes have: nothing runs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from gimli_compile.program import Program

aten = torch.ops.aten
_VIEWS_AT_BEST = {aten.reshape.default, aten._unsafe_view.default, aten.contiguous.default}


def bytes_of(node: fx.Node) -> int:
    """Returns the bytes of a node's value, of all its tensors if there are several."""
    tensors = [leaf for leaf in tree_leaves(node.meta["val"]) if isinstance(leaf, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def owner_of(node: fx.Node) -> fx.Node:
    """Returns the node whose memory a node's value lies in: of a view, what it looks at."""
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        if not _is_view(node.target):
            break
        node = node.args[0]
    return node


def _is_view(target: Any) -> bool:
    if target is operator.getitem or target in _VIEWS_AT_BEST:
        return True
    return isinstance(target, torch._ops.OpOverload) and target.is_view


def made_bytes(program: Program) -> int:
    """Returns the bytes of all that a program computes, views and inputs not counted."""
    made = {owner_of(node) for node in program.graph.nodes if node.op == "call_function"}
    return sum(bytes_of(node) for node in made if node.op == "call_function")


def peak_bytes(program: Program) -> int:
    """Returns the most bytes that computed values take at one time, each freed after its last use."""
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    ends = _ends(program, nodes)
    at: dict[int, int] = {}
    for owner, end in ends.items():
        at[end] = at.get(end, 0) + bytes_of(owner)
    live = peak = 0
    for index, node in enumerate(nodes):
        if node in ends:
            live += bytes_of(node)
        peak = max(peak, live)
        live -= at.get(index, 0)
    return peak


def _ends(program: Program, nodes: list[fx.Node]) -> Mapping[fx.Node, int]:
    """Returns for each node that owns memory the position of the last call that uses it or a view of it."""
    found: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        for used in (node, *node.all_input_nodes):
            owner = owner_of(used)
            if owner.op == "call_function":
                found[owner] = index
    for node in program.returned:
        if owner_of(node).op == "call_function":
            found[owner_of(node)] = len(nodes)
    return found
