"""One look at everything that code reads besides its arguments: at which values, and how to tell that they changed."""

from __future__ import annotations

import argparse
import builtins
import enum
import operator
import sys
import weakref
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import is_dataclass
from functools import cached_property, partial, partialmethod
from operator import attrgetter, is_
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as all_modules
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from gimli_compile.code_origins import INSTALLED, file_of, is_framework, is_installed, names_of, packages_of, slots_of
from gimli_compile.scripted_modules import is_scripted
from gimli_compile.snapshot import is_number
from gimli_compile.watching import Same, Watch

_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
# Objects of the standard library whose attributes are whatever was put there.
_NAMESPACES = (SimpleNamespace, argparse.Namespace, UserDict, UserList, ChainMap, cached_property, partialmethod)
_VALUES = (str, bytes, complex, torch.dtype, torch.device, torch.layout, torch.memory_format, enum.Enum, np.generic)
_WRAPPERS = (staticmethod, classmethod)
_MANY = 1000  # longer containers are taken as one object, as is what lies deeper, or comes after so many objects
_DEEP, _MOST = 64, 100_000
_BY_ANY_NAME = {"getattr", "vars", "__dict__", "asdict", "astuple", "fields", "attrgetter", "exec"}
_ANY = "*"  # stands for all names
_REGISTERED = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")
GLOBAL_HOOKS: tuple[Any, ...] = (
    _global_optimizer_pre_hooks,
    _global_optimizer_post_hooks,
    *(getattr(all_modules, f"_global_{name}hooks") for name in ("forward_", "forward_pre_", "backward_")),
)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_hooks_of = attrgetter(*_TENSOR_HOOKS)
_code_of = attrgetter("__code__", "__defaults__", "__kwdefaults__")

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
    are state, `known` the ids of objects whose numbers are inputs of programs, except of the code that the roots at the
    places `apart` reach; `constants` gives the tensors that captured programs hold.
    """

    roots: Iterable[Any]
    modules: Iterable[tuple[nn.Module, Collection[str]]]
    known: Collection[int]
    apart: Collection[int]
    constants: Callable[[], Iterable[torch.Tensor]]


class Walk:
    """One look at everything: what was `found`, in an order of its own, and `tensors` by where they are."""

    def __init__(self, reached: Reached, names: Names) -> None:
        self.names = Names(set(), set())
        self.found: list[tuple[Any, ...]] = []
        self.tensors: dict[Path, Same] = {}
        self._own, self._all = names.own, names.all
        self._reads_any = _ANY in names.own
        self._known, self._apart = frozenset(reached.known), reached.apart
        self._modules = {id(module) for module, _ in reached.modules}
        self._seen: dict[int, tuple[int, Any]] = {}
        self._pending: deque[tuple[Path, Any]] = deque()
        self._entries: list[tuple[Callable[[Any], Any], Any, Any]] = []
        self._cells: list[CellType] = []
        self._empty: list[CellType] = []
        self._watched: list[Any] = []
        self._params: list[torch.Tensor] = []
        self._module_paths: set[Path] = set()
        self._functions: list[FunctionType] = []
        self._objects: list[Any] = []
        self._arrays: list[np.ndarray] = []
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
        self._codes = list(map(_code_of, self._functions))
        self._classes = list(map(type, self._objects))
        self._bytes = [array.tobytes() for array in self._arrays]
        self._watch = Watch(self._watched)

    def key(self) -> Any:
        """Returns what is equal for equal values."""
        return tuple(self.found)

    # ------------------------------------------------------------------ whether it is still so

    def holds(self) -> bool:
        """Tells whether nothing changed since."""
        try:
            return (
                not any(map(_is_filled, self._empty))
                and all(map(is_, map(_call, self._gets, self._keys), self._values))
                and all(map(is_, map(attrgetter("cell_contents"), self._cells), self._contents))
                and list(map(len, self._mappings)) == self._sizes
                and list(map(_hooks_of, self._params)) == self._hooks
                and [array.tobytes() for array in self._arrays] == self._bytes
                and list(map(_code_of, self._functions)) == self._codes
                and all(map(is_, map(type, self._objects), self._classes))
                and self._watch.holds()
            )
        except (ValueError, AttributeError):  # of what was deleted
            return False

    # ------------------------------------------------------------------ values

    def _look(self, path: Path, value: Any) -> None:
        """Looks at a value; one that does not let itself be looked at counts as the object that it is."""
        try:
            self._look_into(path, value)
        except Exception:
            self.found.append((path, Same(value)))

    def _look_into(self, path: Path, value: Any) -> None:
        if value is None or isinstance(value, (bool, *_VALUES)) or is_number(value):
            is_exact = not isinstance(value, (float, complex, np.inexact))
            hash(value)
            self.found.append((path, type(value), value if is_exact else repr(value)))
            return
        if isinstance(value, torch.Tensor):
            self.tensors[path] = Same(value)
            self.found.append((path, "tensor", value.dtype, value.device, value.layout, value.shape))
            return
        if isinstance(value, _WRAPPERS):
            value = value.__func__
        if id(value) in self._modules or (id(value) in self._known and path[0] not in self._apart):
            self.found.append((path, "known"))
            return
        seen = self._seen.get(id(value))
        if seen is not None and not isinstance(value, MethodType):
            self.found.append((path, "again", seen[0]))
            return
        self._seen[id(value)] = len(self._seen), value
        if len(path) > _DEEP or len(self._seen) > _MOST:
            self.found.append((path, Same(value)))
        else:
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
            self._open_others(path, value)

    def _add(self, path: Path, items: Iterable[tuple[Any, Any]]) -> None:
        self._pending += [((*path, key), item) for key, item in items]

    def _open_container(self, path: Path, value: Any) -> None:
        if len(value) > _MANY:
            self.found.append((path, Same(value)))
            return
        items = list(dict.values(value) if isinstance(value, dict) else value)
        self._keep(value)
        self.found.append((path, "holds", type(value), len(value)))
        if isinstance(value, dict):
            keys = [key if _is_plain(key) else Same(key) for key in dict.keys(value)]
            self._add(path, zip(keys, items, strict=True))
        elif isinstance(value, (set, frozenset)):
            plain = {item for item in value if isinstance(item, (str, bytes)) or is_number(item)}
            self.found.append((path, frozenset(plain), *sorted((Same(item) for item in value - plain), key=hash)))
        else:
            self._add(path, enumerate(items))
        if hasattr(value, "__dict__"):
            self._open_object((*path, "attributes"), value)

    # ------------------------------------------------------------------ code

    def _keep(self, container: Any) -> None:
        """Watches what a container holds; of an empty one, its length tells all."""
        (self._watched if container else self._mappings).append(container)

    def _open_function(self, path: Path, function: FunctionType) -> None:
        self.found.append((path, Same(function), Same(function.__code__)))
        if is_framework(function):
            return
        self._functions.append(function)
        globals_read, attributes, imported = names_of(function.__code__)
        if function.__code__.co_filename.startswith(INSTALLED):
            self.names.installed.update(attributes)
        else:
            held = function.__globals__
            self.names.own.update(attributes, {_ANY} if (globals_read | attributes) & _BY_ANY_NAME else ())
            self._read(path, held, sorted(globals_read & held.keys()))
            missing = [name for name in globals_read - held.keys() if not hasattr(builtins, name)]
            self._entries += [(held.get, name, None) for name in missing]
            self._add((*path, "imports"), ((one.__name__, one) for one in packages_of(imported, held)))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                self._pending.append(((*path, name), cell.cell_contents))
                self._cells.append(cell)
            except ValueError:  # not filled yet
                self.found.append((path, name, "empty"))
                self._empty.append(cell)
        if function.__kwdefaults__:
            self._keep(function.__kwdefaults__)
        defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        self._add((*path, "defaults"), enumerate(defaults))
        self._read_attributes((*path, "attributes"), vars(function), self._own)

    def _open_package(self, path: Path, package: ModuleType) -> None:
        if package.__name__ in sys.builtin_module_names or file_of(package).startswith(INSTALLED):
            self.found.append((path, Same(package)))
            return
        self.found.append((path, "package", package.__name__))
        self._mappings.append(vars(package))
        self._read(path, vars(package), [name for name in vars(package) if self._is_named(name)])

    def _open_class(self, path: Path, cls: type) -> None:
        self.found.append((path, Same(cls)))
        for base in cls.__mro__:
            if not is_framework(base):
                held = vars(base)
                names = [name for name in held if self._is_called(cls, name, held[name])]
                self._mappings.append(held)
                self._read((*path, base.__qualname__), held, names)

    def _is_named(self, name: str) -> bool:
        return name in self._own or (self._reads_any and not name.startswith("__"))

    def _is_called(self, cls: type, name: str, value: Any) -> bool:
        """Tells whether code reads an attribute of a class: by name, by an operator, or in the framework's own code."""
        if name in self._all or self._is_named(name):
            return True
        if name.startswith("__"):
            return isinstance(value, FunctionType)
        return any(name in vars(base) for base in cls.__mro__ if is_framework(base))

    # ------------------------------------------------------------------ objects

    def _open_object(self, path: Path, value: Any) -> None:
        """Opens an object; of one whose class is installed, what the user's code names, or its module's class."""
        self.found.append((path, "object"))
        self._objects.append(value)
        self._look((*path, "class"), type(value))
        if hasattr(value, "__dict__"):
            is_own = not is_installed(type(value)) or path[:-1] in self._module_paths
            wanted = vars(value) if isinstance(value, _NAMESPACES) else self._all if is_own else self._own
            self._read_attributes(path, vars(value), wanted)
        for name in sorted({name for base in type(value).__mro__ for name in slots_of(base)}):
            if hasattr(value, name):
                self._entries.append((partial(getattr, value), name, getattr(value, name)))
                self._pending.append(((*path, name), getattr(value, name)))

    def _open_others(self, path: Path, value: Any) -> None:
        """Opens what objects of frameworks hold: numbers of an optimizer or an array, what is wrapped, who is bound."""
        if isinstance(value, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
            self._read_attributes(path, vars(value), ("param_groups", "last_epoch", "_last_lr"))
        if isinstance(value, np.ndarray) and value.size <= _MANY:
            self._arrays.append(value)
            self.found.append((path, "array", value.tobytes()))
        if isinstance(value, weakref.ref):
            self._add(path, (("referent", value()),))
        for name in ("__wrapped__", "__self__"):
            inner = getattr(value, name, None)
            if inner is not None and not isinstance(inner, (ModuleType, type)):
                self._add(path, ((name, inner),))

    def _open_module(self, path: Path, module: nn.Module, state: Collection[str] | None = None) -> None:
        """Opens a module; of the model's own, the options are told by its view, and attributes are `state`."""
        self._objects.append(module)
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
        return self._reads_any or name in self._all or is_framework(type(module))

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
    if isinstance(value, _NAMESPACES) or is_dataclass(value):
        return True
    return not isinstance(value, BuiltinFunctionType) and not is_framework(type(value))


def _is_plain(key: Any) -> bool:
    """Tells whether the key of a dict is a value, and not just an object."""
    return all(map(_is_plain, key)) if type(key) is tuple else isinstance(key, (str, int, float, bytes, type(None)))


def _is_filled(cell: CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def is_option(value: Any) -> bool:
    """Tells whether a value is what a program of its own is captured for: a number, a flag, a text, or several."""
    if isinstance(value, tuple):
        return all(map(is_option, value))
    return value is None or isinstance(value, (bool, str)) or is_number(value)
