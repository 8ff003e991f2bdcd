"""Randomness that is not torch's: a captured program cannot draw anew from it, so it is refused where it is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, cast

import numpy as np
import torch

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.provenance import user_source
from gimli_compile.snapshot import Skeleton, static_parts

_RANDOM = (
    "random uniform triangular randint randrange choice choices sample shuffle getrandbits randbytes gauss "
    "normalvariate lognormvariate expovariate vonmisesvariate gammavariate betavariate paretovariate weibullvariate "
    "binomialvariate"
).split()
_NUMPY = (
    "rand randn randint random random_sample ranf sample choice shuffle permutation uniform normal standard_normal "
    "binomial poisson exponential beta gamma laplace logistic multinomial"
).split()


def refusals() -> dict[tuple[ModuleType, str], Callable[..., Any]]:
    """Returns forms of the random functions of Python and NumPy that refuse to draw, by module and name."""
    names = [(random, name) for name in _RANDOM] + [(np.random, name) for name in _NUMPY]
    return {(module, name): _refusing(module, name) for module, name in names if hasattr(module, name)}


def _refusing(module: ModuleType, name: str) -> Callable[..., Any]:
    def function(*_: Any, **__: Any) -> Any:
        raise _error(f"`{module.__name__}.{name}` is called")

    return function


def _error(what: str) -> CaptureError:
    return CaptureError(
        compose_message(
            f"{what} in code that is captured",
            user_source(),
            "The program would hold this one draw as a constant; only draws of torch are inputs of a program.",
            "Draw with torch: `torch.rand(())`, `torch.randperm`, or `torch.where` on a draw in place of a branch.",
        )
    )


@contextmanager
def generators_kept(skeleton: Skeleton) -> Iterator[None]:
    """Gives the generators of Python and NumPy, and those that an optimizer holds, their states back on leaving."""
    held = _generators(skeleton)
    states = [_state(generator) for generator in held]
    try:
        yield
    finally:
        for generator, state in zip(held, states, strict=True):
            _set_state(generator, state)


@contextmanager
def draws_refused(skeleton: Skeleton | None = None) -> Iterator[None]:
    """Refuses draws from the generators of Python and NumPy, and from those of their kind that an optimizer holds."""
    held = [generator for generator in _generators(skeleton) if not isinstance(generator, torch.Generator)]
    states = [repr(_state(generator)) for generator in held]
    yield
    for generator, state in zip(held, states, strict=True):
        if repr(_state(generator)) != state:
            raise _error(f"a `{type(generator).__module__}.{type(generator).__name__}` draws")


def _generators(skeleton: Skeleton | None) -> list[Any]:
    held = [part for part in static_parts(skeleton) if _is_generator(part)] if skeleton is not None else []
    return [cast(Any, random)._inst, cast(Any, np.random.mtrand)._rand, *held]


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
