"""What a capture refuses, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.provenance import user_source


def _refusal(what: str, why: str, cure: str) -> CaptureError:
    return CaptureError(compose_message(what, user_source(), why, cure))


def parameter_changes(name: str, operator: str) -> CaptureError:
    """The model or the loss writes to a parameter."""
    return _refusal(
        f"the model changes its parameter {name!r} in place (`{operator}`)",
        "A step returns the parameters that the optimizer makes; this change would be lost.",
        "Change the parameter between steps, or compute with a changed copy of it.",
    )


def live_reference(name: str) -> CaptureError:
    """Code uses a live tensor that the program has another in place of."""
    return _refusal(
        f"the live tensor {name!r} is used through a reference that was kept, not through the model",
        "The program runs with other tensors in its place; a kept reference would stay what it was.",
        "Take parameters and buffers from the model inside the loss, as `model.parameters()` gives them.",
    )


def branch_on_value() -> CaptureError:
    """The model or the loss asks for a value that has derivatives."""
    return _refusal(
        "the model or the loss turns the value of a tensor into a Python value",
        "A captured step is a graph, and the graph cannot follow Python's control flow on tensor values.",
        "Use `torch.where`, `torch.clamp` or another tensor operator in place of the branch. Or let every outcome "
        'have a program of its own: `functionalize(..., branches="guard")`.',
    )


def value_read(operator: str, *, in_model: bool) -> CaptureError:
    """Code reads the value of a tensor where no guard can follow."""
    where = "the model or the loss" if in_model else "the step"
    return _refusal(
        f"{where} turns the value of a tensor into a Python value (`{operator}`)",
        "A captured step is a graph, and the graph cannot follow Python's control flow on tensor values.",
        "Use `torch.where`, `torch.clamp` or another tensor operator in place of the branch.",
    )


def varying_shape(operator: str) -> CaptureError:
    """An operator has a result whose shape follows from values."""
    return _refusal(
        f"`{operator}` has a result whose shape depends on tensor values",
        "A captured program has fixed shapes.",
        "Use a mask (`torch.where`) instead of selecting.",
    )


def foreign_write(operator: str) -> CaptureError:
    """An operator writes to a tensor that is no input of the program."""
    return _refusal(
        f"`{operator}` changes a tensor that is neither a parameter, a buffer nor state",
        "A captured program is pure: what it changes must be one of its inputs.",
        "Register the tensor with `register_buffer`, or keep it in the optimizer's state.",
    )


def custom_write(operator: str) -> CaptureError:
    """A custom operator writes to its arguments and returns nothing."""
    return _refusal(
        f"`{operator}` writes to its arguments",
        "This custom operator has no form that returns what it writes instead, and no derivative.",
        "Write the line in torch's operators, or give the operator a form that returns new tensors "
        "(`mutates_args=()`), with `register_autograd`.",
    )


def hidden_memory(what: str) -> CaptureError:
    """Code reaches for the memory of a captured tensor, past torch's operators."""
    return _refusal(
        f"the memory of a captured tensor is used past torch's operators (`{what}`)",
        "A program sees operators only; what comes of the memory would be a constant of it.",
        "Copy with `x.clone()`, share with `x.detach()` or `x.view_as(x)`.",
    )


def varying_distribution(operator: str) -> CaptureError:
    """An operator draws from a distribution that follows from values."""
    return _refusal(
        f"`{operator}` draws from a distribution that depends on tensor values",
        "A draw becomes an input of the program, so it cannot depend on what the program computes.",
        "Draw noise of a fixed distribution and transform it (the reparameterization of the draw).",
    )


def number_for_each(operator: str) -> CaptureError:
    """A hyperparameter with one value for each element meets elements that a mask selected."""
    return _refusal(
        "a hyperparameter that has a value for each element of its parameter meets elements that a mask selected, "
        f"in `{operator}`",
        "The code has one number there. Which of the values belong to the selected elements it does not say.",
        "Give this hyperparameter one value (of each parameter: `per_parameter=True`), or write the step with "
        "`torch.where(mask, ..., x)` in place of `x[mask]`.",
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
