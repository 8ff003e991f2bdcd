"""Operators whose general form is for complex numbers."""

from __future__ import annotations

import torch

from gimli_compile.program import Program

aten = torch.ops.aten


def use_real_signs(program: Program) -> Program:
    """Takes `sign` for `sgn` of a real tensor: its derivative is a plain zero and costs nothing.

    sgn = aten.sgn.default(x)     becomes     sgn = aten.sign.default(x)
    """
    if not program.calls(aten.sgn.default):
        return program
    copied = program.copy()
    for node in copied.graph.nodes:
        if node.target is aten.sgn.default and not node.meta["val"].is_complex():
            node.target = aten.sign.default
    return copied
