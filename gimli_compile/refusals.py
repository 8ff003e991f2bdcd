"""What a capture refuses, in words."""

from __future__ import annotations

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
