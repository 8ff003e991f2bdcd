"""The arguments of a call as tensors and a key: two calls of one key differ in nothing but the tensors' values.

What is not of the plainest kinds (dicts, lists and tuples of tensors) is not read here, and goes the long way.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch._C._functorch as _functorch
from torch.autograd import forward_ad

from gimli_compile.hyper_values import HyperReader
from gimli_compile.loop_options import LoopOptions
from gimli_compile.loss_table import Asked
from gimli_compile.model_view import ModelView
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.state import Hyperparameters, OptState, TrainState
from gimli_compile.tree_slots import fixed_form

Tensor = torch.Tensor
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_is_differentiated = attrgetter("requires_grad")
_NUMBERS = frozenset((bool, int, float, type(None)))


class _OtherKindError(Exception):
    """An argument is of a kind that is not read here."""


class Call(NamedTuple):
    """A call that was read.

    `tensors` are those of the state, of the batches, of everything else; `state` and `batches` count the first two.
    `flags` tell which are differentiated. `leads`: every task starts from a copy of the state. `token` is what the
    live objects hold, as objects that are replaced when it changes.
    """

    key: Any
    token: tuple[Any, ...]
    tensors: list[Tensor]
    state: int
    batches: int
    flags: tuple[bool, ...]
    leads: bool
    reader: CallReader


class CallReader:
    """Reads the arguments of calls."""

    def __init__(self, view: OptimizerView, model: ModelView, hyper: HyperReader) -> None:
        self._view = view
        self._model = model
        self._hyper = hyper

    def is_live_number(self, value: Tensor) -> bool:
        """Tells whether a tensor stands for a number of the live optimizer."""
        return self._hyper.is_live_number(value)

    def loop(
        self, state: Any, batches: Any, others: tuple[Any, Any], options: LoopOptions, *, single: bool
    ) -> Call | None:
        """Reads the arguments of `unroll`, or of `step`, which takes a `single` one; `others` are hyper and meta."""
        tasks = options.tasks
        if options.backward not in ("reverse", "mixed") or options.truncate is not None:
            return None
        if isinstance(tasks, tuple) and any(tasks):  # a dimension of tasks that does not lead
            return None
        leads = tasks is True or (isinstance(tasks, tuple) and tasks[0] is None)
        key = (single, options.backward, options.checkpoint, type(options.checkpoint), options.order, tasks)
        return self._read(state, batches, others, key, self._view.read(), leads=leads)

    def evaluation(self, asked: Asked, *, tasks: bool) -> Call | None:
        """Reads the arguments of `loss` and of `forward`."""
        state = (asked.params, asked.buffers)
        return self._read(state, asked.batch, (None, asked.meta), (tasks is True, type(tasks)), None, leads=False)

    def besides(self, held_out: Any, meta: Any) -> tuple[Any, list[Tensor]] | None:
        """Reads what the loss after a loop is given besides the last state: no tensor of a batch is differentiated."""
        tensors: list[Tensor] = []
        try:
            key = _open(held_out, tensors)
            if any(map(_is_differentiated, tensors)):
                return None
            _open(meta, tensors)
        except _OtherKindError:
            return None
        plain = _TENSORS.issuperset(map(type, tensors)) and not any(map(Tensor.is_neg, tensors))
        return (key, tensors) if plain else None

    def _read(
        self, state: Any, batches: Any, others: tuple[Any, Any], options: Any, live: Any, *, leads: bool
    ) -> Call | None:
        if _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
            return None
        tensors: list[Tensor] = []
        try:
            keys = [_open_state(state, tensors)]
            of_state = len(tensors)
            keys.append(_open(batches, tensors))
            of_batches = len(tensors) - of_state
            keys += [_open_hyper(others[0], tensors), _open(others[1], tensors)]
        except _OtherKindError:
            return None
        if not _TENSORS.issuperset(map(type, tensors)) or any(map(Tensor.is_neg, tensors)):
            return None
        # Except in batches, one tensor in two places is another thing than two tensors.
        if len(set(map(id, tensors))) < len(tensors):
            single = tensors[:of_state] + tensors[of_state + of_batches :]
            if len(set(map(id, single))) < len(single):
                return None
        flags = tuple(map(_is_differentiated, tensors)) if torch.is_grad_enabled() else ()
        model = self._model
        model.refresh()
        trained = tuple(map(_is_differentiated, model.params.values()))
        key = (options, *keys, flags, trained)
        return Call(key, (live, model.params, model.options), tensors, of_state, of_batches, flags, leads, self)


def _open_state(state: Any, tensors: list[Tensor]) -> Any:
    """Adds the tensors of a train state, or of parameters and buffers, to a list; returns what else it is."""
    skeleton: Any = None
    if type(state) is TrainState and type(state.opt_state) is OptState:
        skeleton = state.opt_state.skeleton
        parts = (state.params, state.buffers, state.opt_state.values_by_path, state.grads)
    elif type(state) is tuple:
        parts = state
    else:
        raise _OtherKindError
    for part in parts:
        if type(part) is not dict:
            raise _OtherKindError
        tensors += part.values()
    return (skeleton, *map(tuple, parts))


def _open_hyper(hyper: Any, tensors: list[Tensor]) -> Any:
    if hyper is None:
        return None
    if type(hyper) is not Hyperparameters:
        raise _OtherKindError
    return _open([hyper.groups, hyper.attributes, hyper.modules], tensors)


def _open(tree: Any, tensors: list[Tensor]) -> Any:
    """Adds the tensors of a pytree to a list, in the order of torch's pytrees; returns all else, with its kinds."""
    kind = type(tree)
    if kind in _TENSORS:
        tensors.append(tree)
        return Tensor
    if kind is tuple or kind is list:
        return (kind, *_open_all(tree, tensors))
    if kind is dict:
        return (kind, tuple(tree), *_open_all(tree.values(), tensors))
    if kind in _NUMBERS:
        return fixed_form(tree)
    raise _OtherKindError


def _open_all(items: Collection[Any], tensors: list[Tensor]) -> Sequence[Any]:
    if _TENSORS.issuperset(map(type, items)):
        tensors += items
        return (len(items),)
    return [_open(item, tensors) for item in items]
