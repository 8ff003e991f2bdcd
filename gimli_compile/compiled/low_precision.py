"""Rounding in programs of Inductor: after each operator, and of numbers, as it happens without a compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast
from unittest import mock

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor import graph as inductor_graph
from torch._inductor import lowering
from torch._inductor.codegen.cpp import CppKernel
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import decompose, make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from gimli_compile.metadata import FAKE

Tensor = torch.Tensor
_aten = torch.ops.aten
_LOW = torch.float16, torch.bfloat16
_MOVES = {
    *(_aten._to_copy.default, torch.ops.prims.convert_element_type.default, _aten.clone.default, _aten.copy.default),
    *(_aten.where.self, _aten.cat.default, _aten.stack.default, _aten.detach.default),
    *(getattr(_aten, f"{name}_like").default for name in ("empty", "zeros", "ones")),
}
_FILLS = {
    *(_aten.full.default, _aten.full_like.default, _aten.new_full.default, _aten.scalar_tensor.default),
    *(_aten.fill.Scalar, _aten.masked_fill.Scalar),
}
_SUMS = {_aten.sum, _aten.mean, _aten.amax, _aten.amin, _aten.max, _aten.min}  # which torch adds up in float32, too
_ARITHMETIC = {getattr(_aten, name).Tensor for name in ("add", "sub", "mul", "div")}
_ARITHMETIC |= {getattr(_aten, name).Scalar for name in ("add", "sub", "mul", "div")}
# Of the operators for which Inductor has code of its own, those that it rounds once.
_SINGLE = {
    getattr(_aten, name)
    for name in (
        *("add", "sub", "mul", "div", "neg", "abs", "sign", "maximum", "minimum", "relu", "floor", "ceil", "round"),
        *("trunc", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal", "sigmoid"),
        *("tanh", "sin", "cos", "tan", "sinh", "cosh", "asin", "acos", "atan", "atan2", "erf", "erfc", "isnan"),
        *("isinf", "signbit", "eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not"),
    )
}
_PROBE = 1.2345678  # between numbers of low precision


@contextmanager
def rounded_as_written(module: fx.GraphModule) -> Iterator[Callable[..., Any]]:
    """Within this, Inductor rounds what a graph computes in float16 or bfloat16 wherever the graph does.

    Otherwise it keeps what it fuses in float32, even across conversions that the user wrote: an optimizer that rounds
    its state on purpose would not, and Muon's steps are off by some thousandths. Numbers it rounds, or does not round,
    without regard to what torch does: a factor of 0.998 would be 0.996.

    Returns:
        what runs the graph, to be traced in the operators of Inductor.
    """
    if not has_low_precision(module):
        yield lambda *inputs: module(*inputs)
        return
    written, known = _AsWritten(module), lowering.fallback_node_due_to_unsupported_type

    def is_for_torch(node: fx.Node, *args: Any, **kwargs: Any) -> bool:
        return _takes_numbers(node) or written.keeps(node) or known(node, *args, **kwargs)

    # Torch 2.11 takes the value before a conversion for what is converted back, whatever the setting says.
    with (
        inductor_config.patch(emulate_precision_casts=True),
        mock.patch.object(CppKernel, "cache_dtype_convert", _forget),
        mock.patch.object(inductor_graph, "fallback_node_due_to_unsupported_type", is_for_torch),
    ):
        yield written.run


class _AsWritten(fx.Interpreter):
    """Runs a graph in operators that Inductor rounds as torch does.

    Which numbers torch rounds beside a tensor of low precision depends on the operator and the device: arithmetic is
    tried, and computed in float32. The rest stays one operator, for which Inductor calls torch, as does what would
    round more often in parts than as a whole.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        calls = [node for node in module.graph.nodes if node.op == "call_function" and _is_low(node)]
        self._rounds = {node: _rounds_number(node) for node in calls if _takes_numbers(node)}
        self._whole = {node for node in calls if _rounds_in_parts(node)}
        self._targets = {node.target for node in self._whole}

    def keeps(self, node: fx.Node) -> bool:
        """Tells whether an operator of the traced graph is one that was not taken apart."""
        return node.target in self._targets and _is_low(node)

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target in _FILLS and n.meta["val"].dtype in _LOW:
            dtype = n.meta["val"].dtype
            filled = tuple(_rounded(value, dtype) if isinstance(value, float) else value for value in args)
            return self.call_function(cast("Any", n.target), filled, kwargs)
        rounds = self._rounds.get(n)
        if rounds is not None:
            return _computed_wide(n.target, args[:2], n.meta["val"].dtype, rounds=rounds)
        with decompose({}) if n in self._rounds or n in self._whole else nullcontext():
            return super().run_node(n)


def _computed_wide(target: Any, operands: Any, dtype: torch.dtype, *, rounds: bool) -> Tensor:
    """Computes in float32 what has a result of low precision; `rounds`: what is not, is rounded to it before."""

    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return _rounded(value, dtype) if rounds else value
        narrow = _aten._to_copy(value, dtype=dtype) if rounds and value.dtype != dtype else value
        return _aten._to_copy(narrow, dtype=torch.float32) if narrow.dtype != torch.float32 else narrow

    return _aten._to_copy(target(*map(wide, operands)), dtype=dtype)


