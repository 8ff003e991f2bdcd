"""Random generators that an optimizer holds, and draws of Python and NumPy that no replacement saw."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.host_draws import host_states
from gimli_compile.provenance import user_source
from gimli_compile.recording import Recorder
from gimli_compile.skeleton import Skeleton, static_parts


@contextmanager
def generators_kept(skeleton: Skeleton) -> Iterator[None]:
    """Gives the generators that an optimizer holds their states back on leaving."""
    held = _generators(skeleton)
    states = [_state(generator) for generator in held]
    try:
        yield
    finally:
        for generator, state in zip(held, states, strict=True):
            _set_state(generator, state)


class DrawsUndone(TorchDispatchMode):
    """Gives the generators of torch that operators were called with, whoever holds them, their states back at the end.

    Of the default generators, it knows nothing (`host_draws.generators_forked`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._states: list[tuple[torch.Generator, torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator."""
        for given in (kwargs or {}).values():
            if isinstance(given, torch.Generator):
                self._states.append((given, given.get_state()))
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: object) -> None:
        super().__exit__(*raised)
        for generator, state in reversed(self._states):
            generator.set_state(state)


@contextmanager
def draws_refused(recorder: Recorder, skeleton: Skeleton | None = None) -> Iterator[None]:
    """Refuses unrecorded draws from generators of Python and NumPy, the optimizer's own or the default ones."""
    held = [part for part in _generators(skeleton) if not isinstance(part, torch.Generator)]
    states = [repr(_state(generator)) for generator in held]
    recorder.host_states = host_states()
    yield
    if repr(host_states()) != repr(recorder.host_states):
        raise _error("a generator of Python or NumPy")
    for generator, state in zip(held, states, strict=True):
        if repr(_state(generator)) != state:
            raise _error(f"the `{type(generator).__module__}.{type(generator).__name__}` that the optimizer holds")


def _error(what: str) -> CaptureError:
    return CaptureError(
        compose_message(
            f"the step draws from {what}",
            user_source(),
            "The program would hold what was drawn at capture as a constant.",
            "Draw with torch (`torch.rand`, `torch.randn`), and choose with `torch.where`.",
        )
    )


def _generators(skeleton: Skeleton | None) -> list[Any]:
    return [part for part in static_parts(skeleton) if _is_generator(part)] if skeleton is not None else []


def _is_generator(part: Any) -> bool:
    return isinstance(part, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState))


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    return generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)
