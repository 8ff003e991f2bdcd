"""A model, an optimizer and the train step that runs both, seen from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gimli_compile.differentiable_forms import differentiable_forms
from gimli_compile.kept_attributes import kept_among, read_kept
from gimli_compile.live_gradients import live_gradients_kept
from gimli_compile.model_view import ModelView
from gimli_compile.optimizer_view import OptimizerView, as_declared, flags_cleared, plain_values
from gimli_compile.outside import outside_kept
from gimli_compile.owned_generators import generators_kept
from gimli_compile.records import rebuilt
from gimli_compile.row_gradients import as_eager
from gimli_compile.several_optimizers import as_given, members
from gimli_compile.side_effects import Change, SideEffects, places_of_modules, side_effects_undone
from gimli_compile.skeleton import Skeleton, owners_of
from gimli_compile.snapshot import freeze, grads_set, installed
from gimli_compile.state import Tensors
from gimli_compile.step_memory import refuse_memory
from gimli_compile.train_steps import DefaultStep, Enter, UserStep
from gimli_compile.update_values import UpdateInputs, UpdateOutputs


class StepView(OptimizerView):
    """An optimizer together with the model and the train step that calls its `step`."""

    def __init__(self, view: OptimizerView, model: ModelView, train_step: DefaultStep | UserStep) -> None:
        self.__dict__.update(vars(view))
        self.model = model
        self.train_step = train_step
        self.leaves_something = False

    @property
    def holds_gradients(self) -> bool:
        """Tells whether gradients that one step leaves in `.grad` may be read by the next: a user's own decides it."""
        return isinstance(self.train_step, UserStep)

    def leaves(self, params: Mapping[str, torch.Tensor]) -> Tensors:
        """Returns leaves with copies of the parameters, which carry the live ones' hooks."""
        return {name: self.model.as_leaf(name, value) for name, value in params.items()}

    def run_step(
        self,
        skeleton: Skeleton,
        leaves: Mapping[str, torch.Tensor],
        buffers: Tensors,
        values: Mapping[str, Any],
        grads: Mapping[str, torch.Tensor | None],
        execute: Callable[[], Any],
        left: Sequence[Change] = (),
        stands_for: Mapping[int, torch.Tensor] | None = None,
        **options: Any,
    ) -> UpdateOutputs:
        """Runs `execute` with model and optimizer holding these values; live objects come back unchanged.

        `left` is what another run changed and this one finds, with other tensors in place of some; `options` are those
        of `installed`.
        """
        names = {id(leaf): name for name, leaf in leaves.items()}
        tensors = {**leaves, **buffers}
        with (
            live_gradients_kept(self.model.live_params.values()),
            generators_kept(skeleton),
            self.model.substituted(tensors),
            installed(skeleton, lambda leaf: as_declared(leaf, values[leaf.path]), leaves.__getitem__, **options),
            grads_set(leaves, grads),
            self._outside_kept(skeleton, tensors) as effects,
            differentiable_forms(),
        ):
            for kept in kept_among(self.companions):
                kept.write()
            for change in left:
                change.redo(stands_for or {})
            with flags_cleared(self.optimizer):
                returned = self.execute(execute)
            held = {name: leaf.grad for name, leaf in leaves.items() if self.holds_gradients and leaf.grad is not None}
            made = self.model.read_buffers()
            read_kept(self.companions)
            after, found = freeze(self.optimizer, names, self.opaque, self.companions)
        self.leaves_something |= any(change.counts or change.place.is_module for change in effects.changes)
        return UpdateOutputs(dict(leaves), after, found, made, returned, held, effects.changes)

    def _outside_kept(
        self, skeleton: Skeleton, tensors: Mapping[str, torch.Tensor]
    ) -> AbstractContextManager[SideEffects]:
        modules = list(self.model.modules())
        kept = {key: names for one in kept_among(self.companions) for key, names in one.by_module().items()}
        places = places_of_modules(modules, kept, set(map(id, tensors.values())))
        if not isinstance(self.train_step, UserStep):
            return side_effects_undone(places)
        lists = [one.param_groups for one in members(self.optimizer)]
        groups = self.optimizer.param_groups
        owned = (*owners_of(self.skeleton), *owners_of(skeleton), as_given(self.optimizer))
        known = {id(owner) for owner in (*owned, *lists, *groups, *modules)}
        return outside_kept(self.train_step.function, known, modules, places)

    def refuse_memory(self, inputs: UpdateInputs) -> None:
        """Refuses a step that reads what the step before left outside of the state."""
        if self.leaves_something:
            refuse_memory(self, inputs)

    def call(
        self, tensors: Mapping[str, torch.Tensor], batch: Any, meta: Any, enter: Enter = lambda _: nullcontext()
    ) -> Any:
        """Runs the train step on what model and optimizer hold now; `tensors` are parameters and buffers by name."""
        model = self.model.filled(tensors)
        with torch.enable_grad(), self.train_step.watching(self.model.modules(), enter):
            return self.train_step(model, self.optimizer, rebuilt(batch), rebuilt(meta), enter)

    def replay(
        self, inputs: UpdateInputs, left: Sequence[Change] = (), before: UpdateOutputs | None = None
    ) -> UpdateOutputs:
        """Runs the train step's own code, not captured, from plain values, and with what the step before left."""
        assert inputs.data is not None
        data = inputs.data
        buffers = {name: value.detach().clone() for name, value in data.buffers.items()}
        leaves = self.leaves(inputs.params)
        return self.run_step(
            inputs.opt_state.skeleton,
            leaves,
            buffers,
            plain_values(inputs),
            {name: as_eager(grad) for name, grad in data.grads.items()},
            lambda: self.call({**leaves, **buffers}, data.batch, data.meta),
            left,
            {} if before is None else _standing_for({**before.params, **before.buffers}, {**leaves, **buffers}),
        )


def _standing_for(before: Mapping[str, torch.Tensor], now: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
    return {id(value): now[name] for name, value in before.items() if name in now}
