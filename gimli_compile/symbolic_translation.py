"""Translates the nodes of an update program into expressions for one element."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from gimli_compile.metadata import operator_name
from gimli_compile.symbolic_operators import (
    ARITHMETIC,
    IDENTITIES,
    LOGIC,
    MADE,
    SAME_ELEMENTS,
    as_number,
    number,
    truncate,
)

_LARGEST = 400
_FORM = frozenset("dtype device layout pin_memory memory_format non_blocking implicit".split())
_SHORT_NAMES = {"linalg_vector_norm": "norm"}


@dataclass(frozen=True)
class Formulas:
    """Expressions by name, and the symbols at which large ones were cut, in the order of computation."""

    results: Mapping[str, sympy.Expr]
    definitions: Mapping[sympy.Symbol, sympy.Expr]


class Translation:
    """The expressions of the nodes of a graph. A node in `named` stands as its symbol in what uses it."""

    def __init__(
        self, nodes: Mapping[fx.Node, None], inputs: Mapping[fx.Node, Any], named: Mapping[fx.Node, sympy.Symbol]
    ) -> None:
        self._values: dict[fx.Node, Any] = dict(inputs)
        self._written_out: dict[fx.Node, Any] = dict(inputs)
        self._definitions: dict[sympy.Symbol, Any] = {}
        self._sizes = dict.fromkeys(inputs, 1)
        for node in nodes:
            if node not in inputs:
                value = self._written_out[node] = self._translate(node)
                self._sizes[node] = 1 + sum(self._sizes[argument] for argument in node.all_input_nodes)
                self._values[node] = value
                if node in named:
                    self._values[node], self._sizes[node] = named[node], 1
                elif self._sizes[node] > _LARGEST:
                    self._name(node)

    def formulas(self, wanted: Mapping[str, fx.Node]) -> Formulas:
        """Returns the expressions of some nodes, by name; the second name of a named node stands for the first."""
        results: dict[str, Any] = {}
        written: set[fx.Node] = set()
        for name, node in wanted.items():
            results[name] = as_number((self._values if node in written else self._written_out)[node])
            written.add(node)
        return Formulas(results, self._definitions)

    def _name(self, node: fx.Node) -> None:
        """Lets a node stand as a symbol from here on."""
        if isinstance(self._values[node], sympy.Expr):
            symbol = sympy.Symbol(node.name, real=True)
            self._definitions[symbol] = self._values[node]
            self._values[node], self._sizes[node] = symbol, 1

    def _translate(self, node: fx.Node) -> Any:
        self._name_cases(node)
        args = [self._argument(argument) for argument in node.args]
        kwargs = {key: self._argument(value) for key, value in node.kwargs.items() if key not in _FORM}
        if node.target is operator.getitem:
            function = args[0]
            return _opaque(f"{function.func.__name__}[{node.args[1]}]", list(function.args))
        if node.meta.get("stands_in"):  # what stands for elements that a mask does not select is used nowhere
            return args[1]
        name = operator_name(node.target)
        name = name.replace("bitwise_", "logical_") if _dtype(node) is torch.bool else name
        if name in MADE:
            return MADE[name](*args)
        if name in IDENTITIES or (name in SAME_ELEMENTS and _long_sides(node) == _long_sides(node.args[0])):
            return _cast(args[0], node)
        if name in LOGIC:
            return args[0] if _is_guard(node) else self._unguarded(node, LOGIC[name](*args))
        if name in ARITHMETIC:
            return ARITHMETIC[name](*map(as_number, args), **{key: as_number(value) for key, value in kwargs.items()})
        if name == "index_put" and _is_mask(node):
            return LOGIC["where"](args[1][0], args[2], args[0])
        return _opaque(_SHORT_NAMES.get(name, name), [*args, *kwargs.values()])

    def _name_cases(self, node: fx.Node) -> None:
        """Names the arguments of a comparison that have several cases: sympy would multiply the cases out."""
        if _dtype(node) is torch.bool:
            for argument in node.all_input_nodes:
                if isinstance(self._values[argument], sympy.Expr) and self._values[argument].has(sympy.Piecewise):
                    self._name(argument)

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self._values[value]
        if isinstance(value, (list, tuple)):
            return [self._argument(item) for item in value]
        return number(value) if isinstance(value, (bool, int, float)) else value

    def _unguarded(self, node: fx.Node, value: Any) -> Any:
        """Returns a root that is guarded at zero as the root itself."""
        for root in node.all_input_nodes:
            guard: Any = root.args[0] if root.args else None
            if isinstance(guard, fx.Node) and _is_guard(guard) and guard.args[1] in node.args:
                return self._values[root]
        return value


def _is_guard(node: fx.Node) -> bool:
    """Tells whether a node keeps zeros away from a root: see `gimli_compile.passes.singularity`."""
    return bool(node.meta.get("guards_zero", False))


def _is_mask(node: fx.Node) -> bool:
    """Tells whether `index_put` chooses elements by one mask."""
    indices: Any = node.args[1]
    return len(indices) == 1 and _dtype(indices[0]) is torch.bool and len(node.args) == 3


def _dtype(node: Any) -> torch.dtype | None:
    return getattr(node.meta["val"], "dtype", None)


def _long_sides(node: Any) -> list[int]:
    return [size for size in node.meta["val"].shape if size != 1]


def _cast(value: Any, node: fx.Node) -> Any:
    before, after = _dtype(node.args[0]), _dtype(node)
    if before is None or after is None or after == before:
        return value
    if after is torch.bool:
        return sympy.Ne(value, 0)
    value = as_number(value)
    return truncate(value) if before.is_floating_point and not after.is_floating_point else value


def _opaque(name: str, args: Sequence[Any]) -> Any:
    """Returns an undefined function of the expressions among the arguments; what else they are is part of its name."""
    inputs: list[Any] = []
    options: list[str] = []
    for argument in args:
        for item in argument if isinstance(argument, list) else [argument]:
            if isinstance(item, sympy.Basic) and not item.is_number and item not in (sympy.true, sympy.false):
                inputs.append(as_number(item))
            else:
                options.append(str(item))
    text = f"{name}[{', '.join(options)}]" if options else name
    return sympy.Function(text, real=True)(*inputs)
