"""Compares what a compiled program computes, when it first runs, with the same graph run operator by operator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from gimli_compile.compiled.backends import Backend, Executable, entry_of
from gimli_compile.errors import CompileError, compose_message

Tensor = torch.Tensor
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 2e-4, torch.complex64: 2e-4}
_LOW = 5e-2  # of float16 and bfloat16
_SLACK = 50  # how many times the effect of rounding the inputs differently


def verified(backend: Backend, module: fx.GraphModule, what: str) -> Executable:
    """Compiles a graph; the executable compares itself, in its first call, with the graph run operator by operator.

    Rounding may differ: by a tolerance relative to the largest entry of each result, or by what the graph itself makes
    of inputs that are rounded differently.

    Raises:
        CompileError: (the first call) a result differs; the message names the first operator that does.
    """
    return _Verified(backend, module, what, backend(module))


@dataclass
class _Verified:
    """An executable that compares itself with its graph once. Until then, only Python can call it."""

    backend: Backend
    module: fx.GraphModule
    what: str
    executable: Executable
    checked: bool = False

    def __call__(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        if self.checked:
            return self.executable(inputs)
        kept = [value.clone() for value in inputs]
        found = list(self.executable(inputs))
        if _is_wrong(found, self.module, kept):
            raise _mismatch(self.backend, self.module, kept, self.what)
        self.checked = True
        return found

    @property
    def entry(self) -> int:
        """The address at which C++ can call it."""
        return entry_of(self.executable) if self.checked else 0


def _is_wrong(found: Sequence[Tensor], module: fx.GraphModule, inputs: list[Tensor]) -> bool:
    with torch.no_grad():
        expected = list(module(*inputs))
        suspects = [index for index, pair in enumerate(zip(found, expected, strict=True)) if not _agree(*pair)]
        if not suspects:
            return False
        nudged = list(module(*map(_nudged, inputs)))
    return any(
        not _distance(found[index], expected[index]) <= _SLACK * _distance(nudged[index], expected[index])
        for index in suspects
    )


def _agree(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(found, expected)
    finite = torch.isfinite(expected)
    if not torch.equal(found[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return False
    scale = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    return _distance(found[finite], expected[finite]) <= _TOLERANCE.get(expected.dtype, _LOW) * scale


def _distance(first: Tensor, second: Tensor) -> float:
    """Returns the largest difference of two tensors; NaN if one has it."""
    if first.shape != second.shape or not first.numel():
        return 0.0 if first.shape == second.shape else float("nan")
    wide = torch.complex128 if first.is_complex() else torch.float64
    return float((first.to(wide) - second.to(wide)).abs().max())


def _nudged(value: Tensor) -> Tensor:
    """Returns a tensor with every entry rounded differently."""
    if not (value.is_floating_point() or value.is_complex()):
        return value
    signs = torch.ones(value.shape, dtype=value.dtype, device=value.device)
    signs.view(-1)[::2] = -1
    return value * (1 + torch.finfo(value.dtype).eps * signs)


def _mismatch(backend: Backend, module: fx.GraphModule, inputs: list[Tensor], what: str) -> CompileError:
    node = _first_wrong(backend, module, inputs)
    where = f"the first operator that differs: {node.name} = {node.target}" if node is not None else None
    return CompileError(
        compose_message(
            f"the compiled {what} computes something else than the program that it was compiled from",
            where,
            "The backend made other code of it: compared were all results, on the values of this very call.",
            "Use `compile(backend='eager')`, or 'torchscript', and report the operator to the backend's developers.",
        )
    )


def _first_wrong(backend: Backend, module: fx.GraphModule, inputs: list[Tensor]) -> fx.Node | None:
    """Returns the first node that is wrong if the graph is compiled up to it; None if none is, cut there."""
    calls = [
        node
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    low, high = 0, len(calls)
    while low < high:
        middle = (low + high) // 2
        prefix = _up_to(module, calls[middle])
        if _is_wrong(list(backend(prefix)([value.clone() for value in inputs])), prefix, inputs):
            high = middle
        else:
            low = middle + 1
    return calls[low] if low < len(calls) else None


def _up_to(module: fx.GraphModule, last: fx.Node) -> fx.GraphModule:
    """Returns the graph that ends with one node and returns everything that the rest of the graph would use."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = dict(node.meta)
        if node is last:
            break
    open_ends = [
        copies[node]
        for node in copies
        if node.op == "call_function"
        and isinstance(node.meta.get("val"), torch.Tensor)
        and (node is last or any(user not in copies for user in node.users))
    ]
    graph.output(tuple(open_ends))
    graph.eliminate_dead_code()
    return fx.GraphModule(module, graph)
