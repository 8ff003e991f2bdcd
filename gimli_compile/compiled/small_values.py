"""Values of few elements that loops over many elements use: computed once, before these loops.

Inductor writes an element-wise operator into the loops of all that use its result. Bias corrections, which are powers
of one number, would be computed for each vector of each parameter.
"""

from __future__ import annotations

import torch
from torch import fx

_FEW = 64  # elements
_MORE = 8  # times as many elements in what uses it


def compute_small_values_first(graph: fx.Graph) -> None:
    """Marks the values that Inductor is to put into memory: the last small ones before larger ones."""
    for node in graph.nodes:
        if _is_call(node) and not _is_view(node) and _size(node) <= _FEW and _spreads(node, _size(node)):
            node.meta["inductor_realize_to_strides"] = True


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target.is_view


def _size(node: fx.Node) -> int:
    return node.meta["val"].numel()


def _spreads(node: fx.Node, size: int) -> bool:
    """Tells whether something of many more elements is computed from a value or from a view of it."""
    users = [user for user in node.users if _is_call(user)]
    return any(_size(user) >= _MORE * size or (_is_view(user) and _spreads(user, size)) for user in users)
