"""Values that a step finds by search: bisection and its kin, which ask for a sign and never use what they asked about.

A condition is recorded with its outcome, and so a search becomes the arithmetic of the way that it took. In that, what
it found is as good as a constant: it stays until a condition turns, and then it jumps by the width of the search. The
program has the derivative of that staircase, as the live code has it between two jumps; differences over more than the
width of the search see the slope of the solution. Which of the two is wanted nobody can tell, so that it is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import fx

from gimli_compile.findings import Baked
from gimli_compile.program import Program
from gimli_compile.provenance import SourceLine
from gimli_compile.slot import Slot

# Eight answers choose one of 256 values: less than the part of a percent by which an outer loop moves anything.
LEAST_DECISIONS = 8
_LEAST_TURNS = 2  # a loop that ends when a condition turns has one turn: it iterates
_PARTS = {"select", "slice", "getitem", "unbind", "split", "narrow"}
_SIGNS = {"abs", "neg"}


class Search(Baked):
    """What a step found by search, and the line that decided."""


@dataclass(frozen=True)
class Decision:
    """A condition that a line asked for: the 0-dim node that computes it, and what it was."""

    node: fx.Node
    outcome: bool
    line: SourceLine


def find_search(
    program: Program, conditions: Iterable[tuple[Slot, bool]], lines: Mapping[Slot, SourceLine | None]
) -> tuple[Search, ...]:
    """Returns the search with the most decisions in a program, if there is one.

    A search is a line whose condition was decided at least eight times about the same values, one way and the other,
    while nothing but the answers reaches the later questions. A threshold that each parameter or element is held
    against asks about different values; a loop until convergence has the same answer until the last; Newton's method
    and interpolating line searches compute with the values that they ask about, and so have their derivatives.
    """
    place = {node: index for index, node in enumerate(program.graph.nodes)}
    asked: dict[SourceLine, list[Decision]] = {}
    for slot, outcome in conditions:
        line, node = lines.get(slot), program.result_of(slot)
        if line is not None and all(known.node is not node for known in asked.get(line, ())[-1:]):
            asked.setdefault(line, []).append(Decision(node, outcome, line))
    counts = {line: sum(map(len, _searches(found, place))) for line, found in asked.items() if _is_long(found)}
    line = max(counts, key=counts.__getitem__, default=None)
    return () if line is None or not counts[line] else (_said(counts[line], line),)


def _is_long(decisions: Sequence[Decision]) -> bool:
    turns = sum(before.outcome is not after.outcome for before, after in pairwise(decisions))
    return len(decisions) >= LEAST_DECISIONS and turns >= _LEAST_TURNS


def _searches(decisions: list[Decision], place: Mapping[fx.Node, int]) -> Iterator[list[Decision]]:
    """Yields those decisions of a line that belong together, where they make a search."""
    start = min(place[decision.node] for decision in decisions)
    together: dict[frozenset[object], list[tuple[Decision, set[fx.Node]]]] = {}
    for decision in decisions:
        values, inner = _origin(decision.node, start, place)
        together.setdefault(values, []).append((decision, inner))
    for group in together.values():
        used: set[fx.Node] = set()
        found = []
        for decision, inner in reversed(group):
            if not _asked_about(decision.node) & used:
                found.append(decision)
            used |= inner
        if _is_long(found):
            yield found


def _origin(node: fx.Node, start: int, place: Mapping[fx.Node, int]) -> tuple[frozenset[object], set[fx.Node]]:
    """Returns from which values, older than the node at `start`, or parts of what, a node follows; and through what."""
    values: set[object] = set()
    inner: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        now = waiting.pop()
        if now in inner:
            continue
        if place[now] < start:
            values.add(now)
            continue
        inner.add(now)
        if _is_part(now):
            whole, way = _origin(now.all_input_nodes[0], start, place)
            values.add((now.target, str(now.args[1:]), whole))
            inner |= way
        else:
            waiting += now.all_input_nodes
    return frozenset(values), inner


def _is_part(node: fx.Node) -> bool:
    return getattr(node.target, "_opname", getattr(node.target, "__name__", "")) in _PARTS


def _asked_about(node: fx.Node) -> set[fx.Node]:
    """Returns what a condition compares, with and without its sign."""
    found = set(node.all_input_nodes)
    signed = [source for source in found if getattr(source.target, "_opname", "") in _SIGNS]
    return found.union(*(source.all_input_nodes for source in signed))


def _said(count: int, line: SourceLine) -> Search:
    return Search(
        f"a value is found by a search: this line decided {count} times in one step, each time about what its earlier "
        "answers had left. The program differentiates the arithmetic that ran, in which what was found is a constant: "
        "it is exact between the jumps of the live code, which are as wide as the search is tolerant, and it is not "
        "the derivative of the solution. For that, let one step of Newton's method follow the search, "
        "`x = x - f(x) / slope`, or write the solution with tensor operators.",
        line,
    )
