"""Reads recipes from a Python file."""

from __future__ import annotations

import runpy
from collections.abc import Mapping
from pathlib import Path

from gimli_compile.coverage.discovery import qualified_name
from gimli_compile.coverage.recipe import Recipe
from gimli_compile.errors import InputError, compose_message


def read_recipes(path: str | Path) -> dict[str, Recipe]:
    """Returns `RECIPES` of a Python file: a mapping from the qualified name of a class to its recipe.

    Raises:
        InputError: the file does not run, or has no such mapping.
    """
    try:
        found = runpy.run_path(str(path)).get("RECIPES")
    except Exception as error:
        raise _unreadable(path, f"Running it raised {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping) or not all(isinstance(recipe, Recipe) for recipe in found.values()):
        raise _unreadable(path, "It has no mapping `RECIPES` from names to recipes.")
    return dict(found)


def recipe_of(kind: type, recipes: Mapping[str, Recipe]) -> Recipe | None:
    """Returns the recipe of a class, by its qualified name or by that of a package above it and its own name."""
    parts = kind.__module__.split(".")
    above = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    names = [qualified_name(kind), *(f"{package}.{kind.__qualname__}" for package in above)]
    return next((recipes[name] for name in names if name in recipes), None)


def _unreadable(path: str | Path, why: str) -> InputError:
    cure = 'Define `RECIPES = {"package.Class": gimli_compile.coverage.Recipe(...)}` in it.'
    return InputError(compose_message(f"{path} is no file of recipes", None, why, cure))
