"""The learning-rate schedulers that go with an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gimli_compile.errors import InputError, compose_message
from gimli_compile.several_optimizers import members
from gimli_compile.snapshot import GROUPS, is_owned_object

SCHEDULER = "scheduler"
_TAKEN = (SCHEDULER, "state", "groups", GROUPS)


class Schedulers:
    """What was passed as `scheduler`: one, a list of them, or None; and `objects` of the train step, by name.

    `are_declared` says that the user's train step steps them itself.
    """

    def __init__(
        self, given: Any = None, *, are_declared: bool = False, objects: Mapping[str, Any] | None = None
    ) -> None:
        self.are_declared = are_declared
        self.companions: dict[str, Any] = {**({} if given is None else {SCHEDULER: given}), **(objects or {})}
        self._each: list[Any] = []
        if given is not None:
            self._each = list(given) if isinstance(given, (list, tuple)) else [given]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._each)

    @property
    def need_loss(self) -> bool:
        """Tells whether the step of one of them is called with the loss."""
        return not self.are_declared and any(map(required_arguments, self._each))

    def follow(self, loss: Any = None) -> None:
        """Does what comes after the optimizer's step: nothing if the train step does it."""
        if not self.are_declared:
            self.step(loss)

    def step(self, loss: Any = None) -> None:
        """Steps each, in order; with the loss where an argument is required, as the plateau of a metric does."""
        for scheduler in self._each:
            required = required_arguments(scheduler)
            if len(required) <= 1:
                scheduler.step(*[loss for _ in required])


def check_objects(objects: Any, *, has_train_step: bool) -> None:
    """Refuses what has no attributes to keep, or would never be used."""
    if objects is None:
        return
    if not isinstance(objects, Mapping) or not all(isinstance(name, str) and name.isidentifier() for name in objects):
        raise InputError(f"`objects` is a {type(objects).__name__}. Pass a dict of objects by their names.")
    for name, one in objects.items():
        if not is_owned_object(one) or isinstance(one, torch.nn.Module) or name in _TAKEN:
            raise InputError(
                compose_message(
                    f"objects[{name!r}] is a {type(one).__name__}",
                    None,
                    "Only the attributes of objects are kept, under a name that nothing else has.",
                    "Pass modules with the model and optimizers with the optimizer; put numbers into an object.",
                )
            )
    if not has_train_step:
        raise InputError("`objects` are those that a train step uses: pass `train_step=` as well.")


def check_schedulers(schedulers: Schedulers, optimizer: Any, *, per_parameter: bool) -> None:
    """Refuses what cannot be stepped after the optimizer, and schedulers of another optimizer."""
    for one in schedulers:
        name = type(one).__name__
        if isinstance(one, type) or not callable(getattr(one, "step", None)):
            raise InputError(
                compose_message(
                    f"the scheduler is a {name}, which has no `step`",
                    None,
                    "After every `optimizer.step()` its own `step()` is run.",
                    "Pass a scheduler, or a list of schedulers.",
                )
            )
        required = required_arguments(one)
        if len(required) > 1 and not schedulers.are_declared:
            raise InputError(
                compose_message(
                    f"`{name}.step` needs {len(required)} arguments: {', '.join(required)}",
                    None,
                    "After every `optimizer.step()`, `scheduler.step()` is run, with the loss if it needs an argument.",
                    "Step it in a train step of your own, and pass both: `train_step=` and `scheduler=`.",
                )
            )
        held = getattr(one, "optimizer", None)
        if isinstance(held, tuple(map(type, members(optimizer)))) and all(
            held is not own for own in members(optimizer)
        ):
            raise InputError(
                compose_message(
                    f"the {name} is that of another {type(held).__name__}",
                    None,
                    "A scheduler changes the groups of its own optimizer.",
                    "Create the scheduler from the optimizer that is passed.",
                )
            )
    if per_parameter and schedulers.companions:
        raise InputError(
            compose_message(
                "`per_parameter=True` does not go with a scheduler",
                None,
                "A scheduler keeps numbers for each group that the optimizer has now.",
                "Create the optimizer with a group for each parameter, then the scheduler.",
            )
        )


def required_arguments(stepper: Any) -> list[str]:
    """Returns the names of the arguments that `stepper.step` cannot do without."""
    step = stepper.step
    try:
        parameters = list(inspect.signature(step).parameters.values())
    except (TypeError, ValueError):
        return []
    innermost = inspect.unwrap(step, stop=inspect.ismethod)
    if inspect.isfunction(step) and innermost is inspect.unwrap(getattr(type(stepper), "step", type)):
        parameters = parameters[1:]  # a wrapper on the instance, as schedulers put it there, shows the method's `self`
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in starred]
