"""Captures one step of an optimizer as a program."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from gimli_compile.aliases import memory_followed
from gimli_compile.concolic import Number, make_number
from gimli_compile.condition_text import expression
from gimli_compile.disguise import Traced, differs_in_disguise, pin_counters
from gimli_compile.escapes import escapes_closed, modules_of
from gimli_compile.host_draws import generators_forked
from gimli_compile.interception import Interception
from gimli_compile.lazy_copies import lazy_copy
from gimli_compile.literals import literals_marked
from gimli_compile.lookups import answering
from gimli_compile.metadata import storage_of
from gimli_compile.optimizer_view import OptimizerView, as_declared, as_leaf, plain_value
from gimli_compile.owned_generators import draws_refused
from gimli_compile.pipeline import UPDATE_PASSES, lower
from gimli_compile.program import Pass, Program
from gimli_compile.provenance import SourceLine
from gimli_compile.recording import COUNTED, DATA, EACH, HOST, Recorder
from gimli_compile.records import opened
from gimli_compile.row_gradients import Gradient, Roles, RowGradient
from gimli_compile.searches import find_search
from gimli_compile.skeleton import Leaf, leaves_of
from gimli_compile.slot import CARRIED, CROSSING, HELD, Role, Slot
from gimli_compile.tree_slots import Returned
from gimli_compile.update_values import UpdateInputs, UpdateOutputs
from gimli_compile.variant import Condition, UpdateVariant, split_guards


def capture_update(view: OptimizerView, inputs: UpdateInputs, title: str) -> UpdateVariant:
    """Runs the optimizer's step once, from copies of `inputs`, and returns what it did as a program."""
    return capture("update", lambda recorder: UpdateTracing(view, inputs, recorder), UPDATE_PASSES, title)


def capture(
    name: str, begin: Callable[[Recorder], UpdateTracing], passes: tuple[Pass, ...], title: str
) -> UpdateVariant:
    """Runs what is traced, and lowers its program; `begin` makes a tracing, once more if the step counts."""
    recorder = Recorder(name)
    tracing = begin(recorder)
    traced = _trace(tracing, title)
    program = lower(traced.program, passes)
    known = {slot for slot, _ in traced.conditions}
    selected = [(slot, True) for slot in program.results if slot.role is Role.GUARD and slot not in known]
    variant = _finish(program, [*traced.conditions, *selected], traced.outputs, tracing)
    if not recorder.counted:
        return variant

    def trace_again() -> Traced:
        return _trace(begin(Recorder(name, disguised=True)), title)

    return pin_counters(variant, tracing.inputs) if differs_in_disguise(traced, trace_again) else variant


def _trace(tracing: UpdateTracing, title: str) -> Traced:
    checks = torch.sparse.check_sparse_tensor_invariants(enable=False)  # they read values
    with torch.backends.cudnn.flags(enabled=False), generators_forked(), checks:
        outputs = tracing.run()
    return Traced(outputs, *tracing.program(outputs, title))


