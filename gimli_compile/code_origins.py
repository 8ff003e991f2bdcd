"""Whose code something is, the user's, that of an installed package, or a framework's; and what it names."""

from __future__ import annotations

import dis
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Any

from gimli_compile.outside import is_of_framework, with_inner

INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")})


def is_framework(one: FunctionType | type) -> bool:
    """Tells whether a function or a class is that of a framework; a file of the user's may have the name of one."""
    if not is_of_framework(one) or (isinstance(one, type) and is_dataclass(one)):
        return False
    root = one.__module__.split(".")[0]
    if root not in sys.stdlib_module_names or root in sys.builtin_module_names:
        return True
    origin = one.__code__.co_filename if isinstance(one, FunctionType) else file_of(sys.modules.get(one.__module__))
    return not origin or origin.startswith(("<", *INSTALLED))


def is_installed(cls: type) -> bool:
    """Tells whether a class is that of an installed package, and does not make up attributes as it is asked."""
    return file_of(sys.modules.get(cls.__module__)).startswith(INSTALLED) and not hasattr(cls, "__getattr__")


def file_of(package: Any) -> str:
    """Returns where a module lies; a package without code of its own lies in folders."""
    return getattr(package, "__file__", None) or next(iter(getattr(package, "__path__", ())), "")


def packages_of(names: Iterable[str], held: Mapping[str, Any]) -> list[ModuleType]:
    """Returns the modules that a function imports by these names, among its own globals."""
    places = [f"{prefix}{name}" for name in names for prefix in ("", f"{held.get('__package__') or ''}.")]
    return [sys.modules[place] for place in places if place in sys.modules]


def slots_of(cls: type) -> Iterator[str]:
    """Yields the names of the slots that a class defines."""
    slots = vars(cls).get("__slots__", ())
    for name in (slots,) if isinstance(slots, str) else slots:
        is_private = name.startswith("__") and not name.endswith("__")
        yield f"_{cls.__name__.lstrip('_')}{name}" if is_private else name


@lru_cache(maxsize=10_000)
def names_of(code: CodeType) -> tuple[set[str], set[str], set[str]]:
    """Returns the names of globals that code reads, those that attributes may have (short texts, too), and imports."""
    globals_read: set[str] = set()
    attributes: set[str] = set()
    imported: set[str] = set()
    for inner in with_inner(code):
        for step in dis.get_instructions(inner):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                globals_read.add(step.argval)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
                attributes.add(step.argval)
            elif step.opname == "IMPORT_NAME":
                imported.add(step.argval)
            elif step.opname in ("LOAD_CONST", "KW_NAMES"):
                texts = step.argval if isinstance(step.argval, tuple) else (step.argval,)
                short = [text for text in texts if isinstance(text, str) and len(text) < 80]
                attributes |= {part for text in short for part in text.split(".") if part.isidentifier()}
    return globals_read, attributes, imported
