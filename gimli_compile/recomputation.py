"""`torch.utils.checkpoint` inside a model: what is computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.utils import checkpoint
from torch.utils.checkpoint import set_checkpoint_early_stop

from gimli_compile.metadata import storage_of
from gimli_compile.program import Draw
from gimli_compile.recording import DATA, Recorder, Region

aten = torch.ops.aten


@contextmanager
def recomputation_recorded(recorder: Recorder) -> Iterator[None]:
    """Records a checkpoint's second run as code of the model, with the draws of its first run.

    Torch puts the state of its generator back before it computes again, so that dropout drops the same elements; a
    program, whose draws are inputs, uses the same inputs.
    """
    module = cast(Any, checkpoint)
    original, hook = module._checkpoint_without_reentrant_generator, module._recomputation_hook

    class Kept(hook):
        """Keeps what is computed again; the detach that this takes is torch's own."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            keep = self.pack_hook

            def pack(tensor: torch.Tensor) -> Any:
                with recorder.in_region(Region.BACKWARD):
                    return keep(tensor)

            self.pack_hook = pack

    def bracket(function: Callable[..., Any], preserve_rng_state: bool = True, *options: Any, **kwargs: Any) -> Any:
        drawn: list[tuple[torch.Tensor, torch.Tensor]] = []

        def again(*args: Any, **kwargs: Any) -> Any:
            with recorder.in_region(Region.LOSS), _draws(recorder, lambda *one: _replay(recorder, left, *one)):
                left = list(drawn)
                return function(*args, **kwargs)

        if not preserve_rng_state:
            yield from original(again, preserve_rng_state, *options, **kwargs)
            return
        with _draws(recorder, lambda *one: _log(recorder, drawn, *one)):
            yield from original(again, preserve_rng_state, *options, **kwargs)

    module._checkpoint_without_reentrant_generator, module._recomputation_hook = bracket, Kept
    try:
        yield
    finally:
        module._checkpoint_without_reentrant_generator, module._recomputation_hook = original, hook


def run_reentrant(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    """Runs a reentrant checkpoint, which torch refuses under `torch.autograd.grad`, as the other kind.

    As in the reentrant kind, all is computed again, and nothing inside has a gradient if no argument asks for one.
    """
    wanted = torch.is_grad_enabled() and any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args)
    if not wanted:
        with torch.no_grad():
            return function(*args)
    with set_checkpoint_early_stop(False):
        return checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)


@contextmanager
def _draws(recorder: Recorder, handle: Callable[..., None]) -> Iterator[None]:
    """Lets `handle` treat what is drawn inside."""
    changed, before = cast(Any, recorder), recorder._add_draw
    changed._add_draw = lambda draw, noise, out: handle(before, draw, noise, out)
    try:
        yield
    finally:
        changed._add_draw = before


def _log(
    recorder: Recorder,
    drawn: list[tuple[torch.Tensor, torch.Tensor]],
    add: Callable[..., None],
    draw: Draw,
    noise: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Announces a draw in a form that the code cannot change in place, and notes it."""
    pristine = noise.detach().clone() if noise is out else noise
    add(draw, pristine, pristine)
    drawn.append((pristine, pristine.detach().clone()))
    _give(recorder, pristine, out)


def _replay(
    recorder: Recorder,
    left: list[tuple[torch.Tensor, torch.Tensor]],
    add: Callable[..., None],
    draw: Draw,
    noise: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Takes the next draw of the first run if this is the same one."""
    with recorder.paused():
        same = bool(left) and left[0][1].shape == noise.shape and torch.equal(left[0][1], noise)
    if same:
        _give(recorder, left.pop(0)[0], out)
    else:
        add(draw, noise, out)


def _give(recorder: Recorder, known: torch.Tensor, out: torch.Tensor) -> None:
    if recorder.knows(out):
        recorder.add_call(aten.copy_.default, (recorder.node_of(out), recorder.node_of(known)), {}, out)
    else:
        recorder.add_call(aten.clone.default, (recorder.node_of(known),), {}, out)
    recorder._reach[storage_of(out)] = DATA
