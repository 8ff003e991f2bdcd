"""Sparse gradients between programs: a dense tensor that is zero elsewhere, and which rows the gradient has.

How many entries a sparse tensor has depends on the values of a batch, so that no program could take or return one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from gimli_compile.lazy_copies import lazy_copy
from gimli_compile.slot import CROSSING, Role, Slot


class RowGradient(NamedTuple):
    """A sparse gradient. `rows` is a bool tensor of its sparse dimensions: which of them it has entries for."""

    dense: torch.Tensor
    rows: torch.Tensor


Gradient = torch.Tensor | RowGradient | None
Roles = tuple[Role, Role]


def as_rows(gradient: Any) -> Any:
    """Returns a sparse COO tensor as a RowGradient, anything else as it is."""
    if not isinstance(gradient, torch.Tensor) or gradient.layout is not torch.sparse_coo:
        return gradient
    rows = torch.zeros(gradient.shape[: gradient.sparse_dim()], dtype=torch.bool, device=gradient.device)
    rows[tuple(gradient.detach()._indices())] = True
    return RowGradient(gradient.to_dense(), rows)


def as_eager(gradient: Gradient) -> torch.Tensor | None:
    """Returns a copy of a gradient as eager code has it: a sparse one may repeat its indices."""
    if isinstance(gradient, RowGradient):
        rows, dense = gradient.rows, gradient.dense.detach()
        indices = rows.nonzero().t()
        return torch.sparse_coo_tensor(indices, dense[rows], dense.shape, check_invariants=False)
    return None if gradient is None else lazy_copy(gradient)


def gradients_of(params: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Returns copies of the gradients that parameters have now, by name."""
    return {name: as_rows(p.grad.detach().clone()) for name, p in params.items() if p.grad is not None}


def put_gradients(params: Mapping[str, torch.Tensor], grads: Mapping[str, Gradient]) -> None:
    """Gives live parameters these gradients, and the others none."""
    for name, param in params.items():
        grad = grads.get(name)
        param.grad = grad.detach().clone() if isinstance(grad, torch.Tensor) else as_eager(grad)


def by_slot(gradients: Mapping[str, Gradient], roles: Roles = CROSSING) -> dict[Slot, torch.Tensor]:
    """Returns the tensors of gradients by slot."""
    found: dict[Slot, torch.Tensor] = {}
    for name, gradient in gradients.items():
        slots = [Slot(role, name) for role in roles]
        if isinstance(gradient, RowGradient):
            found.update(zip(slots, gradient, strict=True))
        elif gradient is not None:
            found[slots[0]] = gradient
    return found


def from_slots(results: Mapping[Slot, torch.Tensor], names: Iterable[str], roles: Roles = CROSSING) -> dict[str, Any]:
    """Returns the gradients by name that a program computed; None where there is none."""
    found: dict[str, Any] = {}
    for name in names:
        found[name], rows = (results.get(Slot(role, name)) for role in roles)
        if rows is not None:
            found[name] = RowGradient(found[name], rows)
    return found


def made_up_gradients(
    params: Mapping[str, torch.Tensor], names: Iterable[str], generator: torch.Generator, *, sparse: bool
) -> dict[str, Any]:
    """Returns normal noise of the form of each parameter; sparse gradients have all rows."""
    found: dict[str, Any] = {}
    for name in names:
        value = params[name]
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device, value.dtype)
        every = torch.ones(value.shape[:1], dtype=torch.bool, device=value.device)
        found[name] = RowGradient(noise, every) if sparse and value.dim() else noise
    return found
