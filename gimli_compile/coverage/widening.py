"""Lifts the low precision that an optimizer chooses inside: what it computes in float32 or less is done in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_LOW = (torch.float32, torch.bfloat16, torch.float16)


class _WidenedOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **_widen(kwargs or {}))


class _WidenedCalls(TorchFunctionMode):
    """Sees `torch.tensor`, which rounds before any operator is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(_widen(kwargs) if func in (torch.tensor, torch.as_tensor) else kwargs))


def _widen(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "dtype": torch.float64} if kwargs.get("dtype") in _LOW else kwargs


class Widened:
    """Within this block casts and new tensors of low precision are float64, live and captured alike.

    Quantized values have no slopes that can be measured to more than a few digits; those of the same code without its
    roundings have. Integers are left alone.
    """

    def __enter__(self) -> None:
        self._modes = (_WidenedOperators(), _WidenedCalls())
        for mode in self._modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)
