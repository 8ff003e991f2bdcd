"""Derivatives at zero and at infinity."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from gimli_compile.metadata import insert_call
from gimli_compile.program import Program
from gimli_compile.slot import Role

aten = torch.ops.aten
_CHOICES = {
    aten.minimum.default, aten.maximum.default, aten.where.self, aten.lt.Tensor, aten.gt.Tensor,
    aten.clamp_max.default, aten.clamp_min.default, aten.clamp.default,
}  # fmt: skip


def guard_zeros(program: Program) -> Program:
    """Gives square roots and fractional powers a zero derivative at zero, where they have an infinite one.

    An adaptive optimizer divides by the root of a mean of squared gradients. Where that mean is exactly zero, the chain
    rule multiplies infinity by zero. The values stay bit-identical.

    A quotient by a number that is always zero is a constant. So is a bound that a hyperparameter makes infinite, and so
    is the orthogonal factor of a matrix of zeros.

                                        zero = aten.eq.Scalar(v, 0)
        root = aten.sqrt(v)  becomes    masked_fill = aten.masked_fill.Scalar(v, zero, 1)
                                        sqrt = aten.sqrt(masked_fill)
                                        root = aten.where.self(zero, aten.detach(v), sqrt)
    """
    copied = program.copy()
    numbers = _numbers(copied)
    bounds = _bounds(copied)
    for node in list(copied.graph.nodes):
        if node.target is aten.div.Tensor and _is_zero(node.args[1]):
            _stop(copied.graph, node)
        if node.target is aten.linalg_qr.default and not node.meta.get("guards_rank", False):
            _guard_rank(copied.graph, node)
        guard = _guard_infinity if node in bounds else _guard
        if node in bounds or (node.op == "call_function" and _is_singular(node, numbers) and not _is_guarded(node)):
            with copied.graph.inserting_before(node):
                guarded = guard(copied.graph, node)
            node.replace_all_uses_with(guarded)
            copied.graph.erase_node(node)
    return copied


def _is_zero(value: Any) -> bool:
    """Tells whether a scalar is zero whatever the inputs are: a product with the number 0."""
    if not isinstance(value, fx.Node):
        return value == 0
    if value.target in (aten.mul.Tensor, aten.mul.Scalar):
        return any(map(_is_zero, value.args))
    if value.target in (aten.div.Tensor, aten.neg.default, aten._to_copy.default):
        return _is_zero(value.args[0])
    return value.target is aten.full.default and bool(value.args[1] == 0)


def _stop(graph: fx.Graph, node: fx.Node) -> None:
    """Stops the gradient at a quotient by zero: an infinity, which the step goes on to take the reciprocal of."""
    if any(user.target is aten.detach.default for user in node.users):
        return
    users = list(node.users)
    with graph.inserting_after(node):
        stop = insert_call(graph, aten.detach.default, (node,), like=node)
    stop.meta["stop"] = True
    for user in users:
        user.replace_input_with(node, stop)


def _bounds(program: Program) -> set[fx.Node]:
    """Returns the products with a hyperparameter that only a choice of the smaller or larger takes.

    Such a product is infinite where there is to be no bound, and the chain rule multiplies a factor of it by zero.
    """
    hyper = {n for n, s in zip(program.placeholders, program.inputs, strict=True) if s.role is Role.HYPER}
    found = set()
    for node in program.graph.nodes:
        users = {user.target for user in node.users}
        if node.target is aten.mul.Tensor and users and users <= _CHOICES:
            if node.meta["val"].dim() == 0 and not hyper.isdisjoint(node.all_input_nodes):
                found.add(node)
    return found


def _guard_infinity(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Returns a product that has the derivative zero where it is infinite."""
    product = insert_call(graph, aten.mul.Tensor, node.args, like=node)
    infinite = insert_call(graph, aten.isinf.default, (product,), like=node, name="infinite")
    safe = []
    for factor in node.args:
        filled = factor
        if isinstance(factor, fx.Node):
            filled = insert_call(graph, aten.masked_fill.Scalar, (factor, infinite, 1), like=node)
            filled.meta["guards_zero"] = True
        safe.append(filled)
    finite = insert_call(graph, aten.mul.Tensor, safe, like=node)
    fixed = insert_call(graph, aten.detach.default, (product,), like=node)
    fixed.meta["stop"] = True
    return insert_call(graph, aten.where.self, (infinite, fixed, finite), like=node)


