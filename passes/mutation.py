"""In-place operators and views become values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.metadata import insert_call
from gimli_compile.program import Program

aten = torch.ops.aten
_DUNDERS = {
    "__iand__": "__and__", "__ior__": "__or__", "__ixor__": "__xor__",
    "__ilshift__": "__lshift__", "__irshift__": "__rshift__",
}  # fmt: skip
_RESHAPES = {
    aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.squeeze.default, aten.squeeze.dim,
    aten.squeeze.dims, aten.unsqueeze.default,
}  # fmt: skip
_VIEWED_IN_PLACE = {"unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_"}
_SAME = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}


def functionalize(program: Program) -> Program:
    """Rewrites in-place operators out of place; a write through a view reaches what it is a view of.

    A result is the last value of the tensor that it named. `copy_` becomes the copied value itself, cast and expanded
    if need be. Where the user's code runs under `no_grad` (`meta["stop"]`) a `detach` says so.

        row = aten.select.int(a, 0, 1)            row = aten.select.int(a, 0, 1)
        mul_ = aten.mul_.Tensor(row, b)   becomes   mul = aten.mul.Tensor(row, b)
        return (a,)                               select_scatter = aten.select_scatter.default(a, mul, 0, 1)
                                                  return (select_scatter,)
    """
    return _Rewrite(program).run()


@dataclass
class _Storage:
    """What several tensors share: its present value."""

    value: fx.Node
    version: int = 0


@dataclass(frozen=True)
class _View:
    """One view operator, with its arguments but the first; `part` picks from operators that return several views."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    like: fx.Node
    part: int | None = None


@dataclass
class _Alias:
    """A tensor of the old graph: a chain of views of a storage, and the node of its value at a version."""

    storage: _Storage
    chain: tuple[_View, ...]
    node: fx.Node
    version: int


