"""The model's output, or the loss, for a train state: no step is taken."""

from __future__ import annotations

from typing import Any

import torch

from gimli_compile.argument_checks import check_callable, check_evaluated
from gimli_compile.compiled.calls import Compiler, evaluate_compiled
from gimli_compile.loss_table import Asked, LossTable
from gimli_compile.model_view import ModelView
from gimli_compile.records import opened
from gimli_compile.state import Tensors


def evaluate(
    losses: LossTable, compiler: Compiler | None, asked: Asked, view: ModelView, *, tasks: bool = False
) -> tuple[Any, Tensors]:
    """Returns the output or the loss, and the new buffers; with `tasks`, for one state and one batch for each task."""
    call, loops = None, None
    if compiler is not None:
        loops = compiler.losses if asked.is_loss else compiler.forwards
        call = compiler.reader.evaluation(asked, tasks=tasks)
        replayed = loops.replay(call)
        if replayed is not None:
            return replayed[1], replayed[0].buffers
    if not asked.is_loss:
        check_callable(view.model)
    view.refresh()
    check_evaluated(asked.params, asked.buffers, view, tasks=tasks)
    asked = asked._replace(batch=opened(asked.batch), meta=opened(asked.meta))
    if loops is not None:
        return evaluate_compiled(loops, asked, view.options, call, tasks=tasks)
    if not tasks:
        return losses.evaluate(asked)

    def one(params: Tensors, buffers: Tensors, batch: Any) -> tuple[Any, Tensors]:
        return losses.evaluate(asked._replace(params=params, buffers=buffers, batch=batch))

    return torch.func.vmap(one, randomness="different")(asked.params, asked.buffers, asked.batch)
