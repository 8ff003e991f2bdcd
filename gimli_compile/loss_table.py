"""The captured programs of the model and of the loss with its gradient, found by the form of the inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from gimli_compile.collecting import rare_collections
from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.gradient_flow import carried_buffers
from gimli_compile.loss_capture import Forward, capture_forward, capture_gradient, capture_loss
from gimli_compile.loss_conditions import Captured
from gimli_compile.metadata import FAKE
from gimli_compile.model_view import ModelView
from gimli_compile.owned_generators import DrawsUndone
from gimli_compile.passes.liveness import compute_only
from gimli_compile.pipeline import first_order
from gimli_compile.program import Program
from gimli_compile.row_gradients import from_slots
from gimli_compile.slot import Role, Slot
from gimli_compile.state import Tensors, TrainState
from gimli_compile.transforms import generator_states, outside_transforms, representatives, rewind
from gimli_compile.tree_slots import form, tree_form, tree_slots


class Gradient:
    """The captured loss and gradient, and the same with the gradient taken as a constant."""

    def __init__(self, captured: Captured) -> None:
        self.captured = captured
        self.exact = captured.program
        self._first_order: Program | None = None

    @cached_property
    def buffers(self) -> Program:
        """The part of the program that makes the new buffers, and the conditions."""
        keep = [i for i, slot in enumerate(self.exact.results) if slot.role in (Role.BUFFER, Role.GUARD)]
        return compute_only(self.exact, keep, dropping=(Role.CONSTANT,))

    @cached_property
    def carried_buffers(self) -> frozenset[str]:
        """The names of the buffers whose new values have derivatives in what the loss is computed from."""
        return carried_buffers(self.buffers)

    def program(self, order: int) -> Program:
        """Returns the program of this order."""
        if order == 2:
            return self.exact
        if self._first_order is None:
            self._first_order = first_order(self.exact)
        return self._first_order

    @cached_property
    def used_buffers(self) -> frozenset[str]:
        """The names of the buffers in which the loss or its gradient has a derivative; found on fake tensors."""
        program = self.exact
        leaves: dict[str, torch.Tensor] = {}
        values = []
        with outside_transforms(), FAKE, torch.enable_grad():
            for slot, node in zip(program.inputs, program.placeholders, strict=True):
                value = node.meta["val"]
                if slot.role is Role.BUFFER and value.is_floating_point():
                    value = leaves[slot.path] = value.detach().requires_grad_()
                values.append(value)
            made = zip(program.results, program.function(*values), strict=True)
            outs = [out for slot, out in made if slot.role in (Role.LOSS, Role.GRAD) and out.requires_grad]
            if not outs:
                return frozenset()
            grads = torch.autograd.grad(
                outs, list(leaves.values()), list(map(torch.ones_like, outs)), allow_unused=True
            )
        return frozenset(name for name, grad in zip(leaves, grads, strict=True) if grad is not None)


class Asked(NamedTuple):
    """What to evaluate: the model on `batch`, arguments and keyword arguments; or the loss on a batch and meta."""

    params: Tensors
    buffers: Tensors
    batch: Any
    meta: Any = None
    is_loss: bool = False

    def values(self) -> dict[Slot, torch.Tensor]:
        """Returns what it is computed from, by slot."""
        return _values(self.params, self.buffers, self.batch, self.meta)


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

    def held(self) -> list[torch.Tensor]:
        """Returns the tensors that anything captured here holds as constants, what decides about it included."""
        forwards = [forward for group in self.forwards.values() for forward in group]
        captured = [one.captured for one in (*self.all_gradients, *forwards)]
        programs = [program for one in captured for program in (one.program, one.decide) if program is not None]
        return [tensor for program in programs for tensor in program.constants.values()]

    def evaluate(self, asked: Asked, draws: dict[Slot, torch.Tensor] | None = None) -> tuple[Any, Tensors]:
        """Returns the model's output, or the loss, and the new buffers; `draws` are made unless given."""
        capture = partial(self._capture_forward, asked)
        draws = {} if draws is None else draws
        forward, results = self._run(self._known_forwards(asked), capture, asked.values(), draws)
        return forward.assemble(results), _new_buffers(asked.buffers, results)

    def _known_forwards(self, asked: Asked) -> list[Forward]:
        forms = _forms(asked.params, asked.buffers)
        key = (self.view.signature(), forms, tree_form((asked.batch, asked.meta)), asked.is_loss)
        return self.forwards.setdefault(key, [])

    def fitting_forwards(self, asked: Asked, draws: Mapping[Slot, torch.Tensor]) -> list[Forward]:
        """Returns the captured programs that fit these inputs, as far as can be told before they run."""
        values = asked.values()
        return [forward for forward in self._known_forwards(asked) if forward.captured.fits(values, draws)]

    def _run(
        self,
        known: list[Any],
        capture: Callable[[], Any],
        values: Mapping[Slot, torch.Tensor],
        draws: dict[Slot, torch.Tensor],
        order: int = 2,
    ) -> tuple[Any, dict[Slot, torch.Tensor]]:
        """Runs the first of what is known that holds for these values, or else what a new capture gives.

        What a program drew that then did not hold is drawn again, from the same state of the generators.
        """
        for entry in _with_new(known, capture):
            if not entry.captured.fits(values, draws):
                continue
            program, own = entry.program(order), dict(draws)
            before = generator_states() if program.draws and entry.captured.after else None
            results = _results_if_held(entry.captured, program, {**values, **program.draw(own)})
            if results is not None:
                draws.update(own)
                return entry, results
            if before is not None:
                rewind(before)
        raise _unsettled(self.title)

    @rare_collections()
    def _capture_forward(self, asked: Asked) -> Forward:
        params, buffers, batch, meta = representatives((asked.params, asked.buffers, asked.batch, asked.meta))
        with outside_transforms(), torch.random.fork_rng(), DrawsUndone():
            if not asked.is_loss:
                args, kwargs = batch
                return capture_forward(self.view, params, buffers, args, kwargs, f"forward of {self.title}")
            assert self.loss_fn is not None
            return capture_loss(self.view, self.loss_fn, params, buffers, batch, meta, f"loss of {self.title}")

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
        values = values_of_loss(state, batch, meta)
        known = self.known_gradients(state, batch, meta, trained, model_key)
        capture = partial(self._capture_gradient, state, batch, meta, trained)
        _, results = self._run(known, capture, values, draws, order)
        return results[Slot(Role.LOSS)], from_slots(results, trained), _new_buffers(state.buffers, results)

    def known_gradients(
        self, state: TrainState, batch: Any, meta: Any, trained: list[str], model_key: Any = None
    ) -> list[Gradient]:
        """Returns the gradients that were captured for inputs of this form; the list grows with captures."""
        model_key = self.view.signature() if model_key is None else model_key
        key = (model_key, _forms(state.params, state.buffers), tree_form((batch, meta)), tuple(trained))
        return self.gradients.setdefault(key, [])

    def buffers(
        self,
        state: TrainState,
        batch: Any,
        meta: Any,
        trained: list[str],
        *,
        values: Mapping[Slot, torch.Tensor],
        draws: dict[Slot, torch.Tensor],
        model_key: Any,
    ) -> dict[Slot, torch.Tensor]:
        """Returns the new buffers of a step that was taken before, at `values` of the same form."""
        for gradient in self.known_gradients(state, batch, meta, trained, model_key):
            if not gradient.captured.fits(values, draws):
                continue
            program = gradient.buffers
            results = program({**values, **program.draw(draws)})
            if gradient.captured.held(results):
                return {slot: results.get(slot, value) for slot, value in values.items() if slot.role is Role.BUFFER}
        raise _unsettled(self.title)

    def used_buffers(self) -> frozenset[str]:
        """Returns the names of the buffers in which any captured loss, or its gradient, has a derivative."""
        return frozenset().union(*(gradient.used_buffers for gradient in self.all_gradients))

    def carried_buffers(self) -> frozenset[str]:
        """Returns the names of the buffers that carry derivatives from one step to the next, in any captured loss."""
        return frozenset().union(*(gradient.carried_buffers for gradient in self.all_gradients))

    @rare_collections()
    def _capture_gradient(self, state: TrainState, batch: Any, meta: Any, trained: list[str]) -> Gradient:
        assert self.loss_fn is not None
        params, buffers, batch, meta = representatives((state.params, state.buffers, batch, meta))
        title = f"loss and gradient of {self.title}"
        with outside_transforms(), torch.random.fork_rng(), DrawsUndone():
            return Gradient(capture_gradient(self.view, self.loss_fn, params, buffers, batch, meta, trained, title))


