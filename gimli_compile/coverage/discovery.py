"""Finds the optimizer classes of a package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import torch

from gimli_compile.errors import InputError, compose_message


def qualified_name(kind: type) -> str:
    """Returns the name that a class is known by: its module and its name there."""
    return f"{kind.__module__}.{kind.__qualname__}"


def optimizer_classes(package: str) -> list[type]:
    """Returns the optimizer classes that a package exports, or those of its modules if it exports none, by name.

    Left out are private classes, those of other distributions that it imports, and those without a `step` of their own.

    Raises:
        InputError: the package cannot be imported, or has no optimizers.
    """
    module = _imported(package)
    found = _classes_in([module])
    if not found:
        found = _classes_in(_modules_below(module))
    if not found:
        raise InputError(
            compose_message(
                f"the package {package!r} has no optimizers",
                None,
                "Neither it nor a module in it has a subclass of `torch.optim.Optimizer` with a `step` of its own.",
                "Name the module that defines them.",
            )
        )
    return sorted(found, key=lambda kind: (kind.__name__, kind.__module__))


def _imported(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except Exception as error:
        raise InputError(
            compose_message(
                f"the package {package!r} cannot be imported",
                None,
                f"{type(error).__name__}: {error}",
                "Install it into this environment, or name a module that can be imported from here.",
            )
        ) from error


def _classes_in(modules: list[ModuleType]) -> list[type]:
    found: dict[int, type] = {}
    for module in modules:
        top = module.__name__.partition(".")[0]
        for value in vars(module).values():
            if inspect.isclass(value) and _is_optimizer(value) and value.__module__.partition(".")[0] == top:
                found[id(value)] = value
    return list(found.values())


def _is_optimizer(kind: type) -> bool:
    if not issubclass(kind, torch.optim.Optimizer) or inspect.isabstract(kind) or kind.__name__.startswith("_"):
        return False
    return getattr(kind, "step", None) is not torch.optim.Optimizer.step


def _modules_below(module: ModuleType) -> list[ModuleType]:
    return [module, *_submodules(module)]


def _submodules(module: ModuleType) -> Iterator[ModuleType]:
    """Yields the modules of a package that can be imported; programs (`__main__`) are not run."""
    for entry in pkgutil.walk_packages(
        getattr(module, "__path__", ()), f"{module.__name__}.", onerror=lambda name: None
    ):
        if entry.name.endswith("__main__"):
            continue
        try:
            yield importlib.import_module(entry.name)
        except Exception:  # what does not import here has nothing to measure
            continue
