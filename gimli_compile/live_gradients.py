"""The gradients of live parameters, while copies of them are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.provenance import user_source


@contextmanager
def live_gradients_kept(params: Iterable[torch.Tensor]) -> Iterator[None]:
    """Takes the gradients of live parameters away for a while; refuses code that gives them new ones.

    Such code evaluates a loss of the live model through a reference that it keeps, whatever it is given.
    """
    held = [(param, param.grad) for param in params]
    for param, _ in held:
        param.grad = None
    try:
        yield
        if any(param.grad is not None for param, _ in held):
            raise CaptureError(
                compose_message(
                    "the step evaluates a loss of the live model, which it keeps a reference to",
                    user_source(),
                    "The program runs with other parameters in place of the live ones.",
                    "Pass the loop body as `functionalize(..., train_step=...)`, and make such closures inside it.",
                )
            )
    finally:
        for param, grad in held:
            param.grad = grad
