"""The tensors of a pytree as slots."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.errors import InputError, compose_message
from gimli_compile.recording import DATA
from gimli_compile.records import opened, rebuilt
from gimli_compile.slot import Role, Slot
from gimli_compile.tree_paths import named_leaves

_OPTIONS = (enum.Enum, torch.dtype, torch.device)
LABEL = 4  # beside HOST and DATA: the value follows from integers and flags that the step is given


def reach_of(tensor: torch.Tensor) -> int:
    """Returns what the values of an input are to Python code: integers and flags have no derivative and may be read."""
    return DATA if tensor.is_floating_point() or tensor.is_complex() else LABEL


def tree_slots(role: Role, tree: Any) -> dict[Slot, torch.Tensor]:
    """Returns the tensors of a pytree by slot; numbers and options are part of the program.

    Anything else is refused: texts as well, of which every batch may have others.
    """
    found = {}
    for path, value in named_leaves(tree):
        if isinstance(value, torch.Tensor):
            found[Slot(role, path)] = value
        elif not (value is None or isinstance(value, (bool, int, float, complex, *_OPTIONS))):
            raise InputError(
                compose_message(
                    f"{role.value}[{path}] is a {type(value).__name__}, not a tensor or a number",
                    None,
                    "A program takes tensors, in lists, tuples, dicts, named tuples and dataclasses. Numbers and "
                    "members of enums are part of it; other things cannot be its inputs.",
                    "Turn it into a tensor before the step, as an index for each label; an option into an enum.",
                )
            )
    return found


@dataclass(frozen=True)
class Returned:
    """The structure of what a captured function returns; what is no tensor is part of it."""

    structure: pytree.TreeSpec
    fixed: tuple[Any, ...]
    slots: tuple[Slot | None, ...]

    @staticmethod
    def of(tree: Any, role: Role) -> tuple[Returned, dict[Slot, torch.Tensor]]:
        """Returns the structure of a pytree, and its tensors by slot."""
        tree = opened(tree)
        pairs = list(named_leaves(tree))
        slots = tuple(Slot(role, path) if isinstance(leaf, torch.Tensor) else None for path, leaf in pairs)
        fixed = tuple(None if isinstance(leaf, torch.Tensor) else leaf for _, leaf in pairs)
        tensors = {slot: leaf for slot, (_, leaf) in zip(slots, pairs, strict=True) if slot is not None}
        return Returned(pytree.tree_structure(tree), fixed, slots), tensors

    def assemble(self, results: Mapping[Slot, Any]) -> Any:
        """Returns the pytree with a program's results in it."""
        leaves = [value if slot is None else results[slot] for slot, value in zip(self.slots, self.fixed, strict=True)]
        if self.structure.is_leaf():
            return leaves[0]
        return rebuilt(pytree.tree_unflatten(leaves, self.structure))


def form(value: torch.Tensor) -> Any:
    """Returns shape, dtype and device."""
    return value.shape, value.dtype, value.device


def tree_form(tree: Any) -> Any:
    """Returns the structure of a pytree, the forms of its tensors, and everything else in it."""
    leaves, structure = pytree.tree_flatten(tree)
    return structure, tuple(form(leaf) if isinstance(leaf, torch.Tensor) else fixed_form(leaf) for leaf in leaves)


def fixed_form(leaf: Any) -> Any:
    """Returns what tells a value that is part of a program from others; 0.0 and -0.0 are two, and NaN is one."""
    if isinstance(leaf, (float, complex)):
        return type(leaf), repr(leaf)
    return type(leaf), leaf if isinstance(leaf, (bool, int, str, type(None), *_OPTIONS)) else id(leaf)
