"""Methods of an optimizer other than `step`, such as the `train` and `eval` of schedule-free ones."""

from __future__ import annotations

import torch

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.several_optimizers import members


class MethodView(OptimizerView):
    """An optimizer of which another method than `step` is run."""

    def __init__(self, view: OptimizerView, method: str) -> None:
        self.__dict__.update(vars(view))
        self.method = method

    def step(self) -> None:
        """Runs the method."""
        before = self._gradients()
        for one in members(self.optimizer):
            if callable(getattr(one, self.method, None)):
                getattr(one, self.method)()
        if any(now is not was for now, was in zip(self._gradients(), before, strict=True)):
            raise CaptureError(
                compose_message(
                    f"`{self.method}` changes gradients",
                    None,
                    "Gradients are no result of a method: those that a train step holds are `state.grads`.",
                    "Change them there: `dataclasses.replace(state, grads={})` is what `zero_grad()` does.",
                )
            )

    def _gradients(self) -> list[torch.Tensor | None]:
        return [p.grad for group in self.optimizer.param_groups for p in group["params"]]
