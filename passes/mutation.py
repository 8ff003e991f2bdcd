"""In-place operators and views become values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.graph_nodes import copy_node
from gimli_compile.metadata import arguments_of, insert_call
from gimli_compile.passes.view_inverses import View, put_back
from gimli_compile.program import Program
from gimli_compile.slot import Role, Slot

aten = torch.ops.aten
_DUNDERS = {
    "__iand__": "__and__", "__ior__": "__or__", "__ixor__": "__xor__",
    "__ilshift__": "__lshift__", "__irshift__": "__rshift__",
}  # fmt: skip
_OPTIONS = {"dtype", "layout", "device", "pin_memory"}
_VIEWED_IN_PLACE = {"unsqueeze_", "squeeze_", "t_", "transpose_", "swapaxes_", "swapdims_"}


def functionalize(program: Program) -> Program:
    """Rewrites in-place operators out of place; a write through a view reaches what it is a view of.

    A result is the last value of the tensor that it named. `copy_` becomes the copied value itself, cast and expanded
    if need be. Where the user's code runs under `no_grad` (`meta["stop"]`) a `detach` says so.

        row = aten.select.int(a, 0, 1)            row = aten.select.int(a, 0, 1)
        mul_ = aten.mul_.Tensor(row, b)   becomes   mul = aten.mul.Tensor(row, b)
        return (a,)                               select_scatter = aten.select_scatter.default(a, mul, 0, 1)
                                                  return (select_scatter,)
    """
    if not any(map(_is_pending, program.graph.nodes)):
        return replace(program, stage="functional")
    return _Rewrite(program).run()


def _is_pending(node: fx.Node) -> bool:
    """Tells whether there is something to rewrite: a write, or a gradient that is to be stopped."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    return node.target._schema.is_mutable or (bool(node.meta.get("stop")) and node.target is not aten.detach.default)


@dataclass
class _Storage:
    """What several tensors share: its present value."""

    value: fx.Node
    version: int = 0


@dataclass
class _Alias:
    """A tensor of the old graph: a chain of views of a storage, and the node of its value at a version."""

    storage: _Storage
    chain: tuple[View, ...]
    node: fx.Node
    version: int


