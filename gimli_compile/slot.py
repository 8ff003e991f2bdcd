"""Slots: the frozen, named meaning of every input and result of a program."""

from __future__ import annotations

import enum
import keyword
import re
from dataclasses import dataclass, field


class Role(enum.Enum):
    """What an input or result of a program is to the training loop."""

    PARAM = "params"
    BUFFER = "buffers"
    GRAD = "grads"
    ROWS = "rows"
    HELD = "held_grads"
    HELD_ROWS = "held_rows"
    STATE = "state"
    HYPER = "hyper"
    BATCH = "batch"
    META = "meta"
    NOISE = "noise"
    CONSTANT = "constant"
    LOSS = "loss"
    OUTPUT = "output"
    GUARD = "guard"


CROSSING = (Role.GRAD, Role.ROWS)  # from the loss to the update
HELD = (Role.HELD, Role.HELD_ROWS)  # in `.grad` from one train step to the next
CARRIED = (Role.PARAM, Role.BUFFER, Role.STATE, *HELD)


@dataclass(frozen=True)
class Slot:
    """One input or result: its role and its path within that role, such as `state` and `0.weight.exp_avg`."""

    role: Role
    path: str = ""
    _hash: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.role.value, self.path)))

    def __hash__(self) -> int:
        """Returns the hash that was made once: slots are looked up many times in every step."""
        return self._hash

    @property
    def name(self) -> str:
        """A Python identifier made of role and path."""
        text = re.sub(r"\W+", "_", f"{self.role.value}_{self.path}").strip("_")
        return text + "_" if keyword.iskeyword(text) else text

    @property
    def result_name(self) -> str:
        """The identifier of this slot's new value."""
        return f"{self.name}_next" if self.role in CARRIED else self.name

    def __str__(self) -> str:
        return f"{self.role.value}[{self.path}]" if self.path else self.role.value
