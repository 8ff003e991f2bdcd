"""Tensors of a training run that share memory, so that a write to one changes the other behind a program's back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.metadata import storage_of

Tensor = torch.Tensor


def refuse_shared_memory(params: Mapping[str, Tensor], held: Mapping[str, Any], what: str) -> None:
    """Refuses tensors that overlap with a parameter or another tensor of `held` without being the same object.

    Parts of one storage that do not overlap are independent. `what` says what `held` is: "state", "buffer".

    Raises:
        CaptureError: two tensors overlap; the message names both.
    """
    with torch._C.DisableTorchFunction():  # who watches calls need not see these
        _refuse(params, held, what)


def _refuse(params: Mapping[str, Tensor], held: Mapping[str, Any], what: str) -> None:
    found: dict[Any, list[tuple[str, Tensor]]] = {}
    named = [(f"the parameter {name!r}", value) for name, value in params.items()]
    named += [(f"the {what} {path!r}", value) for path, value in held.items()]
    for name, value in named:
        if not isinstance(value, Tensor) or value.layout is not torch.strided or not value.numel():
            continue
        others = found.setdefault(storage_of(value), [])
        for other, known in others:
            if known is not value and _overlap(known, value):
                raise CaptureError(
                    compose_message(
                        f"{other} and {name} share memory",
                        None,
                        "A write to one of them changes the other, and a program has each as an input of its own.",
                        "Keep a copy of its own (`.clone()`), or make the view where it is used.",
                    )
                )
        others.append((name, value))


def _overlap(left: Tensor, right: Tensor) -> bool:
    (first, end), (other, other_end) = _extent(left), _extent(right)
    return first < other_end and other < end


def _extent(tensor: Tensor) -> tuple[Any, Any]:
    """Returns the bytes of the storage from the first element to the last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.storage_offset() * tensor.element_size()
    return first, first + (reach + 1) * tensor.element_size()
