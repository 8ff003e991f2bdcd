"""The inverses of view operators: a whole tensor again, from the part of it that a view shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.metadata import insert_call

aten = torch.ops.aten
_RESHAPES = {
    aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default,
}  # fmt: skip
_COMPLEX = {
    aten.view_as_real.default: aten.view_as_complex.default,
    aten.view_as_complex.default: aten.view_as_real.default,
}
_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}


@dataclass(frozen=True)
class View:
    """One view operator, with its arguments but the first; `part` picks from operators that return several views."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like: fx.Node
    part: int | None = None

    @property
    def form(self) -> torch.Tensor:
        """What the view looks like."""
        val = self.like.meta["val"]
        return val if self.part is None else val[self.part]


def put_back(
    graph: fx.Graph, view: View, base: Callable[[], fx.Node], form: torch.Tensor, value: fx.Node, *, like: fx.Node
) -> fx.Node:
    """Returns `base`, of the form `form`, with the part that `view` shows replaced by `value`.

    `base` is a function because most inverses need the form only. Raises CaptureError for a view without an inverse.

        row = aten.select.int(a, 0, 1), replaced by b     becomes     aten.select_scatter.default(a, b, 0, 1)
    """
    target = view.target
    if target in _SAME:
        return value
    if target in _RESHAPES:
        return insert_call(graph, aten.reshape.default, (value, list(form.shape)), like=like)
    if target in (aten.t.default, aten.transpose.int):
        return insert_call(graph, target, (value, *view.args), like=like)
    if target is aten.permute.default:
        order = [dim % len(view.args[0]) for dim in view.args[0]]
        return insert_call(graph, target, (value, [order.index(dim) for dim in range(len(order))]), like=like)
    if target in _COMPLEX:
        return insert_call(graph, _COMPLEX[target], (value,), like=like)
    if target is aten.as_strided.default:
        return _put_strided(graph, view, base(), value, like)
    scatter = _SCATTERS.get(target)
    if scatter is None:
        raise CaptureError(
            compose_message(
                f"an in-place operator writes through `{target}`",
                like.meta.get("source"),
                "This view has no inverse that gives the whole tensor back.",
                "Write to the whole tensor, or through a slice of it.",
            )
        )
    operator, args, kwargs = scatter(view, form)
    return insert_call(graph, operator, (base(), value, *args), kwargs, like=like)


def _put_strided(graph: fx.Graph, view: View, base: fx.Node, value: fx.Node, like: fx.Node) -> fx.Node:
    """Writes to the places of a strided view, counted in the flat tensor."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(graph, target, args, kwargs, like=like)

    place = strided_places(graph, view.args, base, like)
    flat = call(aten.reshape.default, base, [-1])
    written = call(aten.index_put.default, flat, [place], value)
    return call(aten.reshape.default, written, list(base.meta["val"].shape))


def strided_places(graph: fx.Graph, where: tuple[Any, ...], base: fx.Node, like: fx.Node) -> fx.Node:
    """Returns the places in the flat, contiguous `base` of the elements of a view of this size, stride and offset."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return insert_call(graph, target, args, kwargs, like=like)

    size, stride, offset = where
    device = base.meta["val"].device
    place = call(aten.full.default, [1] * len(size), offset, dtype=torch.int64, device=device)
    for index, (count, step) in enumerate(zip(size, stride, strict=True)):
        shape = [1] * len(size)
        shape[index] = count
        along = call(aten.mul.Tensor, call(aten.arange.default, count, device=device), step)
        place = call(aten.add.Tensor, call(aten.reshape.default, along, shape), place)
    return place


def _select(view: View, form: torch.Tensor) -> Any:
    return aten.select_scatter.default, view.args, {}


def _slice(view: View, form: torch.Tensor) -> Any:
    return aten.slice_scatter.default, view.args, view.kwargs


def _diagonal(view: View, form: torch.Tensor) -> Any:
    return aten.diagonal_scatter.default, view.args, view.kwargs


def _unbound(view: View, form: torch.Tensor) -> Any:
    return aten.select_scatter.default, (view.args[0] if view.args else 0, view.part), {}


def _split(view: View, form: torch.Tensor) -> Any:
    assert view.part is not None
    sizes, *rest = view.args
    dim = rest[0] if rest else view.kwargs.get("dim", 0)
    if isinstance(sizes, int):
        start = sizes * view.part
        end = min(start + sizes, form.shape[dim])
    else:
        start = sum(sizes[: view.part])
        end = start + sizes[view.part]
    return aten.slice_scatter.default, (dim, start, end), {}


_SCATTERS: dict[Any, Callable[[View, torch.Tensor], Any]] = {
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.diagonal.default: _diagonal,
    aten.unbind.int: _unbound,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
}
