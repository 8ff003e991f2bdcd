"""Loops recorded as graphs of the device: one launch for all kernels of a loop, and one for its way back.

A kernel of a small step takes less time on a GPU than Python takes to launch it. A CUDA graph replays the launches of
all steps at once, on memory that stays where it is: what a loop is given is copied there, and its results from there.
What a recorded loop keeps for its way back lies there as well, so that it may not run again while anybody may still ask
for the gradients of its last run: then it runs as any other.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
import torch._C._autograd as _autograd
from torch.utils import _pytree as pytree

from gimli_compile.compiled.binding import Bound
from gimli_compile.compiled.choice import LoopInputs
from gimli_compile.compiled.loop import Adjoints, Ran, Record, Tape, run_backward, run_forward, stacked
from gimli_compile.compiled.native import NativeLoop, holder_of
from gimli_compile.skeleton import leaves_of
from gimli_compile.state import OptState, TrainState

Tensor = torch.Tensor
# Records what a function does on a device; returns what it made, at places that stay, and what does it all again.
Recorder = Callable[[Callable[[], Any], Any], tuple[Any, Callable[[], None]]]
_copy_all: Any = torch.ops.aten._foreach_copy_.default
_LOG = logging.getLogger("gimli_compile")
_KEPT = 16  # loops that are kept recorded


def record_on_cuda(function: Callable[[], Any], pool: Any) -> tuple[Any, Callable[[], None]]:
    """Records a CUDA graph, whose memory is of a pool (`torch.cuda.graph_pool_handle`)."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=torch.cuda.Stream(), capture_error_mode="thread_local"):
        made = function()
    return made, graph.replay


RECORDERS: dict[str, Recorder] = {"cuda": record_on_cuda}  # by the type of device


def numbers_on_device(state: TrainState, inputs: LoopInputs) -> tuple[TrainState, LoopInputs]:
    """Moves hyperparameters, and numbers of the optimizer's state, to the device of the parameters.

    Elsewhere, the adjoint of every step would wait for the device to have its part of their gradients; and a graph
    cannot read them there: it would have the values that they had when it was recorded.
    """
    device = next((value.device for value in state.params.values() if value.device.type in RECORDERS), None)
    if device is None:
        return state, inputs
    dims = int(inputs.dims is not None and inputs.dims[2] is not None)
    hyper = {path: value.to(device) if value.dim() == dims else value for path, value in inputs.hyper.items()}
    skeleton = state.opt_state.skeleton
    numbers = {leaf.path for leaf in leaves_of(skeleton) if not leaf.is_tensor}
    values = {path: value.to(device) if path in numbers else value for path, value in state.opt_state.items()}
    return replace(state, opt_state=OptState(skeleton, values)), replace(inputs, hyper=hyper)


class DeviceGraphs:
    """The recorded loops of a compiler."""

    def __init__(self) -> None:
        self._loops: dict[Any, RecordedLoop | None] = {}
        self._lock = threading.Lock()  # what one thread gives a graph, another one must not write over

    def run(self, plan: NativeLoop, tape: Tape, carried: list[Tensor], *, record: bool) -> tuple[Ran, bool] | None:
        """Replays a loop that ran before, and records it first if need be; returns also whether conditions held.

        Returns nothing where it has to run in another way. Hooks on saved tensors want to see all that autograd keeps.
        """
        if record and _autograd._top_saved_tensors_default_hooks(True) is not None:
            return None
        with self._lock:
            return self._replayed((plan, tape.segment, record, _stream()), tape, carried, record=record)

    def _replayed(self, key: Any, tape: Tape, carried: list[Tensor], *, record: bool) -> tuple[Ran, bool] | None:
        if key not in self._loops:
            while len(self._loops) >= _KEPT:
                del self._loops[next(iter(self._loops))]
            self._loops[key] = _recorded(tape, carried, record=record)
        loop = self._loops[key]
        return None if loop is None or loop.is_awaited else loop(tape, carried)


def _stream() -> Any:
    """Returns the stream that kernels run in: a graph's memory must not be used from two at once."""
    return torch.cuda.current_stream() if torch.cuda.is_available() else None


def _recorded(tape: Tape, carried: list[Tensor], *, record: bool) -> RecordedLoop | None:
    """Records a loop, or says why it cannot be."""
    device = next((value.device for value in carried if value.device.type in RECORDERS), None)
    if device is None:
        return None
    elsewhere = next((name for bound in tape.bound for name in _elsewhere(bound, device)), None)
    if elsewhere is not None:
        return _refuse(f"{elsewhere} is not on {device}; an optimizer of torch keeps it there with `capturable=True`")
    try:
        # Calls in any mode write to its memory; a stream belongs to a device.
        with torch.inference_mode(False), torch.no_grad(), _on(device):
            return RecordedLoop(tape, carried, RECORDERS[device.type], record=record)
    except RuntimeError as error:  # what a device cannot record, such as waiting for it
        return _refuse(error)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _refuse(reason: Any) -> None:
    _LOG.warning("a loop runs without a graph of the device: %s", str(reason).partition("\n")[0])


def _elsewhere(bound: Bound, device: torch.device) -> list[str]:
    """Returns what a step takes or makes that is not on the device."""
    halves = bound.compiled.halves
    taken = zip(bound.step.inputs, (bound.forms[place] for place in bound.take), strict=True)
    made = zip(bound.step.results, (halves.results[place] for place in halves.places), strict=True)
    return [f"{slot.role.value}[{slot.path}]" for slot, form in (*taken, *made) if form.device != device]


