"""Random draws: an operator that draws is kept with what it was called with, so that a program can draw again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from gimli_compile.program import Draw

aten = torch.ops.aten
_BY_VALUE = {
    aten.bernoulli.default,
    aten.bernoulli.p,
    aten.bernoulli_.Tensor,
    aten.multinomial.default,
    aten.normal.Tensor_float,
    aten.normal.float_Tensor,
    aten.normal.Tensor_Tensor,
    aten.poisson.default,
    aten.binomial.default,
    aten._standard_gamma.default,
    aten._sample_dirichlet.default,
    aten.rrelu_with_noise.default,
    aten.rrelu_with_noise_.default,
}


@dataclass(frozen=True)
class _Like:
    """Stands for a tensor argument of a draw, of which only the form matters."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Like:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def make(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


def depends_on_values(func: Any) -> bool:
    """Tells whether an operator draws from a distribution that its tensor arguments give."""
    return func in _BY_VALUE


def make_draw(func: Any, args: Any, kwargs: Any) -> Draw:
    """Returns the draw that calls an operator again, with tensors of the same values or, where it suffices, form."""

    def keep(tensor: torch.Tensor) -> Any:
        return tensor.detach().clone() if depends_on_values(func) else _Like.of(tensor)

    kept_args, kept_kwargs = tree_map_only(torch.Tensor, keep, (args, kwargs))
    return Draw(_draw, (func, *kept_args), kept_kwargs)


def make_dropout_draw(value: torch.Tensor, p: float) -> Draw:
    """Returns the draw of the mask of a dropout of `value` with probability `p`."""
    return Draw(_draw_mask, (_Like.of(value), p))


def _draw(target: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    made_args, made_kwargs = tree_map_only(_Like, _Like.make, (args, kwargs))
    return target(*made_args, **made_kwargs)


def _draw_mask(form: _Like, p: float) -> torch.Tensor:
    return aten.native_dropout.default(form.make().fill_(1), p, True)[1]
