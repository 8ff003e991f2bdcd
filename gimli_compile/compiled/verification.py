"""Compares what a compiled program computes, when it first runs, with the same graph run operator by operator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gimli_compile.compiled.backends import Backend, Executable, entry_of
from gimli_compile.errors import CompileError, compose_message

Tensor = torch.Tensor
_TOLERANCE = {torch.float64: 1e-9, torch.complex128: 1e-9, torch.float32: 2e-4, torch.complex64: 2e-4}
_LOW = 5e-2  # of float16 and bfloat16
_SLACK = 50  # how many roundings of the inputs a result may be off by
_FEW = 4  # that many where values are of low precision
# By how many roundings the inputs are nudged, and the seed. Once by one, for what is left where all cancels: noise that
# is as large however much they are nudged. Where rounding crossed a kink (a relu), it takes luck, and the whole slack,
# to cross one that has as much effect.
_NUDGES = ((1, 0), *((_SLACK, seed) for seed in range(4)))
_PATIENCE = 60  # seconds in which a wrong operator is searched for: parts of large programs take long to build


def verified(backend: Backend, module: fx.GraphModule, what: str) -> Executable:
    """Compiles a graph; the executable compares itself, in its first call, with the graph run operator by operator.

    Rounding may differ: by a tolerance relative to the largest entry of each result, or by what the graph itself makes
    of inputs that are off by some roundings.

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
        triples = zip(found, expected, _tolerances(module), strict=True)
        suspects = [index for index, triple in enumerate(triples) if not _agree(*triple)]
        largest = max((_size(value) for value in inputs if value.is_floating_point()), default=0.0)
        for roundings, seed in _NUDGES:
            if not suspects:
                return False
            nudged = _run_nudged(module, inputs, roundings, seed)
            suspects = [
                index
                for index in suspects
                if not _distance(found[index], expected[index])
                <= _allowed(nudged[index], expected[index], roundings, largest)
            ]
    return bool(suspects)


def _allowed(nudged: Tensor, expected: Tensor, roundings: int, largest: float) -> float:
    """Returns by how much a result may be off, if inputs that are nudged make this of it."""
    effect = _distance(nudged, expected)
    if roundings == _SLACK:
        return effect
    is_noise = expected.is_floating_point() and _size(expected) <= _SLACK * torch.finfo(expected.dtype).eps * largest
    return _SLACK * effect if is_noise else 0.0


def _size(value: Tensor) -> float:
    return float(value.detach().abs().max()) if value.numel() else 0.0


def _tolerances(module: fx.GraphModule) -> list[float]:
    """Returns how far each result may be off: a float64 number that float32 tensors add up to is as exact as they.

    What comes of lower precision is compared with what the graph makes of values that are off by some roundings.
    """
    coarsest: dict[fx.Node, float] = {}
    for node in module.graph.nodes:
        value = node.meta.get("val")
        own = _TOLERANCE.get(value.dtype, 0.0) if isinstance(value, torch.Tensor) else 0.0
        inherited = max((coarsest[source] for source in node.all_input_nodes), default=0.0)
        coarsest[node] = max(inherited, own)
    output = next(iter(module.graph.find_nodes(op="output")))
    return [coarsest[result] for result in output.args[0]]


def _agree(found: Tensor, expected: Tensor, inherited: float) -> bool:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    if not (expected.is_floating_point() or expected.is_complex()):
        return torch.equal(found, expected)
    finite = torch.isfinite(expected)
    if not torch.equal(found[~finite].nan_to_num(), expected[~finite].nan_to_num()):
        return False
    scale = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    return _distance(found[finite], expected[finite]) <= max(inherited, _TOLERANCE.get(expected.dtype, _LOW)) * scale


def _distance(first: Tensor, second: Tensor) -> float:
    """Returns the largest difference of two tensors; NaN if one has it."""
    if first.shape != second.shape or not first.numel():
        return 0.0 if first.shape == second.shape else float("nan")
    wide = torch.complex128 if first.is_complex() else torch.float64
    return float((first.to(wide) - second.to(wide)).abs().max())


class _Nudged(fx.Interpreter):
    """Runs a graph with all that it computes in low precision off by some roundings: backends may not round there."""

    def __init__(self, module: fx.GraphModule, roundings: int, seed: int) -> None:
        super().__init__(module)
        self._roundings, self._seed = roundings, seed

    def run_node(self, n: fx.Node) -> Any:
        """Runs a node."""
        made = super().run_node(n)
        is_low = n.op == "call_function" and isinstance(made, Tensor) and _is_low(made.dtype)
        return _nudged(made, self._roundings, self._seed) if is_low else made


def _run_nudged(module: fx.GraphModule, inputs: list[Tensor], roundings: int, seed: int) -> list[Tensor]:
    given = [_nudged(value, roundings, seed) for value in inputs]
    values = (node.meta.get("val") for node in module.graph.nodes)
    if any(isinstance(value, Tensor) and _is_low(value.dtype) for value in values):
        return list(_Nudged(module, roundings, seed).run(*given))
    return list(module(*given))


def _is_low(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point and dtype not in _TOLERANCE


def _nudged(value: Tensor, roundings: int, seed: int) -> Tensor:
    """Returns a tensor with every entry larger or smaller by some roundings, by few where these are large."""
    if not (value.is_floating_point() or value.is_complex()):
        return value
    roundings = min(roundings, _FEW) if _is_low(value.dtype) else roundings
    draw = torch.randint(0, 2, value.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
    signs = (2 * draw - 1).to(value.device, value.dtype)
    return value * (1 + roundings * torch.finfo(value.dtype).eps * signs)


def _mismatch(backend: Backend, module: fx.GraphModule, inputs: list[Tensor], what: str) -> CompileError:
    where = _first_wrong(backend, module, inputs)
    return CompileError(
        compose_message(
            f"the compiled {what} computes something else than the program that it was compiled from",
            where,
            "The backend made other code of it: compared were all results, on the values of this very call.",
            "Use `compile(backend='eager')`, or 'torchscript', and report the operator to the backend's developers.",
        )
    )


def _first_wrong(backend: Backend, module: fx.GraphModule, inputs: list[Tensor]) -> str | None:
    """Says which node is the first that is wrong if the graph is compiled up to it; None if none is, cut there.

    Where time runs out, it says among which nodes the first one is.
    """
    calls = [
        node
        for node in module.graph.nodes
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor)
    ]
    end = time.monotonic() + _PATIENCE
    low, high = 0, len(calls)
    while low < high and time.monotonic() < end:
        middle = (low + high) // 2
        prefix = _up_to(module, calls[middle])
        if _is_wrong(list(backend(prefix)([value.clone() for value in inputs])), prefix, inputs):
            high = middle
        else:
            low = middle + 1
    among = [f"{node.name} = {node.target}" for node in calls[low : high + 1]]
    if len(among) > 1:
        return f"the first operator that differs is one of {len(among)}, from {among[0]} to {among[-1]}"
    return f"the first operator that differs: {among[0]}" if among else None


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
