"""The tangents of one step: every direction pushed forward through loss, gradient and update at once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.checkpointing import distinct
from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.forward_derivatives import jvp
from gimli_compile.loop_labels import labels_of
from gimli_compile.metadata import operator_name
from gimli_compile.program import Program
from gimli_compile.pulling_back import Values
from gimli_compile.records import opened

_LACKING = re.compile(r"forward AD with (\w+)")


def push_step(
    step: Callable[..., Any], inputs: tuple[Any, ...], tangents: Values, programs: Callable[[], Iterable[Program]]
) -> dict[int, torch.Tensor]:
    """Returns the tangents of what a step returns, by the place of the leaf, for tangents of its inputs by slot.

    Tangents lead with the direction. `inputs` are state, batch, hyper and meta; leaves that are one tensor stay one.

    Raises:
        CaptureError: torch has no forward derivative of an operator; the message names the line that called it.
    """
    state, batch, hyper, meta = inputs
    leaves, structure = pytree.tree_flatten((state, [batch], hyper, meta))
    tensors, places = distinct(leaves)
    given: dict[int, torch.Tensor] = {}
    for label, place in zip(labels_of((state, [batch], hyper, meta)), places, strict=True):
        if label is not None and place is not None and label[1] in tangents:
            given.setdefault(place, tangents[label[1]])

    def run(*moved: torch.Tensor) -> Any:
        now = {**dict(enumerate(tensors)), **dict(zip(given, moved, strict=True))}
        flat = [leaf if place is None else now[place] for leaf, place in zip(leaves, places, strict=True)]
        state, batches, hyper, meta = pytree.tree_unflatten(flat, structure)
        made = pytree.tree_leaves(opened(step(state, batches[0], hyper, meta)))
        return {i: v for i, v in enumerate(made) if isinstance(v, torch.Tensor) and v.is_floating_point()}, ()

    def along(*one: torch.Tensor) -> Any:
        return jvp(run, tuple(tensors[place] for place in given), one)[1]

    with refused_operator(programs):
        return torch.func.vmap(along)(*given.values())


@contextmanager
def refused_operator(programs: Callable[[], Iterable[Program]]) -> Iterator[None]:
    """Says which line calls an operator that torch has no forward derivative of, if some call within lacks it."""
    try:
        yield
    except NotImplementedError as error:
        lacking = _LACKING.search(str(error))
        if lacking is None:
            raise
        raise _refusal(lacking[1], programs()) from error


def _refusal(operator: str, programs: Iterable[Program]) -> CaptureError:
    lines = [node.meta.get("source") for p in programs for node in p.graph.nodes if node.op == "call_function"
             and operator_name(node.target) in (operator, operator.lstrip("_"))]  # fmt: skip
    return CaptureError(
        compose_message(
            f"torch cannot differentiate `{operator}` in forward mode",
            next((line for line in lines if line is not None), None),
            'backward="forward" pushes tangents through every operator of a step.',
            'Use `backward="reverse"`, or write the line in elementary operators.',
        )
    )
