"""Random numbers from the generators of Python and NumPy, which no tensor operator makes.

While a trace runs, such a number becomes an input of the program, drawn again from the same generator in every step,
and carries its tensor: `if random.random() < p` is a guard. What else these generators give (whole numbers, choices,
arrays) would enter the program as it was drawn once, and is refused.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from gimli_compile.concolic import Number, bake, make_number
from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.program import Draw
from gimli_compile.provenance import user_source
from gimli_compile.recording import Recorder, Region

_PYTHON = (
    "random uniform triangular betavariate expovariate gammavariate gauss lognormvariate normalvariate vonmisesvariate "
    "paretovariate weibullvariate randint randrange getrandbits randbytes choice choices sample shuffle"
).split()
_NUMPY = (
    "random random_sample ranf sample rand randn uniform normal standard_normal exponential standard_exponential beta "
    "gamma standard_gamma lognormal laplace logistic rayleigh triangular vonmises weibull randint random_integers "
    "binomial poisson geometric choice permutation shuffle bytes multivariate_normal dirichlet multinomial"
).split()


def host_draw_functions(recorder: Recorder) -> dict[tuple[ModuleType, str], Callable[..., Any]]:
    """Returns the forms of the drawing functions for one trace, by module and name."""
    places = [(random, name) for name in _PYTHON] + [(np.random, name) for name in _NUMPY]
    return {(m, name): _recorded(getattr(m, name), recorder) for m, name in places if hasattr(m, name)}


def _recorded(original: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    what = f"`{getattr(original, '__name__', 'a generator')}`"

    def function(*args: Any, **options: Any) -> Any:
        pinned, named = tree_map(
            lambda leaf: bake(leaf, f"a number passed to {what}") if isinstance(leaf, Number) else leaf, (args, options)
        )
        value = original(*pinned, **named)
        if not isinstance(value, float) or recorder.region is Region.LOSS:
            raise _refusal(what, recorder.region)
        with recorder.paused():
            tensor = torch.full((), value, dtype=torch.float64)
        recorder.add_host_draw(Draw(_draw_again, (original, *pinned), named), tensor)
        recorder.host_states = host_states()
        return make_number(float(value), tensor, recorder)

    return function


def _draw_again(original: Callable[..., float], *args: Any, **options: Any) -> torch.Tensor:
    return torch.full((), original(*args, **options), dtype=torch.float64)


def _refusal(what: str, region: Region) -> CaptureError:
    where = "the model or the loss" if region is Region.LOSS else "the step"
    return CaptureError(
        compose_message(
            f"{where} draws from a generator of Python or NumPy: {what}",
            user_source(),
            "The program would hold what was drawn at capture as a constant.",
            "Draw with torch (`torch.rand`, `torch.randn`), and choose with `torch.where`.",
        )
    )


@contextmanager
def generators_forked(rewound: Any = None) -> Iterator[None]:
    """Leaves the default generators of torch, Python and NumPy as they were.

    `rewound` are states of Python's and NumPy's (`host_states`) to start from.
    """
    before = host_states()
    with torch.random.fork_rng():
        try:
            if rewound is not None:
                set_host_states(rewound)
            yield
        finally:
            set_host_states(before)


def host_states() -> Any:
    """Returns the states of the generators of Python and NumPy."""
    return random.getstate(), np.random.get_state()


def set_host_states(states: Any) -> None:
    """Puts the generators of Python and NumPy into these states."""
    python, numpy = states
    random.setstate(python)
    np.random.set_state(numpy)
