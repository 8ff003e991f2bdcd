"""Prints a program as the Python source that runs, with dtypes, shapes and the lines that the operators came from."""

from __future__ import annotations

import enum
import math
import operator
from itertools import chain, count
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from gimli_compile.provenance import SourceLine

if TYPE_CHECKING:
    from gimli_compile.program import Program

_COMMENT_COLUMN = 88
_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
    torch.complex64: "c64",
    torch.complex128: "c128",
}


def print_program(program: Program) -> str:
    """Returns the source of a program: a title, one parameter a line, one operator a line, one return."""
    lines = [f"# {program.title}", f"def {program.name}("]
    for node in program.placeholders:
        lines.append(_with_comment(f"    {node.name},", describe(node)))
    lines.append("):")
    source: SourceLine | None = None
    for node in program.graph.nodes:
        if node.op == "call_function":
            if node.meta.get("source") != source:
                source = node.meta.get("source")
                lines.append(f"    # {source}" if source is not None else "    #")
            lines.append(_with_comment(f"    {node.name} = {format_call(node)}", describe(node)))
    lines.append(_format_return(program.returned))
    return "\n".join(lines) + "\n"


def print_excerpt(program: Program, around: fx.Node, *, radius: int = 3) -> str:
    """Returns the lines of a program around one node, the node marked: what every graph error shows."""
    nodes = [node for node in program.graph.nodes if node.op != "output"]
    at = nodes.index(around) if around in nodes else len(nodes) - 1
    lines = []
    for node in nodes[max(0, at - radius) : at + radius + 1]:
        mark = "-->" if node is around else "   "
        text = f"{node.name} = {format_call(node)}" if node.op == "call_function" else f"{node.name} (an input)"
        lines.append(f"{mark} {text}  # {describe(node)}")
    return "\n".join(lines)


def describe(node: fx.Node) -> str:
    """Returns dtype and shape of a node's value, such as `f32[2, 3]`."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return ", ".join(_describe_tensor(item) for item in value)
    return _describe_tensor(value)


def _describe_tensor(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return "?"
    text = f"{_SHORT.get(value.dtype, str(value.dtype))}[{', '.join(map(str, value.shape))}]"
    return text if value.device.type == "cpu" else f"{text} {value.device}"


def format_call(node: fx.Node) -> str:
    """Returns the expression of one call_function node."""
    if node.target is operator.getitem:
        return f"{_format(node.args[0])}[{node.args[1]!r}]"
    arguments = [_format(argument) for argument in node.args]
    arguments += [f"{key}={_format(value)}" for key, value in node.kwargs.items()]
    return f"{target_name(node)}({', '.join(arguments)})"


def target_name(node: fx.Node) -> str:
    """Returns the name under which printed code calls the target of a node."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return function_names(node.graph)[node.target]
    return str(node.target) if node.target.namespace == "aten" else f"torch.ops.{node.target}"


def function_names(graph: fx.Graph) -> dict[Any, str]:
    """Returns a name for each callable of a graph that is no operator, no name twice."""
    names: dict[Any, str] = {}
    for node in graph.nodes:
        if (
            node.op == "call_function"
            and not isinstance(node.target, torch._ops.OpOverload)
            and node.target not in names
        ):
            name = f"function_{getattr(node.target, '__name__', type(node.target).__name__)}"
            taken = set(names.values())
            names[node.target] = next(n for n in chain([name], (f"{name}_{i}" for i in count(1))) if n not in taken)
    return names


def run_namespace(graph: fx.Graph) -> dict[str, Any]:
    """Returns the globals that the printed source of a graph needs."""
    namespace: dict[str, Any] = {"torch": torch, "aten": torch.ops.aten, "inf": math.inf, "nan": math.nan}
    namespace.update({name: target for target, name in function_names(graph).items()})
    return namespace


def _with_comment(text: str, comment: str) -> str:
    return f"{text:<{_COMMENT_COLUMN}}  # {comment}"


def _format_return(nodes: Any) -> str:
    if not nodes:
        return "    return ()"
    names = "".join(f"        {_format(node)},\n" for node in nodes)
    return f"    return (\n{names}    )"


def _format(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_format, value))
        if isinstance(value, list):
            return f"[{inner}]"
        return f"({inner},)" if len(value) == 1 else f"({inner})"
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, slice):
        return f"slice({_format(value.start)}, {_format(value.stop)}, {_format(value.step)})"
    if isinstance(value, enum.Enum):
        return repr(value.value)
    return repr(value)
