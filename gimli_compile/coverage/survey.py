"""Measures many classes, one after the other or in several processes."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from gimli_compile.coverage.discovery import optimizer_classes, qualified_name
from gimli_compile.coverage.measurement import Measurement, measure
from gimli_compile.coverage.recipe_file import read_recipes, recipe_of

Item = tuple[str, str]  # a package, and the qualified name of one of its classes


def items_of(packages: Sequence[str], selected: Sequence[str] = ()) -> list[Item]:
    """Returns the classes of packages; `selected` keeps those of these names, qualified or not."""
    found = {}
    for package in packages:
        for kind in optimizer_classes(package):
            name = qualified_name(kind)
            if not selected or {name, kind.__name__} & set(selected):
                found.setdefault(name, (package, name))
    return list(found.values())


def survey(
    items: Sequence[Item], recipes: Path | None = None, jobs: int = 1, time_limit: float = math.inf
) -> Iterator[Measurement]:
    """Yields the measurement of each class as it is done; with `jobs`, in that many processes of one thread each."""
    if jobs <= 1:
        for item in items:
            yield _measure_item(item, recipes, time_limit)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for done in as_completed([pool.submit(_measure_item, item, recipes, time_limit) for item in items]):
            yield done.result()


def _measure_item(item: Item, recipes: Path | None, time_limit: float) -> Measurement:
    package, name = item
    kind = next(kind for kind in optimizer_classes(package) if qualified_name(kind) == name)
    recipe = recipe_of(kind, read_recipes(recipes)) if recipes is not None else None
    return measure(kind, recipe, time_limit)
