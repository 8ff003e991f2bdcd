"""Graphs as TorchScript: its interpreter runs them without Python between the operators."""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from gimli_compile.errors import CompileError, compose_message


def script(module: fx.GraphModule) -> Callable[..., Any]:
    """Returns a graph as a function of TorchScript.

    Raises:
        CompileError: TorchScript does not know an operator of the graph.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and says so at every call
        try:
            return torch.jit.CompilationUnit(_source(module)).run
        except RuntimeError as error:
            raise _unknown(str(error)) from error


def _source(module: fx.GraphModule) -> str:
    """Returns the source of a graph; TorchScript finds the overload of an operator by the types of its arguments."""
    lines = []
    for node in module.graph.nodes:
        if node.op == "call_function":
            lines.append(f"    {node.name} = {_call(node)}")
        elif node.op == "output":
            lines.append(f"    return ({''.join(f'{_text(value)}, ' for value in node.args[0])})")
    inputs = ", ".join(node.name for node in module.graph.find_nodes(op="placeholder"))
    return "\n".join([f"def run({inputs}):", *lines, ""])


def _call(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return f"{_text(node.args[0])}[{node.args[1]}]"
    if not isinstance(node.target, torch._ops.OpOverload):
        raise _unknown(f"{node.target} is no operator of torch")
    arguments = [_argument(node.target, place, value) for place, value in enumerate(node.args)]
    arguments += [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
    return f"torch.ops.{node.target.namespace}.{node.target._opname}({', '.join(arguments)})"


def _argument(target: torch._ops.OpOverload, place: int, value: Any) -> str:
    """Returns an argument; a number in the place of a tensor is one if no overload takes numbers there."""
    if not isinstance(value, (int, float)) or not isinstance(_type_of(target, place), torch.TensorType):
        return _text(value)
    packet = target.overloadpacket
    types = [_type_of(getattr(packet, name), place) for name in packet.overloads()]
    if any(isinstance(kind, torch.NumberType) for kind in types):
        return _text(value)
    kind = torch.float64 if isinstance(value, float) else torch.bool if isinstance(value, bool) else torch.int64
    return f"torch.tensor({value!r}, dtype={kind})"


def _type_of(target: torch._ops.OpOverload, place: int) -> Any:
    arguments = target._schema.arguments
    return arguments[place].type if place < len(arguments) else None


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    return str(value) if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)) else repr(value)


def _unknown(reason: str) -> CompileError:
    return CompileError(
        compose_message(
            "TorchScript cannot run a program of this step",
            None,
            reason.strip().splitlines()[0],
            "Use `compile(backend='inductor')` or `compile(backend='eager')`.",
        )
    )
