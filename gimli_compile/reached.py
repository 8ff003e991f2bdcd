"""From where the code of one model and optimizer reaches what is no argument of it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from gimli_compile.environment_walk import GLOBAL_HOOKS, STEP_HOOKS, Reached
from gimli_compile.loss_table import LossTable
from gimli_compile.model_view import ModelView
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.several_optimizers import members
from gimli_compile.skeleton import opaque_of, owners_of
from gimli_compile.stepping import SplitStepper, WholeStepper
from gimli_compile.update_table import UpdateTable


def reached_from(
    code: tuple[Any, ...],
    view: OptimizerView,
    model: ModelView,
    stepper: SplitStepper | WholeStepper,
    tables: Collection[LossTable | UpdateTable],
) -> Reached:
    """Returns what the environment of these is found from.

    `code` is the loss and the train step, `tables` are those of the programs besides the stepper's.
    """
    skeleton, optimizers = view.read()[0], members(view.optimizer)
    owners, held = owners_of(skeleton), opaque_of(skeleton)
    hooks = [vars(one).get(name) for one in optimizers if hasattr(one, "__dict__") for name in STEP_HOOKS]
    known = [*owners, *(part for one in optimizers for part in (one.param_groups, *one.param_groups))]

    def constants() -> list[torch.Tensor]:
        own = (stepper.table,) if isinstance(stepper, WholeStepper) else ()
        return [tensor for table in (*tables, *own) for tensor in table.held()]

    return Reached(
        roots=(*code, *map(type, owners), *held, *hooks, *GLOBAL_HOOKS),
        modules=model.modules_and_state(),
        known=set(map(id, known)),
        # A loss alone has no numbers of the optimizer as inputs; a step has them all.
        apart=(0,) if isinstance(stepper, SplitStepper) else (),
        constants=constants,
    )
