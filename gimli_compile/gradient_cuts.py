"""Which operators pass a gradient on, argument by argument."""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from gimli_compile.metadata import arguments_of, operator_name


class Passage(enum.Enum):
    """What of an argument reaches a result: the gradient too, the value alone, or nothing but its form."""

    GRADIENT = "the result depends on it differentiably"
    VALUE = "the result depends on it, but its derivative is zero or does not exist"
    FORM = "the result depends on its shape and dtype alone"


_PIECEWISE_CONSTANT = frozenset(
    "sign sgn round floor ceil trunc fix heaviside floor_divide bucketize searchsorted histc one_hot".split()
)
_FORM_ONLY = frozenset("zeros_like ones_like empty_like full_like rand_like randn_like".split()) | frozenset(
    "new_zeros new_ones new_empty new_full new_empty_strided".split()
)
# Arguments whose value is used and whose derivative is zero, and arguments of which only the form counts.
_VALUE_ARGUMENTS = {
    "copysign": {1},
    "threshold_backward": {1},
    "hardtanh_backward": {1},
    "leaky_relu_backward": {1},
    "hardsigmoid_backward": {1},
    "hardshrink_backward": {1},
    "softshrink_backward": {1},
    "log_sigmoid_backward": {2},
    "rrelu_with_noise_backward": {1},
    "max_pool2d_with_indices_backward": {1},
    "nll_loss_backward": {1, 6},
    "nll_loss2d_backward": {1, 6},
}
_FORM_ARGUMENTS = {
    "fill": {0},
    "copy": {0},
    "avg_pool2d_backward": {1},
    "avg_pool3d_backward": {1},
    "_adaptive_avg_pool2d_backward": {1},
    "_adaptive_avg_pool3d_backward": {1},
    **{f"{kind}_pad{n}d_backward": {1} for kind in ("reflection", "replication") for n in (1, 2, 3)},
}
# Of operators with several results: the arguments that a result depends on, where it is not all of them.
_RESULT_ARGUMENTS = {
    "nll_loss_forward": {1: {1, 2}},
    "nll_loss2d_forward": {1: {1, 2}},
    "log_sigmoid_forward": {1: set()},
    "native_group_norm": {1: set(), 2: set()},
    "_prelu_kernel_backward": {0: {0, 2}, 1: {0, 1}},
    "convolution_backward": {0: {0, 2}, 1: {0, 1}, 2: {0}},
    "native_layer_norm_backward": {1: {0, 1, 3, 4}, 2: {0}},
    "native_group_norm_backward": {1: {0, 1, 2, 3}, 2: {0}},
    "native_batch_norm_backward": {1: {0, 1, 3, 4, 5, 6}, 2: {0}},
}


def arguments(node: fx.Node) -> Iterator[tuple[fx.Node, Passage]]:
    """Yields the nodes that a call depends on, each with what of it reaches the result.

    Of several uses the best counts. One of several results of a call depends on the arguments of that call.
    """
    found: dict[fx.Node, Passage] = {}
    call = call_of(node)
    kept = _RESULT_ARGUMENTS.get(operator_name(call.target), {}).get(node.args[1]) if call is not node else None
    for position, argument in [*enumerate(call.args), *((None, value) for value in call.kwargs.values())]:
        for leaf in tree_leaves(argument, is_leaf=lambda item: isinstance(item, fx.Node)):
            if isinstance(leaf, fx.Node) and (kept is None or position in kept):
                passage = _passage(call, position) or _of_dtypes(node, leaf)
                found[leaf] = min(passage, found.get(leaf, passage), key=list(Passage).index)
    yield from found.items()


def call_of(node: fx.Node) -> fx.Node:
    """Returns the call that a node is one of several results of, or the node itself."""
    return arguments_of(node)[0] if node.target is operator.getitem else node


def _passage(call: fx.Node, position: int | None) -> Passage | None:
    """Returns what of the argument at a position reaches the result, None where the dtypes decide."""
    name = operator_name(call.target)
    if name in _FORM_ONLY or position in _FORM_ARGUMENTS.get(name, ()):
        return Passage.FORM
    if name in _PIECEWISE_CONSTANT or position in _VALUE_ARGUMENTS.get(name, ()) or _stops(call):
        return Passage.VALUE
    return None


def _stops(node: fx.Node) -> bool:
    """Tells whether a call is the user's stop-gradient, or a division that rounds."""
    return bool(node.meta.get("stop")) or node.kwargs.get("rounding_mode") is not None


def _of_dtypes(node: fx.Node, argument: fx.Node) -> Passage:
    return Passage.GRADIENT if has_gradient(node) and has_gradient(argument) else Passage.VALUE


def has_gradient(node: fx.Node) -> bool:
    """Tells whether a node's value, or one of several, has a dtype that has derivatives."""
    values: Any = tree_leaves(node.meta["val"])
    return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)


def is_notable(node: fx.Node) -> bool:
    """Tells whether a call that cuts a gradient deserves mention where another path is left.

    Conditions do not: within each branch the derivative is right. Nor do the inner derivatives of piecewise linear
    functions.
    """
    if _is_at_guard(node):
        return False
    if _stops(node) or operator_name(node.target) in _PIECEWISE_CONSTANT:
        return True
    value = node.meta["val"]
    return isinstance(value, torch.Tensor) and value.dtype is not torch.bool and not has_gradient(node)


def _is_at_guard(node: fx.Node) -> bool:
    """Tells whether a call gives the value of a root at zero: see `gimli_compile.passes.singularity`."""
    users = [user for user in node.users if user.op == "call_function"]
    roots = [argument for user in users for argument in user.all_input_nodes if argument is not node]
    return any(isinstance(r.args[0], fx.Node) and r.args[0].meta.get("guards_zero") for r in roots if r.args)
