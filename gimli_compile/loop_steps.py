"""The steps of one loop, as the ways through the backward pass call them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch

from gimli_compile.argument_checks import check_constants
from gimli_compile.errors import InputError, compose_message
from gimli_compile.pulling_back import Values
from gimli_compile.slot import Slot
from gimli_compile.state import TrainState
from gimli_compile.step_adjoint import StepAdjoint
from gimli_compile.stepping import SplitStepper, StepInputs, WholeStepper
from gimli_compile.tangents import push_step

Draws = dict[Any, Any] | None


class LoopSteps:
    """Takes steps under the options of one loop. `check` looks at the first state; later ones are made here.

    `recomputes` says that steps are computed again from their arguments, so that nothing else may be differentiated.
    `trained` are the parameters that the steps train.
    """

    task_dims = 0

    def __init__(
        self,
        stepper: SplitStepper | WholeStepper,
        adjoint: StepAdjoint | None,
        check: Callable[[TrainState], None],
        *,
        order: int,
        model_key: Any,
        recomputes: bool,
        trained: Collection[str],
    ) -> None:
        self.stepper = stepper
        self.adjoint = adjoint
        self.check = check
        self.order = order
        self.model_key = model_key
        self.recomputes = recomputes
        self.trained = trained
        self.plan: Any = None
        self._is_checked = False

    def step(self, state: TrainState, batch: Any, hyper: Any, meta: Any, draws: Draws) -> tuple[TrainState, Any]:
        """Returns the new state and the loss before the step."""
        return self._checked(self.stepper.step, state, batch, hyper, meta, draws)

    def step_with_gradient(
        self, state: TrainState, batch: Any, hyper: Any, meta: Any, draws: Draws
    ) -> tuple[TrainState, Any, dict[str, Any]]:
        """Returns the new state, the loss before the step, and what there is of its gradient by parameter name."""
        if isinstance(self.stepper, WholeStepper):
            raise whole_step_error()
        new, loss, grads = self._checked(self.stepper.step_with_gradient, state, batch, hyper, meta, draws)
        return new, loss, {name: grad for name, grad in grads.items() if grad is not None}

    def _checked(self, take: Callable[..., Any], state: TrainState, *rest: Any) -> Any:
        if not self._is_checked:
            self.check(state)
            self._is_checked = True
        made = take(self._inputs(state, *rest))
        if self.recomputes:
            check_constants(self.stepper.constants())
        return made

    def _inputs(self, state: TrainState, batch: Any, hyper: Any, meta: Any, draws: Draws) -> StepInputs:
        return StepInputs(state, batch, hyper, meta, self.order, draws, self.model_key)

    def carry_back(
        self,
        state: TrainState,
        batch: Any,
        hyper: Any,
        meta: Any,
        draws: Draws,
        grads: dict[str, Any],
        seeds: Values,
        *,
        wanted: Collection[Slot],
    ) -> dict[Slot, torch.Tensor]:
        """Returns the adjoints of what a step starts from: see `StepAdjoint.carry_back`."""
        assert self.adjoint is not None
        return self.adjoint.carry_back(self._inputs(state, batch, hyper, meta, draws), grads, seeds, wanted)

    def push_forward(
        self, state: TrainState, batch: Any, hyper: Any, meta: Any, draws: Draws, tangents: Values
    ) -> dict[int, torch.Tensor]:
        """Returns the tangents of the new state and the loss by the place of the leaf: see `push_step`."""

        def step(state: TrainState, batch: Any, hyper: Any, meta: Any) -> Any:
            return self.stepper.step(self._inputs(state, batch, hyper, meta, draws))

        return push_step(step, (state, batch, hyper, meta), tangents, self.stepper.programs)

    def carried_buffers(self) -> frozenset[str]:
        """Returns the names of the buffers that carry derivatives from step to step."""
        return self.stepper.carried_buffers()


def whole_step_error() -> InputError:
    """Returns the error for a step that has no program of its inner gradient."""
    return InputError(
        compose_message(
            'backward="mixed" needs the loss and the update as two programs, and this step is one',
            None,
            "A train step of your own, and an optimizer that calls a closure or differentiates gradients, is captured "
            "whole: there is no program of the inner gradient to differentiate forward.",
            'Use `backward="reverse"`; with `checkpoint="step"` it keeps only the states between steps.',
        )
    )