def _results_if_held(
    captured: Captured, program: Program, values: Mapping[Slot, torch.Tensor]
) -> dict[Slot, torch.Tensor] | None:
    """Runs a program; None if its conditions do not hold, whether it then fails or not."""
    try:
        results = program(values)
    except Exception:
        guards = [index for index, slot in enumerate(program.results) if slot.role is Role.GUARD]
        if not guards or captured.held(compute_only(program, guards)(values)):
            raise
        return None
    return results if captured.held(results) else None


def _with_new(known: list[Any], capture: Callable[[], Any]) -> Iterator[Any]:
    """Yields what is known, then what a new capture gives, which is known from then on."""
    yield from list(known)
    known.append(capture())
    yield known[-1]


def _unsettled(title: str) -> CaptureError:
    return CaptureError(
        compose_message(
            f"the branches that {title} takes on its values, or how many elements its masks select, do not settle",
            None,
            "A program captured from these very values computes other outcomes than the model itself, "
            "or tasks that run together have different ones.",
            "A comparison lies within rounding: perturb the inputs or use float64. With tasks: use `torch.where` in "
            "place of the branch or the selection, or unroll one task at a time.",
        )
    )


def values_of_loss(state: TrainState, batch: Any, meta: Any) -> dict[Slot, torch.Tensor]:
    """Returns what a loss is computed from, by slot."""
    return _values(state.params, state.buffers, batch, meta)


def _values(params: Tensors, buffers: Tensors, batch: Any, meta: Any) -> dict[Slot, torch.Tensor]:
    return {**_by_slot(params, buffers), **tree_slots(Role.BATCH, batch), **tree_slots(Role.META, meta)}


def _by_slot(params: Tensors, buffers: Tensors) -> dict[Slot, torch.Tensor]:
    found = {Slot(Role.PARAM, name): value for name, value in params.items()}
    found.update({Slot(Role.BUFFER, name): value for name, value in buffers.items()})
    return found


def _new_buffers(buffers: Tensors, results: dict[Slot, torch.Tensor]) -> Tensors:
    return {name: results.get(Slot(Role.BUFFER, name), value) for name, value in buffers.items()}


def _forms(params: Tensors, buffers: Tensors) -> Any:
    return tuple(map(form, params.values())), tuple(map(form, buffers.values()))
