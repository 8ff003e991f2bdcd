"""Captures one step of an optimizer as a program."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from gimli_compile.concolic import Number, make_number
from gimli_compile.condition_text import expression
from gimli_compile.disguise import Randomness, Traced, differs_in_disguise, pin_counters
from gimli_compile.escapes import escapes_closed, modules_of
from gimli_compile.interception import Interception
from gimli_compile.literals import literals_marked
from gimli_compile.lookups import answering
from gimli_compile.optimizer_view import OptimizerView, UpdateInputs, UpdateOutputs, as_leaf, plain_value
from gimli_compile.passes.liveness import drop_unused_inputs, restrict_results
from gimli_compile.pipeline import UPDATE_PASSES, lower
from gimli_compile.program import Program
from gimli_compile.recording import COUNTED, DATA, HOST, Recorder
from gimli_compile.slot import Role, Slot
from gimli_compile.snapshot import Leaf, leaves_of
from gimli_compile.variant import Condition, UpdateVariant, split_guards


def capture_update(view: OptimizerView, inputs: UpdateInputs, title: str) -> UpdateVariant:
    """Runs the optimizer's step once, from copies of `inputs`, and returns what it did as a program."""
    before = Randomness.now()
    recorder = Recorder("update")
    traced = _trace(view, inputs, recorder, title)
    outputs, raw, conditions = traced
    program = lower(raw, UPDATE_PASSES)
    variant = _finish(program, conditions, outputs, recorder, inputs)
    if not recorder.counted:
        return variant

    def trace_again() -> Traced:
        return _trace(view, inputs, Recorder("update", disguised=True), title)

    return pin_counters(variant, inputs) if differs_in_disguise(traced, trace_again, before) else variant


def _trace(view: OptimizerView, inputs: UpdateInputs, recorder: Recorder, title: str) -> Traced:
    tracing = _Tracing(view, inputs, recorder)
    with torch.backends.cudnn.flags(enabled=False):
        outputs = tracing.run()
    return Traced(outputs, *tracing.program(outputs, title))


