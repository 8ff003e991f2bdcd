"""Floats that are written in traced code: they let a counter have its say.

Python asks the left operand first. A concolic int is an int, and a plain float takes any int as it is: `1.0 / step` and
`5.0 < step` would be plain, without a guard. While a trace runs, the floats that are written in the traced modules (in
code, as defaults, as constants of modules, `math.pi` among them, and of classes) and those that the traced functions
enclose are of a kind that declines when the other operand is concolic. Tables of numbers that lie there answer a
concolic index (`gimli_compile.lookups`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from gimli_compile.concolic import Number
from gimli_compile.lookups import answering_table

_CONSTANTS = (math, np, torch)
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


class Literal(float):
    """A float that was written down, or computed from such floats."""

    __hash__ = float.__hash__

    def __neg__(self) -> Literal:
        return Literal(float.__neg__(self))

    def __abs__(self) -> Literal:
        return Literal(float.__abs__(self))


def _make_arithmetic(name: str) -> Callable[..., Any]:
    plain = getattr(float, name)

    def method(self: Literal, other: Any) -> Any:
        if isinstance(other, Number):
            return NotImplemented
        result = plain(self, other)
        return Literal(result) if type(result) is float else result

    return method


def _make_comparison(name: str) -> Callable[..., Any]:
    plain = getattr(float, name)
    return lambda self, other: NotImplemented if isinstance(other, Number) else plain(self, other)


for _name in _ARITHMETIC:
    setattr(Literal, f"__{_name}__", _make_arithmetic(f"__{_name}__"))
    setattr(Literal, f"__r{_name}__", _make_arithmetic(f"__r{_name}__"))
for _name in _COMPARISONS:
    setattr(Literal, f"__{_name}__", _make_comparison(f"__{_name}__"))


def mark(value: Any) -> Any:
    """Returns a constant with its floats made literals, those in tuples and nested code included."""
    if type(value) is float:
        return Literal(value)
    if type(value) is tuple:
        return tuple(map(mark, value))
    return _marked_code(value) if isinstance(value, CodeType) else value


@lru_cache(maxsize=16384)
def _marked_code(code: CodeType) -> CodeType:
    constants = tuple(map(mark, code.co_consts))
    if all(map(operator.is_, constants, code.co_consts)):
        return code
    return code.replace(co_consts=constants)


def functions_of(module: ModuleType) -> Iterator[FunctionType]:
    """Yields the functions that a module defines: its own, its classes', and what decorators wrapped."""
    for value in list(vars(module).values()):
        if isinstance(value, type) and value.__module__ == module.__name__:
            for member in vars(value).values():
                yield from _unwrapped(member)
        elif getattr(value, "__module__", None) == module.__name__:
            yield from _unwrapped(value)


def _unwrapped(member: Any) -> Iterator[FunctionType]:
    if isinstance(member, property):
        members = (member.fget, member.fset)
    else:
        members = (member.__func__,) if isinstance(member, (staticmethod, classmethod)) else (member,)
    for function in members:
        while isinstance(function, FunctionType):
            yield function
            function = getattr(function, "__wrapped__", None)


def held_functions(values: Iterable[Any]) -> list[FunctionType]:
    """Returns the functions among some objects, what they wrap and what they enclose, each once."""
    found: dict[int, FunctionType] = {}

    def visit(value: Any) -> None:
        value = value.__func__ if isinstance(value, MethodType) else value
        if not isinstance(value, FunctionType) or id(value) in found:
            return
        found[id(value)] = value
        visit(getattr(value, "__wrapped__", None))
        for cell in value.__closure__ or ():
            visit(content_of(cell))

    for value in values:
        visit(value)
    return list(found.values())


def content_of(cell: CellType) -> Any:
    """Returns what a closure's cell holds; None if nothing yet."""
    try:
        return cell.cell_contents
    except ValueError:  # an empty cell
        return None


@contextmanager
def literals_marked(modules: Iterable[ModuleType], functions: Iterable[FunctionType] = ()) -> Iterator[None]:
    """Makes the floats that are written in these modules and functions literals while the trace runs."""
    undo: list[Callable[[], None]] = []
    try:
        for module in (*_CONSTANTS, *modules):
            _mark_constants(module, undo)
        for module in modules:
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == module.__name__:
                    _mark_constants(value, undo)
            for function in functions_of(module):
                _mark_function(function, undo)
        for function in functions:
            _mark_function(function, undo)
            for cell in function.__closure__ or ():
                _mark_cell(cell, undo)
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _mark_constants(holder: ModuleType | type, undo: list[Callable[[], None]]) -> None:
    for name, value in list(vars(holder).items()):
        marked = _mark_held(value)
        if marked is not value:
            setattr(holder, name, marked)
            undo.append(partial(setattr, holder, name, value))


def _mark_held(value: Any) -> Any:
    if type(value) is float:
        return Literal(value)
    table = answering_table(value)
    return value if table is None else table


def _mark_cell(cell: CellType, undo: list[Callable[[], None]]) -> None:
    value = content_of(cell)
    marked = _mark_held(value)
    if marked is not value:
        cell.cell_contents = marked
        undo.append(partial(setattr, cell, "cell_contents", value))


def _mark_function(function: FunctionType, undo: list[Callable[[], None]]) -> None:
    before = function.__code__, function.__defaults__, function.__kwdefaults__
    code, defaults = _marked_code(before[0]), mark(before[1])
    keywords = None if before[2] is None else {key: mark(value) for key, value in before[2].items()}
    if code is before[0] and defaults == before[1] and keywords == before[2] and not _has_floats(before[1:]):
        return
    function.__code__, function.__defaults__, function.__kwdefaults__ = code, defaults, keywords

    def restore() -> None:
        function.__code__, function.__defaults__, function.__kwdefaults__ = before

    undo.append(restore)


def _has_floats(defaults: Any) -> bool:
    positional, keywords = defaults
    return any(type(value) is float for value in (*(positional or ()), *(keywords or {}).values()))
