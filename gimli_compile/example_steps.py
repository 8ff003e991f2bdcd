"""Steps along made-up gradients, or along a made-up loss: programs to look at before any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.protocol import Protocol, quadratic_loss
from gimli_compile.state import TrainState
from gimli_compile.stepping import StepInputs, WholeStepper
from gimli_compile.train_steps import DefaultStep
from gimli_compile.update_table import UpdateTable


def used_paths(view: OptimizerView, table: Callable[[], UpdateTable | None]) -> set[str]:
    """Returns the paths of the hyperparameters that updates use; looks at example updates if there are others."""
    every, shown = {leaf.path for leaf in view.hyper_leaves()}, view.companion_paths()
    if all(path.startswith("groups.") or path in shown for path in every):
        return every
    found = table()
    return every if found is None else found.used_hyperparameters()


def example_table(
    protocol: Protocol | None,
    updates: UpdateTable,
    trained: list[str],
    whole: Callable[[DefaultStep], WholeStepper],
    begin: Callable[[], tuple[TrainState, Mapping[str, torch.Tensor]]],
) -> UpdateTable | None:
    """Returns captured updates: those of `updates` if the step takes gradients; None if there is no way to step.

    `begin` gives the state and the hyperparameters by path, `whole` makes a stepper of a train step.
    """
    if protocol is None:
        return None
    if protocol.is_plain:
        if not updates.variants:
            state, hyper = begin()
            updates.example(state, dict(hyper), trained)
        return updates
    state, hyper = begin()
    evaluate = quadratic_loss(updates.view.optimizer)
    stepper = whole(DefaultStep(lambda *_: evaluate(), protocol, updates.view.schedulers))
    with torch.random.fork_rng(), torch.no_grad():
        for _ in range(2):
            state, _ = stepper.step(StepInputs(state, None, hyper, None))
    return stepper.table