class _Tracing:
    def __init__(self, view: OptimizerView, inputs: UpdateInputs, recorder: Recorder) -> None:
        self.view = view
        self.inputs = inputs
        self.recorder = recorder
        self.first: dict[int, tuple[Slot, torch.Tensor]] = {}
        self.params: dict[str, torch.nn.Parameter] = {}
        self.grads: dict[str, torch.Tensor | None] = {}
        self.values: dict[str, Any] = {}

    def run(self) -> UpdateOutputs:
        skeleton = self.inputs.opt_state.skeleton
        with self.recorder, torch.no_grad():
            self._announce()
        functions = self.view.functions()
        modules = modules_of(self.view.classes(), functions)

        def execute() -> None:
            escapes = escapes_closed(self.recorder, modules)
            with literals_marked(modules, functions), escapes, self.recorder, Interception(self.recorder):
                self.view.step()

        return self.view.run(skeleton, self.params, self.grads, self.values, execute, adapt=answering)

    # ------------------------------------------------------------------ inputs

    def _announce(self) -> None:
        requires = {name: p.requires_grad for p, name in self.view.live_params()}
        for name, flag in requires.items():
            with self.recorder.paused():
                traced = as_leaf(self.inputs.params[name], requires_grad=flag)
            self.recorder.add_input(Slot(Role.PARAM, name), traced, DATA)
            self.params[name] = traced
        for name in requires:
            grad = self.inputs.grads.get(name)
            self.grads[name] = None if grad is None else self._add(Slot(Role.GRAD, name), grad, DATA)
        for leaf in leaves_of(self.inputs.opt_state.skeleton):
            self.values[leaf.path] = self._add_leaf(leaf)

    def _add(self, slot: Slot, value: torch.Tensor, reach: int) -> torch.Tensor:
        """Announces an input; a tensor object seen before is not announced twice, since its gradient is one."""
        known = self.first.get(id(value))
        if known is not None and known[0].role is slot.role:
            return known[1].clone()
        with self.recorder.paused():
            traced = value.detach().clone()
        self.recorder.add_input(slot, traced, reach)
        self.first[id(value)] = (slot, traced)
        return traced.clone()

    def _add_leaf(self, leaf: Leaf) -> Any:
        value = self.inputs.value_of(leaf)
        slot = Slot(self.inputs.role_of(leaf), leaf.path)
        reach = HOST if value.dim() == 0 or slot.role is Role.HYPER else DATA
        traced = self._add(slot, value, reach | COUNTED if slot.role is Role.STATE and reach is HOST else reach)
        if leaf.kind == "tensor":
            return traced
        form = traced if traced.dtype == torch.float64 else traced.to(torch.float64)
        return make_number(plain_value(value, leaf.kind), form, self.recorder)

    # ------------------------------------------------------------------ results

    def program(self, outputs: UpdateOutputs, title: str) -> tuple[Program, list[tuple[Slot, bool]]]:
        recorder = self.recorder
        results: dict[Slot, fx.Node] = {}
        with recorder, torch.no_grad():
            for name, leaf in outputs.params.items():
                results[Slot(Role.PARAM, name)] = recorder.node_of(leaf)
            for leaf in leaves_of(outputs.skeleton):
                if not self._is_untouched(leaf, outputs.values[leaf.path]):
                    results[Slot(Role.STATE, leaf.path)] = self._result_node(leaf, outputs.values[leaf.path])
        conditions = []
        for guard in recorder.guards:
            slot = Slot(Role.GUARD, str(len(conditions)))
            results[slot] = guard.node
            conditions.append((slot, guard.outcome))
        recorder.graph.output(tuple(results.values()))
        inputs = tuple(recorder.inputs)
        program = Program(
            title, "update", recorder.graph, inputs, tuple(results), dict(recorder.constants), dict(recorder.draws)
        )
        return program, conditions

    def _is_untouched(self, leaf: Leaf, value: Any) -> bool:
        """Tells whether a hyperparameter is what it was, so that it is no result."""
        if leaf.path in self.inputs.opt_state.values_by_path or leaf.path not in self.values:
            return False
        before = self.values[leaf.path]
        return value is before or (isinstance(value, Number) and value.tensor is before.tensor)

    def _result_node(self, leaf: Leaf, value: Any) -> fx.Node:
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


def _finish(
    program: Program,
    conditions: list[tuple[Slot, bool]],
    outputs: UpdateOutputs,
    recorder: Recorder,
    inputs: UpdateInputs,
) -> UpdateVariant:
    before: dict[Any, Condition] = {}
    after: dict[Any, Condition] = {}
    ancestry = ancestors(program)
    slot_of = dict(zip(program.placeholders, program.inputs, strict=True))
    drop = set()
    for slot, outcome in conditions:
        node = program.result_of(slot)
        leaves = ancestry[node]
        found = after if any(_is_data(leaf, slot_of[leaf]) for leaf in leaves) else before
        if not leaves or (node, outcome) in found:
            drop.add(slot)
            continue
        found[node, outcome] = Condition(slot, outcome, expression(node))
    kept = [
        index for index, slot in enumerate(program.results) if slot not in drop and not _is_same_hyper(program, slot)
    ]
    main, decide = split_guards(restrict_results(program, kept), list(before.values()))
    main = _titled(drop_unused_inputs(main, roles=(Role.HYPER,)))
    pins = _pins(main, decide, inputs)
    return UpdateVariant(
        main, outputs.skeleton, tuple(before.values()), tuple(after.values()), decide, pins, baked=tuple(recorder.baked)
    )


def _titled(program: Program) -> Program:
    counts = {role: sum(slot.role is role for slot in program.inputs) for role in (Role.PARAM, Role.STATE, Role.HYPER)}
    text = f"{counts[Role.PARAM]} params, {counts[Role.STATE]} state tensors, {counts[Role.HYPER]} hyperparameters"
    return replace(program, title=f"{program.title}: {text}")


def _is_same_hyper(program: Program, slot: Slot) -> bool:
    """Tells whether a result is a hyperparameter tensor that the step left as it was."""
    node = program.result_of(slot) if slot.role is Role.STATE else None
    return node is not None and node.op == "placeholder" and Slot(Role.HYPER, slot.path) in program.inputs


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
