"""What a drawing of a program shows: cards of inputs, of operators by source line, and of results, and their places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from torch import fx

from gimli_compile.layered_layout import Box, Port, Segment, Wire, place
from gimli_compile.metadata import operator_name
from gimli_compile.printing import describe, format_call
from gimli_compile.provenance import SourceLine
from gimli_compile.slot import Role, Slot

if TYPE_CHECKING:
    from gimli_compile.program import Program

ROW_HEIGHT = 17.0
HEADING_HEIGHT = 31.0
PADDING = 5.0
_CHARACTER = 6.7
_SMALL_CHARACTER = 5.8
_MOST_CHARACTERS = 36
_MOST_DETAIL = 24
_MOST_ROWS = 10
_NEAR = 5
_INPUT_GAP = 30.0
_OPERATOR_GAP = 52.0
OPERATORS = "operators"


@dataclass(frozen=True)
class Row:
    """One line of a card: a node or a result, what it says, the form of its value, and its line of the program."""

    name: str
    text: str
    detail: str
    tooltip: str


@dataclass(eq=False)
class Card:
    """A box with rows. `kind` is a role, or "operators"; operators have the source line as heading."""

    kind: str
    heading: tuple[str, ...]
    rows: list[Row]
    box: Box

    def port(self, index: int) -> Port:
        """Returns the point at the height of a row."""
        return Port(self.box, self.top(index) + ROW_HEIGHT / 2)

    def top(self, index: int) -> float:
        """Returns how far below the top of the card a row starts."""
        return PADDING + (HEADING_HEIGHT if self.heading else 0.0) + index * ROW_HEIGHT


@dataclass(frozen=True)
class Picture:
    """A placed drawing. `arcs` are the wires within a card: the card, and the positions of two of its rows."""

    cards: Sequence[Card]
    segments: Sequence[Segment]
    arcs: Sequence[tuple[Card, int, int]]
    kinds: Mapping[str, str]

    @property
    def width(self) -> float:
        """The width of the drawing."""
        return max((card.box.x + card.box.width for card in self.cards), default=0.0)

    @property
    def height(self) -> float:
        """The height of the drawing."""
        return max((card.box.y + card.box.height for card in self.cards), default=0.0)


def draw_picture(program: Program) -> Picture:
    """Lays a program out: inputs in columns by role, then operators by data flow, and results at the right."""
    inputs = {node: _input_card(slot, node) for slot, node in zip(program.inputs, program.placeholders, strict=True)}
    operators = [_operator_card(run) for run in _runs(program)]
    results = [_result_card(slot, node) for slot, node in zip(program.results, program.returned, strict=True)]
    places = {node: (card, 0) for node, card in inputs.items()}
    by_name = {row.name: (card, index) for card in operators for index, row in enumerate(card.rows)}
    places.update({node: by_name[node.name] for node in program.graph.nodes if node.op == "call_function"})
    wires, arcs = _connect(program, places, results)
    _assign_columns(list(inputs.values()), operators, results, wires)
    cards = [*inputs.values(), *operators, *results]
    segments = place([card.box for card in cards], wires)
    kinds = {row.name: card.kind for card in cards for row in card.rows}
    return Picture(cards, segments, arcs, kinds)


def result_name(slot: Slot) -> str:
    """Returns the name of a result in drawings and networkx graphs, where a node may be several results."""
    return f"return {slot}"


# ---------------------------------------------------------------------- cards


def _runs(program: Program) -> Iterator[list[fx.Node]]:
    """Yields the operators in runs from one source line each, none of them long."""
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    for _, group in groupby(calls, key=lambda node: node.meta.get("source")):
        run = list(group)
        for start in range(0, len(run), _MOST_ROWS):
            yield run[start : start + _MOST_ROWS]


def _operator_card(run: Sequence[fx.Node]) -> Card:
    rows = [Row(node.name, _call_text(node), describe(node), f"{node.name} = {format_call(node)}") for node in run]
    return _card(OPERATORS, _heading(run[0].meta.get("source")), rows)


def _call_text(node: fx.Node) -> str:
    """Returns the operator with those of its arguments that are no nodes and no part of the value's form."""
    shown = [_shorten(str(value), 8) for value in node.args if isinstance(value, (bool, int, float))]
    shown += [f"{key}={value}" for key, value in node.kwargs.items() if isinstance(value, (bool, int, float)) and value]
    return " ".join([operator_name(node.target), *shown])


def _heading(source: SourceLine | None) -> tuple[str, ...]:
    if source is None:
        return ("no source line", "")
    return (source.code, f"{source.file.rsplit('/', 1)[-1]}:{source.line} in {source.function}")


