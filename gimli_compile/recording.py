"""Records every operator that reaches torch's dispatcher as a node of an fx graph, while it runs on real tensors."""

from __future__ import annotations

import enum
import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._C._autograd import _get_sequence_nr
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from gimli_compile.aliases import refuse_hidden
from gimli_compile.call_arguments import map_tensors, tensors_of
from gimli_compile.constant_selections import ConstantSelections
from gimli_compile.custom_operators import function_of
from gimli_compile.draws import depends_on_values, make_draw, make_dropout_draw
from gimli_compile.findings import Baked, Guard
from gimli_compile.graph_nodes import add_node
from gimli_compile.lazy_copies import lazy_copy
from gimli_compile.metadata import fake_like, operator_name, storage_of, with_declared_mutation, written_tensors
from gimli_compile.outside_values import OutsideValues
from gimli_compile.program import Draw
from gimli_compile.provenance import SourceLine, current_source
from gimli_compile.refusals import (
    custom_write,
    foreign_write,
    hidden_memory,
    live_reference,
    parameter_changes,
    value_read,
    varying_distribution,
    varying_shape,
)
from gimli_compile.selections import SELECTING, Extents, masks_of
from gimli_compile.slot import Role, Slot
from gimli_compile.sparse_tensors import SparseTensors

aten = torch.ops.aten

HOST = 1  # the value follows from counters and hyperparameters alone
HOST_DRAW = "number"  # what names the draws of Python's and NumPy's generators
DATA = 2  # the value depends on parameters, gradients, batches or draws
COUNTED = 4  # the value depends on numbers of the state, which change from step to step
EACH = 8  # the value has one for each element of a parameter, where the code expects a number
_NOT_RECORDED = {aten.is_same_size.default, aten.is_pinned.default}
# Of their argument, only the form reaches the result.
_OF_FORM = {
    aten.zeros_like.default, aten.ones_like.default, aten.empty_like.default, aten.full_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_empty.default, aten.new_full.default,
}  # fmt: skip


class Region(enum.Enum):
    """Whose code is running, which decides what `detach` and `no_grad` mean."""

    LOSS = "the model and the loss: a detach stops the gradient"
    BACKWARD = "the inner backward pass: a detach is the framework's own"
    OPTIMIZER = "the optimizer: a detach only says that eager training needs no graph"


