"""The paper's requirements I to III (Gimli, section 2.4), decided on the captured programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gimli_compile.gradient_flow import Cut, Flow, FlowGraph, describe_cuts
from gimli_compile.program import Program
from gimli_compile.slot import Role, Slot
from gimli_compile.variant import UpdateVariant

_STATEMENTS = {
    "I": "L_val is differentiable in theta",
    "II": "opt is differentiable in theta, G and the state that follows from them",
    "III(a)": "opt is differentiable in hyperparameters",
    "III(b)": "G depends differentiably on meta-parameters of the loss, or on the initialization",
}
_NO_GRADIENT = "no loss was captured; pass `batch` (and `meta`), or call `fn.step` on a batch first"
_MOST_NAMES = 3


@dataclass(frozen=True)
class Verdict:
    """Whether one requirement holds, None where it cannot be told, and why."""

    holds: bool | None
    reasons: tuple[str, ...] = ()
    cuts: tuple[Cut, ...] = ()


@dataclass(frozen=True)
class Reach:
    """How one hyperparameter reaches the new parameters, or one meta-parameter the inner gradient."""

    flow: Flow
    note: str = ""

    @property
    def holds(self) -> bool:
        """Tells whether there is a differentiable path."""
        return self.flow.is_differentiable

    def __str__(self) -> str:
        return f"{self.flow}: {self.note}" if self.note else str(self.flow)


@dataclass(frozen=True)
class Captured:
    """What the requirements are decided on: the loss with its gradient, if there is one, and the updates.

    `trained` are parameters, `zeros` hyperparameters whose value is exactly zero.
    """

    title: str
    gradient: Program | None
    updates: Sequence[UpdateVariant]
    trained: Sequence[str]
    zeros: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Requirements:
    """The verdicts on the requirements, on each hyperparameter and on each meta-parameter; prints as a report.

    The inner loss stands in for L_val. A derivative that is zero wherever it exists, as that of `sign`, does not count
    as one: such operators are the cuts that the reasons name. `hyper` is by path, `meta` by path in the pytree,
    `initialization` is None where no loss was captured.
    """

    title: str
    I: Verdict  # noqa: E741 - the paper's numerals
    II: Verdict
    III_a: Verdict
    III_b: Verdict
    hyper: Mapping[str, Reach]
    meta: Mapping[str, Reach] = field(default_factory=dict)
    initialization: Reach | None = None

    @property
    def holds(self) -> bool | None:
        """Tells whether meta-learning is possible: I and II, and (a) or (b) of III; None where it cannot be told."""
        third = _either(self.III_a.holds, self.III_b.holds)
        parts = (self.I.holds, self.II.holds, third)
        return False if False in parts else None if None in parts else True

    def __str__(self) -> str:
        lines = [f"Requirements for meta-learning: {self.title}"]
        for name, verdict in (("I", self.I), ("II", self.II), ("III(a)", self.III_a), ("III(b)", self.III_b)):
            lines.append(f"{name:<7} {_ANSWERS[verdict.holds]:<15} {_STATEMENTS[name]}")
            lines += [f"        - {reason}" for reason in verdict.reasons]
        lines.append(f"{'all':<7} {_ANSWERS[self.holds]:<15} I, II, and III(a) or III(b)")
        lines += _section("Hyperparameters, to the new parameters", self.hyper)
        lines += _section("Meta-parameters of the loss, to the gradient", self.meta)
        if self.meta and self.initialization is not None:
            lines += _section("Initialization, to the gradient", {"theta_0": self.initialization})
        return "\n".join(lines)


_ANSWERS = {True: "holds", False: "does not hold", None: "undecided"}


def _section(title: str, entries: Mapping[str, Reach]) -> list[str]:
    width = max(map(len, entries), default=0)
    return [f"{title}:", *(f"  {name:<{width}}  {reach}" for name, reach in entries.items())] if entries else []


def _either(first: bool | None, second: bool | None) -> bool | None:
    return True if True in (first, second) else None if None in (first, second) else False


# ---------------------------------------------------------------------- deciding


def decide_requirements(captured: Captured, hyper: Iterable[str], wanted: Sequence[str] = ()) -> Requirements:
    """Decides the requirements on what was captured.

    Args:
        captured: the programs.
        hyper: the paths of the hyperparameters to report on.
        wanted: those that are to be learned: III(a) holds if all of them are differentiable, or, if none are named, if
            any hyperparameter is.
    """
    updates = FlowGraph(_names(captured.updates))
    reaches = _reach_of_hyper(updates, captured, hyper)
    second, third_a = _decide_update(updates), _decide_hyper(reaches, wanted)
    if captured.gradient is None:
        unknown = Verdict(None, (_NO_GRADIENT,))
        return Requirements(captured.title, unknown, second, third_a, unknown, reaches)
    loss = FlowGraph({"grad": captured.gradient})
    grads = loss.results(Role.GRAD)
    meta = {slot.path or "meta": Reach(flow) for slot, flow in loss.flows(loss.inputs(Role.META), grads).items()}
    initialization = _reach_of_initialization(loss, captured.trained, grads)
    first = _decide_loss(loss, captured.trained)
    third_b = _decide_meta(loss, meta, initialization)
    return Requirements(captured.title, first, second, third_a, third_b, reaches, meta, initialization)


def _names(updates: Sequence[UpdateVariant]) -> dict[str, Program]:
    if len(updates) == 1:
        return {"update": updates[0].program}
    return {f"update {i + 1} of {len(updates)}": variant.program for i, variant in enumerate(updates)}


def _decide_loss(loss: FlowGraph, trained: Sequence[str]) -> Verdict:
    inputs = [Slot(Role.PARAM, name) for name in trained]
    flows = loss.flows(inputs, [Slot(Role.LOSS)])
    unused = [slot for slot, flow in flows.items() if not flow.is_differentiable and not flow.is_cut]
    reasons = _broken(flows, "the loss")
    if unused:
        reasons.append(f"{_listed(unused)}: not used by the loss")
    cuts = loss.cuts(inputs, [Slot(Role.LOSS)])
    return _verdict(flows, reasons, cuts)


def _decide_update(updates: FlowGraph) -> Verdict:
    inputs = updates.inputs(Role.PARAM, Role.GRAD)
    past = updates.reached(inputs)
    inputs += [slot for slot in updates.inputs(Role.STATE) if slot in past]
    flows = updates.flows(inputs, updates.results(Role.PARAM))
    reasons = _broken(flows, "the new parameters")
    if updates.inputs(Role.NOISE):
        reasons.append("random draws are inputs of the program, so that it is differentiable by reparameterization")
    return _verdict(flows, reasons, updates.cuts(inputs, updates.results(Role.PARAM)))


def _verdict(flows: Mapping[Slot, Flow], reasons: list[str], cuts: tuple[Cut, ...]) -> Verdict:
    """Holds if no input is cut off and any gets through; cuts of some paths only are mentioned."""
    holds = any(flow.is_differentiable for flow in flows.values()) and not any(flow.is_cut for flow in flows.values())
    notable = [cut for cut in cuts if cut.is_notable]
    if holds and notable:
        reasons.append(f"along some of the paths there is no gradient: {describe_cuts(notable)}")
    return Verdict(holds, tuple(reasons), cuts)


def _broken(flows: Mapping[Slot, Flow], target: str) -> list[str]:
    """Returns a sentence for each set of cuts that keeps inputs from the target, with these inputs."""
    found: dict[Any, list[Slot]] = {}
    for slot, flow in flows.items():
        if flow.is_cut:
            found.setdefault(frozenset((cut.operator, cut.source) for cut in flow.cuts), []).append(slot)
    texts = []
    for slots in found.values():
        cuts = dict.fromkeys(cut for slot in slots for cut in flows[slot].cuts)
        texts.append(f"{_listed(slots)}: to {target} only through a cut: {describe_cuts(cuts)}")
    return texts


def _listed(slots: Sequence[Slot]) -> str:
    names = ", ".join(map(str, slots[:_MOST_NAMES]))
    return f"{names} and {len(slots) - _MOST_NAMES} more" if len(slots) > _MOST_NAMES else names


# ---------------------------------------------------------------------- hyperparameters and meta-parameters


def _reach_of_hyper(updates: FlowGraph, captured: Captured, paths: Iterable[str]) -> dict[str, Reach]:
    flows = updates.flows([Slot(Role.HYPER, path) for path in paths], updates.results(Role.PARAM))
    return {
        slot.path: Reach(flow, "" if flow.is_differentiable or flow.is_cut else _why_absent(slot, captured))
        for slot, flow in flows.items()
    }


def _why_absent(slot: Slot, captured: Captured) -> str:
    """Says why no value of a program depends on a hyperparameter: it is baked, it decides a branch, or it is unused."""
    for variant in captured.updates:
        for entry in variant.baked:
            if str(slot) in entry.what:
                return f"baked: {' at '.join(part.strip() for part in str(entry).splitlines())}"
    for variant in captured.updates:
        if slot in variant.pins:
            return f"baked: the program is that of {variant.pins[slot]:g}"
    branches = [str(c) for variant in captured.updates for c in variant.before if slot.name in c.text]
    if branches and slot.path in captured.zeros:
        return "at 0 the step leaves it out; pass `hyper` with this entry requiring a gradient to keep it in"
    return f"it only decides a branch: {branches[0]}" if branches else "unused"


def _decide_hyper(reaches: Mapping[str, Reach], wanted: Sequence[str]) -> Verdict:
    if wanted:
        missing = tuple(f"hyper[{path}]: {reaches[path]}" for path in wanted if not reaches[path].holds)
        return Verdict(not missing, missing, _cuts_of(reaches[path] for path in wanted))
    found = [path for path, reach in reaches.items() if reach.holds]
    reasons = [f"differentiable in {', '.join(found)}" if found else "differentiable in no hyperparameter"]
    reasons += _broken({Slot(Role.HYPER, path): reach.flow for path, reach in reaches.items()}, "the new parameters")
    return Verdict(bool(found), tuple(reasons), _cuts_of(reaches.values()))


def _cuts_of(reaches: Iterable[Reach]) -> tuple[Cut, ...]:
    return tuple(dict.fromkeys(cut for reach in reaches for cut in reach.flow.cuts))


def _reach_of_initialization(loss: FlowGraph, trained: Sequence[str], grads: Sequence[Slot]) -> Reach:
    inputs = [Slot(Role.PARAM, name) for name in trained]
    flows = loss.flows(inputs, grads)
    best = min((flow.path for flow in flows.values() if flow.path is not None), key=len, default=None)
    if best is not None:
        return Reach(Flow(best))
    flow = Flow(None, loss.cuts(inputs, grads))
    linear = "the loss is piecewise linear" if flow.is_cut else "the gradient does not depend on the parameters"
    return Reach(flow, f"{linear}; its second derivative in theta is zero, and MAML equals its first-order form")


def _decide_meta(loss: FlowGraph, meta: Mapping[str, Reach], initialization: Reach) -> Verdict:
    if not meta:
        text = f"initialization: {initialization}"
        return Verdict(initialization.holds, (text,), initialization.flow.cuts)
    reasons = [f"meta[{path}]: {reach}" for path, reach in meta.items() if not reach.holds]
    holds = not reasons
    grads = loss.results(Role.GRAD)
    cuts = [cut for cut in loss.cuts(loss.inputs(Role.META), grads) if cut.is_notable]
    if holds and cuts:
        reasons.append(f"along some of the paths there is no gradient: {describe_cuts(cuts)}")
    return Verdict(holds, tuple(reasons), _cuts_of(meta.values()))
