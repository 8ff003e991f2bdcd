"""Finds a way to train an optimizer class that the live code runs by."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gimli_compile.coverage.live import Trial, default_loss, needs_closure, step_for_second_derivatives
from gimli_compile.coverage.recipe import Recipe, Shapes

SHAPES: tuple[Shapes, ...] = (
    ((3, 2), (4,), (2, 2, 2)),
    ((3, 2), (2, 4)),
    ((3, 2), (4,)),
    ((3, 2, 2, 2), (4,)),
    ((4,), (6,)),
)


class NoTrial(Exception):
    """The live class could not be made or run; the text says how far each way came."""


def find_trial(kind: type, recipe: Recipe) -> Trial:
    """Returns the first way to train a class that the live code runs by, twice with one result.

    Gradients that are drawn come first, then a loss with a closure, then gradients that can be differentiated; each
    over the recipe's shapes or a short list.

    Raises:
        NoTrial: none runs.
    """
    failures: dict[str, str] = {}
    for trial in _candidates(kind, recipe):
        failure = _try(trial)
        if failure is None:
            return trial
        failures.setdefault(failure, trial.driven_by)
    raise NoTrial("; ".join(f"with {way}: {failure}" for failure, way in failures.items()))


def _candidates(kind: type, recipe: Recipe) -> Iterator[Trial]:
    shapes = (recipe.shapes,) if recipe.shapes is not None or recipe.model is not None else SHAPES
    choices = [() if choice is None else choice for choice in shapes]
    if recipe.train_step is not None or recipe.loss is not None:
        for choice in choices:
            yield from _with_loss(Trial(kind, recipe, choice, recipe.loss, recipe.train_step))
        return
    for choice in choices:
        yield Trial(kind, recipe, choice)
    for choice in choices:
        yield Trial(kind, recipe, choice, default_loss, closure=True)
    for choice in choices:
        yield Trial(kind, recipe, choice, train_step=step_for_second_derivatives)


def _with_loss(trial: Trial) -> Iterator[Trial]:
    yield trial
    if trial.train_step is None:
        yield Trial(trial.kind, trial.recipe, trial.shapes, trial.loss, closure=True)


def _try(trial: Trial) -> str | None:
    """Trains twice; returns why that failed, or None."""
    try:
        if not trial.driven_by_loss and needs_closure(trial.start(0)[1]):
            return "`step` needs a closure"
        first, second = trial.history(0), trial.history(0)
    except Exception as error:
        text = str(error).strip().splitlines()
        return f"{type(error).__name__}: {text[0] if text else ''}".strip()
    pairs = zip(first, second, strict=True)
    if any(not torch.equal(a[name].nan_to_num(), b[name].nan_to_num()) for a, b in pairs for name in a):
        return "two runs of the live code from one seed differ"
    if not all(bool(value.isfinite().all()) for value in first[-1].values()):
        return "the live code gives values that are not finite"
    return None
