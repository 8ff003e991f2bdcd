"""Operators that depend on strides."""

from __future__ import annotations

import torch
from torch import fx

from gimli_compile.metadata import arguments_of, insert_call
from gimli_compile.passes.view_inverses import strided_places
from gimli_compile.program import Program

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}


def relax_views(program: Program) -> Program:
    """Makes every `view` a `reshape`, and every `as_strided` a look-up, which also take inputs of other strides.

    Strides differ from those at capture under `vmap`, wherever a user passes another layout of the same shape, and
    where an operator chooses the layout of its result.

        view = aten.view.default(x, [6])     becomes     reshape = aten.reshape.default(x, [6])
    """
    if not program.calls(*_VIEWS, aten.as_strided.default):
        return program
    copied = program.copy()
    for node in list(copied.graph.nodes):
        if node.target in _VIEWS:
            node.target = aten.reshape.default
            node.args = node.args[:2]
        elif node.target is aten.as_strided.default and len(node.args) == 4 and not node.kwargs:
            _look_up(copied.graph, node)
    return copied


def _look_up(graph: fx.Graph, node: fx.Node) -> None:
    """Replaces an `as_strided`, which functionalization applies to contiguous tensors alone."""
    base, *where = arguments_of(node)
    if not base.meta["val"].is_contiguous():
        return
    with graph.inserting_before(node):
        flat = insert_call(graph, aten.reshape.default, (base, [-1]), like=node)
        place = strided_places(graph, tuple(where), base, node)
        made = insert_call(graph, aten.index.Tensor, (flat, [place]), like=node)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
