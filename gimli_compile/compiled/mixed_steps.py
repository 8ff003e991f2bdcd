"""Steps with the joint gradient of their loss, by which mixed mode goes back."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from gimli_compile.compiled.choice import Draws, LoopInputs, Place, at_place
from gimli_compile.compiled.steps import StepFunction
from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.joint_capture import CURE
from gimli_compile.joint_gradients import JointGradients
from gimli_compile.loss_conditions import Captured
from gimli_compile.loss_table import values_of_loss
from gimli_compile.program import Program
from gimli_compile.slot import Role, Slot
from gimli_compile.stepping import SplitStepper, StepInputs


class MixedSteps:
    """Captures joint gradients for steps of two programs; each step has one for what is differentiated."""

    def __init__(self, stepper: SplitStepper) -> None:
        self._stepper = stepper
        self._joints = JointGradients(stepper.losses)
        self._made: dict[Any, StepFunction] = {}

    def of(
        self, step: StepFunction, place: Place, inputs: LoopInputs, draws: Draws, wanted: Collection[Slot]
    ) -> StepFunction | None:
        """Returns a step with the joint gradient in what it trains and in the inputs `wanted` of its loss.

        None if the conditions of the loss do not hold here: the joint gradient would be that of another branch.

        Raises:
            CaptureError: the inner gradient is not the gradient of the loss, or the loss is another when it is captured
                again.
        """
        gradient = step.gradient
        assert gradient is not None
        if gradient.after and not at_place(place, inputs, draws, lambda given: _held(gradient, given)):
            return None
        slots = [slot for slot in gradient.program.inputs if slot in wanted and self._is_used(slot)]
        trained = (Slot(Role.PARAM, name) for name in self._stepper.trained)
        sources = tuple(dict.fromkeys((*trained, *slots)))
        captured = at_place(place, inputs, draws, lambda given: self._find(given, sources))
        key = (step, id(captured))  # which `_joints` keeps
        if key not in self._made:
            _check_conditions(gradient, captured)
            self._made[key] = replace(step, joint=_with_own_constants(captured.program))
        return self._made[key]

    def _find(self, inputs: StepInputs, sources: tuple[Slot, ...]) -> Captured:
        draws = inputs.draws or {}
        given = (inputs.state, inputs.batch, inputs.meta)
        return self._joints.find(*given, wanted=sources, draws=draws, model_key=inputs.model_key)

    def _is_used(self, slot: Slot) -> bool:
        return slot.role is not Role.BUFFER or slot.path in self._stepper.losses.used_buffers()


def _held(gradient: Captured, inputs: StepInputs) -> bool:
    values = values_of_loss(inputs.state, inputs.batch, inputs.meta)
    with torch.no_grad():
        return gradient.held(gradient.program({**values, **(inputs.draws or {})}))


def _check_conditions(gradient: Captured, joint: Captured) -> None:
    """Refuses a joint gradient that holds under conditions which the step does not check."""
    strange = [text for text in joint.guards if text not in gradient.guards]
    if strange:
        raise CaptureError(
            compose_message(
                f"the joint gradient of a loss holds under conditions of its own: {', '.join(strange)}",
                None,
                "A compiled loop looks at the conditions of its steps when they run, and not again on the way back.",
                CURE,
            )
        )


def _with_own_constants(program: Program) -> Program:
    """Names the constants apart from those of the step, which are counted by themselves."""
    names = {slot: Slot(Role.CONSTANT, f"joint.{slot.path}") for slot in program.constants}
    inputs = tuple(names.get(slot, slot) for slot in program.inputs)
    constants = {names[slot]: value for slot, value in program.constants.items()}
    return replace(program, inputs=inputs, constants=constants)
