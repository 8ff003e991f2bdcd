"""Stop-gradients that nobody asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gimli_compile.program import Program

aten = torch.ops.aten
_CUTS = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}
_COPIES = {aten.clone.default, aten.lift_fresh_copy.default}


def reconnect_gradients(program: Program) -> Program:
    """Removes every `detach` that is not the user's own, and copies that a pure program does not need.

    Eager optimizers detach because they do not want a graph, and the framework detaches what it saves; neither means
    that the function is constant. A `detach` that the model or the loss calls does (`meta["stop"]`) and stays.

        detach = aten.detach.default(grad)
        mul = aten.mul.Tensor(detach, lr)     becomes     mul = aten.mul.Tensor(grad, lr)
    """
    copied = program.copy()
    for node in list(copied.graph.nodes):
        if node.meta.get("inner_gradient"):
            node.target = aten.alias.default  # stays: it marks what a first-order program cuts
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            copied.graph.erase_node(node)
    return copied


def _is_identity(node: fx.Node) -> bool:
    if node.target in _CUTS:
        return not node.meta.get("stop")
    return node.target in _COPIES and _same_form(node, node.args[0])


def _same_form(node: fx.Node, source: Any) -> bool:
    made, given = node.meta["val"], source.meta["val"]
    return (made.dtype, made.shape, made.stride()) == (given.dtype, given.shape, given.stride())
