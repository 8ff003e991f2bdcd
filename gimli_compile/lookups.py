"""Containers in which a concolic number looks something up: dicts and sets keyed by ints, lists indexed by a counter.

Python hashes a key and reads an index without a word, and the number would be pinned: one variant for each value. While
a trace runs, what the optimizer and its schedulers hold answers in a way that few programs serve:

    step in milestones      one condition: that the step is one of the keys, or that it is none of them
    milestones[step]        where the values are numbers: the one whose key the step is, as tensor arithmetic
    history[step % 3]       where the items are numbers: the same; otherwise the index is pinned
"""

from __future__ import annotations

import operator
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache, reduce
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree

from gimli_compile.concolic import Number, compare, guard, make_number, plain
from gimli_compile.skeleton import Container, IdRef, ParamRef
from gimli_compile.snapshot import is_number

_FEW = 16


def answering(part: Container, made: Any) -> Any:
    """Returns the form of a container that answers numbers; `part` is its place in the skeleton.

    Containers that no number looks into (without int keys, of parameters, without a length) stay as they are.
    """
    if any(isinstance(entry, (ParamRef, IdRef)) for pair in part.items for entry in pair):
        return made
    if type(made) in _SEQUENCES:
        return _SEQUENCES[type(made)](made) if part.items else made
    keys = [key for key, _ in part.items]
    keyed = isinstance(made, dict) and any(type(key) is int for key in keys)
    keyed |= isinstance(made, (Counter, set, frozenset)) and all(type(key) is int for key in keys)
    return _keyed_like(made) if keyed else made


def answering_table(value: Any) -> Any:
    """Returns the form of a list, tuple or dict of nothing but numbers that answers numbers; of anything else, None."""
    entries = value.values() if type(value) is dict else value if type(value) in _SEQUENCES else ()
    if not entries or not all(map(is_number, entries)):
        return None
    if type(value) is dict:
        return _keyed_like(value) if any(type(key) is int for key in value) else None
    return _SEQUENCES[type(value)](value)


# ---------------------------------------------------------------------- dicts and sets


def _keyed_like(made: Any) -> Any:
    kind = _keyed_form(type(made))
    if isinstance(made, (set, frozenset)):
        return kind(made)
    copied = kind.__new__(kind)
    if hasattr(made, "default_factory"):
        copied.default_factory = made.default_factory
    put = OrderedDict.__setitem__ if isinstance(made, OrderedDict) else dict.__setitem__
    for key, value in made.items():
        put(copied, key, value)
    return copied


@lru_cache(maxsize=64)
def _keyed_form(kind: type) -> Any:
    methods = _MAPPING if issubclass(kind, dict) else _SET
    return type(kind.__name__, (kind,), {"stands_for": kind, **{n: make(kind) for n, make in methods.items()}})


def _is_among(number: Number, keys: Iterable[Any]) -> bool:
    """Tells whether a number is one of the keys, and guards the answer."""
    known = [plain(key) for key in keys if isinstance(key, (int, float))]
    if not known:
        return False
    if number.tensor.dim():
        return hash(number) in set(map(hash, known))
    return guard(number.recorder, _is_any(number, known), number.plain in known)


def _is_any(number: Number, values: list[Any]) -> torch.Tensor:
    """Returns whether the number is one of the values; of few, as a condition that reads well and is computed once."""
    if len(values) > _FEW:
        return _equals(number, values).any()
    return reduce(torch.logical_or, [number.tensor == value for value in values])


def _equals(number: Number, values: list[Any]) -> torch.Tensor:
    """Returns, as a vector of bools, which of the values the number is."""
    return number.tensor == torch.tensor([float(value) for value in values], dtype=torch.float64)


def _make_contains(kind: Any) -> Callable[..., bool]:
    def method(self: Any, key: Any) -> bool:
        return _is_among(key, self) if isinstance(key, Number) else kind.__contains__(self, key)

    return method