class _Rewrite:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.aliases: dict[fx.Node, _Alias] = {}
        self.parts: dict[fx.Node, Any] = {}

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.read))
            elif node.op == "placeholder":
                self._own(node, self._copy(node))
            elif node.target is operator.getitem:
                self._take_part(node)
            else:
                self._call(node)
        return replace(self.program, graph=self.graph, stage="functional")

    # ------------------------------------------------------------------ values

    def _copy(self, node: fx.Node) -> fx.Node:
        copied = self.graph.node_copy(node, self.read)
        copied.meta = dict(node.meta)
        return copied

    def _own(self, node: fx.Node, value: fx.Node) -> None:
        self.aliases[node] = _Alias(_Storage(value), (), value, 0)

    def read(self, node: fx.Node) -> fx.Node:
        """Returns the present value of a tensor of the old graph."""
        alias = self.aliases[node]
        if alias.version != alias.storage.version:
            value = alias.storage.value
            for view in alias.chain:
                value = self._apply(view, value)
            alias.node, alias.version = value, alias.storage.version
        return alias.node

    def _write(self, node: fx.Node, value: fx.Node) -> None:
        alias = self.aliases[node]
        old = self.read(node)
        value = self._fit(value, old.meta["val"], node)
        if node.meta.get("stop"):
            value = self._stopped(value, node)
        alias.storage.value = self._put(alias.chain, alias.storage.value, value)
        alias.storage.version += 1
        alias.node, alias.version = value, alias.storage.version

    def _put(self, chain: tuple[_View, ...], base: fx.Node, value: fx.Node) -> fx.Node:
        """Returns `base` with the part that the views of `chain` show replaced by `value`."""
        if not chain:
            return value
        if len(chain) > 1:
            value = self._put(chain[1:], self._apply(chain[0], base), value)
        return self._scatter(chain[0], base, value)

    def _apply(self, view: _View, base: fx.Node) -> fx.Node:
        made = self._insert(view.target, (base, *view.args), view.kwargs, view.like)
        made.meta["stop"] = view.like.meta.get("stop", False)
        return made if view.part is None else self._insert(operator.getitem, (made, view.part), {}, view.like)

    def _insert(self, target: Any, args: Any, kwargs: Any, like: fx.Node) -> fx.Node:
        return insert_call(self.graph, target, args, kwargs, like=like)

    def _fit(self, value: fx.Node, form: torch.Tensor, like: fx.Node) -> fx.Node:
        """Casts and expands a value to the form of the tensor that it is written to."""
        val = value.meta["val"]
        if val.dtype != form.dtype or val.device != form.device:
            options = {"dtype": form.dtype} | ({"device": form.device} if val.device != form.device else {})
            value = self._insert(aten._to_copy.default, (value,), options, like)
        if val.shape != form.shape:
            value = self._insert(aten.expand.default, (value, list(form.shape)), {}, like)
        return value

    def _stopped(self, value: fx.Node, like: fx.Node) -> fx.Node:
        if not isinstance(value.meta["val"], torch.Tensor) or not value.meta["val"].is_floating_point():
            return value
        stop = self._insert(aten.detach.default, (value,), {}, like)
        stop.meta["stop"] = True
        return stop

    # ------------------------------------------------------------------ calls

    def _call(self, node: fx.Node) -> None:
        if not isinstance(node.target, torch._ops.OpOverload):
            self.parts[node] = made = self._copy(node)
            self._own(node, made)
        elif node.target._schema.is_mutable:
            self._call_mutable(node)
        elif _is_view(node.target):
            self._call_view(node)
        else:
            made = self._copy(node)
            self.parts[node] = made
            stops = node.meta.get("stop") and isinstance(node.meta["val"], torch.Tensor)
            self._own(node, self._stopped(made, node) if stops else made)

    def _take_part(self, node: fx.Node) -> None:
        source, index = node.args
        made = self.parts[source]
        if isinstance(made, _Alias):  # several views of one tensor
            view = replace(made.chain[-1], part=index)
            alias = _Alias(made.storage, (*made.chain[:-1], view), made.node, -1)
            self.aliases[node] = alias
            return
        if isinstance(made, dict):  # an operator that also wrote to its arguments
            self.aliases[node] = made[index]
            return
        part = self.graph.node_copy(node, lambda _: made)
        part.meta = dict(node.meta)
        self._own(node, self._stopped(part, node) if node.meta.get("stop") else part)

    def _call_view(self, node: fx.Node) -> None:
        source = node.args[0]
        alias = self.aliases[source]
        view = _View(node.target, fx.map_arg(node.args[1:], self.read), dict(node.kwargs), node)
        storage, chain = alias.storage, (*alias.chain, view)
        if not isinstance(node.meta["val"], torch.Tensor):
            self.parts[node] = _Alias(storage, chain, self.read(source), -1)
            return
        made = self._apply(view, self.read(source))
        if node.meta.get("stop") and node.target is not aten.detach.default:
            made = self._stopped(made, node)
        self.aliases[node] = _Alias(storage, chain, made, storage.version)

    def _call_mutable(self, node: fx.Node) -> None:
        if node.target is aten._native_batch_norm_legit.default:
            self._call_batch_norm(node)
            return
        written = _written_argument(node)
        name = node.target._opname
        if name in _VIEWED_IN_PLACE:
            self._view_in_place(node, written)
            return
        args = fx.map_arg(node.args, self.read)
        kwargs = fx.map_arg(node.kwargs, self.read)
        if name == "copy_":
            value = args[1]
        elif name == "detach_":
            value = args[0]
        elif name == "zero_":
            value = self._insert(aten.zeros_like.default, args, {}, node)
        elif name == "fill_":
            value = args[1] if isinstance(args[1], fx.Node) else None
            value = value or self._insert(aten.full_like.default, args, {}, node)
        else:
            target = _out_of_place(node)
            kwargs = {key: value for key, value in kwargs.items() if key != "out"}
            value = self._insert(target, args, kwargs, node)
        if node.meta.get("stop"):
            value = self._stopped(value, node)
        self._write(written, value)
        self.aliases[node] = self.aliases[written]

    def _view_in_place(self, node: fx.Node, written: fx.Node) -> None:
        """`unsqueeze_` and its kin change what a tensor shows, not its values."""
        alias = self.aliases[written]
        view = _View(_out_of_place(node), fx.map_arg(node.args[1:], self.read), dict(node.kwargs), node)
        made = self._apply(view, self.read(written))
        self.aliases[written] = self.aliases[node] = _Alias(
            alias.storage, (*alias.chain, view), made, alias.storage.version
        )

    def _call_batch_norm(self, node: fx.Node) -> None:
        """Running statistics carry no gradient, in eager code as here."""
        args = list(fx.map_arg(node.args, self.read))
        for index in (3, 4):
            args[index] = self._stopped(args[index], node)
        made = self._insert(aten._native_batch_norm_legit_functional.default, args, {}, node)
        results: dict[int, _Alias] = {}
        for index in range(5):
            part = self._insert(operator.getitem, (made, index), {}, node)
            if index < 3:
                results[index] = _Alias(_Storage(part), (), part, 0)
            else:
                self._write(node.args[index], part)
        self.parts[node] = results

    # ------------------------------------------------------------------ writes through views

    def _scatter(self, view: _View, base: fx.Node, value: fx.Node) -> fx.Node:
        target, like = view.target, view.like
        if target in _SAME:
            return value
        if target in _RESHAPES:
            shape = list(base.meta["val"].shape)
            return self._insert(aten.reshape.default, (value, shape), {}, like)
        if target in (aten.t.default, aten.transpose.int):
            return self._insert(target, (value, *view.args), {}, like)
        if target is aten.permute.default:
            order = [dim % len(view.args[0]) for dim in view.args[0]]
            return self._insert(target, (value, [order.index(dim) for dim in range(len(order))]), {}, like)
        scatter = _SCATTERS.get(target)
        if scatter is None:
            raise CaptureError(
                compose_message(
                    f"an in-place operator writes through `{target}`",
                    like.meta.get("source"),
                    "This view has no inverse that gives the whole tensor back.",
                    "Write to the whole tensor, or through a slice of it.",
                )
            )
        operator_, args, kwargs = scatter(view, base)
        return self._insert(operator_, (base, value, *args), kwargs, like)


