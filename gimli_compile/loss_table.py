"""The captured programs of the model and of the loss with its gradient, found by the form of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.loss_capture import Captured, Forward, capture_forward, capture_gradient
from gimli_compile.model_view import ModelView
from gimli_compile.pipeline import first_order
from gimli_compile.program import Program
from gimli_compile.row_gradients import from_slots
from gimli_compile.slot import Role, Slot
from gimli_compile.state import Tensors, TrainState
from gimli_compile.transforms import outside_transforms, representatives
from gimli_compile.tree_slots import form, tree_form, tree_slots


class Gradient:
    """The captured loss and gradient, and the same with the gradient taken as a constant."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.exact = captured.program
        self._first_order: Program | None = None

    def program(self, order: int) -> Program:
        """Returns the program of this order."""
        if order == 2:
            return self.exact
        if self._first_order is None:
            self._first_order = first_order(self.exact)
        return self._first_order


class LossTable:
    """Runs the model and the loss; captures them for inputs of a new form, and where a branch comes out otherwise."""

    def __init__(self, view: ModelView, loss_fn: Callable[..., Any] | None, title: str) -> None:
        self.view = view
        self.loss_fn = loss_fn
        self.title = title
        self.forwards: dict[Any, list[Forward]] = {}
        self.gradients: dict[Any, list[Gradient]] = {}

    @property
    def all_gradients(self) -> list[Gradient]:
        """All captured gradients, the latest last."""
        return [gradient for group in self.gradients.values() for gradient in group]

    def constants(self) -> list[torch.Tensor]:
        """Returns the tensors that the captured losses hold as constants."""
        return [tensor for gradient in self.all_gradients for tensor in gradient.exact.constants.values()]

    def forward(self, params: Tensors, buffers: Tensors, args: Any, kwargs: Any) -> tuple[Any, Tensors]:
        """Returns the model's output and the new buffers."""
        key = (self.view.signature(), _forms(params, buffers), tree_form((args, kwargs)))
        values = {**_by_slot(params, buffers), **tree_slots(Role.BATCH, (args, kwargs))}
        known = self.forwards.setdefault(key, [])
        draws: dict[Slot, torch.Tensor] = {}
        for forward in _with_new(known, lambda: self._capture_forward(params, buffers, args, kwargs)):
            program = forward.captured.program
            results = program({**values, **program.draw(draws)})
            if forward.captured.held(results):
                return forward.assemble(results), _new_buffers(buffers, results)
        raise _unsettled(self.title)

    def _capture_forward(self, params: Tensors, buffers: Tensors, args: Any, kwargs: Any) -> Forward:
        params, buffers, args, kwargs = representatives((params, buffers, args, kwargs))
        with outside_transforms(), torch.random.fork_rng():
            return capture_forward(self.view, params, buffers, args, kwargs, f"forward of {self.title}")

    def gradient(
        self,
        state: TrainState,
        batch: Any,
        meta: Any,
        trained: list[str],
        *,
        order: int,
        draws: dict[Slot, torch.Tensor],
        model_key: Any = None,
    ) -> tuple[torch.Tensor, dict[str, Any], Tensors]:
        """Returns the loss, its gradient by parameter name (None where there is none), and the new buffers.

        `model_key` is the model's signature if the caller knows it, as a loop does.
        """
        values = {**_by_slot(state.params, state.buffers), **tree_slots(Role.BATCH, batch)}
        values.update(tree_slots(Role.META, meta))
        known = self.known_gradients(state, batch, meta, trained, model_key)
        for gradient in _with_new(known, lambda: self._capture_gradient(state, batch, meta, trained)):
            program = gradient.program(order)
            results = program({**values, **program.draw(draws)})
            if gradient.captured.held(results):
                return results[Slot(Role.LOSS)], from_slots(results, trained), _new_buffers(state.buffers, results)
        raise _unsettled(self.title)

    def known_gradients(
        self, state: TrainState, batch: Any, meta: Any, trained: list[str], model_key: Any = None
    ) -> list[Gradient]:
        """Returns the gradients that were captured for inputs of this form; the list grows with captures."""
        model_key = self.view.signature() if model_key is None else model_key
        key = (model_key, _forms(state.params, state.buffers), tree_form((batch, meta)), tuple(trained))
        return self.gradients.setdefault(key, [])

    def _capture_gradient(self, state: TrainState, batch: Any, meta: Any, trained: list[str]) -> Gradient:
        assert self.loss_fn is not None
        params, buffers, batch, meta = representatives((state.params, state.buffers, batch, meta))
        title = f"loss and gradient of {self.title}"
        with outside_transforms(), torch.random.fork_rng():
            return Gradient(capture_gradient(self.view, self.loss_fn, params, buffers, batch, meta, trained, title))


def _with_new(known: list[Any], capture: Callable[[], Any]) -> Iterator[Any]:
    """Yields what is known, then what a new capture gives, which is known from then on."""
    yield from list(known)
    known.append(capture())
    yield known[-1]


def _unsettled(title: str) -> CaptureError:
    return CaptureError(
        compose_message(
            f"the branches that {title} takes on its values do not settle",
            None,
            "A program captured from these very values computes other outcomes than the model itself.",
            "A comparison lies within rounding; perturb the inputs or use float64.",
        )
    )


def _by_slot(params: Tensors, buffers: Tensors) -> dict[Slot, torch.Tensor]:
    found = {Slot(Role.PARAM, name): value for name, value in params.items()}
    found.update({Slot(Role.BUFFER, name): value for name, value in buffers.items()})
    return found


def _new_buffers(buffers: Tensors, results: dict[Slot, torch.Tensor]) -> Tensors:
    return {name: results.get(Slot(Role.BUFFER, name), value) for name, value in buffers.items()}


def _forms(params: Tensors, buffers: Tensors) -> Any:
    return tuple(map(form, params.values())), tuple(map(form, buffers.values()))