class UpdateTracing:
    """One step of an optimizer, run on copies of tensors that are the inputs of a program."""

    returned: Returned | None = None

    def __init__(self, view: OptimizerView, inputs: UpdateInputs, recorder: Recorder) -> None:
        self.view = view
        self.inputs = inputs
        self.recorder = recorder
        self.first: dict[int, tuple[Slot, torch.Tensor]] = {}
        self._memory: set[Any] = set()
        self.params: dict[str, torch.Tensor] = {}
        self.grads: dict[str, torch.Tensor | None] = {}
        self.values: dict[str, Any] = {}

    def run(self) -> UpdateOutputs:
        """Runs the step, recorded."""
        skeleton = self.inputs.opt_state.skeleton
        with self.recorder, torch.no_grad():
            self._announce()
        functions = self.view.functions()
        modules = modules_of(self.view.classes(), functions)

        def execute() -> None:
            refused, escapes = draws_refused(self.recorder, skeleton), escapes_closed(self.recorder, modules)
            followed = memory_followed(self.recorder)
            with (
                refused,
                literals_marked(modules, functions),
                escapes,
                followed,
                self.recorder,
                Interception(self.recorder),
            ):
                self.view.step()

        return self.view.run(skeleton, self.params, self.grads, self.values, execute, adapt=answering)

    # ------------------------------------------------------------------ inputs

    def _announce(self) -> None:
        requires = {name: p.requires_grad for p, name in self.view.live_params()}
        for name, flag in requires.items():
            with self.recorder.paused():
                traced = as_leaf(self.inputs.params[name], requires_grad=flag, copy=lazy_copy)
            self.recorder.add_input(Slot(Role.PARAM, name), traced, DATA)
            self.params[name] = traced
        for name in requires:
            self.grads[name] = self._add_gradient(name, self.inputs.grads.get(name), CROSSING)
        self._announce_state()

    def _announce_state(self) -> None:
        for leaf in leaves_of(self.inputs.opt_state.skeleton):
            self.values[leaf.path] = self._add_leaf(leaf)

    def _add_gradient(self, name: str, grad: Gradient, roles: Roles) -> torch.Tensor | None:
        if isinstance(grad, RowGradient):
            dense, rows = (self._add(Slot(role, name), part, DATA) for role, part in zip(roles, grad, strict=True))
            return self.recorder.sparse.make(dense, rows)
        return None if grad is None else self._add(Slot(roles[0], name), grad, DATA)

    def _add(self, slot: Slot, value: torch.Tensor, reach: int) -> torch.Tensor:
        """Announces an input; a tensor object seen before is not announced twice, since its gradient is one."""
        known = self.first.get(id(value))
        if known is not None and known[0].role is slot.role:
            return known[1].clone()
        with self.recorder.paused():
            traced = value.detach()
            if storage_of(value) in self._memory:  # what a value depends on is known by its memory
                traced = traced.clone()
        self._memory.add(storage_of(traced))
        self.recorder.add_input(slot, traced, reach)
        self.first[id(value)] = (slot, traced)
        return traced.clone()  # the code that is traced gets a copy; the values themselves are only read

    def _add_leaf(self, leaf: Leaf) -> Any:
        value = self.inputs.value_of(leaf)
        slot = Slot(self.inputs.role_of(leaf), leaf.path)
        reach = HOST if value.dim() == 0 or slot.role is Role.HYPER else DATA
        reach |= COUNTED if slot.role is Role.STATE and reach is HOST else 0
        reach |= EACH if value.dim() and leaf.kind != "tensor" else 0
        traced = self._add(slot, value, reach)
        if leaf.kind == "tensor":
            return self._declared(leaf, traced)
        form = traced if traced.dtype == torch.float64 else traced.to(torch.float64)
        with self.recorder.paused():
            number = plain_value(value, leaf.kind)
        return make_number(number, form, self.recorder)

    def _declared(self, leaf: Leaf, traced: torch.Tensor) -> torch.Tensor:
        with self.recorder.paused():
            made = as_declared(leaf, traced)
        if made is not traced:
            self.recorder.add_stand_in(made, traced)
        return made

    # ------------------------------------------------------------------ results

    def program(self, outputs: UpdateOutputs, title: str) -> tuple[Program, list[tuple[Slot, bool]]]:
        """Returns what was recorded, and the guards with their outcomes."""
        recorder = self.recorder
        with recorder, torch.no_grad():
            results = self.results(outputs)
        conditions = []
        for guard in recorder.guards:
            slot = Slot(Role.GUARD, str(len(conditions)))
            results[slot] = guard.node
            conditions.append((slot, guard.outcome))
        recorder.graph.output(tuple(results.values()))
        inputs = tuple(recorder.inputs)
        program = Program(
            title, recorder.name, recorder.graph, inputs, tuple(results), dict(recorder.constants), dict(recorder.draws)
        )
        return program, conditions

    def results(self, outputs: UpdateOutputs) -> dict[Slot, fx.Node]:
        """Returns the nodes of the results by slot."""
        results = {Slot(Role.PARAM, name): self.recorder.node_of(leaf) for name, leaf in outputs.params.items()}
        for leaf in leaves_of(outputs.skeleton):
            if not self._is_untouched(leaf, outputs.values[leaf.path]):
                results[Slot(Role.STATE, leaf.path)] = self._result_node(leaf, outputs.values[leaf.path])
        return results

    def _is_untouched(self, leaf: Leaf, value: Any) -> bool:
        """Tells whether a hyperparameter is what it was, so that it is no result."""
        if leaf.path in self.inputs.opt_state.values_by_path or leaf.path not in self.values:
            return False
        before = self.values[leaf.path]
        return value is before or (isinstance(value, Number) and value.tensor is before.tensor)

    def _result_node(self, leaf: Leaf, value: Any) -> fx.Node:
        if self.recorder.sparse.knows(value):
            value, _ = self.recorder.sparse.parts(value)
        if isinstance(value, torch.Tensor):
            if value.requires_grad and value.grad_fn is not None:
                value = value.detach()
            return self.recorder.node_of(value)
        if isinstance(value, Number):
            tensor = value.tensor
        else:
            tensor = torch.full((), float(value), dtype=torch.float64)
        if leaf.kind == "int":
            tensor = tensor.to(torch.int64)
        return self.recorder.node_of(tensor)


