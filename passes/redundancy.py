"""Values that are computed twice."""

from __future__ import annotations

from typing import Any

from torch import fx

from gimli_compile.program import Program


def merge_common_subexpressions(program: Program) -> Program:
    """Computes equal calls once. Draws are inputs, so every operator of a program is a function of its arguments.

    a = aten.sqrt(x)                  a = aten.sqrt(x)
    b = aten.sqrt(x)      becomes     c = aten.add(a, a)
    c = aten.add(a, b)                return (c,)
    return (c,)
    """
    copied = program.copy()
    first: dict[Any, fx.Node] = {}
    for node in list(copied.graph.nodes):
        if node.op != "call_function":
            continue
        key = (node.target, _freeze(node.args), _freeze(node.kwargs), node.meta.get("stop", False))
        known = first.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            copied.graph.erase_node(node)
    return copied


def _freeze(value: Any) -> Any:
    """Returns a hashable form in which 1, 1.0 and True, and 0.0 and -0.0, differ."""
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_freeze, value))
    if isinstance(value, dict):
        return tuple((key, _freeze(item)) for key, item in value.items())
    if isinstance(value, slice):
        return ("slice", _freeze(value.start), _freeze(value.stop), _freeze(value.step))
    if isinstance(value, fx.Node):
        return value
    return (type(value).__name__, repr(value) if isinstance(value, float) else value)
