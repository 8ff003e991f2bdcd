"""A layered layout: boxes in columns from left to right, wires between them that keep clear of the boxes."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

_SWEEPS = 12
_VIA_HEIGHT = 7.0
_STRAIGHTNESS = {0: 1.0, 1: 2.0, 2: 8.0}


@dataclass(eq=False)
class Box:
    """A rectangle of a given size in a given column; `x` and `y` are its upper left corner, found by `place`.

    `gap` is the room for wires that the box asks for between its column and the next.
    """

    key: Hashable
    width: float
    height: float
    layer: int
    gap: float = 0.0
    x: float = 0.0
    y: float = 0.0
    is_via: bool = False


@dataclass(frozen=True)
class Port:
    """A point at the side of a box: the box, and how far below its top."""

    box: Box
    offset: float

    @property
    def y(self) -> float:
        """The height of the point."""
        return self.box.y + self.offset


@dataclass
class Wire:
    """A value: the port that it leaves from and, by name, the ports that it goes to, all of them in later columns."""

    name: str
    start: Port
    ends: list[tuple[str, Port]] = field(default_factory=list)


@dataclass(frozen=True)
class Segment:
    """A part of a wire between two neighbouring columns, and the names of the ends that lie beyond it."""

    wire: Wire
    start: Port
    end: Port
    ends: tuple[str, ...]

    @property
    def weight(self) -> float:
        """How much it matters that the segment is level: most between two points of one long wire."""
        return _STRAIGHTNESS[self.start.box.is_via + self.end.box.is_via]


def place(boxes: Sequence[Box], wires: Sequence[Wire], *, row_gap: float = 13.0) -> list[Segment]:
    """Places the boxes and returns the segments of the wires; the drawing starts at (0, 0)."""
    segments = [segment for wire in wires for segment in _route(wire)]
    vias = dict.fromkeys(port.box for segment in segments for port in (segment.start, segment.end) if port.box.is_via)
    layers = _layers([*boxes, *vias])
    _order(layers, segments)
    _set_columns(layers)
    _set_rows(layers, segments, row_gap)
    return segments


def _route(wire: Wire) -> list[Segment]:
    """Leads a wire through one point in each column that it crosses; ends share what they can."""
    segments: list[Segment] = []
    here = wire.start
    last = max((port.box.layer for _, port in wire.ends), default=here.box.layer)
    for layer in range(wire.start.box.layer + 1, last + 1):
        segments += [Segment(wire, here, port, (name,)) for name, port in wire.ends if port.box.layer == layer]
        beyond = tuple(name for name, port in wire.ends if port.box.layer > layer)
        if beyond:
            via = Port(Box((wire.name, layer), 0.0, _VIA_HEIGHT, layer, is_via=True), _VIA_HEIGHT / 2)
            segments.append(Segment(wire, here, via, beyond))
            here = via
    return segments


def _layers(boxes: Sequence[Box]) -> list[list[Box]]:
    layers: list[list[Box]] = [[] for _ in range(max((box.layer for box in boxes), default=-1) + 1)]
    for box in boxes:
        layers[box.layer].append(box)
    return layers


# ---------------------------------------------------------------------- order within columns

_Links = dict[Box, list[tuple[Box, float, float]]]


def _links(segments: Sequence[Segment], *, backwards: bool) -> _Links:
    """Returns the neighbours of each box in the column before it (after it, if `backwards`).

    Each comes with how much lower the box's top is than the neighbour's where the segment is level, and its weight.
    """
    found: _Links = {}
    for segment in segments:
        box, neighbour = (segment.start, segment.end) if backwards else (segment.end, segment.start)
        found.setdefault(box.box, []).append((neighbour.box, neighbour.offset - box.offset, segment.weight))
    return found


def _order(layers: list[list[Box]], segments: Sequence[Segment]) -> None:
    """Orders the boxes of each column by where their neighbours are, sweeping to and fro; keeps the best order."""
    before, after = _links(segments, backwards=False), _links(segments, backwards=True)
    ranks = {box: index / len(layer) for layer in layers for index, box in enumerate(layer)}
    best, fewest = [list(layer) for layer in layers], _count_crossings(ranks, segments)
    for sweep in range(_SWEEPS):
        for layer in reversed(layers) if sweep % 2 else layers:
            _sort(layer, after if sweep % 2 else before, ranks)
        crossings = _count_crossings(ranks, segments)
        if crossings < fewest:
            best, fewest = [list(layer) for layer in layers], crossings
    for layer, order in zip(layers, best, strict=True):
        layer[:] = order


def _sort(layer: list[Box], links: _Links, ranks: dict[Box, float]) -> None:
    """Sorts one column by the mean rank of the neighbours; ranks run from 0 to 1 in every column."""

    def center(box: Box) -> float:
        near = [ranks[neighbour] for neighbour, _, _ in links.get(box, ())]
        return sum(near) / len(near) if near else ranks[box]

    layer.sort(key=center)
    ranks.update((box, index / len(layer)) for index, box in enumerate(layer))


def _count_crossings(ranks: dict[Box, float], segments: Sequence[Segment]) -> int:
    """Returns the number of pairs of segments between the same two columns that cross."""
    columns: dict[int, list[tuple[float, float]]] = {}
    for segment in segments:
        pair = (ranks[segment.start.box], ranks[segment.end.box])
        columns.setdefault(segment.start.box.layer, []).append(pair)
    crossings = 0
    for pairs in columns.values():
        seen: list[float] = []
        for _, end in sorted(pairs):
            crossings += len(seen) - bisect_right(seen, end)
            insort(seen, end)
    return crossings


# ---------------------------------------------------------------------- places


def _set_columns(layers: Sequence[Sequence[Box]]) -> None:
    x = 0.0
    for layer in layers:
        width = max((box.width for box in layer), default=0.0)
        for box in layer:
            box.x = x
            if box.is_via:
                box.width = width
        x += width + max((box.gap for box in layer), default=0.0)


def _set_rows(layers: Sequence[Sequence[Box]], segments: Sequence[Segment], gap: float) -> None:
    """Moves the boxes of each column towards their neighbours, as far as their order and their heights allow."""
    before, after = _links(segments, backwards=False), _links(segments, backwards=True)
    both = {box: before.get(box, []) + after.get(box, []) for layer in layers for box in layer}
    for layer in layers:
        _settle(layer, {}, gap)
    for sweep in range(_SWEEPS):
        for layer in reversed(layers) if sweep % 2 else layers:
            _settle(layer, after if sweep % 2 else before, gap)
    for layer in [*layers, *reversed(layers)]:
        _settle(layer, both, gap)
    top = min((box.y for layer in layers for box in layer), default=0.0)
    for layer in layers:
        for box in layer:
            box.y -= top


def _settle(layer: Sequence[Box], links: _Links, gap: float) -> None:
    """Gives the boxes of one column the heights nearest to where they want to be, in their order and without overlap.

    This is isotonic regression, by pooling neighbours that want to overlap.
    """
    offsets, total = [], 0.0
    for box in layer:
        offsets.append(total)
        total += box.height + (gap / 3 if box.is_via else gap)
    pools: list[list[float]] = []
    for box, offset in zip(layer, offsets, strict=True):
        wish, weight = _wish(box, links)
        pools.append([wish - offset, weight, 1])
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            value, weight, count = pools.pop()
            last = pools[-1]
            last[0] = (last[0] * last[1] + value * weight) / (last[1] + weight)
            last[1], last[2] = last[1] + weight, last[2] + count
    values = [value for value, _, count in pools for _ in range(int(count))]
    for box, offset, value in zip(layer, offsets, values, strict=True):
        box.y = value + offset


def _wish(box: Box, links: _Links) -> tuple[float, float]:
    """Returns the height at which a box would be level with its neighbours, and how much that matters."""
    near = links.get(box, ())
    total = sum(weight for _, _, weight in near)
    if not total:
        return box.y, 0.01
    return sum((neighbour.y + shift) * weight for neighbour, shift, weight in near) / total, total
