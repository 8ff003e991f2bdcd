"""Captures the joint gradient of the loss: in the trained parameters and in whatever else is differentiated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.loss_capture import LossRun, arguments_of_loss, check_loss, inner_gradient
from gimli_compile.loss_conditions import Captured
from gimli_compile.model_view import ModelView
from gimli_compile.passes.rematerialization import recompute_blocks
from gimli_compile.program import Program
from gimli_compile.provenance import user_source
from gimli_compile.recording import Region
from gimli_compile.slot import Role, Slot
from gimli_compile.state import Tensors

CURE = 'Use `backward="reverse"`; with `checkpoint="step"` it keeps only the states between steps.'


def gradient_slot(slot: Slot) -> Slot:
    """Returns the result slot of the joint gradient in an input."""
    return Slot(Role.GRAD, str(slot))


def capture_joint(
    view: ModelView,
    loss_fn: Callable[..., Any],
    params: Tensors,
    buffers: Tensors,
    batch: Any,
    meta: Any,
    wanted: tuple[Slot, ...],
    title: str,
) -> Captured:
    """Captures the loss and its gradient in the inputs `wanted`, with block recomputation.

    Raises:
        CaptureError: something makes the inner gradient another than that of the loss, such as a hook.
    """
    _refuse_hooks(view)
    run = LossRun(view, params, buffers, wanted)
    arguments = arguments_of_loss(run, loss_fn, batch, meta)
    with run.tracing(), _hooks_refused():
        loss = loss_fn(*arguments)
        check_loss(loss, loss_fn)
        with run.recorder.in_region(Region.BACKWARD):
            leaves = {str(slot): run.leaves[slot] for slot in wanted if slot in run.leaves}
            grads = inner_gradient(loss, leaves, loss_fn)
    results = {Slot(Role.LOSS): run.recorder.node_of(loss), **run.gradient_results(grads)}
    captured = run.finish(title, "joint", {slot: node for slot, node in results.items() if slot.role is not Role.ROWS})
    _refuse_custom_functions(captured.program)
    return replace(captured, program=recompute_blocks(captured.program))


def no_gradient_field(what: str, where: object) -> CaptureError:
    """Returns the error for an inner gradient that is not the gradient of the loss."""
    return CaptureError(
        compose_message(
            f'{what}, and `backward="mixed"` cannot differentiate this inner gradient',
            where,
            "It takes the derivative of the inner gradient to be symmetric, as that of a true gradient is.",
            CURE,
        )
    )


def refuse_complex(slots: Iterable[Slot]) -> None:
    """Refuses these inputs, which are complex."""
    found = ", ".join(map(str, slots))
    if found:
        raise CaptureError(
            compose_message(
                f'`backward="mixed"` cannot differentiate in complex numbers: {found}',
                None,
                "It takes the derivative of the inner gradient to be symmetric, which that of a real loss in complex "
                "numbers is not.",
                CURE,
            )
        )


def _refuse_hooks(view: ModelView) -> None:
    for name, parameter in view.live_params.items():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            raise no_gradient_field(f"the parameter `{name}` has a hook on its gradient", None)
    for module in view.modules():
        if module._backward_hooks or module._backward_pre_hooks:
            raise no_gradient_field(f"a {type(module).__name__} has a hook on its backward pass", None)


@contextmanager
def _hooks_refused() -> Iterator[None]:
    """Refuses hooks that the model or the loss puts on tensors while it runs."""
    original = torch.Tensor.register_hook

    def register_hook(*_: Any) -> Any:
        raise no_gradient_field("a tensor has a hook on its gradient", user_source())

    setattr(torch.Tensor, "register_hook", register_hook)  # noqa: B010
    try:
        yield
    finally:
        setattr(torch.Tensor, "register_hook", original)  # noqa: B010


def _refuse_custom_functions(program: Program) -> None:
    for node in program.graph.nodes:
        if getattr(node.target, "is_custom_function", False):
            name = node.target.__name__
            raise no_gradient_field(f"`{name}` is an autograd function with its own backward", node.meta.get("source"))
