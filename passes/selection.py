"""Elements that a mask selects: shapes that depend on values become fixed ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from gimli_compile.metadata import insert_call
from gimli_compile.passes.counted_form import CountedForm
from gimli_compile.passes.liveness import eliminate_dead_code
from gimli_compile.passes.masked_form import MaskedForm, is_whole, keeps_selection, reduction_of
from gimli_compile.passes.redundancy import merge_common_subexpressions
from gimli_compile.program import Program
from gimli_compile.slot import Role, Slot

aten = torch.ops.aten
SELECTING = (aten.index.Tensor, aten.masked_select.default, aten.nonzero.default)
_WRITING = (aten.index_put.default, aten.masked_scatter.default)


def lower_selections(program: Program) -> Program:
    """Gives selections by masks, whose shapes depend on values, fixed shapes.

    Where every use of what a mask selects is element-wise, a reduction, or a write through the same mask, all elements
    are computed and the mask decides which are kept. In place of an element that is not selected stands the first one
    that is, so that it meets no singularity of its own.

        a = aten.index(x, [mask])                      first = <x where the mask is first set>
        b = aten.log(a)                     becomes    log = aten.log(aten.where(mask, x, first))
        x_next = aten.index_put(x, [mask], b)          x_next = aten.where(mask, log, x)

    Elsewhere the selected elements are gathered by position, as many as there were at capture; that there are so many
    is a result of role GUARD, which must be true. Requires functional programs.
    """
    if not any(node.target in SELECTING and node.meta.get("counts") for node in program.graph.nodes):
        return program
    copied = merge_common_subexpressions(_with_plain_masks(program))
    sites = [node for node in copied.graph.nodes if node.target in SELECTING and node.meta.get("counts")]
    guards = _Lowering(copied, sites).run()
    slots = [Slot(Role.GUARD, f"selection.{index}") for index in range(len(guards))]
    copied.output.args = ((*copied.returned, *guards),)
    return eliminate_dead_code(replace(copied, results=(*copied.results, *slots))).tidied()


# ---------------------------------------------------------------------- one way to select and one to write


def _with_plain_masks(program: Program) -> Program:
    """Brings masks to the dtype bool, to at least one dimension, and to the shape of what they select from."""
    copied = program.copy()
    for node in list(copied.graph.nodes):
        if node.target not in (*SELECTING, *_WRITING) or not any(map(_is_mask, node.all_input_nodes)):
            continue
        with copied.graph.inserting_before(node):
            made = _plain(copied.graph, node)
        if made is not node:
            node.replace_all_uses_with(made)
            copied.graph.erase_node(node)
    return copied


def _is_mask(node: fx.Node) -> bool:
    return _val(node).dtype in (torch.bool, torch.uint8)


def _plain(graph: fx.Graph, node: fx.Node) -> fx.Node:
    args: Any = node.args

    def insert(target: Any, *args: Any) -> fx.Node:
        return insert_call(graph, target, args, like=node)

    def is_bool(mask: fx.Node) -> fx.Node:
        return mask if _val(mask).dtype is torch.bool else insert(aten.ne.Scalar, mask, 0)

    if node.target in (aten.masked_select.default, aten.masked_scatter.default):
        shape = torch.broadcast_shapes(_val(args[0]).shape, _val(args[1]).shape) or (1,)
        value, mask = (
            arg if _val(arg).shape == shape else insert(aten.expand.default, arg, list(shape)) for arg in args[:2]
        )
        if node.target is aten.masked_scatter.default:
            made = insert(node.target, value, is_bool(mask), *args[2:])
            return made if _val(args[0]).dim() else insert(aten.reshape.default, made, [])
        return _like_site(graph, node, aten.index.Tensor, (value, [is_bool(mask)]))
    if node.target is aten.nonzero.default:
        return node
    indices = [index if index is None or not _is_mask(index) else is_bool(index) for index in args[1]]
    return _like_site(graph, node, node.target, (args[0], indices, *args[2:]))


def _like_site(graph: fx.Graph, node: fx.Node, target: Any, args: Any) -> fx.Node:
    """Adds a call with the value and all notes of a node: its shape depends on values and cannot be inferred."""
    made = graph.create_node("call_function", target, args, {}, name=target._opname)
    made.meta = dict(node.meta)
    return made


# ---------------------------------------------------------------------- which form


def _val(node: fx.Node) -> torch.Tensor:
    return node.meta["val"]


def _masks_of(node: fx.Node) -> list[fx.Node]:
    """Returns the masks by which a call selects or writes."""
    args: Any = node.args
    if node.target is aten.nonzero.default:
        return [args[0]]
    if node.target is aten.masked_scatter.default:
        return [args[1]]
    return [index for index in args[1] if index is not None and _val(index).dtype is torch.bool]


class _Lowering:
    """Decides on a form for each mask and rewrites the graph."""

    def __init__(self, program: Program, sites: list[fx.Node]) -> None:
        self.graph = program.graph
        self.sites = set(sites)
        self.counts = {
            mask: count for site in sites for mask, count in zip(_masks_of(site), site.meta["counts"], strict=True)
        }
        for node in self.graph.nodes:
            count = _written_count(node)
            if count is not None:
                self.counts.setdefault(_masks_of(node)[0], count)

    def run(self) -> list[fx.Node]:
        """Rewrites the graph; returns the conditions that must be true."""
        counted: set[fx.Node] = set()
        domain, failed = self._follow(counted)
        while failed != counted:
            counted = failed
            domain, failed = self._follow(counted)
        masked, gathered = MaskedForm(self.graph, domain), CountedForm(self.graph, self.counts)
        for node in list(self.graph.nodes):
            inside = any(argument in domain for argument in node.all_input_nodes)
            if node in domain:
                masked.extend(node)
            elif node.target in _WRITING and self._write_form(node, domain) == "masked":
                masked.write(node, _masks_of(node)[0])
            elif inside:
                masked.reduce(node)
            elif node.target is aten.masked_scatter.default and self._write_form(node, domain) == "counted":
                gathered.scatter(node)
            elif node in self.sites or (node.target is aten.index_put.default and counted & set(_masks_of(node))):
                gathered.replace(node, [mask for mask in _masks_of(node) if mask in counted])
        return [*gathered.guards, *masked.guards]

    def _follow(self, counted: set[fx.Node]) -> tuple[dict[fx.Node, fx.Node], set[fx.Node]]:
        """Follows what the masks that are not `counted` select.

        Returns the mask behind each value that is a selection, and the masks that have to be counted as well.
        """
        domain: dict[fx.Node, fx.Node] = {}
        failed = set(counted)
        for node in self.graph.nodes:
            inside = {domain[argument] for argument in node.all_input_nodes if argument in domain}
            if node in self.sites:
                failed |= inside
                (mask, *others) = _masks_of(node)
                if inside or others or mask in failed or not _is_plain_selection(node, mask):
                    failed |= {mask, *others}
                else:
                    domain[node] = mask
            elif node.target in _WRITING:
                if self._write_form(node, domain) == "counted":
                    failed |= inside | set(_masks_of(node))
            elif len(inside) == 1 and keeps_selection(node, domain):
                domain[node] = inside.pop()
            elif inside and (len(inside) > 1 or reduction_of(node, domain) is None):
                failed |= inside
        return domain, failed & set(self.counts)

    def _write_form(self, node: fx.Node, domain: dict[fx.Node, fx.Node]) -> str:
        """Tells how a write is lowered: "masked", "counted", or "as it is"."""
        args: Any = node.args
        inside = {domain[argument] for argument in node.all_input_nodes if argument in domain}
        masks = _masks_of(node)
        whole = len(masks) == 1 and is_whole(node, masks[0])
        if inside:
            return "masked" if whole and inside == set(masks) and not {args[0], masks[0]} & set(domain) else "counted"
        if node.target is aten.masked_scatter.default:
            return "as it is" if _val(args[2]).numel() >= _val(args[0]).numel() else "counted"
        if whole and _val(args[2]).dim() <= _val(args[0]).dim() - _val(masks[0]).dim():
            return "masked"
        return "as it is" if _written_count(node) is None else "counted"


def _written_count(node: fx.Node) -> int | None:
    """Returns how many elements a write expects its mask to have; None if it takes any number."""
    args: Any = node.args
    if node.target is not aten.index_put.default:
        return None
    masks = _masks_of(node)
    if len(masks) != 1 or not is_whole(node, masks[0]):
        return None
    shape = _val(args[2]).shape
    one_each = len(shape) == _val(args[0]).dim() - _val(masks[0]).dim() + 1
    return shape[0] if one_each and shape[0] != 1 else None


def _is_plain_selection(node: fx.Node, mask: fx.Node) -> bool:
    """Tells whether a call is `x[mask]` and nothing differentiates it by rules that know the number of elements."""
    return node.target is aten.index.Tensor and is_whole(node, mask) and not node.meta.get("differentiated", False)
