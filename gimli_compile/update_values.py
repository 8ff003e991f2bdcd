"""What one update, or one whole train step, starts from and ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gimli_compile.row_gradients import Gradient
from gimli_compile.row_gradients import by_slot as gradients_by_slot
from gimli_compile.side_effects import Change
from gimli_compile.skeleton import Leaf, Skeleton, Value
from gimli_compile.slot import HELD, Role, Slot
from gimli_compile.state import OptState, Tensors
from gimli_compile.tree_slots import tree_slots


@dataclass(frozen=True)
class StepData:
    """What a train step takes besides parameters and the optimizer: buffers by name, the batch, the meta-parameters.

    `form` stands for what else a capture depends on: the model's flags. `grads` are in `.grad` when the step begins.
    """

    buffers: Tensors
    batch: Any = None
    meta: Any = None
    form: Any = None
    grads: Mapping[str, Gradient] = field(default_factory=dict)

    def by_slot(self) -> dict[Slot, torch.Tensor]:
        """Returns the values by slot."""
        found = {Slot(Role.BUFFER, name): value for name, value in self.buffers.items()}
        found.update(gradients_by_slot(self.grads, HELD))
        return {**found, **tree_slots(Role.BATCH, self.batch), **tree_slots(Role.META, self.meta)}


@dataclass(frozen=True)
class UpdateInputs:
    """What one update starts from. `hyper` is by path; a gradient may be None; `draws` are made unless given.

    `data` is there if the update is a whole train step, which makes its gradients itself.
    """

    params: Tensors
    grads: Mapping[str, Gradient]
    opt_state: OptState
    hyper: Mapping[str, torch.Tensor]
    draws: dict[Slot, torch.Tensor] = field(default_factory=dict)
    data: StepData | None = None

    def by_slot(self) -> dict[Slot, torch.Tensor]:
        """Returns the values by slot."""
        found = {Slot(Role.PARAM, name): value for name, value in self.params.items()}
        found.update(gradients_by_slot(self.grads))
        found.update({Slot(Role.STATE, path): value for path, value in self.opt_state.items()})
        found.update({Slot(Role.HYPER, path): value for path, value in self.hyper.items()})
        if self.data is not None:
            found.update(self.data.by_slot())
        return found

    def value_of(self, leaf: Leaf) -> torch.Tensor:
        """Returns the value for a leaf: state comes before hyperparameters."""
        value = self.opt_state.values_by_path.get(leaf.path)
        return self.hyper[leaf.path] if value is None else value

    def role_of(self, leaf: Leaf) -> Role:
        """Tells whether a leaf's value is state or a hyperparameter."""
        return Role.STATE if leaf.path in self.opt_state.values_by_path else Role.HYPER


@dataclass(frozen=True)
class UpdateOutputs:
    """What one update ends with: parameters by name, the structure, and the values by path.

    A whole train step also leaves buffers by name, gradients in `.grad`, and returns something: its loss. `changes` is
    what it changed besides.
    """

    params: dict[str, torch.Tensor]
    skeleton: Skeleton
    values: dict[str, Value]
    buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    returned: Any = None
    grads: Mapping[str, torch.Tensor] = field(default_factory=dict)
    changes: Sequence[Change] = ()