class _Rewrite:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = fx.Graph()
        self.aliases: dict[fx.Node, _Alias] = {}
        self.parts: dict[fx.Node, Any] = {}
        self.slots: dict[fx.Node, Slot] = {}
        self.connected: dict[fx.Node, bool] = {}

    def run(self) -> Program:
        for node in self.program.graph.nodes:
            if node.op == "output":
                self.graph.output(fx.map_arg(node.args[0], self.read))
            elif node.op == "placeholder":
                self._own(node, self._copy(node))
                self.slots[self.aliases[node].node] = self.program.inputs[len(self.slots)]
            elif node.target is operator.getitem:
                self._take_part(node)
            else:
                self._call(node)
        return replace(self.program, graph=self.graph, stage="functional").tidied()

    # ------------------------------------------------------------------ values

    def _copy(self, node: fx.Node) -> fx.Node:
        copied = copy_node(self.graph, node, self.read)
        if node.target is not aten.detach.default:
            copied.meta["stop"] = False
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

    def _write(self, node: fx.Node, value: fx.Node, writer: fx.Node, *, kept: bool = False) -> None:
        """Makes `value` the present value of a tensor; `kept` keeps the derivative of the value before."""
        alias = self.aliases[node]
        form = (
            node.meta["val"]
            if node is writer or not isinstance(writer.meta["val"], torch.Tensor)
            else writer.meta["val"]
        )
        value = self._fit(value, form, writer)
        whole = alias.storage.value
        alias.storage.value = self._put(alias.chain, lambda: whole, whole.meta["val"], value, writer)
        alias.storage.version += 1
        if kept:
            alias.storage.value = self._with_derivative_of(whole, alias.storage.value, writer)
        elif alias.chain or value is alias.storage.value:
            alias.node, alias.version = value, alias.storage.version

    def _put(
        self, chain: tuple[View, ...], base: Callable[[], fx.Node], form: torch.Tensor, value: fx.Node, writer: fx.Node
    ) -> fx.Node:
        """Returns `base`, of the form `form`, with the part that the views of `chain` show replaced by `value`."""
        if not chain:
            return value
        first, rest = chain[0], chain[1:]
        if rest:
            value = self._put(rest, lambda: self._apply(first, base()), first.form, value, writer)
        return put_back(self.graph, first, base, form, value, like=writer)

    def _with_derivative_of(self, old: fx.Node, value: fx.Node, writer: fx.Node) -> fx.Node:
        """A write under `no_grad` changes the value and not the derivative: eager autograd does not see it."""
        value = self._stopped(value, writer)
        if not old.meta["val"].is_floating_point() or not self._is_connected(old):
            return value
        nothing = self._insert(aten.sub.Tensor, (old, self._stopped(old, writer)), {}, writer)
        return self._insert(aten.add.Tensor, (value, nothing), {}, writer)

    def _is_connected(self, node: fx.Node) -> bool:
        """Tells whether a value may have a derivative: whether it depends on more than buffers, draws and constants."""
        if node not in self.connected:
            slot = self.slots.get(node)
            if slot is not None:
                self.connected[node] = slot.role not in (Role.BUFFER, Role.NOISE, Role.CONSTANT)
            elif node.target is aten.detach.default and node.meta.get("stop"):
                self.connected[node] = False
            else:
                self.connected[node] = any(map(self._is_connected, node.all_input_nodes))
        return self.connected[node]

    def _apply(self, view: View, base: fx.Node) -> fx.Node:
        if view.target is aten.as_strided.default and base.target is not aten.clone.default:
            base = self._insert(aten.clone.default, (base,), {"memory_format": torch.contiguous_format}, view.like)
        made = self._insert(view.target, (base, *view.args), view.kwargs, view.like)
        stop = view.like.meta.get("stop", False)
        if stop and view.target is aten.detach.default:
            made.meta["stop"] = True
        elif stop and view.part is None:
            made = self._stopped(made, view.like)
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
        source, index = arguments_of(node)
        made = self.parts[source]
        if isinstance(made, _Alias):  # several views of one tensor
            view = replace(made.chain[-1], part=index)
            self.aliases[node] = _Alias(made.storage, (*made.chain[:-1], view), made.node, -1)
            self.read(node)
            return
        if isinstance(made, dict):  # an operator that also wrote to its arguments
            self.aliases[node] = made[index]
            return
        part = copy_node(self.graph, node, lambda _: made)
        self._own(node, self._stopped(part, node) if node.meta.get("stop") else part)

    def _call_view(self, node: fx.Node) -> None:
        source = arguments_of(node)[0]
        alias = self.aliases[source]
        view = View(node.target, fx.map_arg(node.args[1:], self.read), dict(node.kwargs), node)
        storage, chain = alias.storage, (*alias.chain, view)
        if node.target is aten.as_strided.default:
            self._strided_view(node, alias, view)
            return
        if not isinstance(node.meta["val"], torch.Tensor):
            self.parts[node] = _Alias(storage, chain, storage.value, -1)
            return
        made = self._apply(view, self.read(source))
        self.aliases[node] = _Alias(storage, chain, made, storage.version)

    def _strided_view(self, node: fx.Node, alias: _Alias, view: View) -> None:
        """`as_strided` counts in the memory of the whole storage, whatever view it is called on."""
        whole = alias.storage.value.meta["val"]
        if not whole.is_contiguous():
            raise _no_functional_form(node)
        size, stride, *rest = view.args
        offset = rest[0] if rest and rest[0] is not None else arguments_of(node)[0].meta.get("offset", 0)
        view = replace(view, args=(size, stride, offset))
        self.aliases[node] = _Alias(alias.storage, (view,), alias.storage.value, -1)
        self.read(node)

    def _call_mutable(self, node: fx.Node) -> None:
        if node.target is aten._native_batch_norm_legit.default:
            self._call_batch_norm(node)
            return
        written = _written_argument(node)
        name = _overload(node)._opname
        if name in _VIEWED_IN_PLACE:
            self._view_in_place(node, written)
            return
        args = fx.map_arg(arguments_of(node), self.read)
        kwargs = {key: value for key, value in fx.map_arg(node.kwargs, self.read).items() if key != "out"}
        stop = bool(node.meta.get("stop"))
        if name == "detach_":
            value = self._stopped(args[0], node) if stop else args[0]
        else:
            value = self._written_value(node, name, args, kwargs)
        self._write(written, value, node, kept=stop and name != "detach_")
        self.aliases[node] = self.aliases[written]

    def _written_value(self, node: fx.Node, name: str, args: Any, kwargs: Any) -> fx.Node:
        if name == "copy_":
            return args[1]
        if name == "zero_":
            return self._insert(aten.zeros_like.default, args, {}, node)
        if name == "fill_":
            value = args[1]
            return value if isinstance(value, fx.Node) else self._insert(aten.full_like.default, args, {}, node)
        target = _out_of_place(node)
        if "out" in node.kwargs and _makes_anew(target):
            form = self.read(_written_argument(node)).meta["val"]
            kwargs = {**kwargs, "dtype": form.dtype, "device": form.device}
        return self._insert(target, args, kwargs, node)

    def _view_in_place(self, node: fx.Node, written: fx.Node) -> None:
        """`unsqueeze_` and its kin change what a tensor shows, not its values."""
        alias = self.aliases[written]
        view = View(_out_of_place(node), fx.map_arg(node.args[1:], self.read), dict(node.kwargs), node)
        self.aliases[written] = self.aliases[node] = _Alias(
            alias.storage, (*alias.chain, view), alias.storage.value, -1
        )

    def _call_batch_norm(self, node: fx.Node) -> None:
        """Running statistics carry no gradient, in eager code as here."""
        args: list[Any] = list(fx.map_arg(arguments_of(node), self.read))
        for index in (3, 4):
            args[index] = self._stopped(args[index], node)
        made = self._insert(aten._native_batch_norm_legit_functional.default, args, {}, node)
        results: dict[int, _Alias] = {}
        for index in range(5):
            part = self._insert(operator.getitem, (made, index), {}, node)
            if index < 3:
                results[index] = _Alias(_Storage(part), (), part, 0)
            else:
                self._write(arguments_of(node)[index], part, node)
        self.parts[node] = results


