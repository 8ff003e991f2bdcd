"""The batches of a compiled loop as flat lists of tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.compiled.inputs import in_order
from gimli_compile.errors import InputError, compose_message
from gimli_compile.slot import Role, Slot
from gimli_compile.tree_slots import fixed_form, form, tree_slots
from gimli_compile.unrolling import split_batches

Tensor = torch.Tensor
Flat = tuple[list[Any], pytree.TreeSpec]


class Batches:
    """The batches of a loop: a list, or a pytree of tensors with a step dimension, which is cut only once.

    `is_uniform`: such a pytree; `dim` is its step dimension.
    """

    def __init__(self, batches: Any, dim: int) -> None:
        given = list(batches) if isinstance(batches, Iterator) else batches
        steps = split_batches(given, dim) if isinstance(given, list) else None
        self._flat: list[Flat] = list(map(pytree.tree_flatten, steps)) if steps is not None else _cut(given, dim)
        self.is_uniform = steps is None
        self.dim = dim

    def __len__(self) -> int:
        return len(self._flat)

    def __getitem__(self, index: int) -> Any:
        return pytree.tree_unflatten(*self._flat[index])

    def part(self, start: int, end: int) -> Batches:
        """Returns some of the batches."""
        made = object.__new__(Batches)
        made._flat, made.is_uniform, made.dim = self._flat[start:end], self.is_uniform, self.dim
        return made

    def mapped(self, cut: Callable[[Tensor], Tensor]) -> Batches:
        """Returns the batches with other tensors in place of these."""
        made = object.__new__(Batches)
        made._flat = [
            ([cut(leaf) if isinstance(leaf, Tensor) else leaf for leaf in of], tree) for of, tree in self._flat
        ]
        made.is_uniform, made.dim = self.is_uniform, self.dim
        return made

    def slots(self) -> tuple[Slot, ...]:
        """Returns the slots of a batch."""
        leaves, structure = self._flat[0]
        if all(isinstance(leaf, Tensor) for leaf in leaves):
            return _slots_of(structure)
        return tuple(tree_slots(Role.BATCH, self[0]))

    def leaves(self) -> list[list[Tensor]]:
        """Returns the tensors of each batch, in the order of `slots`."""
        found = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves, _ in self._flat]
        if not self.is_uniform:
            for index, leaves in enumerate(found):
                if len(leaves) != len(found[0]):
                    raise _other_structure(index)
        return found

    def key(self) -> Any:
        """Returns structure, forms, and what is no tensor, of all batches."""
        if self.is_uniform:
            return _form_of(*self._flat[0]), len(self._flat)
        return tuple(_form_of(*flat) for flat in self._flat)


@functools.lru_cache(maxsize=256)
def _slots_of(structure: pytree.TreeSpec) -> tuple[Slot, ...]:
    """Returns the slots of a pytree of tensors."""
    return tuple(tree_slots(Role.BATCH, pytree.tree_unflatten([torch.empty(0)] * structure.num_leaves, structure)))


def _form_of(leaves: Sequence[Any], structure: pytree.TreeSpec) -> Any:
    return structure, tuple(form(leaf) if isinstance(leaf, Tensor) else fixed_form(leaf) for leaf in leaves)


def _cut(batches: Any, dim: int) -> list[Flat]:
    """Cuts a pytree along its step dimension; each step as leaves and structure."""
    leaves, structure = pytree.tree_flatten(batches)
    if not leaves or any(not isinstance(leaf, Tensor) or leaf.dim() <= dim for leaf in leaves):
        return [pytree.tree_flatten(step) for step in split_batches(batches, dim)]
    count = leaves[0].shape[dim]
    if not count or any(leaf.shape[dim] != count for leaf in leaves):
        return [pytree.tree_flatten(step) for step in split_batches(batches, dim)]
    parts = [in_order(leaf if dim == 0 else leaf.movedim(dim, 0)).unbind() for leaf in leaves]
    return [(list(of_step), structure) for of_step in zip(*parts, strict=True)]


def _other_structure(index: int) -> InputError:
    return InputError(
        compose_message(
            f"batch {index} has other tensors than batch 0",
            None,
            "A compiled loop binds the tensors of a batch to its programs once, for all steps.",
            "Give all batches one structure, or unroll uncompiled.",
        )
    )
