"""Dataclasses and kinds of dicts among what users pass and get, which pytrees take for leaves."""

from __future__ import annotations

import dataclasses
from collections import UserDict
from typing import Any, cast

import torch
from torch.utils import _pytree as pytree


class Record:
    """A dataclass or a dict of some kind, taken apart into its names and values. A pytree."""

    def __init__(self, kind: type, names: tuple[Any, ...], values: list[Any]) -> None:
        self.kind = kind
        self.names = names
        self.values = values

    def build(self) -> Any:
        """Returns an object of its kind, which no constructor ran for."""
        values = [rebuilt(value) for value in self.values]
        made: Any = cast(Any, self.kind).__new__(self.kind)
        if isinstance(made, dict):
            dict.update(made, zip(self.names, values, strict=True))
            return made
        for name, value in zip(self.names, values, strict=True):
            object.__setattr__(made, name, value)
        return made


def opened(tree: Any) -> Any:
    """Returns a pytree with records in place of dataclasses and dicts of other kinds, however nested."""
    return tree if _is_plain(tree) else pytree.tree_map(_open, tree)


def _is_plain(tree: Any) -> bool:
    """Tells whether there are only tensors and numbers in lists, tuples and dicts, which is quickly seen."""
    if tree is None or isinstance(tree, (torch.Tensor, bool, int, float)):
        return True
    if type(tree) in (tuple, list):
        return all(map(_is_plain, tree))
    return type(tree) is dict and all(map(_is_plain, tree.values()))


def rebuilt(tree: Any) -> Any:
    """Returns a pytree with dataclasses and dicts in place of records: what the user's code sees."""
    return pytree.tree_map(
        lambda leaf: leaf.build() if isinstance(leaf, Record) else leaf, tree, is_leaf=lambda x: isinstance(x, Record)
    )


def _open(leaf: Any) -> Any:
    kind = type(leaf)
    if isinstance(leaf, dict) and not getattr(leaf, "__dict__", None):
        return Record(kind, tuple(leaf), [opened(value) for value in leaf.values()])
    if isinstance(leaf, type) or not (dataclasses.is_dataclass(leaf) or isinstance(leaf, UserDict)):
        return leaf
    fields = [field.name for field in dataclasses.fields(leaf)] if dataclasses.is_dataclass(leaf) else []
    names = [name for name in dict.fromkeys([*fields, *getattr(leaf, "__dict__", ())]) if hasattr(leaf, name)]
    return Record(kind, tuple(names), [opened(getattr(leaf, name)) for name in names])


def _flatten(record: Any) -> tuple[list[Any], Any]:
    return record.values, (record.kind, record.names)


def _flatten_with_keys(record: Any) -> Any:
    keys = [pytree.MappingKey(name) for name in record.names]
    return list(zip(keys, record.values, strict=True)), (record.kind, record.names)


pytree.register_pytree_node(
    Record,
    _flatten,
    lambda values, context: Record(context[0], context[1], list(values)),
    flatten_with_keys_fn=_flatten_with_keys,
    serialized_type_name="gimli_compile.Record",
)