def returned_tensors(returned: Any) -> tuple[Returned, dict[Slot, torch.Tensor]]:
    """Returns the structure of what a train step returned, and its tensors by slot; floats become tensors."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Number):
            return leaf.tensor
        return torch.tensor(leaf, dtype=torch.float64) if isinstance(leaf, float) else leaf

    return Returned.of(pytree.tree_map(convert, opened(returned)), Role.LOSS)


def _finish(
    program: Program,
    conditions: list[tuple[Slot, bool]],
    outputs: UpdateOutputs,
    tracing: UpdateTracing,
) -> UpdateVariant:
    before: dict[Any, Condition] = {}
    after: dict[Any, Condition] = {}
    ancestry = ancestors(program)
    slot_of = dict(zip(program.placeholders, program.inputs, strict=True))
    drop: set[Slot] = set()
    returned = dict(zip(program.results, program.returned, strict=True))
    for slot, outcome in conditions:
        node = returned[slot]
        leaves = ancestry[node]
        found = after if any(_is_data(leaf, slot_of[leaf]) for leaf in leaves) else before
        if (not leaves and not node.meta.get("fixed")) or (node, outcome) in found:
            drop.add(slot)
            continue
        found[node, outcome] = Condition(slot, outcome, expression(node), node.meta.get("fixed", False))
    drop |= {slot for slot, node in returned.items() if node in slot_of and _is_same(program, slot, slot_of[node])}
    main, decide = split_guards(program, before.values(), drop)
    main = _titled(main)
    return UpdateVariant(
        main,
        outputs.skeleton,
        tuple(before.values()),
        tuple(after.values()),
        decide,
        _pins(main, decide, tracing.inputs),
        baked=(*tracing.recorder.baked, *find_search(program, conditions, _lines(tracing.recorder))),
        returned=tracing.returned,
    )


def _lines(recorder: Recorder) -> dict[Slot, SourceLine | None]:
    """Returns where each recorded guard was decided."""
    return {Slot(Role.GUARD, str(index)): guard.source for index, guard in enumerate(recorder.guards)}


def _titled(program: Program) -> Program:
    counts = {role: sum(slot.role is role for slot in program.inputs) for role in (Role.PARAM, Role.STATE, Role.HYPER)}
    text = f"{counts[Role.PARAM]} params, {counts[Role.STATE]} state tensors, {counts[Role.HYPER]} hyperparameters"
    return replace(program, title=f"{program.title}: {text}")


def _is_same(program: Program, slot: Slot, given: Slot) -> bool:
    """Tells whether a result is a hyperparameter, or a tensor of a frozen part of the model, that stayed as it was."""
    if slot.role not in CARRIED or slot.role in HELD:
        return False
    if slot.role is Role.STATE:
        return given == Slot(Role.HYPER, slot.path)
    return given == slot and program.name == "step"


def _is_data(node: fx.Node, slot: Slot) -> bool:
    if slot.role is Role.HYPER:
        return False
    return slot.role is not Role.STATE or node.meta["val"].dim() > 0


def ancestors(program: Program) -> dict[fx.Node, frozenset[fx.Node]]:
    """Returns, for each node, the inputs (constants excepted) that its value depends on."""
    constant = {program.node_of(slot) for slot in program.inputs if slot.role is Role.CONSTANT}
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            found[node] = frozenset() if node in constant else frozenset({node})
        else:
            found[node] = frozenset().union(*(found[argument] for argument in node.all_input_nodes))
    return found


def _pins(main: Program, decide: Program | None, inputs: UpdateInputs) -> dict[Slot, float]:
    """Pins whole-number hyperparameters that no node uses: they may have counted a loop or sized a tensor."""
    used = {slot for slot, node in zip(main.inputs, main.placeholders, strict=True) if node.users}
    used |= set(decide.inputs) if decide is not None else set()
    pins = {}
    for leaf in leaves_of(inputs.opt_state.skeleton):
        slot = Slot(inputs.role_of(leaf), leaf.path)
        value = inputs.value_of(leaf)
        if leaf.kind == "int" and slot.role is Role.HYPER and slot not in used and value.dim() == 0:
            number = plain_value(value, "int")
            if isinstance(number, int):
                pins[slot] = float(number)
    return pins
