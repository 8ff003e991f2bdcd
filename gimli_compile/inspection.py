"""What can be looked at of a functionalized model and optimizer: programs, formulas, requirements, constants."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from gimli_compile.argument_checks import check_plain
from gimli_compile.findings import Baked
from gimli_compile.loss_table import LossTable
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.programs import Programs
from gimli_compile.protocol import Protocol
from gimli_compile.requirement_capture import capture_for_requirements
from gimli_compile.requirements import Requirements, decide_requirements
from gimli_compile.several_optimizers import kind_of
from gimli_compile.state import Hyperparameters, TrainState
from gimli_compile.stepping import SplitStepper, WholeStepper
from gimli_compile.symbolic_rule import UpdateRule, derive_update_rule
from gimli_compile.tasks import Tasks
from gimli_compile.transforms import is_differentiated
from gimli_compile.update_table import UpdateTable


class Inspection(ABC):
    """The part of `Functional` that captures what is missing, and shows it."""

    _view: OptimizerView
    _losses: LossTable
    _updates: UpdateTable
    _protocol: Protocol | None
    _stepper: SplitStepper | WholeStepper
    _trained: list[str]

    @abstractmethod
    def init(self) -> TrainState:
        """Returns copies of what is live."""

    @abstractmethod
    def hyperparameters(self) -> Hyperparameters:
        """Returns the live hyperparameters."""

    @abstractmethod
    def _hyper_values(self, hyper: Hyperparameters | None, tasks: Tasks = False) -> dict[str, torch.Tensor]:
        """Returns the hyperparameters of a call by path."""

    @abstractmethod
    def _example_table(self) -> UpdateTable | None:
        """Returns the programs of example steps, if such can be taken."""

    @property
    def programs(self) -> Programs:
        """The captured programs by name, with all variants: "forward", "loss", "grad", "update", "step"."""
        whole = self._stepper.table if isinstance(self._stepper, WholeStepper) else None
        if self._protocol is not None and self._protocol.is_plain:
            self._example_table()
        return Programs(self._losses, self._updates, whole)

    def update_rule(self, variant: int | None = None, parameter: str | None = None) -> UpdateRule:
        """Returns the update of one element of a parameter as formulas (sympy), read off the captured program.

        `variant` counts the variants of `programs["update"]` from 0, and is by default one that steps with state take;
        `parameter` is by default the first trained one.
        """
        check_plain(self._protocol, kind_of(self._view.optimizer))
        return derive_update_rule(self.programs["update"].variants, variant, parameter)

    def requirements(
        self, hyper: Hyperparameters | None = None, meta: Any = None, state: TrainState | None = None, batch: Any = None
    ) -> Requirements:
        """Decides the requirements for meta-learning (Gimli, section 2.4) on the captured programs.

        Args:
            hyper: hyperparameters; those that require a gradient are those to be learned. The live ones by default.
            meta: the third argument of the loss.
            state: where training starts; `init()` by default.
            batch: a batch to capture the loss on. By default the loss that `step` captured last.

        Returns:
            The verdicts, with the operators and source lines that cut gradients; print it to read it.
        """
        check_plain(self._protocol, kind_of(self._view.optimizer))
        values = self._hyper_values(hyper)
        start = self.init() if state is None else state
        captured = capture_for_requirements(self._losses, self._updates, start, values, self._trained, batch, meta)
        wanted = [path for path, value in values.items() if hyper is not None and is_differentiated(value)]
        return decide_requirements(captured, [*self.hyperparameters().by_path()], wanted)

    def report(self) -> list[Baked]:
        """Returns what became a constant of the captured programs: numbers, values found by search; with the lines."""
        whole = self._stepper.table.variants if isinstance(self._stepper, WholeStepper) else []
        return [entry for variant in (*self._updates.variants, *whole) for entry in variant.baked]
