"""What a capture refuses, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.provenance import user_source


def parameter_changes(name: str, operator: str) -> CaptureError:
    """The model or the loss writes to a parameter."""
    return CaptureError(
        compose_message(
            f"the model changes its parameter {name!r} in place (`{operator}`)",
            user_source(),
            "A step returns the parameters that the optimizer makes; this change would be lost.",
            "Change the parameter between steps, or compute with a changed copy of it.",
        )
    )


_LACKING = {torch.ctc_loss: "ctc_loss"}


def _refused(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
    """Refuses an operator whose gradient has no derivative and no other form."""
    raise CaptureError(
        compose_message(
            f"`{_LACKING[func]}` has no second derivative",
            user_source(),
            "An inner gradient is differentiated again, and torch cannot differentiate the gradient of this operator.",
            "Write the loss in elementary operators (`logsumexp`, `where`), "
            "or take it out of the inner loss and use it in the outer one.",
        )
    )


REFUSED_OPERATORS: dict[Any, Callable[[Any, Any, Any, Any], Any]] = dict.fromkeys(_LACKING, _refused)
