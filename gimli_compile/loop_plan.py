"""Chooses the way through the backward pass by the memory that there is, from the shapes in the programs."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.errors import InputError, compose_message
from gimli_compile.live_bytes import made_bytes, peak_bytes
from gimli_compile.loop_steps import LoopSteps
from gimli_compile.passes.rematerialization import recompute_blocks
from gimli_compile.stepping import SplitStepper
from gimli_compile.tasks import Loop, TaskSteps

_LOG = logging.getLogger("gimli_compile")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Plan:
    """A way through the backward pass: options of `unroll`, and the bytes that it is estimated to take."""

    backward: str
    checkpoint: int | None
    bytes: int

    def __str__(self) -> str:
        return f"backward={self.backward!r}, checkpoint={self.checkpoint!r}: about {self.bytes / 1e6:,.1f} MB"


def bytes_of_text(memory: str | int | None) -> int:
    """Returns a number of bytes: of "2GiB", "500 MB", or of a number as it is."""
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    found = re.fullmatch(r"\s*([\d.]+)\s*([A-Za-z]*)\s*", memory) if isinstance(memory, str) else None
    if found is None or found[2].upper() not in _UNITS:
        raise InputError(
            f'memory={memory!r} is no amount of memory. With backward="auto", give one as "2GiB", "500MB" or in bytes.'
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def choose_plan(steps: LoopSteps | TaskSteps, loop: Loop, memory: int, together: int | None = None) -> Plan:
    """Returns the fastest exact way that is estimated to fit into `memory`; takes two steps to see their programs.

    Of many tasks, so many run `together`; all by default.

    Raises:
        InputError: none fits.
    """
    with torch.no_grad(), torch.random.fork_rng():
        after = loop.state
        for index in range(min(2, len(loop.batches))):  # later steps may take more than the first, which starts a state
            after = steps.step(after, loop.batches[index], loop.hyper, loop.meta, None)[0]
    plans = list(_plans(steps, loop, after, together))
    fitting = next((plan for plan in plans if plan.bytes <= memory), None)
    if fitting is None:
        least = min(plans, key=lambda plan: plan.bytes)
        raise InputError(
            compose_message(
                f'backward="auto" found no way through the backward pass that fits into {memory / 1e6:,.1f} MB',
                None,
                f"The leanest is {least}.",
                "Give more memory, fewer steps or tasks at a time, or truncate.",
            )
        )
    _LOG.info("unroll of %d steps: %s", len(loop.batches), fitting)
    return fitting


def _plans(steps: LoopSteps | TaskSteps, loop: Loop, after: Any, together: int | None) -> Iterator[Plan]:
    """Yields the ways, the fastest first."""
    plain = steps.steps if isinstance(steps, TaskSteps) else steps
    count, lanes = len(loop.batches), _lanes(steps, after)
    programs = plain.stepper.latest_programs()
    state = sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(after))
    params = sum(leaf.numel() * leaf.element_size() for leaf in after.params.values())
    recorded = sum(map(made_bytes, programs))
    yield Plan("reverse", None, count * lanes * recorded)
    at_once = together or lanes
    length = _length(count, state, at_once * recorded)
    yield Plan("reverse", length, math.ceil(count / length) * state + 2 * length * at_once * recorded)
    if plain.order == 2 and isinstance(plain.stepper, SplitStepper):
        gradient, update = programs
        product = 3 * peak_bytes(recompute_blocks(gradient))  # values, tangents, and what makes tangents
        one = at_once * max(peak_bytes(gradient), product, 2 * made_bytes(update)) + 3 * params
        yield Plan("mixed", 1, count * (state + params) + one)
        length = _length(count, state, state + params)
        yield Plan("mixed", length, math.ceil(count / length) * state + length * (state + params) + one)


def _lanes(steps: LoopSteps | TaskSteps, after: Any) -> int:
    return next(iter(after.params.values())).shape[0] if isinstance(steps, TaskSteps) else 1


def _length(count: int, kept: int, within: int) -> int:
    """Returns the length of segments of which the sum of what is kept between and within them is least."""
    return max(1, min(count, round(math.sqrt(count * kept / max(within, 1)))))
