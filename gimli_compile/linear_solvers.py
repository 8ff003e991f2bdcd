"""Solvers of linear equations between dictionaries of tensors, by products alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from gimli_compile.errors import InputError, compose_message
from gimli_compile.slot import Slot

Vector = Mapping[Slot, torch.Tensor]
Product = Callable[[Vector], Vector]


def solve_by_neumann(product: Product, right: Vector, iterations: int, tolerance: float) -> Vector:
    """Returns u with `u - product(u) = right`, as the sum of repeated products (Lorraine et al. 2020).

    Raises:
        InputError: the terms do not fall below `tolerance`, relative to the sum, in so many iterations.
    """
    total, term = right, right
    for _ in range(iterations):
        term = product(term)
        total = _combined(total, term)
        if _norm(term) <= tolerance * _norm(total):
            return total
    raise _no_solution("neumann", iterations, _norm(term) / _norm(total))


def solve_by_conjugate_gradients(product: Product, right: Vector, iterations: int, tolerance: float) -> Vector:
    """Returns u with `u - product(u) = right`, for a symmetric product with eigenvalues below 1.

    Raises:
        InputError: the product is not symmetric, or the residual does not fall below `tolerance`, relative to `right`.
    """

    def operator(vector: Vector) -> Vector:
        return _combined(vector, product(vector), -1.0)

    _check_symmetry(operator, right)
    found = {slot: torch.zeros_like(value) for slot, value in right.items()}
    residual = direction = right
    square = _dot(residual, residual)
    goal = (tolerance**2) * square
    for _ in range(iterations):
        if square <= goal:
            return found
        image = operator(direction)
        length = square / _dot(direction, image)
        found = _combined(found, direction, length)
        residual = _combined(residual, image, -length)
        square, before = _dot(residual, residual), square
        direction = _combined(residual, direction, square / before)
    if square <= goal:
        return found
    raise _no_solution("cg", iterations, (square / (goal / tolerance**2)) ** 0.5)


def _check_symmetry(operator: Product, right: Vector) -> None:
    """A symmetric B has v . B(Bv) = |Bv|^2."""
    once = operator(right)
    twice = operator(once)
    if abs(_dot(right, twice) - _dot(once, once)) > 1e-3 * (_norm(right) * _norm(twice) + _dot(once, once)):
        raise InputError(
            compose_message(
                'solver="cg" needs a step whose derivative in the state is symmetric',
                None,
                "That of gradient descent with one learning rate is; with momentum, adaptive rates or a rate for each "
                "parameter it is not.",
                'Use `Implicit(solver="neumann")`, or an inner optimizer without them.',
            )
        )


def _no_solution(solver: str, iterations: int, left: float) -> InputError:
    return InputError(
        compose_message(
            f'backward="implicit": the solver "{solver}" did not converge in {iterations} iterations',
            None,
            f"What is left is {left:.1e}, relative. The step may not contract towards where it ended, or slowly.",
            "Raise `Implicit(iterations=...)` or `tolerance`, train longer or with a larger learning rate; a flat "
            'direction of the loss (no regularization) has no implicit gradient: use `backward="reverse"` there.',
        )
    )


def _combined(left: Vector, right: Vector, factor: float = 1.0) -> dict[Slot, torch.Tensor]:
    return {slot: value + factor * right[slot] if slot in right else value for slot, value in left.items()}


def _dot(left: Vector, right: Vector) -> float:
    return float(sum((value.double() * right[slot].double()).sum() for slot, value in left.items() if slot in right))


def _norm(vector: Vector) -> float:
    return _dot(vector, vector) ** 0.5
