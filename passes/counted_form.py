"""Selections as the captured number of elements, gathered by position."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from gimli_compile.metadata import insert_call
from gimli_compile.passes.masked_form import become

aten = torch.ops.aten


class CountedForm:
    """Builds the counted forms in a graph. `counts` tells how many elements each mask selected at capture."""

    def __init__(self, graph: fx.Graph, counts: Mapping[fx.Node, int]) -> None:
        self.graph = graph
        self.counts = counts
        self.guards: list[fx.Node] = []
        self._known: dict[fx.Node, list[fx.Node]] = {}

    def replace(self, node: fx.Node, masks: list[fx.Node]) -> None:
        """Replaces the masks of a call by the positions at which they are set."""
        args: Any = node.args
        for mask in masks:
            self._find(mask, node)
        with self.graph.inserting_before(node):
            if node.target is aten.nonzero.default:
                made = self._insert(aten.stack.default, (self._known[args[0]], 1), node)
            else:
                indices = []
                for index in args[1]:
                    indices += self._known[index] if index in masks else [index]
                made = self._insert(node.target, (args[0], indices, *args[2:]), node)
        become(self.graph, node, made)

    def scatter(self, node: fx.Node) -> None:
        """Replaces a write of as many leading values as a mask has set: zeros follow them, so that it cannot fail."""
        args: Any = node.args
        target, mask, source = args
        with self.graph.inserting_before(node):
            total = self._insert(aten.sum.default, (mask,), node)
            self.guards.append(self._insert(aten.le.Scalar, (total, source.meta["val"].numel()), node))
            flat = self._insert(aten.reshape.default, (source, [-1]), node)
            zeros = self._insert(aten.zeros_like.default, (target,), node)
            rest = self._insert(aten.reshape.default, (zeros, [-1]), node)
            values = self._insert(aten.cat.default, ([flat, rest],), node)
            made = self._insert(aten.masked_scatter.default, (target, mask, values), node)
        become(self.graph, node, made)

    def _find(self, mask: fx.Node, like: fx.Node) -> None:
        """Adds, for each dimension of a mask, the positions at which it is set, and the condition on their number."""
        if mask in self._known:
            return
        with self.graph.inserting_before(like):
            chosen = mask
            if mask.meta["val"].dtype is not torch.bool:
                chosen = self._insert(aten.ne.Scalar, (mask, 0), like)
            total = self._insert(aten.sum.default, (chosen,), like)
            self.guards.append(self._insert(aten.eq.Scalar, (total, self.counts[mask]), like))
            flat = self._insert(aten.reshape.default, (chosen, [-1]), like)
            number = self._insert(aten._to_copy.default, (flat,), like, dtype=torch.uint8)
            ordered = self._insert(aten.sort.stable, (number,), like, stable=True, dim=0, descending=True)
            order = self._insert(operator.getitem, (ordered, 1), like)
            place = self._insert(aten.slice.Tensor, (order, 0, 0, self.counts[mask]), like)
            self._known[mask] = self._unravel(place, mask, like)

    def _unravel(self, place: fx.Node, mask: fx.Node, like: fx.Node) -> list[fx.Node]:
        """Returns the positions in each dimension from those in the flattened mask."""
        found: list[fx.Node] = []
        for size in reversed(mask.meta["val"].shape[1:]):
            found.append(self._insert(aten.remainder.Scalar, (place, size), like))
            place = self._insert(aten.div.Tensor_mode, (place, size), like, rounding_mode="floor")
        return [place, *reversed(found)]

    def _insert(self, target: Any, args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        return insert_call(self.graph, target, args, kwargs, like=like)