def _make_get_item(kind: Any) -> Callable[..., Any]:
    def method(self: Any, key: Any) -> Any:
        if not isinstance(key, Number):
            return kind.__getitem__(self, key)
        if _is_among(key, self):
            return _chosen(key, list(self.values()), lambda: _equals(key, list(map(plain, self))), self, key.plain)
        size = len(self)
        value = kind.__getitem__(self, key.plain)
        if len(self) != size:  # a default was stored under this very key
            compare(operator.eq, key, key.plain)
        return value

    return method


def _make_get(kind: Any) -> Callable[..., Any]:
    def method(self: Any, key: Any, default: Any = None) -> Any:
        if not isinstance(key, Number):
            return kind.get(self, key, default)
        return self[key] if _is_among(key, self) else default

    return method


_SET = {"__contains__": _make_contains}
_MAPPING = {**_SET, "__getitem__": _make_get_item, "get": _make_get}


# ---------------------------------------------------------------------- lists and tuples


def _make_index(kind: Any) -> Callable[..., Any]:
    def method(self: Any, index: Any) -> Any:
        if not isinstance(index, Number):
            return kind.__getitem__(self, _pinned_slice(index))
        value = kind.__getitem__(self, index.plain)
        size = len(self)
        if not (compare(operator.ge, index, -size) and compare(operator.lt, index, size)):
            return value

        def places() -> torch.Tensor:
            return torch.arange(size, dtype=torch.float64) == index.tensor % size

        return _chosen(index, list(self), places, None, value)

    return method


def _pinned_slice(index: Any) -> Any:
    if not isinstance(index, slice):
        return index
    return slice(*(_pinned(bound) for bound in (index.start, index.stop, index.step)))


def _pinned(value: Any) -> Any:
    if isinstance(value, Number):
        compare(operator.eq, value, value.plain)
    return plain(value)


class AnsweringList(list[Any]):
    """A list that answers numbers."""

    stands_for = list
    __getitem__ = _make_index(list)

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_pinned(_pinned_slice(index)), value)


class AnsweringTuple(tuple[Any, ...]):
    """A tuple that answers numbers."""

    stands_for = tuple
    __getitem__ = _make_index(tuple)


_SEQUENCES: dict[type, Callable[[Any], Any]] = {list: AnsweringList, tuple: AnsweringTuple}


# ---------------------------------------------------------------------- choosing


def _chosen(number: Number, values: list[Any], hits: Callable[[], torch.Tensor], owner: Any, place: Any) -> Any:
    """Returns the one of several values that a number chooses.

    Numbers of one kind are chosen between by a tensor operator; of anything else, the choosing number is pinned.
    `hits` makes the vector that says which it is; `place` is the concrete value, or its key in `owner`.
    """
    concrete = place if owner is None else dict.__getitem__(owner, place)
    kinds = {isinstance(value, int) for value in values}
    tensors = [_carried(value) for value in values] if all(map(is_number, values)) else []
    if not tensors or len(kinds) > 1 or number.tensor.dim() or any(tensor.dim() for tensor in tensors):
        compare(operator.eq, number, number.plain)
        return concrete
    if len(tensors) == 1:
        return concrete
    chosen = torch.where(hits(), torch.stack(tensors), 0.0).sum()
    return make_number(plain(concrete), chosen, number.recorder)


def _carried(value: Any) -> torch.Tensor:
    if isinstance(value, Number):
        return value.tensor
    return torch.full((), float(plain(value)), dtype=torch.float64)


def _with_places(value: Any) -> tuple[list[Any], Any]:
    return [(pytree.SequenceKey(place), item) for place, item in enumerate(value)], None


for _kind in (AnsweringList, AnsweringTuple):
    pytree.register_pytree_node(
        cast(Any, _kind),
        lambda value: (list(value), None),
        lambda values, _, kind=_kind: kind.stands_for(values),
        serialized_type_name=f"gimli_compile.{_kind.__name__}",
        flatten_with_keys_fn=_with_places,
    )
