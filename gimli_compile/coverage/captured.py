"""The program side of a comparison: the captured update or train step, run and differentiated."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gimli_compile.coverage.live import Drive, Trial, projection, seed_everything
from gimli_compile.entry import functionalize
from gimli_compile.functional import Functional
from gimli_compile.program import Program
from gimli_compile.state import Hyperparameters, TrainState


@dataclass(frozen=True)
class Gradients:
    """Derivatives of the projection of the last parameters; None where the program has none.

    `state` is keyed by the paths that share one tensor.
    """

    params: Mapping[str, torch.Tensor | None]
    drives: Sequence[Mapping[str, torch.Tensor | None]]
    hyper: Mapping[str, torch.Tensor | None]
    state: Mapping[tuple[str, ...], torch.Tensor | None]


class Captured:
    """The functions of one trial's model and optimizer, captured after `warm` live steps."""

    def __init__(self, trial: Trial, warm: int) -> None:
        self.trial = trial
        model, optimizer = trial.start(warm)
        started = time.perf_counter()
        self.fn = _functionalize(trial, model, optimizer)
        self.seconds = time.perf_counter() - started
        self.state = self.fn.init()

    def values(self) -> list[Drive]:
        """Returns the parameters after each step; the first call captures, and adds to `seconds`."""
        hyper = self.fn.hyperparameters()
        started = time.perf_counter()
        self._run(self.state, hyper, self.trial.drives(self.trial.recipe.steps))
        first = time.perf_counter() - started
        started = time.perf_counter()
        found = self._run(self.state, hyper, self.trial.drives(self.trial.recipe.steps))
        self.seconds += max(first - (time.perf_counter() - started), 0.0)
        return found

    def gradients(self) -> tuple[list[Drive], Gradients]:
        """Returns the parameters after each step, and the derivatives of the last in all that they started from."""
        state, hyper = self.fn.init(), self.fn.hyperparameters()
        drives = self.trial.drives(self.trial.recipe.steps)
        leaves = {("hyper", path): value for path, value in hyper.by_path().items()}
        leaves |= {("params", name): value for name, value in state.params.items()}
        leaves |= {("state", paths): value for paths, value in shared_state(state).items()}
        leaves |= {(step, name): value for step, drive in enumerate(drives) for name, value in drive.items()}
        leaves = {key: value.requires_grad_() for key, value in leaves.items() if _is_smooth(value)}
        history = self._run(state, hyper, drives)
        last = projection(history[-1])
        found: tuple[torch.Tensor | None, ...] = (None,) * len(leaves)
        if last.requires_grad:
            found = torch.autograd.grad(last, list(leaves.values()), allow_unused=True)
        by_key = dict(zip(leaves, found, strict=True))

        def part(kind: Any) -> dict[Any, torch.Tensor | None]:
            return {key: value for (group, key), value in by_key.items() if group == kind}

        moved = [part(step) for step in range(len(drives))]
        return _detached(history), Gradients(part("params"), moved, part("hyper"), part("state"))

    def programs(self) -> list[Program]:
        """Returns all variants of the captured update, or of the whole step where that is one program."""
        known = self.fn.programs
        return [program for program, _ in known["update" if "update" in known else "step"].variants]

    def _run(self, state: TrainState, hyper: Hyperparameters, drives: list[Drive]) -> list[Drive]:
        seed_everything(23)
        history = []
        for drive in drives:
            if self.trial.driven_by_loss:
                state, _ = self.fn.step(state, drive, hyper)
            else:
                params, opt_state = self.fn.update(state.params, drive, state.opt_state, hyper)
                state = TrainState(params, state.buffers, opt_state)
            history.append(state.params)
        return history


def shared_state(state: TrainState) -> dict[tuple[str, ...], torch.Tensor]:
    """Returns the tensors of the optimizer's state, each with all the paths that it is kept at."""
    paths: dict[int, list[str]] = {}
    values = state.opt_state.values_by_path
    for path, value in values.items():
        paths.setdefault(id(value), []).append(path)
    return {tuple(shared): values[shared[0]] for shared in paths.values()}


def coarsest_rounding(programs: list[Program]) -> tuple[float, str]:
    """Returns the relative rounding of the coarsest floating dtype inside the programs, and its name; 0 for float64."""
    found = {
        value.dtype
        for program in programs
        for node in program.graph.nodes
        if isinstance(value := node.meta.get("val"), torch.Tensor) and value.is_floating_point()
    }
    coarse = max(found, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)
    if torch.finfo(coarse).eps <= torch.finfo(torch.float64).eps:
        return 0.0, ""
    return torch.finfo(coarse).eps, str(coarse).removeprefix("torch.")


def size_of(program: Program) -> int:
    """Returns the number of operators of a program."""
    return sum(node.op == "call_function" for node in program.graph.nodes)


def _functionalize(trial: Trial, model: Any, optimizer: Any) -> Functional:
    if trial.train_step is not None:
        return functionalize(model, optimizer, train_step=trial.train_step)
    return functionalize(model, optimizer, trial.loss)


def _is_smooth(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _detached(history: list[Drive]) -> list[Drive]:
    return [{name: value.detach() for name, value in params.items()} for params in history]
