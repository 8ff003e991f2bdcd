"""The hyperparameters that a call runs with: those that the user gave, the live ones for the rest."""

from __future__ import annotations

import torch

from gimli_compile.argument_checks import check_hyper, check_shapes
from gimli_compile.errors import InputError, compose_message
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.state import Hyperparameters, hyper_tensor
from gimli_compile.tasks import Tasks


def hyper_values(view: OptimizerView, hyper: Hyperparameters | None, tasks: Tasks = False) -> dict[str, torch.Tensor]:
    """Returns all hyperparameters by path, checked; with a dimension for tasks, each has it where `tasks` says."""
    _, values = view.read()
    paths = [leaf.path for leaf in view.hyper_leaves()]
    dim = None if isinstance(tasks, bool) else tasks[2]
    if hyper is None and dim is None:
        return {path: hyper_tensor(values[path]) for path in paths}
    given = check_hyper(hyper, set(paths))
    if dim is None:
        check_shapes(given, view)
        return {path: given[path] if path in given else hyper_tensor(values[path]) for path in paths}
    check_shapes({path: _of_one_task(path, value, dim) for path, value in given.items()}, view)
    count = next(iter(given.values())).shape[dim]
    shared = {path: torch.stack([hyper_tensor(values[path])] * count, dim) for path in paths if path not in given}
    return {path: given[path] if path in given else shared[path] for path in paths}


def _of_one_task(path: str, value: torch.Tensor, dim: int) -> torch.Tensor:
    if -value.dim() <= dim < value.dim():
        return value.select(dim, 0)
    raise InputError(
        compose_message(
            f"hyper[{path}] has shape {tuple(value.shape)}, and `tasks` says that dimension {dim} is the task's",
            None,
            "Hyperparameters of their own for each task have a dimension for the tasks, every one of them.",
            "Stack the entries of `hyperparameters()`, or say None for hyper in `tasks` to share them.",
        )
    )
