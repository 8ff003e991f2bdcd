"""The captured programs of the model and of the loss with its gradient, found by the form of the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.loss_capture import Forward, capture_forward, capture_gradient, tree_slots
from gimli_compile.model_view import ModelView
from gimli_compile.pipeline import first_order, for_vmap
from gimli_compile.program import Program
from gimli_compile.slot import Role, Slot
from gimli_compile.state import Tensors, TrainState
from gimli_compile.transforms import inside_vmap, outside_transforms, representatives
from gimli_compile.update_table import form


class Gradient:
    """The captured loss and gradient, and the forms of it that were asked for."""

    def __init__(self, exact: Program) -> None:
        self.exact = exact
        self._forms: dict[tuple[int, bool], Program] = {(2, False): exact}

    def form(self, order: int, mapped: bool) -> Program:
        """Returns the program of this order; under `vmap` the form for it."""
        known = self._forms.get((order, mapped))
        if known is None:
            known = first_order(self.exact) if order == 1 else self.exact
            known = for_vmap(known) if mapped else known
            self._forms[order, mapped] = known
        return known


class LossTable:
    """Runs the model and the loss; captures them for inputs of a new form."""

    def __init__(self, view: ModelView, loss_fn: Callable[..., Any] | None, title: str) -> None:
        self.view = view
        self.loss_fn = loss_fn
        self.title = title
        self.forwards: dict[Any, Forward] = {}
        self.gradients: dict[Any, Gradient] = {}

    def forward(self, params: Tensors, buffers: Tensors, args: Any, kwargs: Any) -> tuple[Any, Tensors]:
        """Returns the model's output and the new buffers."""
        key = (self.view.signature(), _forms(params, buffers), _tree_form((args, kwargs)))
        captured = self.forwards.get(key)
        if captured is None:
            plain = representatives((params, buffers, args, kwargs))
            with outside_transforms(), torch.random.fork_rng():
                captured = self.forwards[key] = capture_forward(self.view, *plain, f"forward of {self.title}")
        values = {**_by_slot(params, buffers), **tree_slots(Role.BATCH, (args, kwargs))}
        results = captured.program(values)
        return captured.assemble(results), _new_buffers(buffers, results)

    def gradient(
        self,
        state: TrainState,
        batch: Any,
        meta: Any,
        trained: list[str],
        *,
        order: int,
        draws: dict[Slot, torch.Tensor],
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor | None], Tensors]:
        """Returns the loss, its gradient by parameter name (None where there is none), and the new buffers."""
        values = {**_by_slot(state.params, state.buffers), **tree_slots(Role.BATCH, batch)}
        values.update(tree_slots(Role.META, meta))
        program = self._gradient(state, batch, meta, trained).form(order, inside_vmap())
        results = program({**values, **program.draw(draws)})
        grads = {name: results.get(Slot(Role.GRAD, name)) for name in trained}
        return results[Slot(Role.LOSS)], grads, _new_buffers(state.buffers, results)

    def _gradient(self, state: TrainState, batch: Any, meta: Any, trained: list[str]) -> Gradient:
        key = (self.view.signature(), _forms(state.params, state.buffers), _tree_form((batch, meta)), tuple(trained))
        captured = self.gradients.get(key)
        if captured is None:
            params, buffers, batch, meta = representatives((state.params, state.buffers, batch, meta))
            title = f"loss and gradient of {self.title}"
            with outside_transforms(), torch.random.fork_rng():
                exact = capture_gradient(self.view, self.loss_fn, params, buffers, batch, meta, trained, title)  # type: ignore[arg-type]
            captured = self.gradients[key] = Gradient(exact)
        return captured


def _by_slot(params: Tensors, buffers: Tensors) -> dict[Slot, torch.Tensor]:
    found = {Slot(Role.PARAM, name): value for name, value in params.items()}
    found.update({Slot(Role.BUFFER, name): value for name, value in buffers.items()})
    return found


def _new_buffers(buffers: Tensors, results: dict[Slot, torch.Tensor]) -> Tensors:
    return {name: results.get(Slot(Role.BUFFER, name), value) for name, value in buffers.items()}


def _forms(params: Tensors, buffers: Tensors) -> Any:
    return tuple(map(form, params.values())), tuple(map(form, buffers.values()))


def _tree_form(tree: Any) -> Any:
    leaves, structure = pytree.tree_flatten(tree)
    kept = tuple(form(leaf) if isinstance(leaf, torch.Tensor) else (type(leaf), _static(leaf)) for leaf in leaves)
    return structure, kept


def _static(leaf: Any) -> Any:
    return leaf if isinstance(leaf, (bool, int, float, complex, str, type(None))) else id(leaf)


