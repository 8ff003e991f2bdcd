"""Takes apart what an optimizer holds, and puts it back together with other values.

`freeze` walks an object and whatever it owns (dicts, lists, deques, sets, partial functions, objects with attributes)
and gives a skeleton: the same structure with a `Leaf` in the place of every tensor and number and a `ParamRef` in the
place of every parameter. Modules that the object owns are walked as well: what is registered in them is named as they
name it (`net.0.weight`). Companions (a scheduler) are walked after the object and belong to the same skeleton.
`installed` builds the structure again from a skeleton, with values of the caller's choice, inside the live objects;
on leaving, the live objects have back exactly what they had.
"""

from __future__ import annotations

import enum
import sys
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from gimli_compile.skeleton import Again, Companion, Container, IdRef, Leaf, ParamRef, Skeleton, Value, is_opaque

GROUPS = "param_groups"


def freeze(
    root: Any,
    names: Mapping[int, str],
    opaque: Collection[int] = (),
    companions: Mapping[str, Any] | None = None,
    visited: list[Any] | None = None,
) -> tuple[Skeleton, dict[str, Value]]:
    """Returns the skeleton of an object and its values by path.

    `names` maps the id of a parameter to its name, `opaque` are the ids of objects that are taken as they are. The
    values of `companions` lie at paths that begin with their names. The containers and tensors that the walk came by
    are added to `visited`.
    """
    walk = _Walk(names, getattr(root, GROUPS, ()), opaque)
    part = walk.visit(root, ())
    if companions:
        beside = tuple((Companion(name), walk.visit(value, (name,))) for name, value in companions.items())
        part = replace(part, items=(*part.items, *beside))
    groups = tuple(walk.groups[index] for index in sorted(walk.groups))
    if visited is not None:
        visited += walk.visited
    return Skeleton(part, tuple(walk.key), groups), walk.values


def is_number(value: Any) -> bool:
    """Tells whether a value is an int or a float, of Python or NumPy, and neither a bool nor an enum."""
    if isinstance(value, (bool, np.bool_, enum.Enum)):
        return False
    return isinstance(value, (int, float, np.integer, np.floating))


class _Walk:
    def __init__(self, names: Mapping[int, str], groups: Sequence[Any], opaque: Collection[int]) -> None:
        self.names = names
        self.opaque = opaque
        self.groups: dict[int, Container] = {}
        self._group_index = {id(group): index for index, group in enumerate(groups)}
        self.values: dict[str, Value] = {}
        self.key: list[Any] = []
        self._seen: dict[int, Any] = {}
        self.visited: list[Any] = []
        self._registered: set[int] = set()
        self._count = 0

    def visit(self, value: Any, path: tuple[str, ...], *, constant: bool = False) -> Any:
        """Returns the part of a skeleton for a value; numbers are a part of the structure where `constant` says so."""
        if isinstance(value, torch.Tensor):
            return self._visit_tensor(value, path)
        if is_number(value):
            if constant:
                self.key.append(("constant", value))
                return value
            kind = "int" if isinstance(value, (int, np.integer)) else "float"
            return self._leaf(Leaf(self._free_text(path), kind), value)
        make, items, owner = (None, [], None) if id(value) in self.opaque else _open(value)
        if make is None:
            self.key.append(_static_key(value))
            return value
        if id(value) in self._seen and not isinstance(value, tuple):
            self.key.append(("again", self._seen[id(value)]))
            return Again(self._seen[id(value)])
        group = self._group_index.get(id(value))
        path = path if group is None else (GROUPS, str(group))
        index = self._seen[id(value)] = self._count
        self._count += 1
        self.visited.append(value)
        kind = stands_for(value)
        self.key.append((kind.__qualname__, len(items), value.maxlen if isinstance(value, deque) else None))
        if isinstance(value, torch.nn.Module):
            self._registered.update(id(parameter) for parameter in value._parameters.values())
        parts = tuple((self._visit_key(key), self._visit_item(value, key, item, path, constant)) for key, item in items)
        part = Container(index, make, parts, owner, isinstance(value, _IMMUTABLE))
        if group is not None:
            self.groups[group] = part
        return part

    def _visit_item(self, owner: Any, key: Any, item: Any, path: tuple[str, ...], constant: bool) -> Any:
        if not isinstance(owner, torch.nn.Module):
            return self.visit(item, (*path, self._step(key)), constant=constant)
        if key in _REGISTRIES:
            return self.visit(item, path)
        return self.visit(item, (*path, key), constant=type(owner).__module__.startswith("torch."))

    def _visit_tensor(self, value: torch.Tensor, path: tuple[str, ...]) -> Any:
        name = self.names.get(id(value))
        if name is not None:
            self.key.append(("param", name))
            return ParamRef(name)
        known = self._seen.get(id(value))
        if known is not None:
            self.key.append(("leaf again", known.path))
            return known
        self.visited.append(value)
        leaf = Leaf(
            self._free_text(path),
            "tensor",
            value.requires_grad and value.is_leaf,
            isinstance(value, torch.nn.Parameter),
            id(value) in self._registered,
        )
        self._seen[id(value)] = leaf
        return self._leaf(leaf, value)

    def _leaf(self, leaf: Leaf, value: Any) -> Leaf:
        self.values[leaf.path] = value
        self.key.append((leaf.kind, leaf.path, leaf.requires_grad, leaf.is_parameter, leaf.of_module))
        return leaf

    def _free_text(self, path: tuple[str, ...]) -> str:
        text = _path_text(path)
        while text in self.values:
            text += "_"
        return text

    def _visit_key(self, key: Any) -> Any:
        if isinstance(key, torch.Tensor):
            part = ParamRef(self.names.get(id(key), f"tensor {id(key)}"))
            self.key.append(part)
            return part if id(key) in self.names else key
        key = getattr(key, "plain", key) if is_number(key) else key
        key = IdRef(self.names[key]) if type(key) is int and key in self.names else key
        self.key.append(key)
        return key

    def _step(self, key: Any) -> str:
        if isinstance(key, torch.Tensor):
            return self.names.get(id(key), "tensor")
        return self.names.get(key, str(key)) if type(key) is int else str(key)


