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
    arguments = [
        f"torch.tensor({value!r})" if _is_tensor(formal) and isinstance(value, (int, float)) else _text(value)
        for formal, value in zip(node.target._schema.arguments, node.args, strict=False)
    ]
    arguments += [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
    return f"torch.ops.{node.target.namespace}.{node.target._opname}({', '.join(arguments)})"


def _is_tensor(argument: torch._C.Argument) -> bool:
    return isinstance(argument.type, torch.TensorType)


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
