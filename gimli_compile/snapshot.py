"""Takes apart what an optimizer holds, and puts it back together with other values.

`freeze` walks an object and whatever it owns (dicts, lists, deques, sets, partial functions, objects with attributes)
and gives a skeleton: the same structure with a `Leaf` in the place of every tensor and number and a `ParamRef` in the
place of every parameter. Companions (a scheduler) are walked after the object and belong to the same skeleton.
`installed` builds the structure again from a skeleton, with values of the caller's choice, inside the live objects;
on leaving, the live objects have back exactly what they had.
"""

from __future__ import annotations

import enum
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

Value = torch.Tensor | float | int
GROUPS = "param_groups"


@dataclass(frozen=True)
class Leaf:
    """The place of one tensor or number. `path` names it, `kind` is tensor, int or float."""

    path: str
    kind: str


@dataclass(frozen=True)
class ParamRef:
    """The place of a parameter, by name."""

    name: str


@dataclass(frozen=True)
class Companion:
    """The key of an object that is walked beside the root and is no attribute of it."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Container:
    """The place of a dict, list, tuple, deque, set or object; `index` counts them in the order of the walk."""

    index: int
    make: Callable[[list[Any]], Any]
    items: tuple[tuple[Any, Any], ...]
    owner: Any = None
    fixed: bool = False


@dataclass(frozen=True)
class Again:
    """A second place of the container with this index."""

    index: int


@dataclass(frozen=True)
class Skeleton:
    """A structure without its values. Two skeletons are equal when every part but the values is."""

    root: Any
    key: tuple[Any, ...]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Skeleton) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def freeze(
    root: Any, names: Mapping[int, str], companions: Mapping[str, Any] | None = None
) -> tuple[Skeleton, dict[str, Value]]:
    """Returns the skeleton of an object and its values by path; `names` maps the id of a parameter to its name.

    The values of `companions` lie at paths that begin with their names.
    """
    walk = _Walk(names)
    part = walk.visit(root, ())
    if companions:
        beside = tuple((Companion(name), walk.visit(value, (name,))) for name, value in companions.items())
        part = replace(part, items=(*part.items, *beside))
    return Skeleton(part, tuple(walk.key)), walk.values


def is_number(value: Any) -> bool:
    """Tells whether a value is an int or a float, of Python or NumPy, and neither a bool nor an enum."""
    if isinstance(value, (bool, np.bool_, enum.Enum)):
        return False
    return isinstance(value, (int, float, np.integer, np.floating))


class _Walk:
    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        self.values: dict[str, Value] = {}
        self.key: list[Any] = []
        self._seen: dict[int, Any] = {}
        self._keep: list[Any] = []
        self._count = 0

    def visit(self, value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, torch.Tensor):
            return self._visit_tensor(value, path)
        if is_number(value):
            return self._leaf(value, path, "int" if isinstance(value, (int, np.integer)) else "float")
        make, items, owner = _open(value)
        if make is None:
            self.key.append(_static_key(value))
            return value
        if id(value) in self._seen and not isinstance(value, tuple):
            self.key.append(("again", self._seen[id(value)]))
            return Again(self._seen[id(value)])
        index = self._seen[id(value)] = self._count
        self._count += 1
        self._keep.append(value)
        self.key.append(
            (stands_for(value).__qualname__, len(items), value.maxlen if isinstance(value, deque) else None)
        )
        parts = tuple((self._visit_key(key), self.visit(item, (*path, self._step(key)))) for key, item in items)
        return Container(index, make, parts, owner, isinstance(value, _IMMUTABLE))

    def _visit_tensor(self, value: torch.Tensor, path: tuple[str, ...]) -> Any:
        name = self.names.get(id(value))
        if name is not None:
            self.key.append(("param", name))
            return ParamRef(name)
        known = self._seen.get(id(value))
        if known is not None:
            self.key.append(("leaf again", known.path))
            return known
        self._keep.append(value)
        leaf = self._seen[id(value)] = self._leaf(value, path, "tensor")
        return leaf

    def _leaf(self, value: Any, path: tuple[str, ...], kind: str) -> Leaf:
        text = _path_text(path)
        while text in self.values:
            text += "_"
        self.values[text] = value
        self.key.append((kind, text))
        return Leaf(text, kind)

    def _visit_key(self, key: Any) -> Any:
        if isinstance(key, torch.Tensor):
            part = ParamRef(self.names.get(id(key), f"tensor {id(key)}"))
            self.key.append(part)
            return part if id(key) in self.names else key
        key = getattr(key, "plain", key) if is_number(key) else key
        self.key.append(key)
        return key

    def _step(self, key: Any) -> str:
        return self.names.get(id(key), "tensor") if isinstance(key, torch.Tensor) else str(key)


def _path_text(path: tuple[str, ...]) -> str:
    if path[:1] == (GROUPS,):
        return ".".join(("groups", *path[1:]))
    if path[:1] == ("state",):
        path = path[1:]
    return ".".join(path)


def _static_key(value: Any) -> Any:
    return ("object", id(value)) if is_opaque(value) else value


def is_opaque(part: Any) -> bool:
    """Tells whether a part of a skeleton is an object that is known by its identity only, such as a function."""
    known = (bool, str, bytes, torch.dtype, torch.device, enum.Enum, type, Leaf, ParamRef, Again, Container)
    return part is not None and not isinstance(part, known)


_IMMUTABLE = (tuple, frozenset, partial)


_OPAQUE = (
    enum.Enum,
    type,
    ModuleType,
    FunctionType,
    MethodType,
    BuiltinFunctionType,
    torch.Generator,
    torch.dtype,
    torch.device,
)


def _open(value: Any) -> tuple[Callable[[list[Any]], Any] | None, list[tuple[Any, Any]], Any]:
    """Returns how to build a container from (key, value) pairs, those pairs, and the object that owns them, if any."""
    if isinstance(value, dict):
        return _dict_maker(value), list(value.items()), None
    if isinstance(value, deque):
        length = value.maxlen
        return (lambda pairs: deque((item for _, item in pairs), maxlen=length)), list(enumerate(value)), None
    if isinstance(value, tuple):
        kind = type(value)
        if hasattr(kind, "_fields"):
            return (lambda pairs: kind(*(item for _, item in pairs))), list(enumerate(value)), None
        return (lambda pairs: tuple(item for _, item in pairs)), list(enumerate(value)), None
    if isinstance(value, list):
        return (lambda pairs: [item for _, item in pairs]), list(enumerate(value)), None
    if isinstance(value, (set, frozenset)):
        plain = frozenset if isinstance(value, frozenset) else set
        return (lambda pairs: plain(key for key, _ in pairs)), [(key, None) for key in _in_order(value)], None
    if type(value) is partial:
        items = [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
        return (lambda pairs: partial(pairs[0][1], *pairs[1][1], **pairs[2][1])), items, None
    if _is_owned_object(value):
        return dict, [(k, v) for k, v in _attributes(value) if not _is_hook(k)], value
    return None, [], None


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Returns the attributes, groups and state first: what several attributes share is named after those."""
    return sorted(vars(value).items(), key=lambda pair: pair[0] not in (GROUPS, "state"))


