"""Traced graphs, before they are split and compiled: in-place operators out of place, and less to compute.

What torch's derivatives are written in is C++: `1 - weight` there is `empty_like`, `fill_`, `sub_`. Such a value counts
as one that must be kept for the way back, and equal ones are not found to be equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._functorch.compile_utils import fx_graph_cse

from gimli_compile.metadata import FAKE

aten = torch.ops.aten
_ZEROS = (aten.zeros_like.default, aten.zeros.default)
_TURNS = (aten.t.default,)


def simplify(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrites a traced graph, in place; its results are the same, up to the sign of zeros."""
    if _write_out_of_place(module.graph):
        _drop_what_changes_nothing(module.graph)
        module.graph.eliminate_dead_code()
        module.graph = fx_graph_cse(module.graph)
    module.recompile()
    return module


def _write_out_of_place(graph: fx.Graph) -> bool:
    """Replaces in-place operators on tensors that have no views; tells whether none is left."""
    done = True
    for node in list(graph.nodes):
        if not _is_operator(node) or not node.target._schema.is_mutable:
            continue
        pure = _pure(node.target)
        if pure is None or not _is_alone(node.args[0], node) or not _gives_the_same_form(pure, node):
            done = False
            continue
        base = node.args[0]
        place = {other: index for index, other in enumerate(graph.nodes)}
        for user in [user for user in base.users if place[user] > place[node]]:
            user.replace_input_with(base, node)
        node.target = pure
        if pure is aten.fill.Scalar and base.target is aten.empty_like.default:
            node.target, node.args = aten.full_like.default, (base.args[0], node.args[1])
    return done


def _is_operator(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload)


def _pure(target: Any) -> Any:
    """Returns the out-of-place form of an in-place operator that writes to its first argument only."""
    schema, name = target._schema, target._schema.name.partition("::")[2]
    written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
    packet = getattr(aten, name.removesuffix("_"), None)
    if target.namespace != "aten" or not name.endswith("_") or written != [True, *[False] * (len(written) - 1)]:
        return None
    pure = getattr(packet, target._overloadname, None)
    return pure if pure is not None and _takes(pure) == _takes(target) else None


def _takes(target: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]


def _gives_the_same_form(pure: Any, node: fx.Node) -> bool:
    """Tells whether an operator gives what the in-place one leaves: that casts to what it writes to."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    with FAKE:
        made = pure(*args, **kwargs)
    return isinstance(made, torch.Tensor) and _form(made) == _form(node.meta["val"])


def _is_alone(base: Any, written: fx.Node) -> bool:
    """Tells whether a value shares its memory with no other."""
    if not isinstance(base, fx.Node) or not _is_operator(base):
        return False
    return not any(_shares(node) for node in (base, *(user for user in base.users if user is not written)))


def _shares(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return any(part.alias_info is not None for part in node.target._schema.returns) or node.target in (
        aten.reshape.default,
        aten.contiguous.default,
        aten._unsafe_view.default,
    )


def _drop_what_changes_nothing(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        rule = _RULES.get(node.target) if _is_operator(node) else None
        same = None if rule is None else rule(node)
        if (
            same is not None
            and _form(same.meta["val"]) == _form(node.meta["val"])
            and not any(user.op == "output" for user in node.users)
        ):
            node.replace_all_uses_with(same)
            graph.erase_node(node)


def _form(value: torch.Tensor) -> Any:
    return value.shape, value.stride(), value.dtype, value.device


def _by_one(node: fx.Node) -> fx.Node | None:
    return _first(node) if node.args[1] == 1 else None


def _with_zeros(node: fx.Node) -> fx.Node | None:
    """Returns what zeros are added to."""
    first, second, *_ = node.args
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node) or node.kwargs:
        return None
    if first.target in _ZEROS:
        return second
    return first if second.target in _ZEROS else None


def _turned_twice(node: fx.Node) -> fx.Node | None:
    inner = _first(node)
    return _first(inner) if inner is not None and inner.target in _TURNS else None


def _first(node: fx.Node) -> fx.Node | None:
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


_RULES: dict[Any, Callable[[fx.Node], fx.Node | None]] = {
    aten.mul.Scalar: _by_one,
    aten.div.Scalar: _by_one,
    aten.add.Tensor: _with_zeros,
    aten.t.default: _turned_twice,
    aten.view.default: _first,
    aten.expand.default: _first,
}