def _select(view: _View, base: fx.Node) -> Any:
    return aten.select_scatter.default, view.args, {}


def _slice(view: _View, base: fx.Node) -> Any:
    return aten.slice_scatter.default, view.args, view.kwargs


def _diagonal(view: _View, base: fx.Node) -> Any:
    return aten.diagonal_scatter.default, view.args, view.kwargs


def _strided(view: _View, base: fx.Node) -> Any:
    return aten.as_strided_scatter.default, view.args, view.kwargs


def _unbound(view: _View, base: fx.Node) -> Any:
    return aten.select_scatter.default, (view.args[0] if view.args else 0, view.part), {}


def _split(view: _View, base: fx.Node) -> Any:
    dim = view.args[1] if len(view.args) > 1 else view.kwargs.get("dim", 0)
    sizes = view.args[0]
    if isinstance(sizes, int):
        start = sizes * view.part  # type: ignore[operator]
        end = min(start + sizes, base.meta["val"].shape[dim])
    else:
        start = sum(sizes[: view.part])
        end = start + sizes[view.part]
    return aten.slice_scatter.default, (dim, start, end), {}


_SCATTERS: dict[Any, Callable[[_View, fx.Node], Any]] = {
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.diagonal.default: _diagonal,
    aten.as_strided.default: _strided,
    aten.unbind.int: _unbound,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
}


def _is_view(target: Any) -> bool:
    return any(item.alias_info is not None for item in target._schema.returns)


def _written_argument(node: fx.Node) -> fx.Node:
    written = []
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if value is not None:
                written.append(value)
    if len(written) != 1 or not isinstance(written[0], fx.Node):
        raise _no_functional_form(node)
    return written[0]


def _out_of_place(node: fx.Node) -> Any:
    """Returns the overload that computes what an in-place or `out=` overload writes."""
    name = node.target._opname
    if "out" not in node.kwargs:
        name = _DUNDERS.get(name, name.removesuffix("_") if not name.endswith("__") else None)
    packet = getattr(getattr(torch.ops, node.target.namespace), name, None) if name else None
    wanted = [(a.name, str(a.type)) for a in node.target._schema.arguments if not a.is_out]
    for overload in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, overload)
        form = [(a.name, str(a.type)) for a in candidate._schema.arguments]
        if form == wanted and not candidate._schema.is_mutable:
            return candidate
    raise _no_functional_form(node)


def _no_functional_form(node: fx.Node) -> CaptureError:
    return CaptureError(
        compose_message(
            f"`{node.target}` changes its arguments and has no form that does not",
            node.meta.get("source"),
            "A program is a pure function.",
            "Use an operator that returns its result.",
        )
    )
