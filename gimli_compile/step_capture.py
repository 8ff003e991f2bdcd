"""Captures a whole train step as one program: loss, backward passes and the optimizer's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from gimli_compile.aliases import memory_followed
from gimli_compile.custom_functions import custom_functions_recorded
from gimli_compile.escapes import escapes_closed, modules_of, modules_of_functions
from gimli_compile.inner_backward import backward_recorded
from gimli_compile.interception import Interception
from gimli_compile.literals import literals_marked
from gimli_compile.lookups import answering
from gimli_compile.loss_capture import refuse_grown, warn_of_changes
from gimli_compile.metadata import storage_of
from gimli_compile.model_view import changed_attributes
from gimli_compile.owned_generators import draws_refused
from gimli_compile.pipeline import STEP_PASSES
from gimli_compile.recording import DATA, HOST, Recorder
from gimli_compile.row_gradients import RowGradient
from gimli_compile.row_gradients import by_slot as gradients_by_slot
from gimli_compile.slot import HELD, Role, Slot
from gimli_compile.step_view import StepView
from gimli_compile.train_steps import UserStep
from gimli_compile.tree_slots import reach_of, tree_slots
from gimli_compile.update_capture import UpdateTracing, capture, returned_tensors
from gimli_compile.update_values import StepData, UpdateInputs, UpdateOutputs
from gimli_compile.variant import UpdateVariant


def capture_step(view: StepView, inputs: UpdateInputs, title: str) -> UpdateVariant:
    """Runs the train step once, from copies of `inputs`, and returns what it did as a program."""
    return capture("step", lambda recorder: _StepTracing(view, inputs, recorder), STEP_PASSES, title)


class _StepTracing(UpdateTracing):
    view: StepView

    def __init__(self, view: StepView, inputs: UpdateInputs, recorder: Recorder) -> None:
        super().__init__(view, inputs, recorder)
        assert inputs.data is not None
        self.data: StepData = inputs.data
        self.buffers: dict[str, torch.Tensor] = {}
        model = view.model
        recorder.guards_branches = model.guards_branches
        recorder.live = {storage_of(tensor): name for name, tensor in (model.live_params | model.live_buffers).items()}

    def run(self) -> UpdateOutputs:
        recorder, view = self.recorder, self.view
        with recorder, torch.no_grad():
            self._announce()
        functions = view.functions()
        optimizer = modules_of(view.classes(), functions)
        model = modules_of(type(module) for module in view.model.modules())
        own = modules_of_functions([view.train_step.function]) if isinstance(view.train_step, UserStep) else []
        before, skeleton = view.model.signature(), self.inputs.opt_state.skeleton

        def execute() -> Any:
            with (
                draws_refused(self.recorder, skeleton),
                literals_marked(dict.fromkeys([*optimizer, *own]), functions),
                custom_functions_recorded(recorder),
                backward_recorded(recorder),
                escapes_closed(recorder, dict.fromkeys([*optimizer, *model, *own])),
                memory_followed(recorder),
                recorder,
                Interception(recorder),
            ):
                returned = view.call({**self.params, **self.buffers}, self.batch, self.meta, recorder.in_region)
            refuse_grown(view.model, recorder, {**self.params, **self.buffers})
            warn_of_changes(changed_attributes(before, view.model.signature()))
            return returned

        return view.run_step(skeleton, self.params, self.buffers, self.values, self.grads, execute, adapt=answering)

    def _announce(self) -> None:
        with self.recorder.paused():
            leaves = self.view.leaves(self.inputs.params)
        for name, leaf in leaves.items():
            self.recorder.add_input(Slot(Role.PARAM, name), leaf, DATA)
            self.params[name] = leaf
        for name, value in self.data.buffers.items():
            self.buffers[name] = self._add(Slot(Role.BUFFER, name), value, reach_of(value) if value.dim() else HOST)
        self.batch = self._add_tree(Role.BATCH, self.data.batch)
        self.meta = self._add_tree(Role.META, self.data.meta)
        self.grads = {name: self._add_gradient(name, grad, HELD) for name, grad in self.data.grads.items()}
        self._announce_state()

    def _add_tree(self, role: Role, tree: Any) -> Any:
        traced = iter([self._add(slot, value, reach_of(value)) for slot, value in tree_slots(role, tree).items()])
        return pytree.tree_map(lambda leaf: next(traced) if isinstance(leaf, torch.Tensor) else leaf, tree)

    def results(self, outputs: UpdateOutputs) -> dict[Slot, fx.Node]:
        results = super().results(outputs)
        nodes = {name: self.recorder.node_of(buffer) for name, buffer in outputs.buffers.items()}
        results.update({Slot(Role.BUFFER, name): node for name, node in nodes.items() if name in self.buffers})
        for name, grad in outputs.grads.items():
            results.update({slot: self.recorder.node_of(part) for slot, part in self._held(name, grad).items()})
        self.returned, tensors = returned_tensors(outputs.returned)
        return {slot: self.recorder.node_of(tensor) for slot, tensor in tensors.items()} | results

    def _held(self, name: str, grad: torch.Tensor) -> dict[Slot, torch.Tensor]:
        known = self.recorder.sparse.knows(grad)
        held = RowGradient(*self.recorder.sparse.parts(grad)) if known else grad.detach()
        return gradients_by_slot({name: held}, HELD)