@functools.cache
def _rounded(value: float, dtype: torch.dtype) -> float:
    with _disable_current_modes():
        return torch.tensor(value, dtype=torch.float64).to(dtype).item()


def _tensors(node: fx.Node) -> list[Tensor]:
    """Returns fake tensors of what a node takes and makes."""
    values = [one.meta.get("val") for one in (*node.all_input_nodes, node)]
    return [value for value in pytree.tree_leaves(values) if isinstance(value, Tensor)]


def _is_low(node: fx.Node) -> bool:
    """Tells whether an operator takes or makes tensors of low precision."""
    return isinstance(node.target, torch._ops.OpOverload) and any(value.dtype in _LOW for value in _tensors(node))


def _takes_numbers(node: fx.Node) -> bool:
    """Tells whether an operator computes each entry of a tensor of low precision with numbers, or tensors like them."""
    target, made = node.target, node.meta.get("val")
    if target in _MOVES or target in _FILLS or not isinstance(made, Tensor) or not _is_low(node):
        return False
    if torch.Tag.pointwise not in cast("Any", target).tags:
        return False
    given = [value for value in (*node.args, *node.kwargs.values()) if type(value) in (int, float)]
    numbers = [value for value in given if value != 1 or "alpha" not in node.kwargs]
    kinds = {value.dtype for value in _tensors(node)[:-1] if value.is_floating_point()}
    return bool(numbers) or (len(kinds) > 1 and made.dtype in (*_LOW, torch.bool))


def _rounds_in_parts(node: fx.Node) -> bool:
    """Tells whether Inductor rounds an operator in parts, or adds up in another way, or its parts take numbers."""
    target, table = cast("Any", node.target), select_decomp_table()
    if target.is_view or target in _MOVES or target in _FILLS or target.overloadpacket in _SUMS:
        return False
    if target not in table:
        is_pointwise = torch.Tag.pointwise in target.tags or target.overloadpacket is _aten.glu  # which has no such tag
        return _reduces(node) or (is_pointwise and target.overloadpacket not in _SINGLE)
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, fx.Node)]

    def call(*tensors: Tensor) -> Any:
        given = [*leaves]
        for place, value in zip(places, tensors, strict=True):
            given[place] = value
        args, kwargs = pytree.tree_unflatten(given, structure)
        return target(*args, **kwargs)

    with FAKE, torch.no_grad():
        parts = make_fx(call, decomposition_table=table)(*(leaves[place].meta["val"] for place in places))
    nodes = parts.graph.nodes
    return sum(map(_rounds, nodes)) > 1 or any(_takes_numbers(part) or _reduces(part) for part in nodes)


def _reduces(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and torch.Tag.reduction in node.target.tags


def _rounds(node: fx.Node) -> bool:
    """Tells whether an operator computes something in low precision."""
    target, made = node.target, node.meta.get("val")
    if not isinstance(target, torch._ops.OpOverload) or target.is_view or target in _MOVES or target in _FILLS:
        return False
    return isinstance(made, Tensor) and made.dtype in _LOW and bool(node.all_input_nodes)


def _rounds_number(node: fx.Node) -> bool | None:
    """Tells whether an operator rounds the number that it takes to low precision; None if this is not known."""
    if node.target not in _ARITHMETIC or node.kwargs or len(node.args) != 2 or node.meta["val"].dtype not in _LOW:
        return None
    kinds = tuple(_kind(value) for value in node.args)
    return _tried(node.target, kinds, node.meta["val"].dtype)


def _kind(value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return None
    val = value.meta["val"]
    return val.dtype, val.device, val.dim() == 0


@functools.cache
def _tried(target: Any, kinds: tuple[Any, ...], dtype: torch.dtype) -> bool | None:
    """Tells how an operator of torch rounds a number, from what it makes of one."""
    with _disable_current_modes(), torch.no_grad():
        operands = [_example(kind, dtype) for kind in kinds]
        made = target(*operands)
        agree = [torch.equal(made, _computed_wide(target, operands, dtype, rounds=rounds)) for rounds in (False, True)]
    return agree[1] if made.dtype == dtype and sum(agree) == 1 else None


def _example(kind: Any, dtype: torch.dtype) -> Any:
    """Returns values for an operand: a number, a tensor like one, or a tensor that a vectorized loop takes in parts."""
    if kind is None:
        return _PROBE
    own, device, is_number = kind
    if is_number and own != dtype:
        return torch.tensor(_PROBE, dtype=own, device=device)
    return torch.linspace(-3, 3, 1001, dtype=torch.float64).to(device, own)


def _forget(_kernel: CppKernel, *_conversion: Any) -> None:
    """Keeps no conversion in mind."""


def has_low_precision(module: fx.GraphModule) -> bool:
    """Tells whether a graph computes anything in float16 or bfloat16."""
    values = (node.meta.get("val") for node in module.graph.nodes)
    return any(isinstance(value, Tensor) and value.dtype in _LOW for value in values)
