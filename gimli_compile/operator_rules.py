"""Operators that lack a derivative that is needed, or read values, in the form of others that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gimli_compile.concolic import Number, bake

if TYPE_CHECKING:
    from gimli_compile.interception import Interception


def _one_hot(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """The operator reads all values to check them; the write that it consists of checks them as well."""
    given = {"num_classes": -1, **dict(zip(("tensor", "num_classes"), args, strict=False)), **kwargs}
    labels, count = given["tensor"], given["num_classes"]
    if not mode.recorder.reach(labels):
        return func(labels, count)
    with mode:
        if count == -1:
            count = labels.max().item() + 1
        count = int(bake(count, "a number used as a size") if isinstance(count, Number) else count)
        zeros = torch.zeros((*labels.shape, count), dtype=torch.int64, device=labels.device)
        return zeros.scatter(-1, labels.unsqueeze(-1), 1)


def _squared_error(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """The fused operator has no forward-mode derivative of its gradient (pytorch#123996)."""
    names = ("input", "target", "size_average", "reduce", "reduction", "weight")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    reduction = given.get("reduction", "mean")
    same = given["input"].shape == given["target"].shape
    if not same or any(given.get(name) is not None for name in names[2:4] + names[5:]):
        return mode.call(func, args, kwargs)
    with mode:
        squares = (given["input"] - given["target"]) ** 2
        return squares if reduction == "none" else getattr(squares, reduction)()


RULE_HANDLERS: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {
    torch.nn.functional.mse_loss: _squared_error,
    torch.nn.functional.one_hot: _one_hot,
}