class RecordedLoop:
    """A loop as one graph, and one for each way back that was asked for (which results have adjoints)."""

    def __init__(self, tape: Tape, carried: list[Tensor], recorder: Recorder, *, record: bool) -> None:
        self.bound, self.through = tape.bound, tape.through
        self._recorder, self._records = recorder, record
        self._pool = torch.cuda.graph_pool_handle() if carried[0].is_cuda else None
        self._given = _copies(_given(tape, carried))
        values = iter(self._given)
        start = [next(values) for _ in carried]
        shared = [next(values) for _ in tape.shared]
        self._tape = Tape(tape.bound, shared, [[next(values) for _ in one] for one in tape.rest], tape.segment)
        self._tape.through = tape.through
        self._ticket: weakref.ref[Ticket] | None = None
        self._lock = threading.Lock()
        self._back: dict[tuple[bool, ...], _WayBack | None] = {}
        self._made, self._replay = recorder(lambda: self._forward(start), self._pool)

    def _forward(self, start: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
        carried, returned, held = run_forward(self._tape, start, record=self._records)
        return carried, stacked(returned), torch.stack(held).all() if held else None

    @property
    def is_awaited(self) -> bool:
        """Tells whether gradients of the last run may still be asked for."""
        return self._ticket is not None and self._ticket() is not None

    def __call__(self, tape: Tape, carried: list[Tensor]) -> tuple[Ran, bool]:
        """Runs the loop on other values; returns also whether conditions held, for which the device is waited for."""
        _copy_all(self._given, _given(tape, carried))
        self._replay()
        last, returned, held = self._made
        last, returned = _copied((last, returned))
        last = [carried[self.through[place]] if place in self.through else value for place, value in enumerate(last)]
        ticket = Ticket()
        self._ticket = weakref.ref(ticket) if self._records else None
        return Ran(RecordedTape(self, ticket), last, returned), held is None or bool(held)

    def backward(self, last: list[Any], returned: Sequence[Tensor | None]) -> Adjoints:
        """Runs the adjoints of the steps of the last run: the first time one by one, later recorded."""
        with self._lock, _on(self._given[0].device):
            return self._backward(last, returned)

    def _backward(self, last: list[Any], returned: Sequence[Tensor | None]) -> Adjoints:
        given = [*last, *returned]
        key = tuple(grad is not None for grad in given)
        grads = [grad for grad in given if grad is not None]
        if key not in self._back:
            self._back[key] = _NOT_YET
            return self._step_by_step(last, returned)
        if self._back[key] is _NOT_YET:
            self._back[key] = self._way_back(key, grads, len(last))
        known = self._back[key]
        if known is None:
            return self._step_by_step(last, returned)
        _copy_all(known.given, grads)
        known.replay()
        return Adjoints(*_copied(known.made))

    def _step_by_step(self, last: list[Any], returned: Sequence[Tensor | None]) -> Adjoints:
        return Adjoints(*_copied(self._adjoints(last, returned)))

    def _adjoints(self, last: list[Any], returned: Sequence[Tensor | None]) -> Any:
        made = run_backward(self._tape, last, returned)
        return made.carried, made.shared, made.batches

    def _way_back(self, key: tuple[bool, ...], grads: list[Tensor], count: int) -> _WayBack | None:
        """Records the adjoints; `key` tells which of the results, `count` of them carried on, have some."""
        kept = _copies(grads)
        places = iter(kept)
        given = [next(places) if is_given else None for is_given in key]
        try:
            made, replay = self._recorder(lambda: self._adjoints(given[:count], given[count:]), self._pool)
        except RuntimeError as error:
            return _refuse(error)
        return _WayBack(kept, made, replay)


@dataclass(frozen=True)
class _WayBack:
    """The recorded adjoints of a loop: where those of its results go, and what they make."""

    given: list[Tensor]
    made: Any
    replay: Callable[[], None]


_NOT_YET = _WayBack([], None, lambda: None)  # stands for what is recorded when it runs again


class Ticket:
    """Lives as long as somebody may ask for the gradients of a run."""


@dataclass(frozen=True)
class RecordedTape:
    """What a recorded loop left for the way back, which lies with the graph."""

    loop: RecordedLoop
    ticket: Ticket

    @property
    def bound(self) -> Sequence[Bound]:
        """The steps."""
        return self.loop.bound

    @property
    def through(self) -> Mapping[int, int]:
        """What all steps only pass on."""
        return self.loop.through

    def recorded(self) -> tuple[Record, list[Tensor]]:
        """Returns what the way back has to know, and what autograd keeps for it."""
        return RecordedRecord(self.loop), [holder_of(self.ticket)]


@dataclass(frozen=True)
class RecordedRecord:
    """What the way back knows of a recorded loop."""

    loop: RecordedLoop

    def backward(self, kept: list[Tensor], last: list[Any], stacked: Sequence[Tensor | None]) -> Adjoints:
        """Runs the adjoints of the steps."""
        return self.loop.backward(last, stacked)


def _given(tape: Tape, carried: list[Tensor]) -> list[Tensor]:
    return [*carried, *tape.shared, *chain.from_iterable(tape.rest)]


def _copies(values: Sequence[Tensor]) -> list[Tensor]:
    return [value.clone(memory_format=torch.contiguous_format) for value in values]


def _copied(tree: Any) -> Any:
    """Returns a pytree with copies of its tensors: one for each, wherever it is."""
    leaves, structure = pytree.tree_flatten(tree)
    known = {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}
    copies = dict(zip(known, _copies([*known.values()]), strict=True))
    return pytree.tree_unflatten([copies.get(id(leaf), leaf) for leaf in leaves], structure)
