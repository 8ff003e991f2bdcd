"""Statistics that normalization layers save for their backward pass."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from gimli_compile.metadata import arguments_of, insert_call
from gimli_compile.program import Program

aten = torch.ops.aten


def write_out_normalization(program: Program) -> Program:
    """Writes the backward pass of layer and batch normalization out, with statistics that are functions of the input.

    The operators' own second derivatives are right, but not their third ones; and under `vmap` the operators are taken
    apart, and the derivative misses what the saved statistics owe to the input (functorch#534).

        grads = native_layer_norm_backward(g, x, [n], mean, rstd, weight, bias, [True, True, True])
    becomes, with xhat = (x - mean(x)) * rsqrt(var(x) + eps) and h = g * weight,
        grads = (rsqrt(var(x) + eps) * (h - mean(h) - xhat * mean(h * xhat)), sum(g * xhat), sum(g))
    """
    if not program.calls(*_WRITTEN_OUT):
        return program
    copied = program.copy()
    for node in list(copied.graph.nodes):
        write_out = _WRITTEN_OUT.get(node.target)
        if write_out is not None:
            with copied.graph.inserting_before(node):
                write_out(copied.graph, node)
    return copied


def _layer_norm(graph: fx.Graph, node: fx.Node) -> None:
    upstream, value, shape, mean, _, weight, _, _ = arguments_of(node)
    forward = mean.args[0] if mean.op == "call_function" else None
    if forward is None or forward.target is not aten.native_layer_norm.default:
        return
    rank = value.meta["val"].dim()
    within = list(range(rank - len(shape), rank))
    across = list(range(rank - len(shape)))
    affine = (weight, list(shape))
    made = _backward(graph, node, upstream, value, affine, forward.args[4], within, across)
    _replace(graph, node, made)


def _in_one_precision(graph: fx.Graph, node: fx.Node) -> None:
    """Widens what is of lower precision than the rest, for which torch's tangents are of another type than values.

    The operators compute in the higher precision themselves, and round once at the end.
    """
    given = [arg.meta["val"] if isinstance(arg, fx.Node) else None for arg in arguments_of(node)]
    if len({value.dtype for value in given if isinstance(value, torch.Tensor) and value.is_floating_point()}) < 2:
        return
    arguments = [_widened(graph, arg, node) if isinstance(arg, fx.Node) else arg for arg in arguments_of(node)]
    made = insert_call(graph, node.target, tuple(arguments), {}, like=node)
    outputs = tuple(insert_call(graph, operator.getitem, (made, index), {}, like=node) for index in range(3))
    _replace(graph, node, outputs)


def _batch_norm(graph: fx.Graph, node: fx.Node) -> None:
    upstream, value, weight, _, _, _, _, train, eps, _ = arguments_of(node)
    if not train:
        return
    rank = value.meta["val"].dim()
    within = [0, *range(2, rank)]
    affine = (weight, [1, -1, *[1] * (rank - 2)])
    _replace(graph, node, _backward(graph, node, upstream, value, affine, eps, within, within))


def _backward(
    graph: fx.Graph, like: fx.Node, upstream: Any, value: Any, affine: Any, eps: Any, within: Any, across: Any
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Returns the gradients in input, weight and bias.

    `within` are the dimensions that are normalized over, `across` those that share a weight.
    """

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(graph, target, args, kwargs, like=like)

    def total(part: fx.Node) -> fx.Node:
        return call(aten.sum.dim_IntList, part, across) if across else part

    weight, shape = affine
    value, upstream, weight = (_widened(graph, part, like) for part in (value, upstream, weight))
    both = call(aten.var_mean.correction, value, within, correction=0, keepdim=True)
    variance, mean = call(operator.getitem, both, 0), call(operator.getitem, both, 1)
    deviation = call(aten.rsqrt.default, call(aten.add.Scalar, variance, eps))
    normal = call(aten.mul.Tensor, call(aten.sub.Tensor, value, mean), deviation)
    inner = upstream
    if weight is not None:
        inner = call(aten.mul.Tensor, upstream, call(aten.reshape.default, weight, shape))
    along = call(aten.mean.dim, call(aten.mul.Tensor, inner, normal), within, True)
    rest = call(aten.sub.Tensor, inner, call(aten.mean.dim, inner, within, True))
    rest = call(aten.sub.Tensor, rest, call(aten.mul.Tensor, normal, along))
    grad = call(aten.mul.Tensor, rest, deviation)
    return grad, total(call(aten.mul.Tensor, upstream, normal)), total(upstream)


def _running_statistics(graph: fx.Graph, node: fx.Node) -> None:
    """Takes the update of the running statistics out of the forward operator, which `vmap` has no rule for."""
    value, weight, bias, running_mean, running_var, train, momentum, eps = arguments_of(node)
    if not train:
        return
    form = value.meta["val"]
    within = [0, *range(2, form.dim())]

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(graph, target, args, kwargs, like=node)

    def blend(old: Any, new: fx.Node) -> fx.Node:
        kept = call(aten.mul.Tensor, old, 1 - momentum)
        return call(aten.add.Tensor, kept, call(aten.mul.Tensor, new, momentum))

    given = [_widened(graph, part, node) if part is not None else None for part in (value, weight, bias)]
    both = call(aten.native_batch_norm.default, *given, None, None, True, momentum, eps)
    fixed = call(aten.detach.default, value)
    fixed.meta["stop"] = True
    fixed = _widened(graph, fixed, node)
    moments = call(aten.var_mean.correction, fixed, within, correction=1)
    variance, mean = call(operator.getitem, moments, 0), call(operator.getitem, moments, 1)
    outputs = tuple(call(operator.getitem, both, index) for index in range(3))
    _replace(graph, node, (*outputs, blend(running_mean, mean), blend(running_var, variance)))


def _widened(graph: fx.Graph, value: Any, like: fx.Node) -> Any:
    """Returns a value in the precision that the operators compute in, and round once at the end."""
    if value is None or value.meta["val"].dtype not in (torch.bfloat16, torch.float16):
        return value
    return insert_call(graph, aten._to_copy.default, (value,), {"dtype": torch.float32}, like=like)


def _replace(graph: fx.Graph, node: fx.Node, made: tuple[fx.Node, ...]) -> None:
    for user in list(node.users):
        result, dtype = made[arguments_of(user)[1]], user.meta["val"].dtype
        if result.meta["val"].dtype != dtype:
            result = insert_call(graph, aten._to_copy.default, (result,), {"dtype": dtype}, like=node)
        user.replace_all_uses_with(result)
        graph.erase_node(user)
    graph.erase_node(node)


_WRITTEN_OUT: dict[Any, Callable[[fx.Graph, fx.Node], None]] = {
    **dict.fromkeys((aten.native_layer_norm.default, aten.native_group_norm.default), _in_one_precision),
    aten.native_group_norm_backward.default: _in_one_precision,
    aten.native_layer_norm_backward.default: _layer_norm,
    aten.native_batch_norm_backward.default: _batch_norm,
    aten._native_batch_norm_legit_functional.default: _running_statistics,
}
