"""The captured variants of an optimizer's update, found by the form of the inputs and the guards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from gimli_compile.collecting import rare_collections
from gimli_compile.edges import edges_of, lift_edges
from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.findings import Baked
from gimli_compile.host_draws import generators_forked, host_states
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.owned_generators import DrawsUndone
from gimli_compile.row_gradients import Gradient, RowGradient, made_up_gradients
from gimli_compile.several_optimizers import kind_of
from gimli_compile.slot import Role, Slot
from gimli_compile.state import OptState, TrainState
from gimli_compile.surroundings import surroundings
from gimli_compile.transforms import is_differentiated, outside_transforms, representatives, representatives_apart
from gimli_compile.tree_slots import form, tree_form
from gimli_compile.update_capture import capture_update
from gimli_compile.update_values import StepData, UpdateInputs
from gimli_compile.validation import validate, warn_of_baked
from gimli_compile.variant import UpdateVariant

Capture = Callable[[Any, UpdateInputs, str], UpdateVariant]


class UpdateTable:
    """Runs updates; captures a variant where none holds."""

    def __init__(self, view: OptimizerView, title: str, capture: Capture = capture_update) -> None:
        self.view = view
        self.title = title
        self._capture_once = capture
        self._variants: dict[Any, list[UpdateVariant]] = {}

    @property
    def variants(self) -> list[UpdateVariant]:
        """All variants, in the order of capture."""
        return [variant for group in self._variants.values() for variant in group]

    def constants(self) -> list[torch.Tensor]:
        """Returns the tensors that the captured updates hold as constants."""
        return [tensor for variant in self.variants for tensor in variant.program.constants.values()]

    def held(self) -> list[torch.Tensor]:
        """Returns the tensors that anything captured here holds as constants, what decides about it included."""
        programs = [program for one in self.variants for program in (one.program, one.decide) if program is not None]
        return [tensor for program in programs for tensor in program.constants.values()]

    def example(self, state: TrainState, hyper: dict[str, torch.Tensor], trained: list[str]) -> None:
        """Captures the first and the second update, with made-up gradients."""
        generator = torch.Generator().manual_seed(0)
        params, opt_state = state.params, state.opt_state
        state, hyper = representatives((state, hyper))
        with outside_transforms(), generators_forked():
            for _ in range(2):
                grads = made_up_gradients(params, trained, generator, sparse=self.view.sparse)
                params, opt_state = self.run(UpdateInputs(params, grads, opt_state, hyper))

    def used_hyperparameters(self) -> set[str]:
        """Returns the paths of the hyperparameters that some captured variant uses."""
        used: set[str] = set()
        for variant in self.variants:
            for program in (variant.program, variant.decide):
                pairs = zip(program.inputs, program.placeholders, strict=True) if program is not None else ()
                used |= {slot.path for slot, node in pairs if slot.role is Role.HYPER and node.users}
        return used

    def run(self, inputs: UpdateInputs) -> tuple[dict[str, torch.Tensor], OptState]:
        """Returns the new parameters and the new state."""
        variant, results = self.run_variant(inputs)
        return assemble(inputs, variant, results)

    def run_variant(self, inputs: UpdateInputs, *, order: int = 2) -> tuple[UpdateVariant, dict[Slot, torch.Tensor]]:
        """Returns the variant that fits the inputs, and its results; `order` 1 takes inner gradients as constants."""
        values = inputs.by_slot()
        watched = frozenset(path for path, value in inputs.hyper.items() if is_differentiated(value))
        for variant in self._candidates(inputs, values, watched):
            program = variant.program if order == 2 else variant.first_order
            results = program({**values, **program.draw(inputs.draws)})
            if variant.held(results):
                variant.check_derivatives(values, order)
                return variant, results
        raise CaptureError(
            compose_message(
                f"the conditions on tensor values in `{kind_of(self.view.optimizer)}.step` do not settle",
                None,
                "A program captured from these very values computes other outcomes than the step itself, "
                "or tasks that run together have different ones.",
                "A comparison lies within rounding: perturb the inputs or use float64. With tasks: use `torch.where` "
                "in place of the branch, or unroll one task at a time.",
            )
        )

    def fitting(self, inputs: UpdateInputs) -> list[UpdateVariant]:
        """Returns the known variants that hold before the step; of the gradients, only the form matters."""
        values = inputs.by_slot()
        watched = frozenset(path for path, value in inputs.hyper.items() if is_differentiated(value))
        return [one for one in self._variants.get(self._key(inputs), ()) if one.holds(values, watched)]

    def _key(self, inputs: UpdateInputs) -> Any:
        return signature(inputs), self.view.environment.read()

    def _candidates(
        self, inputs: UpdateInputs, values: dict[Slot, torch.Tensor], watched: frozenset[str]
    ) -> Iterator[UpdateVariant]:
        """Yields the known variants that hold before the step, then one that is captured from these values."""
        group = self._variants.setdefault(self._key(inputs), [])
        rewound = host_states() if any(variant.draws_on_host for variant in group) else None
        for variant in list(group):
            if variant.holds(values, watched):
                yield variant
        with generators_forked(rewound), DrawsUndone(), self.view.environment.frozen():
            captured = self._capture(representatives_of(inputs), watched)
        group.append(captured)
        warn_of_baked(captured.baked)
        yield captured

    def _captured(self, inputs: UpdateInputs) -> UpdateVariant:
        variant = validate(self.view, inputs, self._capture_once(self.view, inputs, self.title))
        self.view.refuse_memory(inputs)
        return variant

    @rare_collections()
    def _capture(self, inputs: UpdateInputs, watched: frozenset[str]) -> UpdateVariant:
        _refuse_non_finite(inputs)
        with outside_transforms():
            variant = self._captured(inputs)
            edges = edges_of(variant, inputs)
            wanted = edges & watched
            if not wanted:
                return replace(variant, edges=edges)
            variant, lifted = lift_edges(self.view, inputs, variant, wanted, self._captured)
            lost = (_lost_at_edge(path, float(inputs.hyper[path].reshape(-1)[0])) for path in sorted(wanted - lifted))
            return replace(variant, edges=edges, relaxed=wanted, baked=(*variant.baked, *lost))


def _refuse_non_finite(inputs: UpdateInputs) -> None:
    """Refuses to capture from values on which nothing can be checked; a captured program takes any values."""
    for what, tensors in (("grads", inputs.grads), ("params", inputs.params)):
        for name, value in tensors.items():
            value = value.dense if isinstance(value, RowGradient) else value
            if value is not None and not _is_finite(value):
                raise CaptureError(
                    compose_message(
                        f"{what}[{name!r}] has NaN or infinite entries, and this update is yet to be captured",
                        None,
                        "A program captured from such values could not be checked against the optimizer's own step.",
                        "Start from finite values; if training diverged before, take a smaller learning rate.",
                    )
                )


def _is_finite(value: torch.Tensor) -> bool:
    """Tells whether all entries are finite: they are if their sum is, which takes less time and memory to find out."""
    return bool(torch.isfinite(value.sum())) or bool(torch.isfinite(value).all())


def _lost_at_edge(path: str, value: float) -> Baked:
    return Baked(
        f"hyper[{path}] is {value:g}, where the step takes a branch of its own: the program has the derivative of that "
        "branch. Start from a value beside it for that of the other.",
        None,
    )


def assemble(
    inputs: UpdateInputs, variant: UpdateVariant, results: dict[Slot, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], OptState]:
    """Returns the new parameters and the new state that a variant computed."""
    params = dict(inputs.params)
    state: dict[str, torch.Tensor] = {}
    for slot, value in results.items():
        if slot.role is Role.PARAM:
            params[slot.path] = value
        elif slot.role is Role.STATE:
            state[slot.path] = value
    return params, OptState(variant.skeleton, state)


def representatives_of(inputs: UpdateInputs) -> UpdateInputs:
    """Returns plain tensors in place of those that torch.func wrapped.

    They are one object where a variant is made for that (`signature`): a program reads one object as one input.
    """
    data = inputs.data
    grads, state, hyper = (representatives(dict(part)) for part in (inputs.grads, inputs.opt_state, inputs.hyper))
    params = representatives_apart(dict(inputs.params))
    if data is not None:
        buffers, batch, meta, held = representatives_apart((data.buffers, data.batch, data.meta, dict(data.grads)))
        data = StepData(buffers, batch, meta, data.form, held)
    return UpdateInputs(params, grads, OptState(inputs.opt_state.skeleton, state), hyper, data=data)


def signature(inputs: UpdateInputs) -> Any:
    """Returns what a variant is captured for: structures, forms, which tensors are one, what surrounds it."""
    state, hyper = inputs.opt_state.values_by_path, inputs.hyper
    return (
        inputs.opt_state.skeleton,
        tuple((name, form(value)) for name, value in inputs.params.items()),
        _gradient_forms(inputs.grads),
        tuple(map(form, state.values())),
        tuple(map(form, hyper.values())),
        partition([part for value in inputs.grads.values() for part in _parts(value)]),
        partition([*state.values()]),
        partition([*hyper.values()]),
        None if inputs.data is None else _data_form(inputs.data),
        surroundings(),
    )


def _data_form(data: StepData) -> Any:
    held = _gradient_forms(data.grads)
    return data.form, tuple(map(form, data.buffers.values())), tree_form((data.batch, data.meta)), held


def _gradient_forms(grads: Mapping[str, Gradient]) -> Any:
    return tuple((name, tuple(map(form, _parts(value)))) for name, value in grads.items())


def _parts(gradient: Gradient) -> tuple[torch.Tensor, ...]:
    if isinstance(gradient, RowGradient):
        return tuple(gradient)
    return () if gradient is None else (gradient,)


def partition(values: list[Any]) -> tuple[int, ...]:
    """Returns, for each value, the position of the first that is the same object."""
    first: dict[int, int] = {}
    return tuple(first.setdefault(id(value), index) for index, value in enumerate(values))
