"""What a node's value looks like (`meta["val"]`): fake tensors, made and inferred without running anything."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

FAKE = FakeTensorMode(allow_non_fake_inputs=True)


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
    fake_args, fake_kwargs = tree_map_only(fx.Node, lambda node: node.meta["val"], (args, kwargs))
    with FAKE, torch.no_grad():
        return target(*fake_args, **fake_kwargs)


def insert_call(
    graph: fx.Graph, target: Any, args: Any, kwargs: Any = None, *, like: fx.Node, name: str | None = None
) -> fx.Node:
    """Adds a call to a graph at its insertion point, with inferred value and the source line of what it replaces."""
    kwargs = kwargs or {}
    node = graph.create_node("call_function", target, tuple(args), kwargs, name=name or operator_name(target))
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
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return found
