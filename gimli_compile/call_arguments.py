"""What the arguments and the results of a call hold.

torch's pytrees take any container, and take their time over it: most of a trace went into walking arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

_LEAVES = frozenset(
    (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, slice)
)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Returns the tensors among nested arguments, in order."""
    found: list[torch.Tensor] = []
    _collect(value, torch.Tensor, found)
    return found


def holds(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Tells whether something of a kind is among nested arguments."""
    found: list[Any] = []
    _collect(value, kind, found)
    return bool(found)


def _collect(value: Any, kind: type | tuple[type, ...], found: list[Any]) -> None:
    form = type(value)
    if isinstance(value, kind):
        found.append(value)
    elif form is tuple or form is list:
        for item in value:
            _collect(item, kind, found)
    elif form is dict:
        for item in value.values():
            _collect(item, kind, found)
    elif form not in _LEAVES and not isinstance(value, torch.Tensor):
        found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, kind)]


def map_tensors(value: Any, convert: Callable[[torch.Tensor], Any]) -> Any:
    """Returns nested arguments with what `convert` gives for each tensor."""
    form = type(value)
    if isinstance(value, torch.Tensor):
        return convert(value)
    if form in _LEAVES:
        return value
    if form is tuple:
        return tuple([map_tensors(item, convert) for item in value])
    if form is list:
        return [map_tensors(item, convert) for item in value]
    if form is dict:
        return {key: map_tensors(item, convert) for key, item in value.items()}
    return tree_map_only(torch.Tensor, convert, value)