def _input_card(slot: Slot, node: fx.Node) -> Card:
    return _card(slot.role.value, (), [Row(node.name, slot.path or slot.role.value, describe(node), node.name)])


def _result_card(slot: Slot, node: fx.Node) -> Card:
    text = (slot.path or slot.role.value) + ("'" if slot.name != slot.result_name else "")
    return _card(slot.role.value, (), [Row(result_name(slot), text, describe(node), f"{slot}, which is {node.name}")])


def _card(kind: str, heading: tuple[str, ...], rows: Sequence[Row]) -> Card:
    kept = [Row(r.name, _shorten(r.text, _MOST_CHARACTERS), _shorten(r.detail, _MOST_DETAIL), r.tooltip) for r in rows]
    lines = tuple(_shorten(line, _MOST_CHARACTERS + 4) for line in heading)
    width = max(len(row.text) + len(row.detail) + 2 for row in kept) * _CHARACTER
    width = max([width, *(len(line) * _SMALL_CHARACTER for line in lines)]) + 2 * PADDING + 8
    height = len(kept) * ROW_HEIGHT + (HEADING_HEIGHT if heading else 0.0) + 2 * PADDING
    gap = _OPERATOR_GAP if heading else _INPUT_GAP
    return Card(kind, lines, kept, Box((kind, kept[0].name), width, height, 0, gap))


def _shorten(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}\N{HORIZONTAL ELLIPSIS}"


# ---------------------------------------------------------------------- wires and columns


def _connect(
    program: Program, places: Mapping[fx.Node, tuple[Card, int]], results: Sequence[Card]
) -> tuple[list[Wire], list[tuple[Card, int, int]]]:
    """Returns a wire for each node whose value leaves its card, and the arcs within cards."""
    wires: list[Wire] = []
    arcs: list[tuple[Card, int, int]] = []
    for node, (card, index) in places.items():
        wire = Wire(node.name, card.port(index))
        for user in node.users:
            if user.op == "call_function":
                other, at = places[user]
                if other is card:
                    arcs.append((card, index, at))
                else:
                    wire.ends.append((user.name, other.port(at)))
        wire.ends += [(c.rows[0].name, c.port(0)) for c, n in zip(results, program.returned, strict=True) if n is node]
        if wire.ends:
            wires.append(wire)
    return wires, arcs


def _assign_columns(
    inputs: Sequence[Card], operators: Sequence[Card], results: Sequence[Card], wires: Sequence[Wire]
) -> None:
    """Gives every card its column: the inputs of one role have one of their own, before the operators that use them."""
    depth = _depths([card.box for card in operators], wires)
    roles = [role.value for role in Role if any(card.kind == role.value for card in inputs)]
    first = {role: _first_use([c.box for c in inputs if c.kind == role], depth, wires) for role in roles}
    columns: dict[Any, int] = {}
    for level in range(max(depth.values(), default=-1) + 1):
        for role in roles:
            if first[role] == level:
                columns[role] = len(columns)
        columns[level] = len(columns)
    for role in roles:
        columns.setdefault(role, len(columns))
    for card in inputs:
        card.box.layer = columns[card.kind]
    for card in operators:
        card.box.layer = columns[depth[card.box]]
    for card in results:
        card.box.layer = len(columns)


def _first_use(boxes: Sequence[Box], depth: Mapping[Box, int], wires: Sequence[Wire]) -> int:
    """Returns the depth before which a column of inputs stands: the leftmost, unless they are used far from it only."""
    used = [depth[p.box] for wire in wires if wire.start.box in boxes for _, p in wire.ends if p.box in depth]
    earliest = min(used, default=0)
    return 0 if earliest <= _NEAR else earliest


def _depths(boxes: Sequence[Box], wires: Sequence[Wire]) -> dict[Box, int]:
    """Returns how deep each card of operators lies: as early as it can, or later where that shortens the wires."""
    links = [(w.start.box, p.box) for w in wires for _, p in w.ends]
    before: dict[Box, list[Box]] = {box: [] for box in boxes}
    after: dict[Box, list[Box]] = {box: [] for box in boxes}
    for start, end in links:
        if start in before and end in before:
            before[end].append(start)
            after[start].append(end)
    depth: dict[Box, int] = {}
    for box in boxes:
        depth[box] = max((depth[other] + 1 for other in before[box]), default=0)
    for box in reversed(boxes):
        if after[box] and len(set(after[box])) >= len(set(before[box])):
            depth[box] = min(depth[other] for other in after[box]) - 1
    return depth
