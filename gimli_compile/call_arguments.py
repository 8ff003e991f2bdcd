"""What the arguments and the results of a call hold.

torch's pytrees take any container, and take their time over it: most of a trace went into walking arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

_LEAVES = frozenset(
    (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, slice)
)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Returns the tensors among nested arguments, in order."""
    return [leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor)]


def holds(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Tells whether something of a kind is among nested arguments."""
    return any(isinstance(leaf, kind) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    kind = type(value)
    if kind in _LEAVES or isinstance(value, torch.Tensor):
        yield value
    elif kind is tuple or kind is list:
        for item in value:
            yield from _leaves(item)
    elif kind is dict:
        for item in value.values():
            yield from _leaves(item)
    else:
        yield from tree_leaves(value)


def map_tensors(value: Any, convert: Callable[[torch.Tensor], Any]) -> Any:
    """Returns nested arguments with what `convert` gives for each tensor."""
    kind = type(value)
    if isinstance(value, torch.Tensor):
        return convert(value)
    if kind in _LEAVES:
        return value
    if kind is tuple:
        return tuple(map_tensors(item, convert) for item in value)
    if kind is list:
        return [map_tensors(item, convert) for item in value]
    if kind is dict:
        return {key: map_tensors(item, convert) for key, item in value.items()}
    return tree_map_only(torch.Tensor, convert, value)
