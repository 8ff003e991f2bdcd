"""The leaves of a pytree by path."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils import _pytree as pytree


def named_leaves(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yields path and value of the leaves of a pytree, the path as `0.x`."""
    pairs, _ = pytree.tree_flatten_with_path(tree)
    for path, value in pairs:
        yield ".".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path), value
