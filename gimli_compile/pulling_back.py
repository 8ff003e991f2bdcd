"""Vector-Jacobian products of functions from slots to slots."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch

from gimli_compile.checkpointing import distinct, pull
from gimli_compile.slot import Slot

Values = Mapping[Slot, torch.Tensor]


def pull_back(
    function: Callable[[Values], Values], values: Values, wanted: Collection[Slot], seeds: Values
) -> dict[Slot, torch.Tensor]:
    """Returns the gradient of `sum(seed * result)` in the inputs `wanted`, without those on which nothing depends.

    `seeds` are by result slot. Of inputs that are one and the same tensor, the first gets the gradient of all.
    """
    slots = tuple(values)
    tensors, places = distinct([values[slot] for slot in slots])
    where = dict(zip(slots, places, strict=True))
    outputs = [slot for slot, seed in seeds.items() if seed is not None]

    def flat(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        results = function({slot: given[place] for slot, place in where.items() if place is not None})
        return tuple(results[slot] for slot in outputs)

    first: dict[int, Slot] = {}
    for slot in slots:
        place = where[slot]
        if slot in wanted and place is not None and tensors[place].is_floating_point():
            first.setdefault(place, slot)
    if not first or not outputs:
        return {}
    grads = pull(flat, tensors, list(first), [seeds[slot] for slot in outputs])
    return {slot: grad for slot, grad in zip(first.values(), grads, strict=True) if grad is not None}


def added(*parts: Values) -> dict[Slot, torch.Tensor]:
    """Returns the sums of tensors by slot."""
    total: dict[Slot, torch.Tensor] = {}
    for part in parts:
        for slot, value in part.items():
            total[slot] = total[slot] + value if slot in total else value
    return total