class Recorder(TorchDispatchMode):
    """A dispatch mode that turns what runs under it into a graph.

    Tensors are known by identity. A tensor that nobody announced (`add_input`) and no recorded operator made is a
    constant and becomes an input of role CONSTANT that is bound to that very tensor. `name` sets apart the constants
    and draws of programs that are put together. `disguised` is for a second look at code whose counters are not what
    they seem to those who do not ask them: see `gimli_compile.disguise`. `guards_branches` tells whether the model and
    the loss may branch on values that have derivatives.
    """

    def __init__(self, name: str, *, disguised: bool = False) -> None:
        super().__init__()
        self.name = name
        self.disguised = disguised
        self.counted = False
        self.graph = fx.Graph()
        self.inputs: list[Slot] = []
        self.constants: dict[Slot, torch.Tensor] = {}
        self.draws: dict[Slot, Draw] = {}
        self.guards: list[Guard] = []
        self.baked: list[Baked] = []
        self.region = Region.OPTIMIZER
        self.guards_branches = False
        self.refuses_hidden = False
        self.live: dict[Any, str] = {}  # by their memory
        self.kept: dict[Any, str] = {}
        self.extents = Extents(self)
        self.outside = OutsideValues(self)
        self.fixed = ConstantSelections(self)
        self.sparse = SparseTensors(self)
        self._nodes = WeakTensorKeyDictionary()
        self._reach: dict[Any, int] = {}
        self._fixed: set[Any] = set()
        self._forward_lines: dict[int, SourceLine | None] = {}
        self._last_line: SourceLine | None = None
        self._last_input: fx.Node | None = None
        self.is_paused = False
        self._grad_at_entry = True
        self.host_states: Any = None
        self._around = torch._C._current_autograd_node()  # capture may happen inside an outer backward pass

    # ------------------------------------------------------------------ inputs

    def add_input(self, slot: Slot, tensor: torch.Tensor, reach: int) -> fx.Node:
        """Announces a tensor as the input `slot`."""
        with self._at_inputs():
            node = self.graph.placeholder(slot.name)
        self._last_input = node
        self.inputs.append(slot)
        node.meta.update(val=fake_like(tensor), source=None)
        self._nodes[tensor] = node
        self._reach[storage_of(tensor)] = reach
        return node

    def add_stand_in(self, tensor: torch.Tensor, known: torch.Tensor) -> None:
        """Announces a tensor that stands for a known one, of the same value."""
        self._nodes[tensor] = self.node_of(known)
        self._reach[storage_of(tensor)] = self._reach[storage_of(known)]

    @contextmanager
    def _at_inputs(self) -> Iterator[None]:
        last = self._last_input
        point = self.graph.inserting_before(None) if last is None else self.graph.inserting_after(last)
        with point:
            yield

    def knows(self, tensor: torch.Tensor) -> bool:
        """Tells whether a tensor is an input or was made by a recorded operator."""
        return tensor in self._nodes

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        """Returns the node of a tensor; an unknown tensor becomes a constant."""
        node = self._nodes.get(tensor)
        if node is None:
            memory = storage_of(tensor)
            if memory in self.live:
                raise live_reference(self.live[memory])
            if self.refuses_hidden and self._reach.get(memory):
                refuse_hidden(tensor, self._nodes)
            slot = Slot(Role.CONSTANT, f"{self.name}.{len(self.constants)}")
            node = self.add_input(slot, tensor, 0)
            self.constants[slot] = tensor
            self._fixed.add(memory)
            self.outside.add(node)
        return node

    def rename(self, tensor: torch.Tensor, other: torch.Tensor) -> None:
        """Lets another tensor of the same memory stand for what a tensor stands for."""
        self._nodes[other] = self.node_of(tensor)

    def reach(self, tensor: torch.Tensor) -> int:
        """Returns what a tensor's value depends on: a union of HOST, DATA and COUNTED, 0 for a constant."""
        return self._reach.get(storage_of(tensor), 0) if tensor in self._nodes else 0

    # ------------------------------------------------------------------ operators

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Runs what is inside without recording it."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before

    @contextmanager
    def in_region(self, region: Region) -> Iterator[None]:
        """Says whose code runs inside; a model that is called without gradients stops none of its own accord."""
        before, self.region = self.region, region
        enabled = self._grad_at_entry
        if before is not region:
            self._grad_at_entry = torch.is_grad_enabled()
        try:
            yield
        finally:
            self.region, self._grad_at_entry = before, enabled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator and records it."""
        kwargs = kwargs or {}
        if self.is_paused or func.namespace == "profiler" or func in _NOT_RECORDED:
            return func(*args, **kwargs)
        if self.sparse.concerns(func, args, kwargs, making=self.region is not Region.LOSS):
            return self.sparse.call(func, args, kwargs)
        if torch.is_inference_mode_enabled():
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func is aten.lift_fresh.default and not self.knows(args[0]):
            return self._record_literal(args[0])
        if torch.Tag.nondeterministic_seeded in func.tags and func is not aten.native_dropout.default:
            return self._record_draw(func, args, kwargs)
        if func is aten.native_dropout.default:
            return self._record_dropout(*args)
        return self._record(with_declared_mutation(func, args), args, kwargs)

    def _record_literal(self, tensor: torch.Tensor) -> torch.Tensor:
        """Records what `torch.tensor(...)` made: a number as itself, an array as a constant of its value now."""
        if tensor.dim() == 0:
            options = {"dtype": tensor.dtype, "device": tensor.device}
            self.add_call(aten.full.default, ([], tensor.item()), options, tensor)
            self._reach[storage_of(tensor)] = 0
            return tensor
        return self.as_constant(tensor)

    def as_constant(self, tensor: torch.Tensor) -> torch.Tensor:
        """Lets a tensor be a constant of the value that it has now."""
        node = self._nodes[tensor] = self.node_of(tensor.detach().clone())
        self.outside.discard(node)
        self._reach[storage_of(tensor)] = 0
        return tensor

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = tensors_of((args, kwargs))
        reach = 0
        for tensor in tensors:
            reach |= self.reach(tensor)
        self._refuse(func, args, kwargs, reach)
        selected = self.fixed.call(func, args, kwargs)
        if selected is not None:
            return selected
        node_args, node_kwargs = map_tensors((args, kwargs), self.node_of)
        shared = {storage_of(tensor) for tensor in tensors}
        out = lazy_copy(args[0]) if func is aten.clone.default and not kwargs else func(*args, **kwargs)
        self._spread(written_tensors(func, args, kwargs), out, shared, 0 if func in _OF_FORM else reach)
        if isinstance(out, (torch.Tensor, tuple, list)):
            self.add_call(func, node_args, node_kwargs, out)
        elif reach and out is not None:
            raise value_read(func._opname, in_model=self.region is Region.LOSS)
        elif out is not None:
            self.outside.pin(tensors)
        self.extents.follow(func, tensors, out)
        if func in SELECTING and isinstance(out, torch.Tensor) and any(map(self.reach, masks_of(func, args))):
            self.extents.select(func, args, out)
        return out

    def expect(self, condition: torch.Tensor) -> None:
        """Makes it a condition of the program that a 0-dim bool tensor is true."""
        self.guards.append(Guard(self.node_of(condition), True, self._source()))

    def _spread(self, written: list[torch.Tensor], out: Any, shared: set[Any], reach: int) -> None:
        """Notes what the results, and what an in-place operator wrote to, depend on: by storage, for views to know."""
        for item in tensors_of(out):
            if storage_of(item) not in shared:
                self._reach[storage_of(item)] = reach
        for tensor in written:
            self._reach[storage_of(tensor)] = self._reach.get(storage_of(tensor), 0) | reach

    def add_call(self, func: Any, args: Any, kwargs: Any, out: Any, *, override: bool = False) -> None:
        """Adds the node of a call and ties its results to it; known results (in-place) stay tied unless `override`."""
        node = add_node(self.graph, "call_function", function_of(func, out), args, kwargs, name=operator_name(func))
        node.meta.update(source=self._source(), stop=self._stops_gradient() and not override)
        if isinstance(out, torch.Tensor):
            node.meta["val"] = fake_like(out)
            self._tie(out, node, override)
            return
        node.meta["val"] = tuple(fake_like(item) if isinstance(item, torch.Tensor) else item for item in out)
        for index, item in enumerate(out):
            if isinstance(item, torch.Tensor) and (override or not self.knows(item)):
                part = add_node(self.graph, "call_function", operator.getitem, (node, index), {}, name=node.name)
                part.meta.update(node.meta, val=node.meta["val"][index])
                self._tie(item, part, override)

    def _tie(self, tensor: torch.Tensor, node: fx.Node, override: bool) -> None:
        if override or not self.knows(tensor):
            self._nodes[tensor] = node

    def _source(self) -> SourceLine | None:
        backward = torch._C._current_autograd_node()
        if backward is not None and backward is not self._around:
            return self._forward_lines.get(backward._sequence_nr())
        if self.region is Region.BACKWARD:
            return self._last_line
        source = self._last_line = current_source()
        if torch.is_grad_enabled():
            self._forward_lines[_get_sequence_nr() - 1] = source
        return source

    def _stops_gradient(self) -> bool:
        return self.region is Region.LOSS and self._grad_at_entry and not torch.is_grad_enabled()

    def mark_gradient(self, tensor: torch.Tensor) -> None:
        """Says that the call that made this tensor ends an inner backward pass."""
        self._nodes[tensor].meta["inner_gradient"] = True

    def mark_differentiable(self, out: Any) -> None:
        """Says that the operator that made this has a derivative, though it ran where none was recorded."""
        for tensor in tensors_of(out):
            node = self._nodes.get(tensor)
            while node is not None:
                node.meta["stop"] = False
                node = node.args[0] if node.target is operator.getitem else None

    def mark_stop(self, tensor: torch.Tensor) -> None:
        """Says that the code stops the gradient at this tensor, where it is the model or the loss."""
        if self.region is not Region.LOSS or not self._grad_at_entry:
            return
        node = self._nodes.get(tensor)
        last = next(iter(reversed(self.graph.nodes)), None)
        if last is not None and last.target is aten.detach_.default:
            last.meta["stop"] = True
        elif node is not None:
            node.meta["stop"] = True

    # ------------------------------------------------------------------ refusals

    def _refuse(self, func: Any, args: Any, kwargs: Any, reach: int) -> None:
        self._refuse_writes(func, args, kwargs)
        if func._opname == "set_":
            raise hidden_memory("Tensor.set_")
        if not reach:
            return
        if reach & EACH:
            self.extents.refuse_each(func, args, kwargs, lambda tensor: self.reach(tensor) & (EACH | DATA) == EACH)
        if func is aten._local_scalar_dense.default:
            raise value_read(func._opname, in_model=self.region is Region.LOSS)
        if torch.Tag.dynamic_output_shape in func.tags and self._shape_varies(func, args):
            if func in SELECTING:
                return
            raise varying_shape(str(func))

    def keep(self, tensor: torch.Tensor, name: str) -> None:
        """Refuses writes to a parameter by the model and the loss: the loop takes parameters from the update alone."""
        self.kept[storage_of(tensor)] = name

    def _refuse_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        written = written_tensors(func, args, kwargs)
        if written and func.namespace != "aten" and not func._schema.returns:
            raise custom_write(f"{func.namespace}.{func._opname}")
        for tensor in written:
            if self.region is Region.LOSS and storage_of(tensor) in self.kept:
                raise parameter_changes(self.kept[storage_of(tensor)], func._opname)
            if not self.knows(tensor) or storage_of(tensor) in self._fixed:
                raise foreign_write(func._opname)

    def _shape_varies(self, func: Any, args: Any) -> bool:
        """Tells whether the shape of a result depends on values that may change; an index of integers never does."""
        if func is not aten.index.Tensor:
            return func is not aten.linalg_lstsq.default  # its rank is a condition: see `operator_forms`
        return any(map(self.reach, masks_of(func, args)))

    # ------------------------------------------------------------------ randomness

    def _record_draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        tensors = tensors_of((args, kwargs))
        if depends_on_values(func):
            self._pin_distribution(func, tensors)
        draw = make_draw(func, args, kwargs)
        out = func(*args, **kwargs)
        self.extents.follow(func, tensors, out)
        in_place = any(out is tensor for tensor in tensors)
        self._add_draw(draw, out.detach().clone() if in_place else out, out)
        return out

    def _pin_distribution(self, func: Any, tensors: list[torch.Tensor]) -> None:
        """Makes the numbers that a distribution follows from a condition of the program; refuses other values."""
        for tensor in tensors:
            if self.reach(tensor) & DATA:
                raise varying_distribution(func._opname)
            if self.reach(tensor):
                self.outside.expect_same(tensor)
                what = f"what `{func._opname}` draws from is a constant of the program"
                self.baked.append(Baked(what, self._source()))

    def _add_draw(self, draw: Draw, noise: torch.Tensor, out: torch.Tensor) -> None:
        slot = Slot(Role.NOISE, f"{self.name}.{sum(HOST_DRAW not in known.path for known in self.draws)}")
        node = self.add_input(slot, noise, DATA)
        self.draws[slot] = draw
        self._reach[storage_of(out)] = DATA
        if out is not noise:
            self.add_call(aten.copy_.default, (self.node_of(out), node), {}, out)

    def add_host_draw(self, draw: Draw, tensor: torch.Tensor) -> None:
        """Announces a number that Python or NumPy drew; such numbers are counted apart from the tensors drawn."""
        count = sum(slot.path.startswith(f"{self.name}.{HOST_DRAW}") for slot in self.draws)
        slot = Slot(Role.NOISE, f"{self.name}.{HOST_DRAW}{count}")
        self.add_input(slot, tensor, DATA)
        self.draws[slot] = draw

    def _record_dropout(self, value: torch.Tensor, p: float, train: bool | None) -> Any:
        """Records the fused dropout as a product with a drawn mask, which has every derivative."""
        if train is False or p == 0.0:
            return self._record(aten.mul.Tensor, (value, 1.0), {}), torch.ones_like(value, dtype=torch.bool)
        out, mask = aten.native_dropout.default(value, p, train)
        self._add_draw(make_dropout_draw(value, p), mask, mask)
        scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
        masked = self.graph.create_node(
            "call_function", aten.mul.Tensor, (self.node_of(value), self.node_of(mask)), {}, name="mul"
        )
        masked.meta.update(val=fake_like(out), source=self._source(), stop=False)
        self._reach[storage_of(out)] = DATA
        self.add_call(aten.mul.Tensor, (masked, scale), {}, out)
        return out, mask
