"""Operators that depend on strides."""

from __future__ import annotations

import torch

from gimli_compile.program import Program

aten = torch.ops.aten
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default}


def relax_views(program: Program) -> Program:
    """Makes every `view` a `reshape`, which also takes inputs whose strides differ from those at capture.

    Strides differ under `vmap` and wherever a user passes another layout of the same shape.

        view = aten.view.default(x, [6])     becomes     reshape = aten.reshape.default(x, [6])
    """
    copied = program.copy()
    for node in copied.graph.nodes:
        if node.target in _VIEWS:
            node.target = aten.reshape.default
            node.args = node.args[:2]
    return copied