def _guard_rank(graph: fx.Graph, node: fx.Node) -> None:
    """Factors the identity in place of a matrix of zeros: it has the same orthogonal factor."""
    matrix: Any = node.args[0]
    form = matrix.meta["val"]
    with graph.inserting_before(node):
        zero = insert_call(graph, aten.eq.Scalar, (matrix, 0), like=node, name="zero")
        for dim in (-1, -2):
            zero = insert_call(graph, aten.all.dim, (zero, dim, True), like=node, name="zero")
        options = {"dtype": form.dtype, "device": form.device}
        identity = insert_call(graph, aten.eye.m, tuple(form.shape[-2:]), options, like=node)
        safe = insert_call(graph, aten.where.self, (zero, identity, matrix), like=node)
    node.args = (safe, *node.args[1:])
    node.meta["guards_rank"] = True
    for part in list(node.users):
        if part.args[1] == 1:
            with graph.inserting_after(part):
                triangle = insert_call(graph, aten.masked_fill.Scalar, (part, zero, 0), like=node)
            part.replace_all_uses_with(triangle, delete_user_cb=lambda user, own=triangle: user is not own)


def _numbers(program: Program) -> set[fx.Node]:
    """Returns the nodes whose values follow from counters and hyperparameters: powers of those are of whole numbers."""
    slots = dict(zip(program.placeholders, program.inputs, strict=True))
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op == "placeholder":
            if slots[node].role in (Role.HYPER, Role.STATE) and node.meta["val"].dim() == 0:
                found.add(node)
        elif all(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def _is_singular(node: fx.Node, numbers: set[fx.Node]) -> bool:
    if node.target is aten.sqrt.default:
        return True
    if node.target is aten.pow.Tensor_Scalar:
        exponent = node.args[1]
        return isinstance(exponent, float) and 0 < exponent < 1
    return node.target is aten.pow.Tensor_Tensor and node.args[0] not in numbers


def _is_guarded(node: fx.Node) -> bool:
    base: Any = node.args[0]
    return base.target is aten.masked_fill.Scalar and base.args[2] == 1 and base.meta.get("guards_zero", False)


def _guard(graph: fx.Graph, node: fx.Node) -> fx.Node:
    base, *rest = node.args
    zero = insert_call(graph, aten.eq.Scalar, (base, 0), like=node, name="zero")
    if node.target is aten.pow.Tensor_Tensor:
        fraction = insert_call(graph, aten.lt.Scalar, (rest[0], 1), like=node)
        positive = insert_call(graph, aten.gt.Scalar, (rest[0], 0), like=node)
        singular = insert_call(graph, aten.logical_and.default, (fraction, positive), like=node)
        zero = insert_call(graph, aten.logical_and.default, (zero, singular), like=node, name="zero")
    safe = insert_call(graph, aten.masked_fill.Scalar, (base, zero, 1), like=node)
    safe.meta["guards_zero"] = True
    root = insert_call(graph, node.target, (safe, *rest), like=node)
    if node.target is not aten.sqrt.default:
        return insert_call(graph, aten.masked_fill.Scalar, (root, zero, 0), like=node)
    same = insert_call(graph, aten.detach.default, (base,), like=node)  # the root of a zero is that zero, sign included
    same.meta["stop"] = True
    return insert_call(graph, aten.where.self, (zero, same, root), like=node)
