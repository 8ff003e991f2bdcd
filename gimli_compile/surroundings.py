"""What surrounds a call, and decides about dtypes within: the default dtype, and autocast."""

from __future__ import annotations

from typing import Any

import torch

_KINDS = ("cpu", "cuda")


def surroundings() -> tuple[Any, ...]:
    """Returns what surrounds the present call; programs that are captured within are for calls of the same only."""
    return torch.get_default_dtype(), _autocast() if torch._C._is_any_autocast_enabled() else None


def _autocast() -> tuple[Any, ...]:
    return tuple((torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in _KINDS)
