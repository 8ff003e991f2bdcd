"""What a node's value looks like (`meta["val"]`): fake tensors, made and inferred without running anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from gimli_compile.call_arguments import tensors_of
from gimli_compile.graph_nodes import add_node

FAKE = FakeTensorMode(allow_non_fake_inputs=True)


def is_differentiable(value: torch.Tensor) -> bool:
    """Tells whether a tensor's numbers can have derivatives."""
    return value.is_floating_point() or value.is_complex()


def fake_like(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a fake tensor with the shape, strides, dtype and device of a real one."""
    if tensor.layout is not torch.strided:
        return FAKE.from_tensor(tensor)
    return _fake(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)


@functools.lru_cache(maxsize=4096)
def _fake(shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    with FAKE:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def infer(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Returns the fake result of an operator from the `meta["val"]` of the nodes among its arguments."""
    if not isinstance(target, torch._ops.OpOverload):
        return _infer(target, args, kwargs)
    known = _inferred((target, frozen(args, _form_of), frozen(kwargs, _form_of)))
    if not known:
        known.append(_infer(target, args, kwargs))
    return known[0]


def _infer(target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    fake_args, fake_kwargs = tree_map_only(fx.Node, lambda node: node.meta["val"], (args, kwargs))
    with FAKE, torch.no_grad():
        return target(*fake_args, **fake_kwargs)


@functools.lru_cache(maxsize=4096)
def _inferred(call: Any) -> list[Any]:
    """Returns the place for what calls of one form give: they are many times as many as their forms."""
    return []


def _form_of(node: fx.Node) -> Any:
    value = node.meta["val"]
    return tuple(map(_tensor_form, value)) if isinstance(value, (tuple, list)) else _tensor_form(value)


def _tensor_form(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return value
    bits = (value.storage_offset(), value.is_conj(), value.is_neg())
    return (value.dtype, value.shape, value.stride(), value.device, *bits)


def frozen(value: Any, node: Callable[[fx.Node], Any]) -> Any:
    """Returns a hashable form of an argument in which 1, 1.0 and True, and 0.0 and -0.0, differ.

    `node` gives what stands for a node.
    """
    if isinstance(value, fx.Node):
        return node(value)
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(frozen(item, node) for item in value))
    if isinstance(value, dict):
        return tuple((key, frozen(item, node)) for key, item in value.items())
    if isinstance(value, slice):
        return ("slice", *(frozen(item, node) for item in (value.start, value.stop, value.step)))
    return (type(value).__name__, repr(value) if isinstance(value, float) else value)


def insert_call(
    graph: fx.Graph, target: Any, args: Any, kwargs: Any = None, *, like: fx.Node, name: str | None = None
) -> fx.Node:
    """Adds a call to a graph at its insertion point, with inferred value and the source line of what it replaces."""
    kwargs = kwargs or {}
    node = add_node(graph, "call_function", target, tuple(args), kwargs, name=name or operator_name(target))
    node.meta["val"] = infer(target, node.args, node.kwargs)
    node.meta["source"] = like.meta.get("source")
    return node


def arguments_of(node: fx.Node) -> tuple[Any, ...]:
    """Returns the arguments of a call, whose types the operator's schema gives and the graph does not."""
    return node.args


def operator_name(target: Any) -> str:
    """Returns the name that nodes calling a target start with."""
    return target._opname if isinstance(target, torch._ops.OpOverload) else target.__name__


def storage_of(tensor: torch.Tensor) -> Any:
    """Returns what tensors of one memory have in common."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def written_tensors(func: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    """Returns the tensors that a call writes to."""
    found = []
    for index, name in _written_places(func):
        found += tensors_of(args[index] if index < len(args) else kwargs.get(name))
    return found


@functools.lru_cache(maxsize=4096)
def _written_places(func: Any) -> list[tuple[int, str]]:
    """Returns position and name of the arguments that an operator writes to."""
    arguments = enumerate(func._schema.arguments)
    return [(i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def with_declared_mutation(func: Any, args: Any) -> Any:
    """Replaces batch normalization, which changes its running statistics unannounced, by the form that says so."""
    if func is torch.ops.aten.native_batch_norm.default and args[5] and args[3] is not None:
        return torch.ops.aten._native_batch_norm_legit.default
    return func
