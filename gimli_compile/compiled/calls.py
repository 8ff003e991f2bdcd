"""From the arguments of `unroll` to a compiled loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch._C._functorch as _functorch
from torch.utils import _pytree as pytree

from gimli_compile.compiled.batches import Batches
from gimli_compile.compiled.choice import LoopInputs
from gimli_compile.compiled.unrolling import LoopCompiler
from gimli_compile.errors import InputError, compose_message
from gimli_compile.state import TrainState
from gimli_compile.tasks import Tasks, lead_with_tasks, task_dims
from gimli_compile.unrolling import Loop, check_options, segment_length


def unroll_compiled(
    compiler: LoopCompiler,
    loop: Loop,
    model_key: Any,
    backward: str,
    checkpoint: str | int | None,
    order: int,
    truncate: int | None,
    tasks: Tasks,
) -> tuple[TrainState, Any]:
    """Runs a loop by compiled programs: see `Functional.unroll`."""
    check_options(backward, order, truncate)
    _refuse_transforms(loop)
    state, given, hyper, meta = loop.state, loop.batches, loop.hyper, loop.meta
    dims, count, step_dim = task_dims(tasks), None, 0
    if dims is not None:
        (state, given, hyper, meta), count = lead_with_tasks(state, given, hyper, meta, dims)
        step_dim = 0 if dims[1] is None else 1
        batch, hypers, metas = (None if dim is None else 0 for dim in dims[1:])
        dims = (0, batch, hypers, metas)
    batches = Batches(given, step_dim)
    inputs = LoopInputs(batches, hyper, meta, order, model_key, dims, count)
    cut = 0 if truncate is None else max(0, len(batches) - truncate)
    if not cut:
        return compiler.unroll(state, inputs, segment=segment_length(checkpoint, len(batches)))
    with torch.no_grad():
        state, losses = compiler.unroll(state, replace(inputs, batches=batches.part(0, cut)), segment=None)
    rest = replace(inputs, batches=batches.part(cut, len(batches)))
    state, last = compiler.unroll(state, rest, segment=segment_length(checkpoint, len(rest.batches)))
    return state, _joined([losses, last])


def _joined(parts: list[Any]) -> Any:
    """Returns what the steps of several loops returned as if there had been one."""
    leaves = [pytree.tree_leaves(part) for part in parts]
    made = [torch.cat(of, -1) if isinstance(of[0], torch.Tensor) else of[0] for of in zip(*leaves, strict=True)]
    return pytree.tree_unflatten(made, pytree.tree_structure(parts[0]))


def _refuse_transforms(loop: Loop) -> None:
    if not _functorch.peek_interpreter_stack():
        return
    leaves = pytree.tree_leaves((loop.state, loop.batches, loop.hyper, loop.meta))
    tensors = (leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
    if any(map(_functorch.is_functorch_wrapped_tensor, tensors)):
        raise InputError(
            compose_message(
                "a compiled loop runs under a torch.func transform",
                None,
                "Transforms of torch.func trace Python code, and compiled code cannot be traced.",
                "Use `unroll(..., tasks=True)` for many tasks and `backward()` for gradients, or unroll uncompiled.",
            )
        )