def _is_owned_object(value: Any) -> bool:
    if isinstance(value, _OPAQUE) or not hasattr(value, "__dict__") or (callable(value) and not _has_state(value)):
        return False
    module = type(value).__module__.split(".")[0]
    return module not in sys.stdlib_module_names


def _has_state(value: Any) -> bool:
    return isinstance(value, torch.nn.Module) or bool(vars(value))


def _is_hook(name: str) -> bool:
    return name.endswith("_hooks") or name.startswith("_zero_grad_profile")


def _dict_maker(value: dict[Any, Any]) -> Callable[[list[Any]], Any]:
    if isinstance(value, defaultdict):
        factory = value.default_factory
        return lambda pairs: defaultdict(factory, pairs)
    if isinstance(value, OrderedDict):
        return OrderedDict
    if stands_for(value) is dict:
        return dict
    kind = stands_for(value)

    def make(pairs: list[Any]) -> Any:
        made = kind.__new__(kind)
        dict.update(made, pairs)
        return made

    return make


def _in_order(elements: Any) -> list[Any]:
    """Returns the elements of a set, numbers and strings in an order that does not depend on how it was filled."""
    found = list(elements)
    return sorted(found, key=repr) if all(is_number(item) or isinstance(item, str) for item in found) else found


def stands_for(value: Any) -> Any:
    """Returns the class of a value; of a form that is used while a trace runs, the class that it stands for."""
    return getattr(type(value), "stands_for", type(value))


