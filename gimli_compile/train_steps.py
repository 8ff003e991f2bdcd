"""Whole train steps: the default one, and the loop body that a user already has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.modules import module as torch_module

from gimli_compile.errors import InputError
from gimli_compile.loss_capture import check_loss, takes_meta
from gimli_compile.protocol import Protocol
from gimli_compile.recording import Region
from gimli_compile.schedulers import Schedulers
from gimli_compile.several_optimizers import as_given

Enter = Callable[[Region], AbstractContextManager[None]]


class DefaultStep:
    """Evaluates the loss and its gradient as the optimizer wants it, and lets the optimizer and its schedulers step."""

    def __init__(self, loss_fn: Callable[..., Any] | None, protocol: Protocol, schedulers: Schedulers) -> None:
        self.function = loss_fn or _missing_loss
        self.schedulers = schedulers
        self.protocol = protocol

    def watching(self, modules: Iterable[torch.nn.Module], enter: Enter) -> AbstractContextManager[None]:
        """Says whose code runs: that is known without a look at the modules."""
        return nullcontext()

    def __call__(self, model: Any, optimizer: Any, batch: Any, meta: Any, enter: Enter) -> Any:
        """Takes the step; returns the loss before it."""
        arguments = (model, batch, meta) if takes_meta(self.function) else (model, batch)

        def evaluate() -> torch.Tensor:
            with enter(Region.LOSS):
                loss = self.function(*arguments)
            check_loss(loss, self.function)
            return loss

        loss = self.protocol.step(optimizer, evaluate)
        self.schedulers.follow(loss)
        return loss


def _missing_loss(*_: Any) -> torch.Tensor:
    raise InputError("There is no loss. Call `functionalize(model, optimizer, loss_fn)`.")


class UserStep:
    """Runs the user's own train step: `train_step(model, optimizer, batch)`, or with `meta` as a fourth argument."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def watching(self, modules: Iterable[torch.nn.Module], enter: Enter) -> AbstractContextManager[None]:
        """Says whose code runs: the model's while one of its modules is called."""
        return _calls_of(set(map(id, modules)), enter)

    def __call__(self, model: Any, optimizer: Any, batch: Any, meta: Any, enter: Enter) -> Any:
        """Takes the step; returns what the function returns."""
        arguments = (model, as_given(optimizer), batch)
        return self.function(*((*arguments, meta) if takes_meta(self.function, places=4) else arguments))


@contextmanager
def _calls_of(modules: set[int], enter: Enter) -> Iterator[None]:
    running: list[AbstractContextManager[None]] = []

    def before(module: torch.nn.Module, _: Any) -> None:
        if id(module) in modules:
            running.append(enter(Region.LOSS))
            running[-1].__enter__()

    def after(module: torch.nn.Module, _: Any, out: Any) -> None:
        if id(module) in modules:
            running.pop().__exit__(None, None, None)

    handles = (
        torch_module.register_module_forward_pre_hook(before),
        torch_module.register_module_forward_hook(after, always_call=True),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
