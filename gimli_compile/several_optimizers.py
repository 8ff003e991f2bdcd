"""Several optimizers of one train step, taken as one: `(optimizer_g, optimizer_d)`, `{"actor": ..., "critic": ...}`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gimli_compile.errors import InputError, compose_message
from gimli_compile.snapshot import GROUPS
from gimli_compile.tree_paths import named_leaves

_TAKEN = ("", "state", "groups", GROUPS, "scheduler", "given")


class SeveralOptimizers:
    """Optimizers with their groups in a row. Its attributes are the optimizers, by their paths in what was `given`."""

    __slots__ = ("__dict__", "given")  # what was given is no attribute: attributes are walked

    def __init__(self, given: Any) -> None:
        self.given = given
        for path, one in named_leaves(given):
            setattr(self, path, one)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, in order."""
        return [group for one in members(self) for group in one.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> None:
        """Steps each, in order."""
        for one in members(self):
            one.step() if closure is None else one.step(closure)

    def zero_grad(self) -> None:
        """Takes the gradients of all parameters away."""
        for group in self.param_groups:
            for param in group["params"]:
                param.grad = None


def as_one(optimizer: Any) -> Any:
    """Returns one optimizer as it is, a list, tuple or dict of them as one, and checks what it is given."""
    if not isinstance(optimizer, (list, tuple, dict)):
        check_optimizer(optimizer)
        return optimizer
    for path, one in named_leaves(optimizer):
        check_optimizer(one)
        if path in _TAKEN:
            raise InputError(f"an optimizer cannot be called {path!r}. Choose another key.")
    found = list(map(id, (one for _, one in named_leaves(optimizer))))
    if not found or len(set(found)) < len(found):
        what = "holds the same one twice" if found else "has nothing to step"
        raise InputError(
            compose_message(
                f"the {type(optimizer).__name__} of optimizers {what}",
                None,
                "The parameter groups of all are numbered through, each once.",
                "Pass one optimizer, or a list, tuple or dict of different ones.",
            )
        )
    return SeveralOptimizers(optimizer)


def check_optimizer(optimizer: Any) -> None:
    """Refuses what is no optimizer."""
    if not (callable(getattr(optimizer, "step", None)) and isinstance(getattr(optimizer, GROUPS, None), list)):
        raise InputError(
            compose_message(
                f"{type(optimizer).__name__} is no optimizer: it lacks `step` or `param_groups`",
                None,
                "`functionalize` runs the optimizer's own `step`.",
                "Pass an instance of a `torch.optim.Optimizer` subclass, or of a class that looks like one; "
                "or a list, tuple or dict of them.",
            )
        )


def check_default_step(optimizer: Any) -> None:
    """Refuses several optimizers that do not step along gradients alone, where no train step says how."""
    if isinstance(optimizer, SeveralOptimizers):
        raise InputError(
            compose_message(
                f"one of {kind_of(optimizer)} steps with a closure or the graph of its gradient, or a scheduler with "
                "the loss",
                None,
                "Without a train step, all optimizers step along the same gradient, one after the other.",
                "Write down what evaluates the loss when: `functionalize(models, optimizers, train_step=...)`.",
            )
        )


def members(optimizer: Any) -> list[Any]:
    """Returns the optimizers of a collection, or the one."""
    return list(vars(optimizer).values()) if isinstance(optimizer, SeveralOptimizers) else [optimizer]


def as_given(optimizer: Any) -> Any:
    """Returns what the user's own code is to see."""
    return optimizer.given if isinstance(optimizer, SeveralOptimizers) else optimizer


def kind_of(optimizer: Any) -> str:
    """Returns the name of an optimizer's class, or of those of a collection."""
    return ", ".join(type(one).__name__ for one in members(optimizer))


def full_kind_of(optimizer: Any) -> str:
    """Returns the name with its module."""
    return ", ".join(f"{type(one).__module__}.{type(one).__qualname__}" for one in members(optimizer))


def groups_by_optimizer(optimizer: Any, *, per_parameter: bool) -> dict[str, tuple[int, int]]:
    """Returns the first and the last group, exclusive, of each optimizer of a collection by its path."""
    found: dict[str, tuple[int, int]] = {}
    if isinstance(optimizer, SeveralOptimizers):
        start = 0
        for path, one in vars(optimizer).items():
            stop = start + (sum(len(g["params"]) for g in one.param_groups) if per_parameter else len(one.param_groups))
            found[path] = (start, stop)
            start = stop
    return found
