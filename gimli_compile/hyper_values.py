"""The hyperparameters that a call runs with: those that the user gave, the live ones for the rest."""

from __future__ import annotations

from typing import Any

import torch

from gimli_compile.argument_checks import check_hyper, check_shapes
from gimli_compile.errors import InputError, compose_message
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.state import Hyperparameters, hyper_tensor
from gimli_compile.tasks import Tasks
from gimli_compile.transforms import outside_transforms


class HyperReader:
    """Reads the hyperparameters of calls. Numbers of the live optimizer become tensors once, as long as they stay."""

    def __init__(self, view: OptimizerView) -> None:
        self._view = view
        self._read: Any = None
        self._numbers: dict[str, torch.Tensor] = {}

    def values(self, hyper: Hyperparameters | None, tasks: Tasks = False) -> dict[str, torch.Tensor]:
        """Returns all hyperparameters by path, checked; with a dimension for tasks, each has it where `tasks` says."""
        view = self._view
        live = view.read()
        if live is not self._read:
            self._read, self._numbers = live, {}
        paths = [leaf.path for leaf in view.hyper_leaves()]
        dim = None if isinstance(tasks, bool) else tasks[2]
        if hyper is None and dim is None:
            return {path: self._live(path) for path in paths}
        given = check_hyper(hyper, view.hyper_paths)
        if dim is None:
            check_shapes(given, view)
            return {path: given[path] if path in given else self._live(path) for path in paths}
        check_shapes({path: _of_one_task(path, value, dim) for path, value in given.items()}, view)
        count = next(iter(given.values())).shape[dim]
        shared = {path: torch.stack([self._live(path)] * count, dim) for path in paths if path not in given}
        return {path: given[path] if path in given else shared[path] for path in paths}

    def is_live_number(self, value: torch.Tensor) -> bool:
        """Tells whether a tensor stands for a number of the live optimizer, as it is now."""
        return any(value is number for number in self._numbers.values())

    def _live(self, path: str) -> torch.Tensor:
        value = self._read[1][path]
        if isinstance(value, torch.Tensor):  # what its memory holds may change
            return hyper_tensor(value)
        if path not in self._numbers:
            with outside_transforms(), torch.inference_mode(False):  # calls of any kind share it
                self._numbers[path] = hyper_tensor(value)
        return self._numbers[path]


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
