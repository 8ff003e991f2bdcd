"""Writes of a part into a whole whose derivatives torch lacks or has wrong."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gimli_compile.metadata import arguments_of, insert_call
from gimli_compile.program import Program

aten = torch.ops.aten
_SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)


def lower_scatters(program: Program) -> Program:
    """Writes a selected part as a slice of length one, and a slice of complex numbers by putting pieces together.

    The gradient of `select_scatter` in what is written is wrong where the call was mapped by `vmap` (torch 2.13), and
    `slice_scatter` has none for complex numbers.

                                                               b_1 = aten.unsqueeze.default(b, 0)
        c = aten.select_scatter.default(a, b, 0, 1) becomes    c = aten.slice_scatter.default(a, b_1, 0, 1, 2)
    """
    if not program.calls(*_SCATTERS):
        return program
    copied = program.copy()
    for node in list(copied.graph.nodes):
        if node.target in _SCATTERS:
            with copied.graph.inserting_before(node):
                _lower(copied.graph, node)
    return copied


def _lower(graph: fx.Graph, node: fx.Node) -> None:
    def call(target: Any, *args: Any) -> fx.Node:
        return insert_call(graph, target, args, like=node)

    base, part, *rest = arguments_of(node)
    shape = base.meta["val"].shape
    if node.target is aten.select_scatter.default:
        dim, index = rest
        start = index % shape[dim]
        part, end, step = call(aten.unsqueeze.default, part, dim % len(shape)), start + 1, 1
    else:
        dim, start, end, step = (*rest, *(0, None, None, 1)[len(rest) :])
        start, end, _ = slice(start, end).indices(shape[dim])
    if base.meta["val"].is_complex() and step == 1:
        pieces = [
            call(aten.slice.Tensor, base, dim, 0, start),
            part,
            call(aten.slice.Tensor, base, dim, end, shape[dim]),
        ]
        made = call(aten.cat.default, pieces, dim)
    elif node.target is aten.select_scatter.default:
        made = call(aten.slice_scatter.default, base, part, dim, start, end)
    else:
        return
    node.replace_all_uses_with(made)
    graph.erase_node(node)
