"""The text of a scalar expression of a graph, as `state_step + 1 > 5`."""

from __future__ import annotations

from typing import Any

from torch import fx

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "floor_divide": "//", "remainder": "%", "pow": "**",
    "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "logical_or": "or", "logical_and": "and",
}  # fmt: skip
_TRANSPARENT = {"_to_copy", "clone", "detach", "alias", "expand", "reshape", "view"}


def expression(value: Any, depth: int = 0) -> str:
    """Returns the text of a value; what lies deep is named by its node."""
    if not isinstance(value, fx.Node):
        return f"{value:g}" if isinstance(value, float) else str(value)
    name = getattr(value.target, "_opname", None)
    if value.op != "call_function" or name is None or depth > 8:
        return value.name
    if name in _TRANSPARENT:
        return expression(value.args[0], depth)
    if name == "full":
        return expression(value.args[1], depth)
    parts = [expression(argument, depth + 1) for argument in value.args if not isinstance(argument, (list, tuple))]
    if name == "rsub":
        name, parts = "sub", parts[::-1]
    if name in _INFIX and len(parts) == 2:
        text = f"{parts[0]} {_INFIX[name]} {parts[1]}"
        return f"({text})" if depth else text
    return f"{name}({', '.join(parts)})"
