"""The options of one loop, checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gimli_compile.errors import InputError, compose_message
from gimli_compile.implicit_mode import Implicit
from gimli_compile.tasks import Tasks

BACKWARD = ("reverse", "mixed", "forward", "implicit", "auto")


@dataclass(frozen=True)
class LoopOptions:
    """The options of `Functional.unroll`, which describes them.

    Raises:
        InputError: an option does not exist, or does not fit the others.
    """

    backward: str = "reverse"
    checkpoint: str | int | None = None
    order: int = 2
    truncate: int | None = None
    tasks: Tasks = False
    implicit: Implicit | None = None
    memory: str | int | None = None

    @property
    def recomputes(self) -> bool:
        """Tells whether steps may be computed again from their arguments."""
        return self.checkpoint is not None or self.backward != "reverse"

    def __post_init__(self) -> None:
        if self.backward not in BACKWARD:
            raise InputError(
                f"backward={self.backward!r} is not an option. Use one of {', '.join(map(repr, BACKWARD))}."
            )
        if self.order not in (1, 2):
            raise InputError(f"order={self.order!r} is not an option. Use 2 (exact) or 1 (first-order).")
        steps = self.truncate
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise InputError(f"truncate={steps!r} is not an option. Use None or a positive number of steps.")
        if not _is_of_tasks(self.tasks):
            raise InputError(
                f"tasks={self.tasks!r} is not an option. Use True, False, or a tuple that says which dimension of "
                "state, batches, hyper and meta is the task's, as (None, 0, None, None)."
            )
        self._refuse_combinations()

    def _refuse_combinations(self) -> None:
        for name, value, needed in (("implicit", self.implicit, "implicit"), ("memory", self.memory, "auto")):
            if value is not None and self.backward != needed:
                raise InputError(f"{name}={value!r} is an option of backward={needed!r}, not of {self.backward!r}.")
        if self.order == 1 and self.backward in ("mixed", "implicit"):
            raise InputError(
                compose_message(
                    f"order=1 with backward={self.backward!r}",
                    None,
                    "First order takes the inner gradients as constants: there is no second derivative to save on.",
                    'Use `backward="reverse"`, or `order=2` for the exact gradient.',
                )
            )
        if self.checkpoint is not None and self.backward in ("forward", "implicit", "auto"):
            raise InputError(
                compose_message(
                    f"checkpoint={self.checkpoint!r} with backward={self.backward!r}",
                    None,
                    '"auto" chooses its checkpoints itself; the others keep nothing of the steps.',
                    "Leave `checkpoint` out.",
                )
            )


def _is_of_tasks(tasks: Any) -> bool:
    if not isinstance(tasks, tuple):
        return isinstance(tasks, bool)
    return len(tasks) == 4 and all(dim is None or type(dim) is int for dim in tasks)


def loop_options(*given: Any) -> LoopOptions:
    """Returns `LoopOptions(*given)`, checked once for all calls that give the same."""
    try:
        return _checked(*given)
    except TypeError:  # what cannot be hashed
        return LoopOptions(*given)


_checked = lru_cache(maxsize=64, typed=True)(LoopOptions)
