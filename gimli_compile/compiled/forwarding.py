"""The compiled forward pass: a loop of one step that changes no parameters, and returns an output or a loss."""

from __future__ import annotations

from typing import Any

from gimli_compile.compiled.batches import Batches
from gimli_compile.compiled.call_reading import Call
from gimli_compile.compiled.choice import Draws, LoopInputs, Place, at_place
from gimli_compile.compiled.steps import StepFunction
from gimli_compile.compiled.unrolling import LoopCompiler
from gimli_compile.loss_capture import Forward
from gimli_compile.loss_table import Asked, LossTable
from gimli_compile.skeleton import Skeleton
from gimli_compile.state import OptState, Tensors, TrainState
from gimli_compile.stepping import StepInputs
from gimli_compile.variant import UpdateVariant

_NOTHING = Skeleton(None, ())


class ForwardChoice:
    """Makes step functions of captured forward passes of the model, or of the loss."""

    def __init__(self, losses: LossTable, *, is_loss: bool) -> None:
        self._losses = losses
        self._is_loss = is_loss
        self._made: dict[int, StepFunction] = {}

    def fitting(self, place: Place, inputs: LoopInputs, draws: Draws) -> list[StepFunction]:
        """Returns what is known to fit, as far as can be told before it runs."""
        return at_place(place, inputs, draws, self._known)

    def capture(self, place: Place, inputs: LoopInputs, draws: Draws) -> None:
        """Runs the model uncompiled, which captures what is missing; adds the draws that it makes."""
        at_place(place, inputs, draws, self._run)

    def _asked(self, inputs: StepInputs) -> Asked:
        state = inputs.state
        return Asked(state.params, state.buffers, inputs.batch, inputs.meta, self._is_loss)

    def _known(self, inputs: StepInputs) -> list[StepFunction]:
        return [self._step(one) for one in self._losses.fitting_forwards(self._asked(inputs), inputs.draws or {})]

    def _run(self, inputs: StepInputs) -> None:
        assert inputs.draws is not None
        self._losses.evaluate(self._asked(inputs), inputs.draws)

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
    compiler: LoopCompiler, asked: Asked, model_key: Any, call: Call | None, *, tasks: bool
) -> tuple[Any, Tensors]:
    """Evaluates the model, or the loss; returns also the new buffers.

    With `tasks`, parameters, buffers and batch lead with the task, and meta is shared. `call`: see `LoopCompiler`.
    """
    state = TrainState(asked.params, asked.buffers, OptState(_NOTHING, {}))
    dims, count = None, None
    if tasks:
        dims, count = (0, 0, None, None), next(iter(asked.params.values())).shape[0]
    loop = LoopInputs(Batches([asked.batch], 0), {}, asked.meta, 2, model_key, dims, count)
    state, output = compiler.unroll(state, loop, segment=None, call=call, single=True)
    return output, state.buffers
