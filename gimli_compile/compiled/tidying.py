"""What tracing a derivative leaves over: other names of values, values computed twice, products with nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx._lazy_graph_module import _make_graph_module

aten = torch.ops.aten
_NAMES = (aten.alias.default, aten.detach.default)
_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.mv.default)
_ANY_STRIDES = (aten.add.Tensor, aten.mul.Tensor)  # calls that do not look at how a value lies in memory
_MOVES = (aten.expand.default, aten.t.default, aten.transpose.int, aten.permute.default, aten.view.default)


def without_names(module: fx.GraphModule) -> fx.GraphModule:
    """Takes out what only gives a value another name: a graph that writes to nothing has no use for it."""
    for target in _NAMES:
        for node in list(module.graph.find_nodes(op="call_function", target=target)):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    module.recompile()
    return module


def with_reshapes(module: fx.GraphModule) -> fx.GraphModule:
    """Lets views copy where a value lies in memory otherwise than a trace without values thinks it does.

    The gradients of batched convolutions do (torch 2.13, CPU).
    """
    for node in module.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default
    module.recompile()
    return module


def computed_once(module: fx.GraphModule) -> fx.GraphModule:
    """Computes equal calls once; the graph writes to nothing."""
    return _make_graph_module(module, fx_graph_cse(module.graph))


def without_zeros(module: fx.GraphModule) -> fx.GraphModule:
    """Takes out products with the derivative of what has none, and sums with them.

    Forward mode writes such a derivative as an expanded zero, and multiplies matrices by it.

        z = aten.expand(aten.zeros([]), [16, 32])
        a = aten.mm(z, weight)                           becomes     b
        c = aten.add(a, b)
    """
    absent: set[fx.Node] = set()
    for node in list(module.graph.nodes):
        if _is_absent(node, absent):
            absent.add(node)
        elif node.target is aten.add.Tensor and not node.kwargs:
            zeros = [part for part in node.args if part in absent or _is_zero(part)]
            if zeros:
                _take_other(node, zeros)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _take_other(total: fx.Node, zeros: Sequence[Any]) -> None:
    """Replaces a sum with zero by the other summand, in the sum's shape."""
    other = next((part for part in total.args if isinstance(part, fx.Node) and part not in zeros), None)
    if other is None or other.meta["val"].dtype != total.meta["val"].dtype:
        return
    shape = total.meta["val"].shape
    if other.meta["val"].shape == shape:
        total.replace_all_uses_with(other)
    elif all(user.target in _ANY_STRIDES for user in total.users):
        with total.graph.inserting_before(total):
            expanded = total.graph.call_function(aten.expand.default, (other, list(shape)))
        expanded.meta["val"] = total.meta["val"]
        total.replace_all_uses_with(expanded)


def _is_zero(part: Any) -> bool:
    return isinstance(part, fx.Node) and part.target is aten.zeros_like.default


def _is_absent(node: fx.Node, absent: set[fx.Node]) -> bool:
    """Tells whether a value is the derivative of something that has none, or made of it alone."""
    if node.target is aten.zeros.default:
        return node.args[0] == []
    if node.target in _MOVES:
        return node.args[0] in absent
    return node.target in _PRODUCTS and any(part in absent for part in node.args)
