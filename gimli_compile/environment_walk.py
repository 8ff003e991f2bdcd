"""One look at everything that code reads besides its arguments: at which values, and how to tell that they changed."""

from __future__ import annotations

import argparse
import dis
import enum
import operator
import sys
import sysconfig
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import lru_cache, partial
from operator import attrgetter, is_
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from gimli_compile.outside import is_of_framework, with_inner
from gimli_compile.scripted_modules import is_scripted
from gimli_compile.snapshot import is_number
from gimli_compile.watching import Same, Watch

_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_NAMESPACES = (SimpleNamespace, argparse.Namespace)
_VALUES = (str, bytes, complex, torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum, np.generic)
_WRAPPERS = (staticmethod, classmethod)
_MANY = 1000  # longer containers are taken as one object
_BY_ANY_NAME = {"getattr", "vars", "__dict__", "asdict", "astuple", "fields", "attrgetter", "exec"}
_ANY = "*"  # stands for all names
_REGISTERED = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_hooks_of = attrgetter(*_TENSOR_HOOKS)
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib", "platstdlib")})

_call: Any = operator.call
Path = tuple[Any, ...]


class Names(NamedTuple):
    """The names that code reads attributes by: the user's own code, and that of installed packages."""

    own: set[str]
    installed: set[str]

    @property
    def all(self) -> set[str]:
        """The names of both."""
        return self.own | self.installed


class Reached(NamedTuple):
    """From where the environment is looked at.

    `roots` are functions and classes whose code is run, `modules` those of the model with the names of attributes that
    are state, `known` the ids of objects whose numbers are inputs of programs, `constants` the tensors that captured
    programs hold.
    """

    roots: Iterable[Any]
    modules: Iterable[tuple[nn.Module, Collection[str]]]
    known: Collection[int]
    constants: Callable[[], Iterable[torch.Tensor]]


