"""Products with the second derivatives of the loss: forward over the joint gradient, as in MixFlow-MG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from gimli_compile.collecting import rare_collections
from gimli_compile.errors import CaptureError
from gimli_compile.forward_derivatives import Values, push_forward
from gimli_compile.joint_capture import CURE, capture_joint, gradient_slot, no_gradient_field, refuse_complex
from gimli_compile.loss_conditions import Captured
from gimli_compile.loss_table import LossTable, values_of_loss
from gimli_compile.program import Program
from gimli_compile.slot import Role, Slot
from gimli_compile.state import TrainState
from gimli_compile.transforms import outside_transforms, representatives
from gimli_compile.tree_slots import tree_form

_TOLERANCES = {torch.float64: 1e-6, torch.float32: 2e-2}


class JointGradients:
    """The captured joint gradients of a loss, by what is differentiated and by the form of the inputs."""

    def __init__(self, losses: LossTable) -> None:
        self.losses = losses
        self._known: dict[Any, list[Captured]] = {}

    def push(
        self,
        state: TrainState,
        batch: Any,
        meta: Any,
        *,
        wanted: tuple[Slot, ...],
        along: Mapping[Slot, torch.Tensor],
        draws: dict[Slot, torch.Tensor],
        model_key: Any,
    ) -> tuple[Values, Values]:
        """Returns the gradient of the loss in the inputs `wanted`, and its derivative along a direction of parameters.

        Of a direction v in the parameters, the derivative of the gradient in an input x is the derivative of
        `v . grad` in x, for x the parameters (the Hessian product) and anything else (the mixed term).
        """
        values = values_of_loss(state, batch, meta)
        for captured in self._fitting(state, batch, meta, wanted, draws, model_key):
            given = {**values, **_draws_of(captured.program, draws)}
            results, tangents = push_forward(captured.program, given, along, CURE)
            if captured.held(results):
                return _by_input(wanted, results), _by_input(wanted, tangents) if along else {}
        raise self._unsettled()

    def find(
        self,
        state: TrainState,
        batch: Any,
        meta: Any,
        *,
        wanted: tuple[Slot, ...],
        draws: dict[Slot, torch.Tensor],
        model_key: Any,
    ) -> Captured:
        """Returns the joint gradient of the loss in the inputs `wanted` that holds for these values."""
        values = values_of_loss(state, batch, meta)
        for captured in self._fitting(state, batch, meta, wanted, draws, model_key):
            given = {**values, **_draws_of(captured.program, draws)}
            if not captured.after or captured.held(push_forward(captured.program, given, {}, CURE)[0]):
                return captured
        raise self._unsettled()

    def _fitting(
        self,
        state: TrainState,
        batch: Any,
        meta: Any,
        wanted: tuple[Slot, ...],
        draws: dict[Slot, torch.Tensor],
        model_key: Any,
    ) -> Iterator[Captured]:
        """Yields what is known and fits, as far as can be told before it runs, then a new capture."""
        values = values_of_loss(state, batch, meta)
        key = (model_key, tree_form((state.params, state.buffers, batch, meta)), wanted)
        known = self._known.setdefault(key, [])
        yield from [captured for captured in known if captured.fits(values, draws)]
        known.append(self._capture(state, batch, meta, wanted, values, draws))
        if known[-1].fits(values, draws):
            yield known[-1]

    def _unsettled(self) -> CaptureError:
        return CaptureError(f"the branches of {self.losses.title} come out otherwise than when the step ran. {CURE}")

    @rare_collections()
    def _capture(
        self, state: TrainState, batch: Any, meta: Any, wanted: tuple[Slot, ...], values: Values, draws: Values
    ) -> Captured:
        losses = self.losses
        assert losses.loss_fn is not None
        refuse_complex(slot for slot in wanted if slot in values and values[slot].is_complex())
        params, buffers, batch, meta = representatives((state.params, state.buffers, batch, meta))
        title = f"joint gradient of {losses.title}"
        with outside_transforms(), torch.random.fork_rng():
            captured = capture_joint(losses.view, losses.loss_fn, params, buffers, batch, meta, wanted, title)
            given = representatives({**values, **_draws_of(captured.program, draws)})
            _check_symmetry(captured.program, given, wanted)
        return captured


def _draws_of(program: Program, draws: Values) -> dict[Slot, torch.Tensor]:
    """Returns the draws of the step, which the program is to see again."""
    missing = [str(slot) for slot in program.draws if slot not in draws]
    if missing:
        raise CaptureError(f"the loss drew {', '.join(missing)} only when it was captured again. {CURE}")
    return {slot: draws[slot] for slot in program.draws}


def _by_input(wanted: tuple[Slot, ...], results: Values) -> dict[Slot, torch.Tensor]:
    return {slot: results[gradient_slot(slot)] for slot in wanted if gradient_slot(slot) in results}


def _check_symmetry(program: Program, values: Values, wanted: tuple[Slot, ...]) -> None:
    """Refuses a gradient with a derivative that is not symmetric: v . H(Hv) is |Hv|^2 for symmetric H alone."""
    slots = [slot for slot in wanted if slot.role is Role.PARAM and gradient_slot(slot) in program.results]
    generator = torch.Generator().manual_seed(0)
    tolerance = min((_TOLERANCES.get(values[slot].dtype, 1.0) for slot in slots), default=1.0)
    first = {slot: _noise(values[slot], generator) for slot in slots}
    second = _by_input(tuple(slots), push_forward(program, values, first, CURE)[1])
    third = _by_input(tuple(slots), push_forward(program, values, second, CURE)[1])
    crossed, square = _dot(first, third), _dot(second, second)
    scale = (_dot(first, first) * _dot(third, third)) ** 0.5 + square
    if abs(crossed - square) > tolerance * scale:
        raise no_gradient_field("the inner gradient has a derivative that is not symmetric", None)


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return noise.to(like.device, like.dtype)


def _dot(left: Values, right: Values) -> float:
    return float(sum((left[slot].double() * right[slot].double()).sum() for slot in left))
