"""What the networks are made of, in torch: the operators of `benchmarks.networks`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

relu, tanh, sigmoid, sqrt = torch.relu, torch.tanh, torch.sigmoid, torch.sqrt
linear, conv, embedding = F.linear, F.conv2d, lambda indices, table: F.embedding(indices, table)


def batch_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Normalizes every channel [N, C, H, W] over the batch that it sees."""
    return F.batch_norm(x, None, None, scale, shift, training=True)


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], scale, shift)


def max_pool(x: Tensor) -> Tensor:
    """Pools windows of 2 by 2."""
    return F.max_pool2d(x, 2)


def average_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def mask_future(scores: Tensor) -> Tensor:
    """Keeps every position [..., query, key] from looking at later ones."""
    length = scores.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(future, -torch.inf)


def reshape(x: Tensor, shape: Sequence[int]) -> Tensor:
    return x.reshape(shape)


def transpose(x: Tensor, first: int, second: int) -> Tensor:
    return x.transpose(first, second)


def concatenate(parts: Sequence[Tensor], axis: int) -> Tensor:
    return torch.cat(parts, axis)


def split(x: Tensor, parts: int) -> Sequence[Tensor]:
    """Cuts the last dimension into equal parts."""
    return x.chunk(parts, -1)


def mean(x: Tensor, axes: tuple[int, ...] | None = None) -> Tensor:
    return x.mean() if axes is None else x.mean(axes)


def zeros_like(x: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    return x.new_zeros(x.shape if shape is None else tuple(shape))


def guarded_sqrt(x: Tensor) -> Tensor:
    """The root, with derivative zero at zero (where torch's is infinite, and makes NaN)."""
    is_zero = x == 0
    return torch.where(is_zero, 0.0, torch.where(is_zero, 1.0, x).sqrt())


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean over all that leads [..., class]."""
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
