"""Selections as all elements and a mask: operators apply to every element, and the mask decides what counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gimli_compile.metadata import insert_call

aten = torch.ops.aten
_ALIKE = {
    "_to_copy", "alias", "copy", "detach", "empty_like", "fill", "full_like", "lift_fresh_copy", "masked_fill",
    "ones_like", "zero", "zeros_like",
}  # fmt: skip
_FLATTENING = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_NEUTRAL = {
    "sum": 0, "nansum": 0, "mean": 0, "prod": 1, "any": False, "all": True, "count_nonzero": 0,
    "max": -math.inf, "amax": -math.inf, "min": math.inf, "amin": math.inf,
    "norm": 0, "linalg_vector_norm": 0,
}  # fmt: skip
_WITHOUT_EMPTY = {"max", "amax", "min", "amin"}


def _val(node: fx.Node) -> Any:
    return node.meta["val"]


def is_whole(node: fx.Node, mask: fx.Node) -> bool:
    """Tells whether a call selects from, or writes to, a tensor by this mask of its leading dimensions alone."""
    args: Any = node.args
    if not isinstance(args[1], fx.Node) and len(args[1]) != 1:
        return False
    shape = _val(mask).shape
    return 0 < len(shape) and shape == _val(args[0]).shape[: len(shape)]


def is_elementwise(target: Any) -> bool:
    """Tells whether an operator, in place or not, gives each element from those at the same place."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or target._opname.removesuffix("_") in _ALIKE


def is_reduction(target: Any) -> bool:
    """Tells whether an operator is a reduction that may have a masked form."""
    return isinstance(target, torch._ops.OpOverload) and target._opname in _NEUTRAL


def keeps_selection(node: fx.Node, domain: Mapping[fx.Node, fx.Node]) -> bool:
    """Tells whether a call on selections of one mask gives a selection of it: an element-wise operator does.

    An argument that is no selection must not depend on how many elements there are.
    """
    target: Any = node.target
    if not isinstance(target, torch._ops.OpOverload) or not isinstance(_val(node), torch.Tensor):
        return False
    if target in _FLATTENING:
        return _val(node).dim() == 1 and _val(node.all_input_nodes[0]).shape == _val(node).shape
    reduction = reduction_of(node, domain)
    if reduction is not None:
        return not reduction.over_elements
    return is_elementwise(target) and all(
        _fits(argument, _val(node).shape, domain) for argument in node.all_input_nodes
    )


def _fits(argument: fx.Node, shape: torch.Size, domain: Mapping[fx.Node, fx.Node]) -> bool:
    own = _val(argument).shape
    if argument in domain:
        return len(own) == len(shape) and own[0] == shape[0]
    return len(own) < len(shape) or (len(own) == len(shape) and own[0] == 1 and shape[0] != 1)


@dataclass(frozen=True)
class Reduction:
    """A reduction of a selection: its name, its arguments by name, and over which dimensions of the selection."""

    name: str
    arguments: dict[str, Any]
    dims: list[int] | None

    @property
    def over_elements(self) -> bool:
        """Tells whether the selected elements are reduced, not only what each of them holds."""
        return self.dims is None or 0 in self.dims

    @property
    def neutral(self) -> Any:
        """What an element that is not selected counts as."""
        return math.inf if self.order == -math.inf else _NEUTRAL[self.name]

    @property
    def order(self) -> Any:
        """The order of a norm."""
        return self.arguments.get("ord", self.arguments.get("p", 2)) if "norm" in self.name else None

    @property
    def needs_elements(self) -> bool:
        """Tells whether the reduction of nothing is an error."""
        return self.name in _WITHOUT_EMPTY or self.order in (math.inf, -math.inf)


