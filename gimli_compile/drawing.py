"""Programs as networkx graphs, SVG drawings and HTML pages."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
from torch import fx

from gimli_compile.drawing_page import render_page
from gimli_compile.picture import draw_picture, result_name
from gimli_compile.printing import describe, format_call
from gimli_compile.svg_rendering import render_svg

if TYPE_CHECKING:
    from gimli_compile.program import Program


def to_networkx(program: Program) -> nx.DiGraph:
    """Returns a program's data flow as a directed graph.

    Nodes are named as in the printed program, and results `return <slot>`. Their attributes are texts: `kind` (input,
    operator or result), `target`, `form` (dtype and shape), `source` (the line that an operator came from), `slot` (of
    inputs and results) and `text` (the line of the program). An edge's `argument` tells which arguments it is.
    """
    graph = nx.DiGraph(name=program.title)
    for slot, node in zip(program.inputs, program.placeholders, strict=True):
        graph.add_node(node.name, **_attributes("input", node, slot=str(slot)))
    for node in program.graph.nodes:
        if node.op == "call_function":
            call = format_call(node)
            target = "getitem" if node.target is operator.getitem else call.partition("(")[0]
            graph.add_node(node.name, **_attributes("operator", node, target=target, text=f"{node.name} = {call}"))
            for argument, positions in _positions(node).items():
                graph.add_edge(argument.name, node.name, argument=", ".join(positions))
    for slot, node in zip(program.results, program.returned, strict=True):
        graph.add_node(result_name(slot), **_attributes("result", node, slot=str(slot), text=f"return {node.name}"))
        graph.add_edge(node.name, result_name(slot), argument="0")
    return graph


def _attributes(kind: str, node: fx.Node, *, target: str = "", slot: str = "", text: str = "") -> dict[str, str]:
    source = node.meta.get("source") if kind == "operator" else None
    return {
        "kind": kind,
        "target": target,
        "form": describe(node),
        "source": "" if source is None else str(source),
        "slot": slot,
        "text": text or node.name,
    }


def _positions(node: fx.Node) -> dict[fx.Node, list[str]]:
    """Returns the positions and keywords at which a call takes each of its node arguments."""
    found: dict[fx.Node, list[str]] = {}
    arguments: list[tuple[str, Any]] = [(str(index), value) for index, value in enumerate(node.args)]
    for position, value in [*arguments, *node.kwargs.items()]:
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(item, fx.Node):
                found.setdefault(item, []).append(position)
    return found


def save_svg(program: Program, path: str | os.PathLike[str]) -> None:
    """Draws a program's data flow into an SVG file."""
    Path(path).write_text(render_svg(draw_picture(program)), encoding="utf-8")


def save_html(program: Program, path: str | os.PathLike[str]) -> None:
    """Writes a page with the drawing of a program beside its text; pointing at a node marks it in both."""
    svg = render_svg(draw_picture(program))
    names = {node.name for node in program.graph.nodes if node.op != "output"}
    Path(path).write_text(render_page(program.title, svg, program.code, names), encoding="utf-8")