class Walk:
    """One look at everything: what was `found`, in an order of its own, and `tensors` by where they are."""

    def __init__(self, reached: Reached, names: Names) -> None:
        self.names = Names(set(), set())
        self.found: list[tuple[Any, ...]] = []
        self.tensors: dict[Path, Same] = {}
        self._own, self._all = names.own, names.all
        self._reads_any = _ANY in names.own
        self._known = {*reached.known, *(id(module) for module, _ in reached.modules)}
        self._seen: dict[int, tuple[int, Any]] = {}
        self._pending: deque[tuple[Path, Any]] = deque()
        self._entries: list[tuple[Callable[[Any], Any], Any, Any]] = []
        self._cells: list[CellType] = []
        self._watched: list[Any] = []
        self._params: list[torch.Tensor] = []
        self._module_paths: set[Path] = set()
        self._mappings: list[Any] = []
        for index, root in enumerate(reached.roots):
            self._pending.append(((index,), root))
        for index, (module, state) in enumerate(reached.modules):
            self._open_module(("model", index), module, state)
        while self._pending:
            self._look(*self._pending.popleft())
        self._gets, self._keys, self._values = ([entry[part] for entry in self._entries] for part in range(3))
        self._contents = [cell.cell_contents for cell in self._cells]
        self._sizes = list(map(len, self._mappings))
        self._hooks = list(map(_hooks_of, self._params))
        self._watch = Watch(self._watched)

    def key(self) -> Any:
        """Returns what is equal for equal values."""
        return tuple(self.found)

    # ------------------------------------------------------------------ whether it is still so

    def holds(self) -> bool:
        """Tells whether nothing changed since."""
        try:
            return (
                all(map(is_, map(_call, self._gets, self._keys), self._values))
                and all(map(is_, map(attrgetter("cell_contents"), self._cells), self._contents))
                and list(map(len, self._mappings)) == self._sizes
                and list(map(_hooks_of, self._params)) == self._hooks
                and self._watch.holds()
            )
        except (ValueError, AttributeError):  # of what was deleted
            return False

    # ------------------------------------------------------------------ values

    def _look(self, path: Path, value: Any) -> None:
        if value is None or isinstance(value, (bool, *_VALUES)) or is_number(value):
            is_exact = not isinstance(value, (float, complex, np.inexact))
            self.found.append((path, type(value), value if is_exact else repr(value)))
            return
        if isinstance(value, torch.Tensor):
            self.tensors[path] = Same(value)
            self.found.append((path, "tensor", value.dtype, value.device, value.layout, value.shape))
            return
        if isinstance(value, _WRAPPERS):
            value = value.__func__
        if id(value) in self._known:
            self.found.append((path, "known"))
            return
        seen = self._seen.get(id(value))
        if seen is not None and not isinstance(value, MethodType):
            self.found.append((path, "again", seen[0]))
            return
        self._seen[id(value)] = len(self._seen), value
        self._open(path, value)

    def _open(self, path: Path, value: Any) -> None:
        if isinstance(value, MethodType):
            self._add(path, (("self", value.__self__), ("function", value.__func__)))
        elif isinstance(value, partial):
            self._add(path, (("function", value.func), ("args", value.args), ("keywords", value.keywords)))
        elif isinstance(value, property):
            self._add(path, (("get", value.fget),))
        elif isinstance(value, _CONTAINERS):
            self._open_container(path, value)
        elif isinstance(value, FunctionType):
            self._open_function(path, value)
        elif isinstance(value, ModuleType):
            self._open_package(path, value)
        elif isinstance(value, nn.Module):
            self._open_module(path, value)
        elif isinstance(value, type):
            self._open_class(path, value)
        elif _is_object(value):
            self._open_object(path, value)
        else:
            self.found.append((path, Same(value)))

    def _add(self, path: Path, items: Iterable[tuple[Any, Any]]) -> None:
        self._pending += [((*path, key), item) for key, item in items]

    def _open_container(self, path: Path, value: Any) -> None:
        if len(value) > _MANY:
            self.found.append((path, Same(value), len(value)))
            return
        self._keep(value)
        self.found.append((path, "holds", type(value), len(value)))
        if isinstance(value, dict):
            keys = [key if isinstance(key, (str, int, float, bytes)) else Same(key) for key in dict.keys(value)]
            self._add(path, zip(keys, dict.values(value), strict=True))
        elif isinstance(value, (set, frozenset)):
            plain = {item for item in value if isinstance(item, (str, bytes)) or is_number(item)}
            self.found.append((path, frozenset(plain), *sorted((Same(item) for item in value - plain), key=hash)))
        else:
            self._add(path, enumerate(value))
        if hasattr(value, "__dict__"):
            self._open_object((*path, "attributes"), value)

    # ------------------------------------------------------------------ code

    def _keep(self, container: Any) -> None:
        """Watches what a container holds; of an empty one, its length tells all."""
        (self._watched if container else self._mappings).append(container)

    def _open_function(self, path: Path, function: FunctionType) -> None:
        self.found.append((path, Same(function)))
        if is_of_framework(function):
            return
        globals_read, attributes = _names_of(function.__code__)
        if function.__code__.co_filename.startswith(_INSTALLED):
            self.names.installed.update(attributes)
        else:
            self.names.own.update(attributes, {_ANY} if (globals_read | attributes) & _BY_ANY_NAME else ())
            self._read(path, function.__globals__, sorted(globals_read & function.__globals__.keys()))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self._pending.append(((*path, name), cell.cell_contents))
                self._cells.append(cell)
            except ValueError:  # not filled yet
                self.found.append((path, name, "empty"))
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self._add((*path, "defaults"), enumerate(defaults))
        if vars(function):
            self._read_attributes((*path, "attributes"), vars(function), self._own)

    def _open_package(self, path: Path, package: ModuleType) -> None:
        origin = getattr(package, "__file__", None) or _INSTALLED[0]  # built in
        if origin.startswith(_INSTALLED):
            self.found.append((path, Same(package)))
            return
        self.found.append((path, "package", package.__name__))
        self._read(path, vars(package), sorted(self._own & vars(package).keys()))

    def _open_class(self, path: Path, cls: type) -> None:
        self.found.append((path, Same(cls)))
        for base in cls.__mro__:
            if not is_of_framework(base):
                held = vars(base)
                names = [name for name in held if name in self._all or _is_operator(name, held[name])]
                self._read((*path, base.__qualname__), held, names)

    # ------------------------------------------------------------------ objects

    def _open_object(self, path: Path, value: Any) -> None:
        """Opens an object; of one whose class is installed, what the user's code names, or its module's class."""
        self.found.append((path, "object"))
        self._look((*path, "class"), type(value))
        if hasattr(value, "__dict__"):
            is_own = not _is_installed(type(value)) or path[:-1] in self._module_paths
            self._read_attributes(path, vars(value), self._all if is_own else self._own)
        for name in sorted({name for base in type(value).__mro__ for name in _slots_of(base)}):
            if hasattr(value, name):
                self._entries.append((partial(getattr, value), name, getattr(value, name)))
                self._pending.append(((*path, name), getattr(value, name)))

    def _open_module(self, path: Path, module: nn.Module, state: Collection[str] | None = None) -> None:
        """Opens a module; of the model's own, the options are told by its view, and attributes are `state`."""
        self._look((*path, "class"), type(module))
        if is_scripted(module):
            return
        self._module_paths.add(path)
        held = vars(module)
        for name, param in held["_parameters"].items():
            self._open_hooks((*path, name), param)
        registered = _HOOKS if state is not None else (*_HOOKS, "_parameters", "_buffers", "_modules")
        for name in registered:
            self._keep(held[name])
            self._add((*path, name), held[name].items())
        names = [name for name in held if name not in _REGISTERED and self._is_wanted_of_module(name, module)]
        if state is None:
            names.append("training")
        else:
            names = [name for name in names if name not in state and not is_option(held[name])]
        self._read(path, held, names)
        self._mappings.append(held)

    def _open_hooks(self, path: Path, param: torch.Tensor | None) -> None:
        if param is not None:
            self._params.append(param)
            for name, held in zip(_TENSOR_HOOKS, _hooks_of(param), strict=True):
                self._look((*path, name), held)

    def _is_wanted_of_module(self, name: str, module: nn.Module) -> bool:
        return self._reads_any or name in self._all or is_of_framework(type(module))

    def _read_attributes(self, path: Path, held: dict[str, Any], wanted: Collection[str]) -> None:
        self._mappings.append(held)
        self._read(path, held, [name for name in held if self._reads_any or name in wanted])

    def _read(self, path: Path, held: Any, names: Iterable[str]) -> None:
        """Looks at what names hold, and watches them."""
        for name in names:
            self._entries.append((held.get, name, held[name]))
            self._pending.append(((*path, name), held[name]))


