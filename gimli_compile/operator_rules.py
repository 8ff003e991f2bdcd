"""Operators that lack a derivative that is needed, or read values, in the form of others that do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch

from gimli_compile.concolic import Number, bake

if TYPE_CHECKING:
    from gimli_compile.interception import Interception

Tensor = torch.Tensor
_SIXTH = float(torch.tensor(1 / 6, dtype=torch.float32))  # so torch's kernel of the gradient has it, in float64 too


def _weight_norm(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """The fused operator has a wrong second derivative."""
    with mode:
        value, scale, *rest = args
        dim = rest[0] if rest else kwargs.get("dim", 0)
        return value * (scale / torch.norm_except_dim(value, 2, dim))


def _cdist(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """The distance operator has no second derivative; a norm of differences has."""
    given = {**dict(zip(("x1", "x2", "p"), args, strict=False)), **kwargs}
    with mode:
        differences = given["x1"].unsqueeze(-2) - given["x2"].unsqueeze(-3)
        return torch.linalg.vector_norm(differences, given.get("p", 2.0), -1)


def _pdist(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """The distances between the rows of one matrix have no second derivative either."""
    given = {"p": 2.0, **dict(zip(("input", "p"), args, strict=False)), **kwargs}
    rows = given["input"]
    with mode:
        left, right = torch.triu_indices(len(rows), len(rows), offset=1, device=rows.device)
        return torch.linalg.vector_norm(rows[left] - rows[right], given["p"], -1)


def _hard_sigmoid(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """The gradient of the operator has no derivative; the operator is a clamped line with a slope that torch rounds."""
    given = {"inplace": False, **dict(zip(("input", "inplace"), args, strict=False)), **kwargs}
    value = given["input"]
    with mode:
        line = torch.nn.functional.hardtanh(value + 3, 0.0, 6.0)
        line = line * _SIXTH + (line / 6 - line * _SIXTH).detach()
        return value.copy_(line) if given["inplace"] else line


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


OPERATOR_HANDLERS: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {
    torch.nn.functional.mse_loss: _squared_error,
    torch.nn.functional.one_hot: _one_hot,
    cast(Any, torch)._weight_norm: _weight_norm,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    torch.nn.functional.pdist: _pdist,
    torch.nn.functional.hardsigmoid: _hard_sigmoid,
}
