"""Writes a placed picture as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from gimli_compile.layered_layout import Segment
from gimli_compile.picture import HEADING_HEIGHT, PADDING, ROW_HEIGHT, Card, Picture
from gimli_compile.slot import Role

_MARGIN = 24.0
_TITLES = 26.0
COLORS = {
    Role.PARAM: "#1d4ed8",
    Role.BUFFER: "#0f766e",
    Role.GRAD: "#b91c1c",
    Role.ROWS: "#b91c1c",
    Role.HELD: "#b91c1c",
    Role.HELD_ROWS: "#b91c1c",
    Role.STATE: "#15803d",
    Role.HYPER: "#b45309",
    Role.BATCH: "#6d28d9",
    Role.META: "#be185d",
    Role.NOISE: "#475569",
    Role.CONSTANT: "#64748b",
    Role.LOSS: "#b91c1c",
    Role.OUTPUT: "#0f172a",
    Role.GUARD: "#475569",
}
_STYLE = """
.gimli { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: 11px; }
.gimli .title { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; font-size: 13px; font-weight: 600; }
.gimli .card > rect { fill: #ffffff; stroke: #cbd5e1; }
.gimli .heading { fill: #334155; font-size: 9.5px; }
.gimli .place { fill: #94a3b8; font-size: 9px; }
.gimli .row rect { fill: transparent; }
.gimli .row text { fill: #0f172a; }
.gimli .row .detail { fill: #94a3b8; font-size: 10px; }
.gimli .row:hover rect, .gimli .row.on rect { fill: #fde68a; }
.gimli .row.near rect { fill: #fef3c7; }
.gimli .wire { fill: none; stroke: #94a3b8; stroke-width: 1.2; stroke-opacity: 0.85; }
"""


def render_svg(picture: Picture) -> str:
    """Returns a self-contained SVG document."""
    width, height = picture.width + 2 * _MARGIN, picture.height + 2 * _MARGIN + _TITLES
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    colors = "".join(map(_color_rules, COLORS))
    marked = ".gimli .wire.on { stroke-width: 2.6; stroke-opacity: 1; } .gimli .wire.operators.on { stroke: #334155; }"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="gimli" {size}>',
        f"<style>{_STYLE}{colors}{marked}</style>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#f8fafc"/>',
        f'<g transform="translate({_MARGIN:.0f} {_MARGIN + _TITLES:.0f})">',
        *_titles(picture),
        *(_wire(segment, picture) for segment in picture.segments),
        *(_arc(card, start, end) for card, start, end in picture.arcs),
        *(line for card in picture.cards for line in _card(card)),
        "</g>",
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _color_rules(role: Role) -> str:
    bar = f".gimli .{role.value} .bar {{ fill: {COLORS[role]}; }}"
    return f"{bar} .gimli .wire.{role.value} {{ stroke: {COLORS[role]}; stroke-opacity: 0.5; }}\n"


def _titles(picture: Picture) -> Iterator[str]:
    """Yields the titles of the columns of inputs and of the column of results."""
    last = max((card.box.layer for card in picture.cards), default=0)
    titles = {card.box.layer: (card.box.x, card.kind) for card in picture.cards if not card.heading}
    for layer, (x, kind) in titles.items():
        text = "results" if layer == last else kind
        color = "#0f172a" if layer == last else COLORS[Role(kind)]
        yield f'<text class="title" x="{x:.1f}" y="-14" fill="{color}">{text}</text>'


def _wire(segment: Segment, picture: Picture) -> str:
    start, end = segment.start, segment.end
    x, y = start.box.x + start.box.width, start.y
    bend = (end.box.x - x) / 2
    path = f"M{x:.1f} {y:.1f}C{x + bend:.1f} {y:.1f} {end.box.x - bend:.1f} {end.y:.1f} {end.box.x:.1f} {end.y:.1f}"
    if end.box.is_via:
        path += f"H{end.box.x + end.box.width:.1f}"
    return _path(path, picture.kinds[segment.wire.name], segment.wire.name, segment.ends)


def _arc(card: Card, start: int, end: int) -> str:
    """Joins two rows of one card at its right side."""
    x = card.box.x + card.box.width
    first, last = card.port(start).y, card.port(end).y
    reach = x + 6 + 4 * min(end - start, 6)
    path = f"M{x:.1f} {first:.1f}C{reach:.1f} {first:.1f} {reach:.1f} {last:.1f} {x:.1f} {last:.1f}"
    return _path(path, card.kind, card.rows[start].name, (card.rows[end].name,))


def _path(path: str, kind: str, start: str, ends: tuple[str, ...]) -> str:
    names = escape("|".join(ends), quote=True)
    return f'<path class="wire {kind}" data-from="{escape(start, quote=True)}" data-to="{names}" d="{path}"/>'


def _card(card: Card) -> Iterator[str]:
    box = card.box
    yield f'<g class="card {card.kind}" transform="translate({box.x:.1f} {box.y:.1f})">'
    yield f'<rect width="{box.width:.1f}" height="{box.height:.1f}" rx="5"/>'
    if not card.heading:
        yield f'<rect class="bar" width="4" height="{box.height:.1f}" rx="2"/>'
    for line, style, y in zip(card.heading, ("heading", "place"), (15.0, 27.0), strict=False):
        yield f'<text class="{style}" x="8" y="{y:.1f}">{escape(line)}</text>'
    if card.heading:
        y = HEADING_HEIGHT + PADDING - 2
        yield f'<path d="M0 {y:.1f}H{box.width:.1f}" stroke="#e2e8f0"/>'
    for index, row in enumerate(card.rows):
        top = card.top(index)
        yield f'<g class="row" data-node="{escape(row.name, quote=True)}"><title>{escape(row.tooltip)}</title>'
        yield f'<rect x="1" y="{top:.1f}" width="{box.width - 2:.1f}" height="{ROW_HEIGHT:.1f}" rx="3"/>'
        yield f'<text x="9" y="{top + 12.5:.1f}">{escape(row.text)}</text>'
        yield (
            f'<text class="detail" x="{box.width - 7:.1f}" y="{top + 12.5:.1f}" text-anchor="end">{escape(row.detail)}'
            "</text></g>"
        )
    yield "</g>"
