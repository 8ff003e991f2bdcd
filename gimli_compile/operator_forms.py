"""Operators that lack a derivative, or have a wrong one, in operators that have all of them.

Each form takes the arguments of the torch function that it replaces; what it calls is recorded in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional as F

from gimli_compile.grid_forms import GRID_FORMS
from gimli_compile.loss_scaling_forms import LOSS_SCALING_FORMS
from gimli_compile.recurrent_forms import RECURRENT_FORMS
from gimli_compile.written_gradients import with_gradient

if TYPE_CHECKING:
    from gimli_compile.interception import Interception

Tensor = torch.Tensor
_NONE, _MEAN = 0, 1
_SIXTH_AS_TORCH_HAS_IT = 6 * float(torch.tensor(1 / 6, dtype=torch.float32))
_nn = cast(Any, torch._C)._nn


def _reduced(loss: Tensor, reduction: int) -> Tensor:
    return loss if reduction == _NONE else (loss.mean() if reduction == _MEAN else loss.sum())


# ---------------------------------------------------------------------- element-wise functions


def _hardsigmoid(mode: Interception, func: Any, args: Any, kwargs: Any) -> Tensor:
    """The gradient of the fused operator has no derivative; its sixth is of single precision, whatever the dtype."""
    value = args[0] if args else kwargs["input"]
    with mode:
        source = with_gradient(mode, value, lambda gradient: gradient * _SIXTH_AS_TORCH_HAS_IT)
        made = F.hardtanh(source + 3, 0.0, 6.0) / 6
        return value.copy_(made) if func is _nn.hardsigmoid_ else made


def _rrelu(mode: Interception, func: Any, args: Any, kwargs: Any) -> Tensor:
    """Outside of training the slope is a number; the fused operator counts as a draw nonetheless."""
    given = {"lower": 1 / 8, "upper": 1 / 3, "training": False}
    given |= {**dict(zip(("input", "lower", "upper", "training"), args, strict=False)), **kwargs}
    if given["training"]:
        return func(*args, **kwargs)
    with mode:
        rectify = F.leaky_relu_ if func is torch.rrelu_ else F.leaky_relu
        return cast(Any, rectify)(given["input"], (given["lower"] + given["upper"]) / 2)


# ---------------------------------------------------------------------- norms and distances


def _weight_norm(value: Tensor, scale: Tensor, dim: int = 0) -> Tensor:
    """The fused operator has a wrong second derivative."""
    return value * (scale / torch.norm_except_dim(value, 2, dim))


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """The distance operator has no second derivative; a norm of differences has."""
    return _lengths(x1.unsqueeze(-2) - x2.unsqueeze(-3), p)


def _pdist(value: Tensor, p: float = 2.0) -> Tensor:
    """The distance operator has no second derivative; a norm of differences has."""
    left, right = torch.triu_indices(value.shape[0], value.shape[0], 1, device=value.device)
    return _lengths(value[left] - value[right], p)


def _lengths(differences: Tensor, p: float) -> Tensor:
    """Returns the norms of differences; points that coincide have distance zero with all derivatives zero."""
    apart = (differences != 0).any(-1)
    safe = torch.where(apart.unsqueeze(-1), differences, torch.ones_like(differences))
    norms = torch.linalg.vector_norm(safe, p, -1)
    return torch.where(apart, norms, torch.zeros_like(norms))


def _lstsq(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """Least squares as they are; the rank, by which the residuals are there or not, is a condition of the program."""
    out = func(*args, **kwargs)
    if mode.recorder.reach(out.rank):
        with mode.recorder.paused():
            rank = out.rank.clone()
        mode.recorder.expect((out.rank == rank).all())
    return out


# ---------------------------------------------------------------------- losses


def _huber_loss(value: Tensor, target: Tensor, reduction: int = _MEAN, delta: Any = 1.0) -> Tensor:
    """The gradient of the fused operator has no forward-mode derivative."""
    difference = value - target
    distance = difference.abs()
    near = 0.5 * difference * difference
    return _reduced(torch.where(distance <= delta, near, delta * (distance - 0.5 * delta)), reduction)


def _soft_margin_loss(value: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    """The gradient of the fused operator has no forward-mode derivative."""
    return _reduced(((-value * target).exp() + 1).log(), reduction)


def _multi_margin_loss(
    value: Tensor,
    target: Tensor,
    p: int = 1,
    margin: Any = 1.0,
    weight: Tensor | None = None,
    reduction: int = _MEAN,
) -> Tensor:
    """The fused operator has no second derivative."""
    rows, labels = torch.atleast_2d(value), target.reshape(-1, 1)
    excess = torch.relu(margin - rows.gather(1, labels) + rows)
    others = torch.arange(rows.shape[1], device=rows.device) != labels
    powers = excess if p == 1 else excess * excess
    if weight is not None:
        powers = powers * weight[labels]
    losses = torch.where(others, powers, torch.zeros_like(powers)).sum(1) / rows.shape[1]
    return _reduced(losses if target.dim() else losses.squeeze(0), reduction)


def _multilabel_margin_loss(value: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    """The fused operator has no second derivative. The labels of a row end at its first negative entry."""
    valid = (target >= 0).to(torch.int64).cumprod(-1)
    labels = target.clamp(min=0)
    named = torch.zeros_like(labels).scatter_add(-1, labels, valid) > 0
    excess = torch.relu(1 - value.gather(-1, labels).unsqueeze(-1) + value.unsqueeze(-2))
    counted = (valid > 0).unsqueeze(-1) & ~named.unsqueeze(-2)
    losses = torch.where(counted, excess, torch.zeros_like(excess)).sum((-1, -2)) / value.shape[-1]
    return _reduced(losses, reduction)


def _replaced(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    with mode:
        return _FORMS[func](*args, **kwargs)


_FORMS: dict[Any, Callable[..., Any]] = {
    cast(Any, torch)._weight_norm: _weight_norm,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    _nn.huber_loss: _huber_loss,
    _nn.soft_margin_loss: _soft_margin_loss,
    _nn.multi_margin_loss: _multi_margin_loss,
    _nn.multilabel_margin_loss: _multilabel_margin_loss,
    **RECURRENT_FORMS,
    **GRID_FORMS,
    **LOSS_SCALING_FORMS,
}
OPERATOR_HANDLERS: dict[Any, Callable[[Any, Any, Any, Any], Any]] = {
    **dict.fromkeys(_FORMS, _replaced),
    torch.linalg.lstsq: _lstsq,
    _nn.hardsigmoid: _hardsigmoid,
    _nn.hardsigmoid_: _hardsigmoid,
    torch.rrelu: _rrelu,
    torch.rrelu_: _rrelu,
}
