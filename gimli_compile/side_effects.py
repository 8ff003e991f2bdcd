"""What a train step leaves in what it reaches beside model and optimizer: counters, logs, caches.

Variables that functions enclose and globals that they name, attributes of functions, classes, objects and modules. All
is as before after a run. What a run left can be put there again, to see whether the next step reads it (`step_memory`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch

from gimli_compile.contents import Contents, contents_of, refilled, same_contents
from gimli_compile.snapshot import is_number

_REGISTRIES = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Place:
    """Something that holds named values: `read` gives them as a new dict, `write` puts one there, or takes it away.

    `is_module` says that it is a module, whose attributes the views give back by themselves.
    """

    prefix: str
    read: Callable[[], Mapping[str, Any]]
    write: Callable[[str, Any], None]
    is_module: bool = False


@dataclass(frozen=True)
class Change:
    """A named value that a run changed: its contents before and after; `MISSING` stands for none."""

    place: Place
    key: str
    before: Any
    after: Any

    @property
    def name(self) -> str:
        """The name, for messages."""
        return f"{self.place.prefix}{self.key}"

    def undo(self) -> None:
        """Puts back what was there."""
        self.place.write(self.key, refilled(self.before))

    def redo(self, stands_for: Mapping[int, torch.Tensor]) -> None:
        """Puts there what the run left, other tensors in place of some."""
        self.place.write(self.key, refilled(self.after, stands_for))

    @property
    def counts(self) -> bool:
        """Tells whether it is a number, a flag, a tensor or a container, and not just another object."""
        return any(_counts(value) for value in (self.before, self.after))


MISSING = object()


@dataclass
class SideEffects:
    """What a run changed, known when it is over."""

    changes: list[Change] = field(default_factory=list)


@contextmanager
def side_effects_undone(places: Iterable[Place]) -> Iterator[SideEffects]:
    """Gives all places their contents back on leaving, and tells what changed."""
    held = [(place, {key: contents_of(value) for key, value in place.read().items()}) for place in places]
    effects = SideEffects()
    try:
        yield effects
    finally:
        for place, before in held:
            after = place.read()
            for key in {**before, **after}:
                was, now = before.get(key, MISSING), contents_of(after.get(key, MISSING))
                if not same_contents(now, was):
                    effects.changes.append(Change(place, key, was, now))
        for change in reversed(effects.changes):
            change.undo()


def places_of_functions(functions: Iterable[FunctionType], names_in: Callable[[Any], set[str]]) -> Iterator[Place]:
    """Yields what functions enclose, the globals that they name, their attributes and their defaults."""
    for function in functions:
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        yield from (Place("", _reader_of(name, cell), _writer_of(cell)) for name, cell in cells)
        names, globals_ = names_in(function.__code__), function.__globals__
        yield Place("", _named(globals_, names), _setter(globals_))
        yield Place(f"{function.__name__}.", lambda f=function: _without_wrapped(f), _setter(vars(function)))
        defaults = function.__kwdefaults__
        if defaults:
            yield Place("", lambda d=defaults: dict(d), _setter(defaults))
        if function.__defaults__:
            yield Place(f"{function.__name__}.", lambda f=function: {"__defaults__": f.__defaults__}, _ignore)


def places_of_objects(owners: Iterable[Any]) -> Iterator[Place]:
    """Yields the attributes of objects, and those of classes."""
    for owner in owners:
        if isinstance(owner, type):
            yield Place(f"{owner.__name__}.", lambda o=owner: _class_attributes(o), _attribute_setter(owner))
        else:
            yield Place(f"{type(owner).__name__}.", lambda o=owner: dict(vars(o)), _setter(vars(owner)))


def places_of_modules(
    modules: Iterable[torch.nn.Module], kept: Mapping[int, Iterable[str]], known: set[int]
) -> Iterator[Place]:
    """Yields the plain attributes of modules; not those of `kept`, by module, and not tensors with the ids `known`."""
    for module in modules:
        names = frozenset(kept.get(id(module), ()))

        def read(module: torch.nn.Module = module, names: frozenset[str] = names) -> dict[str, Any]:
            return {k: v for k, v in vars(module).items() if _is_plain(k, v) and k not in names and id(v) not in known}

        def write(key: str, value: Any, module: torch.nn.Module = module) -> None:
            _put(vars(module), key, value)

        yield Place(f"{type(module).__name__}.", read, write, is_module=True)


def _is_plain(key: str, value: Any) -> bool:
    return key not in _REGISTRIES and not key.endswith("_hooks") and not isinstance(value, torch.nn.Parameter)


def _counts(value: Any) -> bool:
    return is_number(value) or isinstance(value, (bool, torch.Tensor, Contents))


def _put(names: Any, key: str, value: Any) -> None:
    if value is MISSING:
        names.pop(key, None)
    else:
        names[key] = value


def _setter(names: Any) -> Callable[[str, Any], None]:
    return lambda key, value: _put(names, key, value)


def _attribute_setter(owner: Any) -> Callable[[str, Any], None]:
    def write(key: str, value: Any) -> None:
        if value is not MISSING:
            setattr(owner, key, value)
        elif key in vars(owner):
            delattr(owner, key)

    return write


def _ignore(key: str, value: Any) -> None:
    """Does nothing: contents of what cannot be replaced are refilled already."""


def _reader_of(name: str, cell: Any) -> Callable[[], dict[str, Any]]:
    def read() -> dict[str, Any]:
        try:
            return {name: cell.cell_contents}
        except ValueError:  # not filled yet
            return {}

    return read


def _writer_of(cell: Any) -> Callable[[str, Any], None]:
    def write(_: str, value: Any) -> None:
        if value is MISSING:
            del cell.cell_contents
        else:
            cell.cell_contents = value

    return write


def _named(globals_: dict[str, Any], names: set[str]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: globals_[name] for name in names if name in globals_}


def _without_wrapped(function: FunctionType) -> dict[str, Any]:
    return {key: value for key, value in vars(function).items() if key != "__wrapped__"}


def _class_attributes(owner: type) -> dict[str, Any]:
    return {key: value for key, value in vars(owner).items() if not key.startswith("__")}