def reduction_of(node: fx.Node, domain: Mapping[fx.Node, fx.Node]) -> Reduction | None:
    """Reads a call as a reduction of a selection that has a masked form; None if it is none."""
    target: Any = node.target
    if not is_reduction(target) or not isinstance(_val(node), torch.Tensor) or len(node.all_input_nodes) != 1:
        return None  # `max(dim=...)` returns positions as well; `max(a, b)` is element-wise
    names = [argument.name for argument in target._schema.arguments]
    arguments: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    source: Any = node.args[0]
    dim, rank = arguments.get("dim"), _val(source).dim()
    given = [dim] if isinstance(dim, int) else dim
    dims = [one % rank for one in given] if given else None
    found = Reduction(target._opname, arguments, dims)
    depth = _val(domain[source]).dim()
    if depth > 1 and (isinstance(dim, int) or arguments.get("keepdim")) and found.over_elements:
        return None
    return None if found.order is not None and -math.inf < found.order < 0 else found


class MaskedForm:
    """Builds the masked forms in a graph. `domain` gives the mask of each value that is a selection."""

    def __init__(self, graph: fx.Graph, domain: Mapping[fx.Node, fx.Node]) -> None:
        self.graph = graph
        self.domain = domain
        self.full: dict[fx.Node, fx.Node] = {}
        self.guards: list[fx.Node] = []
        self._known: dict[tuple[fx.Node, fx.Node], fx.Node] = {}

    def extend(self, node: fx.Node) -> None:
        """Adds the form with all elements of a value that is a selection."""
        args: Any = node.args
        mask = self.domain[node]
        with self.graph.inserting_before(node):
            if node.target is aten.index.Tensor:
                self.full[node] = self._safe(args[0], mask, node)
            elif node.target in _FLATTENING:
                self.full[node] = self.full[args[0]]
            else:
                args, kwargs = fx.map_arg((args, dict(node.kwargs)), self._full)
                reduction = reduction_of(node, self.domain)
                if reduction is not None and reduction.dims is not None:
                    dims = [dim + _val(mask).dim() - 1 for dim in reduction.dims]
                    args, kwargs = _with_dims(node.target, args, kwargs, dims)
                self.full[node] = self._insert(node.target, args, node, **kwargs)

    def write(self, node: fx.Node, mask: fx.Node) -> None:
        """Replaces a write through the mask."""
        args: Any = node.args
        target, value = args[0], args[2]
        accumulates = len(args) > 3 and bool(args[3])
        with self.graph.inserting_before(node):
            chosen, value = self._wide(mask, target, node), self._full(value)
            if accumulates:
                value = self._insert(aten.where.self, (chosen, value, self._number(0, target, node)), node)
                made = self._insert(aten.add.Tensor, (target, value), node)
            else:
                made = self._insert(aten.where.self, (chosen, value, target), node)
        become(self.graph, node, made)

    def reduce(self, node: fx.Node) -> None:
        """Replaces a reduction over the selected elements."""
        reduction = reduction_of(node, self.domain)
        assert reduction is not None, node
        source: Any = node.args[0]
        mask, value = self.domain[source], self.full[source]
        with self.graph.inserting_before(node):
            if reduction.needs_elements:
                self.guards.append(self._insert(aten.any.default, (mask,), node))
            neutral = self._number(reduction.neutral, value, node)
            filled = self._insert(aten.where.self, (self._wide(mask, value, node), value, neutral), node)
            dims = reduction.dims
            if dims is not None:
                depth = _val(mask).dim()
                dims = [*range(depth), *(dim + depth - 1 for dim in dims if dim)]
            if reduction.name == "mean":
                made = self._mean(node, reduction, mask, filled, dims)
            else:
                args, kwargs = (filled, *node.args[1:]), dict(node.kwargs)
                if dims is not None:
                    args, kwargs = _with_dims(node.target, args, kwargs, dims)
                made = self._insert(node.target, args, node, **kwargs)
        become(self.graph, node, made)

    def _mean(self, node: fx.Node, reduction: Reduction, mask: fx.Node, filled: fx.Node, dims: list[int] | None) -> Any:
        """Returns the sum by the count, both in the precision in which the operator itself adds."""
        dtype = _val(node).dtype
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        keep = bool(reduction.arguments.get("keepdim", False))
        total = self._insert(aten.sum.dim_IntList, (filled, dims, keep), node, dtype=wide)
        sizes = enumerate(_val(filled).shape)
        others = [size for dim, size in sizes if dim >= _val(mask).dim() and (dims is None or dim in dims)]
        count = self._insert(aten.sum.default, (mask,), node)
        count = self._insert(aten.mul.Scalar, (count, math.prod(others)), node)
        count = self._insert(aten._to_copy.default, (count,), node, dtype=wide)
        made = self._insert(aten.div.Tensor, (total, count), node)
        return made if wide is dtype else self._insert(aten._to_copy.default, (made,), node, dtype=dtype)

    # ------------------------------------------------------------------ parts

    def _safe(self, value: fx.Node, mask: fx.Node, like: fx.Node) -> fx.Node:
        """Returns all elements, with the first selected one in place of those that are not selected."""
        if not _val(mask).numel():
            return value
        key = (value, mask)
        if key not in self._known:
            depth = _val(mask).dim()
            flat = self._insert(aten.reshape.default, (value, [-1, *_val(value).shape[depth:]]), like)
            first = self._insert(aten.index.Tensor, (flat, [self._first(mask, like)]), like)
            some = self._insert(aten.any.default, (mask,), like)
            # Where nothing is selected, values that differ from one source to another: their differences are not zero.
            others = sum(known_mask is mask for _, known_mask in self._known)
            filler = self._number(1 + others / 8, value, like)
            filler = self._insert(aten.where.self, (some, first, filler), like)
            chosen = self._wide(mask, value, like)
            self._known[key] = self._insert(aten.where.self, (chosen, value, filler), like)
            self._known[key].meta["stands_in"] = True
        return self._known[key]

    def _first(self, mask: fx.Node, like: fx.Node) -> fx.Node:
        """Returns the position of the first element that is set, in the flattened mask."""
        number = self._insert(aten._to_copy.default, (mask,), like, dtype=torch.uint8)
        return self._insert(aten.argmax.default, (number,), like)

    def _wide(self, mask: fx.Node, value: fx.Node, like: fx.Node) -> fx.Node:
        """Returns the mask with the dimensions of a value."""
        shape = list(_val(mask).shape)
        missing = _val(value).dim() - len(shape)
        return self._insert(aten.reshape.default, (mask, [*shape, *[1] * missing]), like) if missing else mask

    def _number(self, number: Any, like_value: fx.Node, like: fx.Node) -> fx.Node:
        """Returns a number in the dtype of a value; in one without infinity, the extreme in place of it."""
        dtype = _val(like_value).dtype
        if dtype is torch.bool:
            number = number > 0
        elif not (dtype.is_floating_point or dtype.is_complex):
            info = torch.iinfo(dtype)
            number = int(min(max(number, info.min), info.max))
        return self._insert(aten.full.default, ([], number), like, dtype=dtype, device=_val(like_value).device)

    def _full(self, node: fx.Node) -> fx.Node:
        return self.full.get(node, node)

    def _insert(self, target: Any, args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
        return insert_call(self.graph, target, args, kwargs, like=like)


def become(graph: fx.Graph, node: fx.Node, made: fx.Node) -> None:
    """Turns a node into the call that was just made for it: a mask that is rewritten stays the node that it was."""
    node.target, node.args, node.kwargs = made.target, made.args, made.kwargs
    node.meta = {**node.meta, "val": made.meta["val"], "counts": None}
    graph.erase_node(made)


def _with_dims(target: Any, args: Any, kwargs: Any, dims: list[int]) -> tuple[Any, dict[str, Any]]:
    """Returns the arguments of a reduction with other dimensions."""
    names = [argument.name for argument in target._schema.arguments]
    index = names.index("dim")
    value = dims if "List" in str(target._schema.arguments[index].type) else dims[0]
    if "dim" in kwargs:
        return args, {**kwargs, "dim": value}
    return (*args[:index], value, *args[index + 1 :]), dict(kwargs)
