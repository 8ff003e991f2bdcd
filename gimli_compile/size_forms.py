"""Operators whose results have sizes that follow from values, in operators that select by masks or by position."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from gimli_compile.interception import Interception

Tensor = torch.Tensor


def _repeat_interleave(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """Entries repeated by counts: gathered by position, as many as there were at capture."""
    given = {**dict(zip(("input", "repeats", "dim"), args, strict=False)), **kwargs}
    source = given.get("input") if "repeats" in given else None
    counts: Any = given.get("repeats", args[0] if args else None)
    if not isinstance(counts, Tensor) or not mode.recorder.reach(counts) or not counts.numel():
        return func(*args, **kwargs)
    with mode:
        dim = given.get("dim")
        if source is not None and dim is None:
            source, dim = source.flatten(), 0
        length = counts.numel() if source is None else source.shape[dim]
        ends = counts.flatten().expand(length).cumsum(0)
        with mode.recorder.paused():
            total = int(ends[-1].detach().cpu().numpy().item())
        positions = torch.searchsorted(ends, torch.arange(total, device=ends.device), right=True)
    mode.recorder.expect(ends[-1] == total)
    if source is None:
        return positions
    with mode:
        return source.index_select(dim, positions)


def _unique(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """The distinct values: those of the sorted ones that differ from the one before."""
    names = ("input", "sorted", "return_inverse", "return_counts", "dim")
    given = {"input": kwargs.get("self"), "sorted": True, **dict(zip(names, args, strict=False)), **kwargs}
    source: Tensor = given["input"]
    plain = given["sorted"] and given.get("dim") is None
    if not plain or not mode.recorder.reach(source) or not source.numel():
        return mode.call(func, args, kwargs)
    with mode:
        ordered, order = source.detach().flatten().sort(stable=True)
        is_new = torch.cat((torch.ones_like(order[:1], dtype=torch.bool), ordered[1:] != ordered[:-1]))
        ranks = is_new.cumsum(0) - 1
        values = ordered[is_new]
        inverse = torch.zeros_like(order).scatter(0, order, ranks).reshape(source.shape)
        counts = ranks.new_zeros(values.shape).scatter_add(0, ranks, torch.ones_like(ranks))
    asked = [values]
    asked += [inverse] if given.get("return_inverse") else []
    asked += [counts] if given.get("return_counts") else []
    return tuple(asked) if len(asked) > 1 else values


def _bincount(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """How often each number occurs: ones that are added up, in as many places as at capture."""
    given = {"weights": None, "minlength": 0, **dict(zip(("input", "weights", "minlength"), args, strict=False))}
    given |= kwargs
    source, least = given.get("input", given.get("self")), given["minlength"]
    if given["weights"] is not None or not mode.recorder.reach(source) or not source.numel():
        return func(*args, **kwargs)
    with mode.recorder.paused():
        largest = int(source.max().cpu().numpy().item())
    mode.recorder.expect(source.max() < least if largest < least else source.max() == largest)
    with mode:
        counts = torch.zeros(max(least, largest + 1), dtype=torch.int64, device=source.device)
        places = source.to(torch.int64)
        return counts.scatter_add(0, places, torch.ones_like(places))


SIZE_FORMS: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {
    torch.repeat_interleave: _repeat_interleave,
    Tensor.repeat_interleave: _repeat_interleave,
    torch.bincount: _bincount,
    Tensor.bincount: _bincount,
    torch.unique: _unique,
    Tensor.unique: _unique,
}
