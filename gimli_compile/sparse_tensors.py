"""Operators on the sparse tensors of a trace, recorded as operators on strided ones.

A sparse tensor runs as itself, but the program knows it by the mask of its rows (of its sparse dimensions) and by
either all elements, zero in other rows, or the entries of its rows, which are a selection by the mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.provenance import user_source

if TYPE_CHECKING:
    from gimli_compile.recording import Recorder


@dataclass
class Rows:
    """What stands for a sparse tensor: traced tensors, one of `dense` and `values`.

    `distinct` tells that eager code sees each row once, in order: what `coalesce` gives.
    """

    shape: torch.Size
    mask: torch.Tensor
    dense: torch.Tensor | None = None
    values: torch.Tensor | None = None
    distinct: bool = False


class SparseTensors:
    """The sparse tensors of one recording."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._rows = WeakTensorKeyDictionary()
        self._indices: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def knows(self, value: Any) -> bool:
        """Tells whether a value is a sparse tensor of this trace."""
        return isinstance(value, torch.Tensor) and value.layout is torch.sparse_coo and value in self._rows

    def make(self, dense: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Returns a sparse tensor, which may repeat indices, of a traced tensor that is zero outside of the mask."""
        return self._run(Rows(dense.shape, mask, dense))

    def concerns(self, func: Any, args: Any, kwargs: Any, *, making: bool) -> bool:
        """Tells whether a call takes a sparse tensor of this trace, or, if `making`, makes one of traced values."""
        if func._opname in _CONSTRUCTORS:
            return making and bool(self._recorder.reach(args[4]))
        return bool(self._rows) and any(map(self.knows, tree_leaves((args, kwargs))))

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an operator, below the recording mode, and records what it is for rows."""
        name = func._opname
        if name in _CONSTRUCTORS:
            return self._construct(*args[2:5])
        if name in _NATIVE:
            return func(*args, **kwargs)
        in_place = func._schema.is_mutable
        handler = _HANDLERS.get(name.removesuffix("_") if in_place else name)
        made = NotImplemented if handler is None else handler(self, *args, **kwargs)
        if made is NotImplemented or (in_place and isinstance(made, Rows) is not self.knows(args[0])):
            raise _refusal(func)
        if not isinstance(made, Rows):
            return self.record(args[0].copy_, made) if in_place else made
        if in_place:
            self._rows[args[0]] = made
            return args[0]
        return self._run(made)

    def parts(self, tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns all elements of a sparse tensor and the mask of its rows."""
        rows = self._rows[tensor]
        return self.dense(rows), rows.mask

    # ------------------------------------------------------------------ parts

    def _run(self, rows: Rows) -> torch.Tensor:
        """Returns the real sparse tensor that rows stand for."""
        with self._recorder.paused(), torch.no_grad():
            values = rows.values if rows.dense is None else rows.dense.detach()[rows.mask]
            assert values is not None
            indices, distinct = rows.mask.nonzero().t(), rows.distinct
            made = torch.sparse_coo_tensor(
                indices, values.detach(), rows.shape, check_invariants=False, is_coalesced=distinct
            )
        self._rows[made] = rows
        return made

    def rows(self, tensor: torch.Tensor, *, once: bool = False) -> Rows:
        """Returns what stands for a sparse tensor; `once`: for code that tells the entries of a row apart."""
        rows = self._rows[tensor]
        if rows.distinct or not once:
            return rows
        raise CaptureError(
            compose_message(
                "the entries of a sparse gradient are read one by one",
                user_source(),
                "A gradient may have several entries for one index, and the program knows only their sum.",
                "Call `coalesce()` first, or make the layer with `sparse=False`.",
            )
        )

    def dense(self, rows: Rows) -> torch.Tensor:
        """Returns all elements."""
        if rows.dense is not None:
            return rows.dense
        assert rows.values is not None
        with self._recorder:
            zeros = torch.zeros(rows.shape, dtype=rows.values.dtype, device=rows.values.device)
            return zeros.index_put((rows.mask,), rows.values)

    def values(self, rows: Rows) -> torch.Tensor:
        """Returns the entries; code may change them in place, so that they stand for the tensor from here on."""
        if rows.values is None:
            assert rows.dense is not None
            with self._recorder:
                rows.values = rows.dense[rows.mask]
            rows.dense = None
        return rows.values

    def indices(self, rows: Rows) -> torch.Tensor:
        """Returns the indices; a tensor that is made from them has the same rows."""
        with self._recorder, self._recorder.extents.carried():
            found = rows.mask.nonzero().t()
        self._indices[_memory(found)] = (found, rows.mask)
        return found

    def count(self, rows: Rows) -> int:
        """Returns the number of entries, which becomes a condition."""
        values = self.values(rows)
        with self._recorder:
            self._recorder.extents.fix(values)
        return values.shape[0]

    def _construct(self, size: Any, indices: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Makes a tensor from the indices of another, whose rows it has, or from indices that may repeat."""
        shape = torch.Size(size)
        known = self._indices.get(_memory(indices))
        if known is not None:
            return self._run(Rows(shape, known[1], values=values, distinct=True))
        with self._recorder:
            places = indices.unbind(0)
            mask = torch.zeros(shape[: len(places)], dtype=torch.bool, device=values.device)
            mask = mask.index_put(places, torch.ones((), dtype=torch.bool, device=values.device))
            zeros = torch.zeros(shape, dtype=values.dtype, device=values.device)
            return self.make(zeros.index_put(places, values, accumulate=True), mask)

    def record(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls a function of torch under the recording mode."""
        with self._recorder:
            return function(*args, **options)


def _memory(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def _refusal(func: Any) -> CaptureError:
    return CaptureError(
        compose_message(
            f"`{func}` is called on a sparse gradient",
            user_source(),
            "A program has fixed shapes and knows few operators on sparse tensors.",
            "Make the layer with `sparse=False`, or work on `grad.coalesce()` and its `values()`.",
        )
    )


# ---------------------------------------------------------------------- operators

_CONSTRUCTORS = {"_sparse_coo_tensor_with_dims_and_tensors"}
_NATIVE = {"is_coalesced", "sparse_dim", "dense_dim"}


def _coalesce(trace: SparseTensors, tensor: torch.Tensor) -> Rows:
    rows = trace.rows(tensor)
    values = None if rows.values is None else trace.record(torch.clone, rows.values)
    return replace(rows, values=values, distinct=True)


def _clone(trace: SparseTensors, tensor: torch.Tensor, **options: Any) -> Rows:
    return replace(_coalesce(trace, tensor), distinct=trace.rows(tensor).distinct)


def _each(function: Callable[..., Any], *, linear: bool) -> Callable[..., Any]:
    """An element-wise operator that keeps zeros; a linear one does not tell the entries of a row apart."""

    def handler(trace: SparseTensors, tensor: Any, *rest: Any, **options: Any) -> Any:
        if not trace.knows(tensor) or any(isinstance(arg, torch.Tensor) and arg.dim() for arg in rest):
            return NotImplemented
        rows = trace.rows(tensor, once=not linear)
        if rows.distinct:
            return replace(rows, dense=None, values=trace.record(function, trace.values(rows), *rest, **options))
        return replace(rows, dense=trace.record(function, trace.dense(rows), *rest, **options))

    return handler


def _add(trace: SparseTensors, left: Any, right: Any, *, alpha: Any = 1) -> Any:
    if not trace.knows(right):
        return NotImplemented
    rows = trace.rows(right)
    if trace.knows(left):
        other = trace.rows(left)
        mask = trace.record(torch.logical_or, other.mask, rows.mask)
        total = trace.record(torch.add, trace.dense(other), trace.dense(rows), alpha=alpha)
        return Rows(rows.shape, mask, total)
    if rows.values is None:
        return trace.record(torch.add, left, trace.dense(rows), alpha=alpha)
    values = rows.values if alpha == 1 else trace.record(torch.mul, rows.values, alpha)
    return trace.record(torch.Tensor.index_put, left, (rows.mask,), values, accumulate=True)


def _addcmul(trace: SparseTensors, left: Any, right: Any, factor: Any, *, value: Any = 1) -> Any:
    if not trace.knows(right) or trace.knows(left) or factor.dim():
        return NotImplemented
    rows = trace.rows(right)
    if rows.values is None:
        return trace.record(torch.addcmul, left, trace.dense(rows), factor, value=value)
    product = trace.record(torch.mul, trace.record(torch.mul, rows.values, factor), value)
    return trace.record(torch.Tensor.index_put, left, (rows.mask,), product, accumulate=True)


def _sub(trace: SparseTensors, left: Any, right: Any, *, alpha: Any = 1) -> Any:
    return _add(trace, left, right, alpha=-alpha)


def _sparse_mask(trace: SparseTensors, value: torch.Tensor, pattern: torch.Tensor) -> Any:
    if trace.knows(value) or not trace.knows(pattern):
        return NotImplemented
    rows = trace.rows(pattern, once=True)
    return Rows(value.shape, rows.mask, values=trace.record(torch.Tensor.__getitem__, value, rows.mask), distinct=True)


def _to_dense(trace: SparseTensors, tensor: torch.Tensor, dtype: Any = None, **options: Any) -> torch.Tensor:
    dense = trace.dense(trace.rows(tensor))
    return trace.record(torch.clone, dense if dtype is None else trace.record(dense.to, dtype))


_HANDLERS: dict[str, Callable[..., Any]] = {
    "coalesce": _coalesce,
    "_coalesce": _coalesce,
    "clone": _clone,
    "detach": lambda trace, tensor: trace.rows(tensor),
    "alias": lambda trace, tensor: trace.rows(tensor),
    "values": lambda trace, tensor: trace.values(trace.rows(tensor, once=True)),
    "_values": lambda trace, tensor: trace.values(trace.rows(tensor, once=True)),
    "indices": lambda trace, tensor: trace.indices(trace.rows(tensor, once=True)),
    "_indices": lambda trace, tensor: trace.indices(trace.rows(tensor, once=True)),
    "_nnz": lambda trace, tensor: trace.count(trace.rows(tensor, once=True)),
    "add": _add,
    "sub": _sub,
    "addcmul": _addcmul,
    "sparse_mask": _sparse_mask,
    "_to_dense": _to_dense,
    "to_dense": _to_dense,
    "sum": lambda trace, tensor, **options: trace.record(torch.sum, trace.dense(trace.rows(tensor)), **options),
    **{name: _each(getattr(torch, name), linear=True) for name in ("neg", "mul", "div")},
    **{name: _each(getattr(torch, name), linear=False) for name in ("abs", "pow", "sqrt", "square", "sign")},
}