def _is_object(value: Any) -> bool:
    """Tells whether a value is an object with attributes of the user's, or of a package that is no framework."""
    if isinstance(value, _NAMESPACES):
        return True
    return not isinstance(value, (BuiltinFunctionType, torch.optim.Optimizer)) and not is_of_framework(type(value))


def _is_installed(cls: type) -> bool:
    """Tells whether a class is that of an installed package, and does not make up attributes as it is asked."""
    package = sys.modules.get(cls.__module__)
    origin = getattr(package, "__file__", None) or ""
    return origin.startswith(_INSTALLED) and not hasattr(cls, "__getattr__")


def _is_operator(name: str, value: Any) -> bool:
    """Tells whether code may call a method without its name."""
    return name.startswith("__") and isinstance(value, FunctionType)


def is_option(value: Any) -> bool:
    """Tells whether a value is what a program of its own is captured for: a number, a flag, a text, or several."""
    if isinstance(value, tuple):
        return all(map(is_option, value))
    return value is None or isinstance(value, (bool, str)) or is_number(value)


def _slots_of(cls: type) -> Iterator[str]:
    slots = vars(cls).get("__slots__", ())
    yield from (name for name in ((slots,) if isinstance(slots, str) else slots) if not name.startswith("__"))


@lru_cache(maxsize=10_000)
def _names_of(code: CodeType) -> tuple[set[str], set[str]]:
    """Returns the names of globals that code reads, and those that attributes may have: names and short texts."""
    globals_read: set[str] = set()
    attributes: set[str] = set()
    for inner in with_inner(code):
        for step in dis.get_instructions(inner):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                globals_read.add(step.argval)
            elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
                attributes.add(step.argval)
            elif step.opname == "LOAD_CONST" and isinstance(step.argval, str) and len(step.argval) < 80:
                attributes |= {part for part in step.argval.split(".") if part.isidentifier()}
    return globals_read, attributes
