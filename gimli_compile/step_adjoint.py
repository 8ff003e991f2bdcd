"""The adjoint of one step: the update by a vector-Jacobian product, the inner gradient by a forward product."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from gimli_compile.joint_gradients import JointGradients
from gimli_compile.loss_table import values_of_loss
from gimli_compile.pulling_back import Values, added, pull_back
from gimli_compile.row_gradients import by_slot, from_slots
from gimli_compile.slot import Role, Slot
from gimli_compile.state import OptState
from gimli_compile.stepping import SplitStepper, StepInputs
from gimli_compile.update_values import UpdateInputs

LOSS = Slot(Role.LOSS)
_OF_UPDATE = (Role.PARAM, Role.GRAD, Role.STATE, Role.HYPER)


class StepAdjoint:
    """Carries adjoints back over one step of two programs, by Algorithm 1 of Gimli with forward over reverse.

    With v the adjoint of the inner gradient G, the derivative of the *joint* gradient of the loss along (v, 0) has the
    Hessian product and all mixed terms (MixFlow-MG, arXiv 2505.00793): nothing is differentiated in reverse twice.
    """

    def __init__(self, stepper: SplitStepper) -> None:
        self.stepper = stepper
        self.joint = JointGradients(stepper.losses)

    def carry_back(
        self, inputs: StepInputs, grads: Mapping[str, Any], seeds: Values, wanted: Collection[Slot]
    ) -> dict[Slot, torch.Tensor]:
        """Returns the adjoints of what the step starts from, given those of what it ends with.

        `seeds` are by the slots of the new state, and LOSS; `grads` is the inner gradient, which the step made before.
        `wanted` are the inputs whose adjoints matter.
        """
        data, grad_seeds = self._through_update(inputs, grads, seeds, wanted)
        return added(
            data,
            self._through_gradient(inputs, grad_seeds, seeds.get(LOSS), wanted),
            self._through_buffers(inputs, seeds, wanted),
        )

    def _through_update(
        self, inputs: StepInputs, grads: Mapping[str, Any], seeds: Values, wanted: Collection[Slot]
    ) -> tuple[dict[Slot, torch.Tensor], dict[Slot, torch.Tensor]]:
        state, trained = inputs.state, self.stepper.trained
        values = {Slot(Role.PARAM, name): value for name, value in state.params.items()}
        values.update(by_slot(grads))
        values.update({Slot(Role.STATE, path): value for path, value in state.opt_state.items()})
        values.update({Slot(Role.HYPER, path): value for path, value in inputs.hyper.items()})

        def update(given: Values) -> Values:
            of = _by_role(given)
            opt_state = OptState(state.opt_state.skeleton, of[Role.STATE])
            made = UpdateInputs(of[Role.PARAM], from_slots(given, trained), opt_state, of[Role.HYPER], draws)
            params, opt_state = self.stepper.updates.run(made)
            results = {Slot(Role.PARAM, name): value for name, value in params.items()}
            return {**results, **{Slot(Role.STATE, path): value for path, value in opt_state.items()}}

        draws = inputs.draws or {}
        of_update = {slot: seed for slot, seed in seeds.items() if slot.role in (Role.PARAM, Role.STATE)}
        of_inputs = {slot for slot in values if slot in wanted or slot.role is Role.GRAD}
        found = pull_back(update, values, of_inputs, of_update)
        grad_seeds = {Slot(Role.PARAM, slot.path): found.pop(slot) for slot in list(found) if slot.role is Role.GRAD}
        return found, grad_seeds

    def _through_gradient(
        self, inputs: StepInputs, along: Values, of_loss: torch.Tensor | None, wanted: Collection[Slot]
    ) -> dict[Slot, torch.Tensor]:
        """Returns what the adjoints of the inner gradient, and of the loss itself, are in the inputs of the loss."""
        found = values_of_loss(inputs.state, inputs.batch, inputs.meta)
        slots = tuple(slot for slot in found if slot in wanted and self._is_used(slot))
        if not slots or (not along and of_loss is None):
            return {}
        trained = tuple(Slot(Role.PARAM, name) for name in self.stepper.trained)
        gradient, product = self.joint.push(
            inputs.state,
            inputs.batch,
            inputs.meta,
            wanted=tuple(dict.fromkeys((*trained, *slots))),
            along=along,
            draws=inputs.draws or {},
            model_key=inputs.model_key,
        )
        parts = [product]
        if of_loss is not None:
            parts.append({slot: value * of_loss for slot, value in gradient.items()})
        return {slot: value for slot, value in added(*parts).items() if slot in slots}

    def _is_used(self, slot: Slot) -> bool:
        return slot.role is not Role.BUFFER or slot.path in self.stepper.losses.used_buffers()

    def _through_buffers(self, inputs: StepInputs, seeds: Values, wanted: Collection[Slot]) -> dict[Slot, torch.Tensor]:
        """Returns the adjoints of what new buffers depend on, in reverse: only the part that makes them runs."""
        of_buffers = {slot: seed for slot, seed in seeds.items() if slot.role is Role.BUFFER}
        if not of_buffers:
            return {}
        if self.stepper.keeps_buffers:
            return {slot: seed for slot, seed in of_buffers.items() if slot in wanted}
        data = (inputs.state, inputs.batch, inputs.meta)

        def buffers(given: Values) -> Values:
            draws = inputs.draws or {}
            stepper = self.stepper
            return stepper.losses.buffers(*data, stepper.trained, values=given, draws=draws, model_key=inputs.model_key)

        values = values_of_loss(*data)
        return pull_back(buffers, values, [slot for slot in values if slot in wanted], of_buffers)


def _by_role(values: Values) -> dict[Role, dict[str, torch.Tensor]]:
    found: dict[Role, dict[str, torch.Tensor]] = {role: {} for role in _OF_UPDATE}
    for slot, value in values.items():
        found.setdefault(slot.role, {})[slot.path] = value
    return found
