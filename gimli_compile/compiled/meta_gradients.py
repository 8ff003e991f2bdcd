"""Loops like one that ran before, with the loss after them and the adjoints of both, in one call of the driver.

Between a loop, its loss and their gradient, autograd goes through Python three times, makes tensors of all that is
carried on, and looks for an order. Where both are replays (`replays.py`), none of that is needed: the driver gives the
loss what the loop carries on, and the loop the adjoints of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
import torch._C._aoti as _aoti
import torch._C._autograd as _autograd

from gimli_compile.compiled.call_reading import Call, CallReader
from gimli_compile.compiled.lean import driver
from gimli_compile.compiled.native import capsules
from gimli_compile.compiled.replays import Replay
from gimli_compile.compiled.unrolling import LoopCompiler
from gimli_compile.loop_options import LoopOptions
from gimli_compile.loss_table import Asked
from gimli_compile.metadata import is_differentiable
from gimli_compile.state import TrainState

Tensor = torch.Tensor
Adjoints = list[tuple[Tensor, Tensor | None]]  # what is differentiated, and its adjoint; a tensor may be there twice
_KNOWN = 256  # calls that are remembered
_hooks_of = attrgetter("_backward_hooks")


class OtherFormsError(Exception):
    """A loop and its loss give tensors that do not lie in memory as those do that they take from each other."""


class GradientCall(NamedTuple):
    """The arguments of `meta_gradient`, read: those of its loop, and what the loss is given besides what that makes."""

    key: Any
    loop: Call
    besides: list[Tensor]


class GradientLoops:
    """Runs what `meta_gradient` takes at once, where it ran before."""

    def __init__(self, reader: CallReader, loops: LoopCompiler, losses: LoopCompiler) -> None:
        self._reader = reader
        self._loops, self._losses = loops, losses
        self._known: dict[Any, GradientReplay | None] = {}  # None: it goes step by step

    def read(
        self, state: Any, batches: Any, held_out: Any, others: tuple[Any, Any], options: LoopOptions
    ) -> GradientCall | None:
        """Reads the arguments of a call; None where they are not of the plainest kinds, or nothing is remembered.

        Hooks on tensors, and on what autograd saves, see those of the loop and the loss one after the other, and the
        detection of anomalies does so too.
        """
        if _autograd._top_saved_tensors_default_hooks(True) is not None or torch.is_anomaly_enabled():
            return None
        call = self._reader.loop(state, batches, others, options, single=False)
        found = None if call is None else self._reader.besides(held_out, others[1])
        if call is None or found is None or any(_hooks_of(tensor) for tensor in call.tensors):
            return None
        return GradientCall((call.key, found[0]), call, found[1])

    def run(self, call: GradientCall | None) -> tuple[Tensor, Adjoints] | None:
        """Returns the loss, and the adjoints of what it is differentiated in, if such a call ran before."""
        known = None if call is None else self._known.get(call.key)
        if call is None or known is None or not known.fits(call):
            return None
        try:
            return known(call)
        except OtherFormsError:  # as it will be each time
            self._known[call.key] = None
            return None

    def remember(self, call: GradientCall | None, last: TrainState, held_out: Any, meta: Any, *, tasks: bool) -> None:
        """Takes note of a call of which the loop and the loss just ran; `last` is the state between them."""
        if call is None or self._known.get(call.key, self) is None:
            return
        after = self._reader.evaluation(Asked(last.params, last.buffers, held_out, meta, is_loss=True), tasks=tasks)
        loop, loss = self._loops.known(call.loop), None if after is None else self._losses.known(after)
        if loop is None or loss is None or after is None or not fit_together(loop, loss):
            return
        if len(self._known) == _KNOWN:
            del self._known[next(iter(self._known))]
        self._known[call.key] = GradientReplay(loop, loss, after)


def fit_together(loop: Replay, loss: Replay) -> bool:
    """Tells whether the driver can run a loop and its loss at once."""
    differentiated = loop.record and loss.record
    return differentiated and len(loss.kinds) == 1 and is_differentiable(loss.kinds[0]) and not loss.more


class GradientReplay:
    """A loop and the loss after it, as tables for others like them."""

    def __init__(self, loop: Replay, loss: Replay, after: Call) -> None:
        self._loop, self._loss = loop, loss
        carried = loop.places_of_model()
        self._besides = [place - after.state for place in loss.origins if place >= after.state]
        more = iter(range(loop.carried, loop.carried + len(self._besides)))
        routes = [carried[place] if place < after.state else next(more) for place in loss.origins]
        self._others = [routes[source] - loop.carried for source in loss.sources if routes[source] >= loop.carried]
        kind = loss.kinds[0]
        seed = torch.full((1, *kind.shape), 1 / max(kind.numel(), 1), dtype=kind.dtype)
        through = [loop.through.get(place, -1) for place in range(loop.carried)]
        self._native = driver().gradient(loop.native, loss.native, routes, through, capsules([[seed]])[0][0])

    def fits(self, call: GradientCall) -> bool:
        """Tells whether the live objects hold what they held when the loop and the loss ran."""
        return self._loop.fits(call.loop) and all(map(is_, self._loss.token[1:], call.loop.token[1:]))

    def __call__(self, call: GradientCall) -> tuple[Tensor, Adjoints] | None:
        """Runs all of it; returns nothing where that has to go another way.

        Raises:
            OtherFormsError: it always has to.
        """
        besides = [call.besides[place] for place in self._besides]
        given = [*self._loop.picked(call.loop.tensors), *besides]
        found = self._play(given)
        if found is None and not all(map(Tensor.is_contiguous, given)):
            found = self._play(list(map(Tensor.contiguous, given)))
        if found is None:
            return None
        differentiated = [*self._loop.differentiated(given), *(besides[place] for place in self._others)]
        loss, *adjoints = _tensors(found)
        return loss, list(zip(differentiated, adjoints, strict=True))

    def _play(self, given: list[Tensor]) -> list[Any] | None:
        found = driver().play_gradient(self._native, _aoti.unsafe_alloc_void_ptrs_from_tensors(given))
        if found is False:
            raise OtherFormsError
        return found


def _tensors(found: list[Any]) -> Sequence[Any]:
    if None not in found:
        return _aoti.alloc_tensors_by_stealing_from_void_ptrs(found)
    made = iter(_aoti.alloc_tensors_by_stealing_from_void_ptrs([one for one in found if one is not None]))
    return [None if one is None else next(made) for one in found]
