"""How a functionalized model steps: by two programs, loss with gradient and update, or by one of the whole step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gimli_compile.loss_table import LossTable
from gimli_compile.model_view import ModelView
from gimli_compile.program import Program
from gimli_compile.records import opened
from gimli_compile.row_gradients import from_slots
from gimli_compile.slot import HELD, Role, Slot
from gimli_compile.state import Tensors, TrainState
from gimli_compile.update_table import UpdateTable, assemble
from gimli_compile.update_values import StepData, UpdateInputs


@dataclass(frozen=True)
class StepInputs:
    """What one step starts from: see `Functional.step`. `model_key` is the model's signature if the caller knows it."""

    state: TrainState
    batch: Any
    hyper: Mapping[str, torch.Tensor]
    meta: Any
    order: int = 2
    draws: dict[Slot, torch.Tensor] | None = None
    model_key: Any = None


class SplitStepper:
    """Takes the loss and its gradient from one program and the update from another.

    With `keeps_buffers`, those after a step are those before it.
    """

    def __init__(self, losses: LossTable, updates: UpdateTable, trained: list[str], keeps_buffers: bool) -> None:
        self.losses = losses
        self.updates = updates
        self.trained = trained
        self.keeps_buffers = keeps_buffers

    def step(self, inputs: StepInputs) -> tuple[TrainState, torch.Tensor]:
        """Returns the new state and the loss before the step."""
        return self.step_with_gradient(inputs)[:2]

    def step_with_gradient(self, inputs: StepInputs) -> tuple[TrainState, torch.Tensor, dict[str, Any]]:
        """Returns the new state, the loss before the step, and its gradient by parameter name."""
        state = inputs.state
        batch, meta = opened((inputs.batch, inputs.meta))
        draws = {} if inputs.draws is None else inputs.draws
        loss, grads, buffers = self.losses.gradient(
            state,
            batch,
            meta,
            self.trained,
            order=inputs.order,
            draws=draws,
            model_key=inputs.model_key,
        )
        params, opt_state = self.updates.run(UpdateInputs(state.params, grads, state.opt_state, inputs.hyper, draws))
        return TrainState(params, state.buffers if self.keeps_buffers else buffers, opt_state), loss, grads

    def carried_buffers(self) -> frozenset[str]:
        """Returns the names of the buffers that carry derivatives from one step to the next."""
        return frozenset() if self.keeps_buffers else self.losses.carried_buffers()

    def latest_programs(self) -> list[Program]:
        """Returns the programs that make up a step: those captured last."""
        return [self.losses.all_gradients[-1].exact, self.updates.variants[-1].program]

    def programs(self) -> list[Program]:
        """Returns the captured programs."""
        losses = [gradient.exact for gradient in self.losses.all_gradients]
        return losses + [variant.program for variant in self.updates.variants]

    def constants(self) -> list[torch.Tensor]:
        """Returns the tensors that the captured programs hold."""
        return [*self.losses.constants(), *self.updates.constants()]


class WholeStepper:
    """Takes whole train steps, each one program: those that call the loss themselves, or differentiate gradients.

    With `keeps_buffers`, those after a step are those before it.
    """

    def __init__(self, model: ModelView, table: UpdateTable, keeps_buffers: bool) -> None:
        self.model = model
        self.table = table
        self.keeps_buffers = keeps_buffers

    def step(self, inputs: StepInputs) -> tuple[TrainState, Any]:
        """Returns the new state and what the train step returned: the loss before the step."""
        state = inputs.state
        key = self.model.signature() if inputs.model_key is None else inputs.model_key
        batch, meta = opened((inputs.batch, inputs.meta))
        data = StepData(state.buffers, batch, meta, key, state.grads)
        draws = {} if inputs.draws is None else inputs.draws
        given = UpdateInputs(state.params, {}, state.opt_state, inputs.hyper, draws, data)
        variant, results = self.table.run_variant(given, order=inputs.order)
        params, opt_state = assemble(given, variant, results)
        assert variant.returned is not None
        held = {name: grad for name, grad in from_slots(results, params, HELD).items() if grad is not None}
        buffers = state.buffers if self.keeps_buffers else new_buffers(state.buffers, results)
        after = TrainState(params, buffers, opt_state, held)
        return after, variant.returned.assemble(results)

    def carried_buffers(self) -> frozenset[str]:
        """Returns the names of the buffers that carry derivatives from one step to the next."""
        if self.keeps_buffers:
            return frozenset()
        return frozenset().union(*(variant.carried_buffers for variant in self.table.variants))

    def latest_programs(self) -> list[Program]:
        """Returns the program of a step: the one captured last."""
        return [self.table.variants[-1].program]

    def programs(self) -> list[Program]:
        """Returns the captured steps."""
        return [variant.program for variant in self.table.variants]

    def constants(self) -> list[torch.Tensor]:
        """Returns the tensors that the captured steps hold."""
        return self.table.constants()


def new_buffers(buffers: Tensors, results: Mapping[Slot, torch.Tensor]) -> Tensors:
    """Returns the buffers after a program ran; those that it does not change stay."""
    return {name: results.get(Slot(Role.BUFFER, name), value) for name, value in buffers.items()}