def _overload(node: fx.Node) -> torch._ops.OpOverload:
    return cast(torch._ops.OpOverload, node.target)


def _is_view(target: Any) -> bool:
    return any(item.alias_info is not None for item in target._schema.returns)


def _written_argument(node: fx.Node) -> fx.Node:
    written = []
    for index, argument in enumerate(_overload(node)._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
            if value is not None:
                written.append(value)
    if len(written) != 1 or not isinstance(written[0], fx.Node):
        raise _no_functional_form(node)
    return written[0]


def _out_of_place(node: fx.Node) -> Any:
    """Returns the overload that computes what an in-place or `out=` overload writes."""
    target = _overload(node)
    name = target._opname
    if "out" not in node.kwargs:
        name = _DUNDERS.get(name, name.removesuffix("_") if not name.endswith("__") else None)
    packet = getattr(getattr(torch.ops, target.namespace), name, None) if name else None
    wanted = [(a.name, str(a.type)) for a in target._schema.arguments if not a.is_out]
    for overload in packet.overloads() if packet is not None else ():
        candidate = getattr(packet, overload)
        options = _OPTIONS if "out" in node.kwargs and _makes_anew(candidate) else ()
        form = [(a.name, str(a.type)) for a in candidate._schema.arguments if a.name not in options]
        if form == wanted and not candidate._schema.is_mutable:
            return candidate
    raise _no_functional_form(node)


def _makes_anew(target: torch._ops.OpOverload) -> bool:
    """Tells whether an operator makes a tensor of numbers, the same every time: `eye`, `arange`, `full`."""
    names = {a.name for a in target._schema.arguments}
    return names >= _OPTIONS and torch.Tag.nondeterministic_seeded not in target.tags


def _no_functional_form(node: fx.Node) -> CaptureError:
    return CaptureError(
        compose_message(
            f"`{node.target}` changes its arguments and has no form that does not",
            node.meta.get("source"),
            "A program is a pure function.",
            "Use an operator that returns its result.",
        )
    )
