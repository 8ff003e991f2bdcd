"""Paths through programs: which inputs reach which results, and which operators cut the gradient on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
from torch import fx

from gimli_compile.gradient_cuts import Passage, arguments, call_of, is_notable
from gimli_compile.metadata import operator_name
from gimli_compile.program import Program
from gimli_compile.provenance import SourceLine
from gimli_compile.slot import Role, Slot

Key = tuple[Any, Any]


@dataclass(frozen=True)
class Cut:
    """An operator through which a value passes and its gradient does not."""

    operator: str
    node: str
    program: str
    source: SourceLine | None
    is_notable: bool

    def __str__(self) -> str:
        return describe_cuts([self])


@dataclass(frozen=True)
class Flow:
    """How inputs reach results.

    `path` holds the operators of a shortest differentiable path, None if there is none. `cuts` are operators that end
    the gradient on other paths: on all of them if there is no `path`.
    """

    path: tuple[str, ...] | None
    cuts: tuple[Cut, ...] = ()

    @property
    def is_differentiable(self) -> bool:
        """Tells whether the results depend on the inputs differentiably."""
        return self.path is not None

    @property
    def is_cut(self) -> bool:
        """Tells whether the results depend on the inputs, but only through operators that have no derivative."""
        return self.path is None and bool(self.cuts)

    def __str__(self) -> str:
        if self.path is not None:
            return f"differentiable: {', '.join(self.path) or 'passed on as it is'}"
        return f"only through a cut: {describe_cuts(self.cuts)}" if self.cuts else "no path"


def describe_cuts(cuts: Iterable[Cut]) -> str:
    """Returns the text of cuts, one for each operator and source line."""
    found: dict[Any, list[Cut]] = {}
    for cut in cuts:
        found.setdefault((cut.operator, cut.source), []).append(cut)
    texts = []
    for (name, source), (first, *others) in found.items():
        nodes = f"node {first.node} of {first.program}" + (f" and {len(others)} more" if others else "")
        texts.append(f"`{name}` at {source or 'a line that is not known'} ({nodes})")
    return "; ".join(texts)


class FlowGraph:
    """Several programs as one graph. State that one of them leaves is state that all of them take: steps repeat."""

    def __init__(self, programs: Mapping[str, Program]) -> None:
        self._all = nx.DiGraph()
        self._smooth = nx.DiGraph()
        for name, program in programs.items():
            self._add(name, program)
        for slot in self.results(Role.STATE):
            if ("input", slot) in self._all:
                self._connect(("result", slot), ("input", slot))

    def _add(self, name: str, program: Program) -> None:
        for slot, node in zip(program.inputs, program.placeholders, strict=True):
            self._connect(("input", slot), (name, node.name))
        for node in program.graph.nodes:
            if node.op == "call_function":
                self._add_call(name, node)
        for slot, node in zip(program.results, program.returned, strict=True):
            self._connect((name, node.name), ("result", slot))

    def _connect(self, start: Key, end: Key, *, differentiable: bool = True) -> None:
        self._all.add_edge(start, end)
        if differentiable:
            self._smooth.add_edge(start, end)

    def _add_call(self, name: str, node: fx.Node) -> None:
        called = operator_name(call_of(node).target)
        cut = Cut(called, node.name, name, node.meta.get("source"), is_notable(node))
        self._all.add_node((name, node.name), cut=cut)
        for argument, passage in arguments(node):
            if passage is not Passage.FORM:
                self._connect((name, argument.name), (name, node.name), differentiable=passage is Passage.GRADIENT)

    # ------------------------------------------------------------------ asking

    def inputs(self, *roles: Role) -> list[Slot]:
        """Returns the input slots of some roles."""
        return [slot for kind, slot in self._all if kind == "input" and slot.role in roles]

    def results(self, *roles: Role) -> list[Slot]:
        """Returns the result slots of some roles."""
        return [slot for kind, slot in self._all if kind == "result" and slot.role in roles]

    def reached(self, inputs: Iterable[Slot]) -> set[Slot]:
        """Returns the input slots whose later values depend on some inputs, in whatever way."""
        found = _hops(self._all, [("input", slot) for slot in inputs])
        return {slot for kind, slot in found if kind == "input"}

    def flows(self, inputs: Iterable[Slot], results: Iterable[Slot]) -> dict[Slot, Flow]:
        """Returns how each of some inputs reaches any of some results; cuts only where there is no path."""
        ends = [("result", slot) for slot in results]
        smooth = _hops(self._smooth.reverse(copy=False), ends)
        leading = _hops(self._all.reverse(copy=False), ends)
        found = {}
        for slot in inputs:
            key = ("input", slot)
            found[slot] = Flow(self._follow(smooth, key)) if key in smooth else Flow(None, self._cuts([key], leading))
        return found

    def cuts(self, inputs: Iterable[Slot], results: Iterable[Slot]) -> tuple[Cut, ...]:
        """Returns the operators that end the gradient on any path from some inputs to some results."""
        leading = _hops(self._all.reverse(copy=False), [("result", slot) for slot in results])
        return self._cuts([("input", slot) for slot in inputs], leading)

    def _cuts(self, starts: Iterable[Key], leading: Mapping[Key, Any]) -> tuple[Cut, ...]:
        reached = _hops(self._smooth, starts)
        ends = {end for key in reached for end in self._all.successors(key) if not self._smooth.has_edge(key, end)}
        return tuple(self._all.nodes[key]["cut"] for key in self._all if key in ends and key in leading)

    def _follow(self, hops: Mapping[Key, Key | None], start: Key) -> tuple[str, ...]:
        """Returns the operators between an input and the result that its hops lead to."""
        path = []
        key: Key | None = start
        while key is not None:
            if "cut" in self._all.nodes[key]:
                path.append(self._all.nodes[key]["cut"].operator)
            key = hops[key]
        return tuple(path)


def carried_buffers(program: Program) -> frozenset[str]:
    """Returns the names of the buffers whose new values depend differentiably on parameters, batch or meta."""
    flows = FlowGraph({program.name: program})
    made = [slot for slot in program.results if slot.role is Role.BUFFER]
    inputs = flows.inputs(Role.PARAM, Role.BATCH, Role.META)
    return frozenset(s.path for s in made if any(f.is_differentiable for f in flows.flows(inputs, [s]).values()))


def _hops(graph: nx.DiGraph, starts: Iterable[Key]) -> dict[Key, Key | None]:
    """Searches breadth first; returns the nodes that some nodes lead to, each with the node it was reached from."""
    found: dict[Key, Key | None] = {start: None for start in starts if start in graph}
    queue = deque(found)
    while queue:
        key = queue.popleft()
        for end in graph.successors(key):
            if end not in found:
                found[end] = key
                queue.append(end)
    return found
