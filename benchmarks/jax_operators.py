"""What the networks are made of, in JAX: the operators of `benchmarks.networks`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax import numpy as jnp

Array = Any
NORMALIZATION_EPS = 1e-5  # torch's

relu, tanh, sigmoid, sqrt = jax.nn.relu, jnp.tanh, jax.nn.sigmoid, jnp.sqrt


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    out = x @ weight.T
    return out if bias is None else out + bias


def conv(x: Array, weight: Array, bias: Array | None = None, stride: int = 1, padding: int = 0) -> Array:
    layout = ("NCHW", "OIHW", "NCHW")
    sides = [(padding, padding)] * 2
    out = jax.lax.conv_general_dilated(x, weight, (stride, stride), sides, dimension_numbers=layout)
    return out if bias is None else out + bias[:, None, None]


def embedding(indices: Array, table: Array) -> Array:
    return table[indices]


def _normalize(x: Array, axes: tuple[int, ...]) -> Array:
    centered = x - x.mean(axes, keepdims=True)
    return centered / jnp.sqrt((centered**2).mean(axes, keepdims=True) + NORMALIZATION_EPS)


def batch_norm(x: Array, scale: Array, shift: Array) -> Array:
    """Normalizes every channel [N, C, H, W] over the batch that it sees."""
    return _normalize(x, (0, 2, 3)) * scale[:, None, None] + shift[:, None, None]


def layer_norm(x: Array, scale: Array, shift: Array) -> Array:
    return _normalize(x, (-1,)) * scale + shift


def max_pool(x: Array) -> Array:
    """Pools windows of 2 by 2."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")


def average_pool(x: Array) -> Array:
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4


def softmax(x: Array) -> Array:
    return jax.nn.softmax(x, -1)


def mask_future(scores: Array) -> Array:
    """Keeps every position [..., query, key] from looking at later ones."""
    length = scores.shape[-1]
    future = jnp.triu(jnp.ones((length, length), bool), 1)
    return jnp.where(future, -jnp.inf, scores)


def reshape(x: Array, shape: Sequence[int]) -> Array:
    return x.reshape(shape)


def transpose(x: Array, first: int, second: int) -> Array:
    return jnp.swapaxes(x, first, second)


def concatenate(parts: Sequence[Array], axis: int) -> Array:
    return jnp.concatenate(parts, axis)


def split(x: Array, parts: int) -> Sequence[Array]:
    """Cuts the last dimension into equal parts."""
    return jnp.split(x, parts, -1)


def mean(x: Array, axes: tuple[int, ...] | None = None) -> Array:
    return x.mean(axes)


def zeros_like(x: Array, shape: Sequence[int] | None = None) -> Array:
    return jnp.zeros(x.shape if shape is None else tuple(shape), x.dtype)


def guarded_sqrt(x: Array) -> Array:
    """The root, with derivative zero at zero (where it is infinite otherwise, and makes NaN)."""
    is_zero = x == 0
    return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, x)))


def cross_entropy(logits: Array, labels: Array) -> Array:
    """The mean over all that leads [..., class]."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits, -1), labels[..., None], -1).mean()