def _path_text(path: tuple[str, ...]) -> str:
    if path[:1] == (GROUPS,):
        return ".".join(("groups", *path[1:]))
    if path[:1] == ("state",):
        path = path[1:]
    return ".".join(path)


def _static_key(value: Any) -> Any:
    if not is_opaque(value):
        return value
    if isinstance(value, FunctionType):
        return ("function", value.__code__, tuple(map(_cell_key, value.__closure__ or ())))
    if isinstance(value, weakref.ReferenceType):
        return "weak reference"
    return ("object", id(value))


_IMMUTABLE = (tuple, frozenset, partial)


def _cell_key(cell: Any) -> Any:
    """Tells apart functions of one definition by what they hold, as far as that is no value of one step."""
    try:
        held = cell.cell_contents
    except ValueError:
        return None
    if is_number(held) or isinstance(held, FunctionType):
        return held if is_number(held) else held.__code__
    return held if isinstance(held, (bool, str, bytes, type, torch.dtype, torch.device)) else type(held)


_REGISTRIES = ("_parameters", "_buffers", "_modules")
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
    if is_owned_object(value):
        return dict, [(k, v) for k, v in _attributes(value) if not _is_hook(k)], value
    return None, [], None


def _attributes(value: Any) -> list[tuple[str, Any]]:
    """Returns the attributes in the order in which they name what they share: groups and state, modules, the others."""
    first = (GROUPS, "state")
    return sorted(
        vars(value).items(), key=lambda pair: (pair[0] not in first, not isinstance(pair[1], torch.nn.Module))
    )


def is_owned_object(value: Any) -> bool:
    """Tells whether a value is an object whose attributes are walked."""
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


_Adapt = Callable[[Container, Any], Any]


def _as_made(_: Container, made: Any) -> Any:
    return made


@contextmanager
def installed(
    skeleton: Skeleton,
    value_of: Callable[[Leaf], Any],
    param_of: Callable[[str], Any],
    adapt: _Adapt = _as_made,
) -> Iterator[None]:
    """Fills the live objects of a skeleton with the caller's values, and restores them on leaving.

    `adapt` may give another form of each container that is made: empty ones that are filled later, or complete tuples.
    """
    filling = _Filling(value_of, param_of, adapt)
    try:
        filling.build(skeleton.root)
        yield
    finally:
        for owner, attributes in reversed(filling.before):
            object.__setattr__(owner, "__dict__", attributes)


class _Filling:
    """Builds the parts of a skeleton. Nothing of it refers to itself, so that the values go when it goes."""

    def __init__(self, value_of: Callable[[Leaf], Any], param_of: Callable[[str], Any], adapt: _Adapt) -> None:
        self.value_of = value_of
        self.param_of = param_of
        self.adapt = adapt
        self.before: list[tuple[Any, dict[str, Any]]] = []
        self._made: dict[int, Any] = {}
        self._pending: dict[str, Any] = {}

    def build(self, part: Any) -> Any:
        """Returns the live form of a part."""
        if isinstance(part, Leaf):
            if part.path not in self._pending:
                self._pending[part.path] = self.value_of(part)
            return self._pending[part.path]
        if isinstance(part, ParamRef):
            return self.param_of(part.name)
        if isinstance(part, IdRef):
            return id(self.param_of(part.name))
        if isinstance(part, Again):
            return self._made[part.index]
        if not isinstance(part, Container):
            return part
        return self._build_object(part) if part.owner is not None else self._build_container(part)

    def _build_container(self, part: Container) -> Any:
        shell = None if part.fixed else self.adapt(part, part.make([]))
        self._made[part.index] = shell
        pairs = [(self.build(key), self.build(item)) for key, item in part.items]
        made = self.adapt(part, part.make(pairs)) if part.fixed else _refill(shell, pairs, part.make)
        self._made[part.index] = made
        return made

    def _build_object(self, part: Container) -> Any:
        owner = part.owner
        self._made[part.index] = owner
        original = vars(owner)
        built = [(key, self.build(item)) for key, item in part.items]
        attributes = {key: item for key, item in built if not isinstance(key, Companion)}
        attributes.update({key: item for key, item in original.items() if _is_hook(key)})
        self.before.append((owner, original))
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