def _as_made(_: Container, made: Any) -> Any:
    return made


@contextmanager
def installed(
    skeleton: Skeleton,
    value_of: Callable[[Leaf], Any],
    param_of: Callable[[str], Any],
    adapt: Callable[[Container, Any], Any] = _as_made,
) -> Iterator[None]:
    """Fills the live objects of a skeleton with the caller's values, and restores them on leaving.

    `adapt` may give another form of each container that is made: empty ones that are filled later, or complete tuples.
    """
    before: list[tuple[Any, dict[str, Any]]] = []
    made: dict[int, Any] = {}
    pending: dict[str, Any] = {}

    def build(part: Any) -> Any:
        if isinstance(part, Leaf):
            if part.path not in pending:
                pending[part.path] = value_of(part)
            return pending[part.path]
        if isinstance(part, ParamRef):
            return param_of(part.name)
        if isinstance(part, Again):
            return made[part.index]
        if not isinstance(part, Container):
            return part
        if part.owner is not None:
            return _fill(part, build, made, before)
        shell = None if part.fixed else adapt(part, part.make([]))
        made[part.index] = shell
        pairs = [(build(key) if isinstance(key, ParamRef) else key, build(item)) for key, item in part.items]
        made[part.index] = adapt(part, part.make(pairs)) if part.fixed else _refill(shell, pairs, part.make)
        return made[part.index]

    try:
        build(skeleton.root)
        yield
    finally:
        for owner, attributes in reversed(before):
            object.__setattr__(owner, "__dict__", attributes)


def _fill(part: Container, build: Callable[[Any], Any], made: dict[int, Any], before: list[Any]) -> Any:
    owner = part.owner
    made[part.index] = owner
    original = vars(owner)
    built = [(key, build(item)) for key, item in part.items]
    attributes = {key: item for key, item in built if not isinstance(key, Companion)}
    attributes.update({key: item for key, item in original.items() if _is_hook(key)})
    before.append((owner, original))
    object.__setattr__(owner, "__dict__", attributes)
    return owner


def _refill(shell: Any, pairs: list[Any], make: Callable[[list[Any]], Any]) -> Any:
    """Fills a mutable container in place, so that parts which refer back to it see the same object."""
    if isinstance(shell, dict):
        for key, item in pairs:
            shell[key] = item
        return shell
    if isinstance(shell, set):
        shell.update(key for key, _ in pairs)
        return shell
    if isinstance(shell, (list, deque)):
        shell.extend(item for _, item in pairs)
        return shell
    return make(pairs)


def leaves_of(skeleton: Skeleton) -> list[Leaf]:
    """Returns the leaves of a skeleton in the order of the walk, each once."""
    found: dict[str, Leaf] = {}

    def visit(part: Any) -> None:
        if isinstance(part, Leaf):
            found.setdefault(part.path, part)
        elif isinstance(part, Container):
            for _, item in part.items:
                visit(item)

    visit(skeleton.root)
    return list(found.values())


def owners_of(skeleton: Skeleton) -> list[Any]:
    """Returns the live objects of a skeleton."""
    return [part.owner for part in _parts(skeleton.root) if isinstance(part, Container) and part.owner is not None]


def opaque_of(skeleton: Skeleton) -> list[Any]:
    """Returns what a skeleton holds by identity: functions and the like."""
    return [part for part in _parts(skeleton.root) if is_opaque(part)]


def _parts(part: Any) -> Iterator[Any]:
    yield part
    if isinstance(part, Container):
        for _, item in part.items:
            yield from _parts(item)


@contextmanager
def grads_set(params: Mapping[str, torch.Tensor], grads: Mapping[str, torch.Tensor | None]) -> Iterator[None]:
    """Gives parameters gradients, and takes them away again."""
    for name, grad in grads.items():
        params[name].grad = grad
    try:
        yield
    finally:
        for param in params.values():
            param.grad = None
