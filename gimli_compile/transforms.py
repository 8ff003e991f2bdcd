"""Values under torch.func transforms: what is inside a wrapper, and capture outside of all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._C._functorch as _functorch
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import (
    VmapInterpreter,
    retrieve_all_functorch_interpreters,
    temporarily_clear_interpreter_stack,
)
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only


@contextmanager
def outside_transforms() -> Iterator[None]:
    """Runs what is inside as if no torch.func transform were active, and without recording for autograd."""
    with temporarily_clear_interpreter_stack(), torch.no_grad():
        yield


def representative(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a plain tensor of the same form as a possibly wrapped one; of a batched one, the first lane."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            tensor = _functorch.get_unwrapped(tensor).select(_functorch.maybe_get_bdim(tensor), 0)
        else:
            tensor = _functorch.get_unwrapped(tensor)
    return tensor.detach()


def representatives(tree: Any) -> Any:
    """Applies `representative` to the tensors of a pytree; equal objects stay equal."""
    known: dict[int, torch.Tensor] = {}

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in known:
            known[id(tensor)] = representative(tensor)
        return known[id(tensor)]

    with outside_transforms():
        return tree_map_only(torch.Tensor, convert, tree)


def representatives_apart(tree: Any) -> Any:
    """Applies `representative` to the tensors of a pytree; none of those that it returns are one object."""
    with outside_transforms():
        return tree_map_only(torch.Tensor, representative, tree)


def all_lanes(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the values of a possibly wrapped tensor, with the batch dimensions of `vmap` if there are any."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor.detach()


def is_everywhere(condition: torch.Tensor, outcome: bool) -> bool:
    """Tells whether a bool tensor equals `outcome` in every element and every lane."""
    if not _functorch.is_functorch_wrapped_tensor(condition):
        if condition.dim() == 0:
            return bool(condition) == outcome
        return bool((condition == outcome).all())
    with outside_transforms():
        return bool((all_lanes(condition) == outcome).all())


def in_every_lane(draw: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Makes a random draw; under `vmap` one for each lane, each from the default generator in turn."""
    levels = [one for one in retrieve_all_functorch_interpreters() if isinstance(one, VmapInterpreter)]
    if not levels:
        return draw()
    sizes = [one.batch_size() for one in levels]
    with outside_transforms():
        noise = torch.stack([draw() for _ in range(math.prod(sizes))])
        noise = noise.reshape(*sizes, *noise.shape[1:])
    for level in levels:
        noise = _functorch._add_batch_dim(noise, 0, level.level())
    return noise


def generator_states() -> list[tuple[torch.Generator, torch.Tensor]]:
    """Returns torch's default generators with their present states."""
    devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
    return [(generator, generator.get_state()) for generator in (torch.default_generator, *devices)]


def rewind(states: list[tuple[torch.Generator, torch.Tensor]]) -> None:
    """Puts generators back into these states."""
    for generator, state in states:
        generator.set_state(state)


def is_differentiated(tensor: torch.Tensor) -> bool:
    """Tells whether somebody differentiates with respect to a tensor, by autograd, torch.func.grad or forward mode."""
    if tensor.requires_grad:
        return True
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def has_tangent(tensor: torch.Tensor) -> bool:
    """Tells whether somebody differentiates with respect to a tensor in forward mode, as far as the tensor shows it."""
    forward = {one.level() for one in retrieve_all_functorch_interpreters() if one.key() == TransformType.Jvp}
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor) and _functorch.maybe_get_level(tensor) in forward:
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return not forward and forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_zero(tensor: torch.Tensor) -> bool:
    """Tells whether all values of a tensor are exactly zero."""
    with outside_transforms():
        return not bool(all_lanes(tensor).any())
