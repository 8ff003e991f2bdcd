"""How an optimizer wants its step to be called: with a gradient, with a closure, with the gradient's graph.

Nobody declares it, so it is found out by trying: the live optimizer steps on copies of its parameters along a quadratic
loss, and the first way that runs is the one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from gimli_compile.errors import CaptureError
from gimli_compile.hollow_tensors import FormAsked, HollowTensors
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.row_gradients import as_eager, made_up_gradients
from gimli_compile.snapshot import GROUPS
from gimli_compile.update_values import UpdateOutputs

LARGE = 1 << 24  # bytes of parameters from which on memory matters more than how long an operator takes
Evaluate = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Protocol:
    """One way to take a step.

    `gradient`: the gradient is there before the step. `closure`: the step is given a function that evaluates the loss
    and its gradient again. `number`: that function returns a plain number. `graph`: the gradients keep their graph, so
    that the step can differentiate them. `follows`: what comes after the step, the schedulers, needs the loss.
    """

    gradient: bool = True
    closure: bool = False
    number: bool = False
    graph: bool = False
    follows: bool = False

    @property
    def is_plain(self) -> bool:
        """Tells whether the step takes nothing but gradients, so that it is a program of its own."""
        return self == Protocol()

    def step(self, optimizer: Any, evaluate: Evaluate) -> torch.Tensor:
        """Takes a step of a live optimizer along the loss that `evaluate` returns; returns its first value."""
        losses: list[torch.Tensor] = []

        def closure() -> Any:
            with torch.enable_grad():
                clear_gradients(optimizer)
                loss = evaluate()
                _backward(loss, create_graph=self.graph)
            losses.append(loss.detach())
            return loss.item() if self.number else loss

        if self.gradient:
            closure()
        if self.closure:
            optimizer.step(closure)
        else:
            optimizer.step()
        if not losses:
            raise CaptureError(f"`{type(optimizer).__name__}.step` never called the closure that it was given.")
        return losses[0]


def clear_gradients(optimizer: Any) -> None:
    """Does what `zero_grad` does, also for an optimizer without one."""
    if callable(getattr(optimizer, "zero_grad", None)):
        optimizer.zero_grad()
        return
    for group in getattr(optimizer, GROUPS):
        for param in group["params"]:
            param.grad = None


def _backward(loss: torch.Tensor, *, create_graph: bool) -> None:
    with warnings.catch_warnings():
        if create_graph:  # the cycle of parameter and gradient that torch warns of is broken after the step
            warnings.filterwarnings("ignore", message="Using backward")
        loss.backward(create_graph=create_graph)


def quadratic_loss(optimizer: Any) -> Evaluate:
    """Returns a made-up convex loss of the parameters that an optimizer holds."""
    generator = torch.Generator().manual_seed(0)
    params = [param for group in getattr(optimizer, GROUPS) for param in group["params"]]
    made = [[_noise(param, generator) for _ in range(2)] for param in params]

    def evaluate() -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        held = [param for group in getattr(optimizer, GROUPS) for param in group["params"]]
        for param, (centre, weight) in zip(held, made, strict=True):
            if param.requires_grad:
                total = total + (weight.abs() * (param - centre).abs().square()).sum().to("cpu", torch.float64)
        return total

    return evaluate


def _noise(param: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(param.shape, generator=generator, dtype=torch.float64)
    return noise.to(param.device, param.dtype)


def choose_protocol(view: OptimizerView, *, is_needed: bool) -> Protocol | None:
    """Returns how the optimizer's step is called, and notes which of its numbers the step changes.

    If the optimizer runs in no way: None, or, where one is needed, the CaptureError of the plain step.
    """
    first: CaptureError | None = None
    for protocol in _candidates():
        try:
            after = _try(view, protocol)
        except CaptureError as error:
            first = first or error
            continue
        return replace(_with_gradient_if_used(view, protocol, after), follows=view.schedulers.need_loss)
    if is_needed and first is not None:
        raise first
    return None


def _candidates() -> Iterator[Protocol]:
    yield Protocol()
    for graph, number, gradient in product((False, True), (False, True), (False, True)):
        yield Protocol(gradient=gradient, closure=True, number=number, graph=graph)
        if graph and not number and not gradient:
            yield Protocol(graph=True)


def _try(view: OptimizerView, protocol: Protocol) -> UpdateOutputs:
    if protocol.is_plain:
        return _try_gradients(view)
    evaluate = quadratic_loss(view.optimizer)
    return view.observe(lambda: protocol.step(view.optimizer, evaluate), {})


def _try_gradients(view: OptimizerView) -> UpdateOutputs:
    """Steps along made-up gradients; sparse ones for an optimizer that takes no others."""
    live = {name: p for p, name in view.live_params()}
    trained = [name for name, p in live.items() if p.requires_grad]

    if sum(value.nbytes for value in live.values()) >= LARGE:
        after = _try_form(view, {name: live[name] for name in trained})
        if after is not None:
            return after

    def observe(*, sparse: bool) -> UpdateOutputs:
        view.sparse = sparse
        made = made_up_gradients(live, trained, torch.Generator().manual_seed(0), sparse=sparse)
        for name in trained:
            made[name] = as_eager(made[name])  # one after the other: a copy of all takes the memory of the model
        return view.observe(view.optimizer.step, made)

    try:
        return observe(sparse=False)
    except CaptureError as error:
        with suppress(CaptureError):
            return observe(sparse=True)
        view.sparse = False
        raise error


def _try_form(view: OptimizerView, trained: Mapping[str, torch.Tensor]) -> UpdateOutputs | None:
    """Steps along gradients without values; returns None where the step asks for values, or does not run."""
    view.sparse = False
    hollow, changing = HollowTensors(), view.changing
    try:
        with hollow:
            after = view.observe(view.optimizer.step, {n: hollow.like(p) for n, p in trained.items()}, hollow.like)
    except (CaptureError, FormAsked):
        after = None
    if hollow.failed or after is None:
        view.changing = changing
        return None
    return after


def _with_gradient_if_used(view: OptimizerView, protocol: Protocol, after: UpdateOutputs) -> Protocol:
    """Adds the gradient before the step where it makes a difference to a step that evaluates the loss itself."""
    if protocol.gradient:
        return protocol
    other = replace(protocol, gradient=True)
    changing = view.changing
    try:
        with_gradient = _try(view, other)
    except CaptureError:
        view.changing = changing
        return protocol
    same = all(torch.equal(after.params[name], value) for name, value in with_gradient.params.items())
    if same:
        view.changing = changing
    return protocol if same else other
