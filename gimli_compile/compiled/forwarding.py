"""The compiled forward pass: a loop of one step that changes no parameters and returns the model's output."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.compiled.batches import Batches
from gimli_compile.compiled.choice import Draws, LoopInputs, Place, at_place
from gimli_compile.compiled.steps import StepFunction
from gimli_compile.compiled.unrolling import LoopCompiler
from gimli_compile.loss_capture import Forward
from gimli_compile.loss_table import LossTable
from gimli_compile.skeleton import Skeleton
from gimli_compile.state import OptState, Tensors, TrainState
from gimli_compile.stepping import StepInputs
from gimli_compile.variant import UpdateVariant

_NOTHING = Skeleton(None, ())


class ForwardChoice:
    """Makes step functions of captured forward passes."""

    def __init__(self, losses: LossTable) -> None:
        self._losses = losses
        self._made: dict[int, StepFunction] = {}

    def fitting(self, place: Place, inputs: LoopInputs, draws: Draws) -> list[StepFunction]:
        """Returns what is known to fit, as far as can be told before it runs."""
        return at_place(place, inputs, draws, self._known)

    def capture(self, place: Place, inputs: LoopInputs, draws: Draws) -> None:
        """Runs the model uncompiled, which captures what is missing; adds the draws that it makes."""
        at_place(place, inputs, draws, self._run)

    def _known(self, inputs: StepInputs) -> list[StepFunction]:
        state, (args, kwargs) = inputs.state, inputs.batch
        known = self._losses.fitting_forwards(state.params, state.buffers, args, kwargs, inputs.draws or {})
        return [self._step(forward) for forward in known]

    def _run(self, inputs: StepInputs) -> None:
        args, kwargs = inputs.batch
        assert inputs.draws is not None
        self._losses.forward(inputs.state.params, inputs.state.buffers, args, kwargs, inputs.draws)

    def _step(self, forward: Forward) -> StepFunction:
        if id(forward) not in self._made:
            captured = forward.captured
            variant = UpdateVariant(
                captured.program,
                _NOTHING,
                captured.before,
                captured.after,
                captured.decide,
                returned=forward.returned,
            )
            self._made[id(forward)] = StepFunction(None, variant)
        return self._made[id(forward)]


def forward_compiled(
    compiler: LoopCompiler, params: Tensors, buffers: Tensors, inputs: Any, model_key: Any, *, tasks: bool
) -> tuple[Any, Tensors]:
    """Calls the model on `inputs`, its arguments and keyword arguments: see `Functional.forward`.

    With `tasks`, parameters, buffers and inputs lead with the task.
    """
    state = TrainState(params, buffers, OptState(_NOTHING, {}))
    dims, count = None, None
    if tasks:
        dims, count = (0, 0, None, None), next(iter(params.values())).shape[0]
    loop = LoopInputs(Batches([inputs], 0), {}, None, 2, model_key, dims, count)
    state, output = compiler.unroll(state, loop, segment=None)
    return pytree.tree_map_only(torch.Tensor, lambda part: part.squeeze(-1), output), state.buffers
