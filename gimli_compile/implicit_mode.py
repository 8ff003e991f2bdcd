"""The implicit way: the gradient at the fixed point that training ended at, whatever way led there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.checkpointing import distinct
from gimli_compile.errors import InputError, compose_message
from gimli_compile.linear_solvers import Vector, solve_by_conjugate_gradients, solve_by_neumann
from gimli_compile.loop_labels import Label, labels_of, settled_buffers, state_slots
from gimli_compile.loop_node import run_as_node
from gimli_compile.loop_steps import LoopSteps
from gimli_compile.records import opened
from gimli_compile.slot import Role, Slot
from gimli_compile.state import TrainState
from gimli_compile.tasks import Loop, TaskSteps

Tensor = torch.Tensor
RunLoop = Callable[[TrainState, Sequence[Any], Any, Any], tuple[TrainState, list[Any]]]  # to the losses of all steps
_SOLVERS = {"neumann": solve_by_neumann, "cg": solve_by_conjugate_gradients}


@dataclass(frozen=True)
class Implicit:
    """How `unroll(..., backward="implicit")` solves for its gradient.

    Attributes:
        solver: "neumann" for any step that contracts; "cg" (conjugate gradients, as iMAML) needs a symmetric one, such
            as gradient descent, and far fewer iterations.
        iterations: how many products with the derivative of one step are allowed.
        tolerance: when the solution is good enough, relative.
        residual: how far a further step may move the parameters, relative to their norm, for the state to count as a
            fixed point. The gradient is as wrong as the state is far from it.
    """

    solver: str = "neumann"
    iterations: int = 1000
    tolerance: float = 1e-8
    residual: float = 1e-4

    def __post_init__(self) -> None:
        if self.solver not in _SOLVERS:
            raise InputError(f"solver={self.solver!r} is not an option. Use one of {', '.join(map(repr, _SOLVERS))}.")


def unroll_implicit(
    steps: LoopSteps | TaskSteps, loop: Loop, implicit: Implicit, run: RunLoop | None = None
) -> tuple[TrainState, list[Any]]:
    """Runs a loop to the fixed point of its last step; its gradient is that of the fixed point.

    `run` gets there; by default, the steps do.
    """
    return run_as_node(ImplicitMode(steps, implicit, run), (loop.state, list(loop.batches), loop.hyper, loop.meta))


class ImplicitMode:
    """Differentiates z = step(z, phi): dz/dphi = (I - dstep/dz)^-1 dstep/dphi (iMAML; Bai et al. 2019, theorem 1).

    z are the trained parameters, and the tensors of the optimizer's state that are not single numbers. Numbers such as
    step counts, which never settle, and everything else that a step starts from are taken as they are at the end.
    """

    name = "implicit"

    def __init__(self, steps: LoopSteps | TaskSteps, implicit: Implicit, run: RunLoop | None = None) -> None:
        self.steps = steps
        self.implicit = implicit
        self._run = run or self._step_by_step

    def forward(self, inputs: Any, needed: Sequence[bool]) -> tuple[Any, Any, Any]:
        """Returns the last state with the losses; keeps that state and the draws of one more step."""
        state, batches, hyper, meta = inputs
        state, losses = self._run(state, batches, hyper, meta)
        draws: dict[Slot, Tensor] = {}
        if any(needed):
            after, _ = self.steps.step(state, batches[-1], hyper, meta, draws)
            self._check_rest(state, after)
        return (state, losses), (state, draws), settled_buffers(inputs, needed, state, self.steps.carried_buffers())

    def _step_by_step(
        self, state: TrainState, batches: Sequence[Any], hyper: Any, meta: Any
    ) -> tuple[TrainState, list[Any]]:
        losses = []
        for batch in batches:
            state, loss = self.steps.step(state, batch, hyper, meta, None)
            losses.append(opened(loss))
        return state, losses

    def _check_rest(self, state: TrainState, after: TrainState) -> None:
        moved = _norm([after.params[name] - value for name, value in state.params.items()])
        size = _norm(list(state.params.values()))
        if not moved <= self.implicit.residual * size:
            raise InputError(
                compose_message(
                    'backward="implicit" after a loop that has not converged',
                    None,
                    f"One more step with the last batch moves the parameters by {moved / max(size, 1e-300):.1e} of "
                    f"their norm, more than {self.implicit.residual:.1e}: there is no fixed point to differentiate.",
                    "Train longer, with the same batch in every step, or raise `Implicit(residual=...)` for an "
                    'approximation. `backward="reverse"` and `"mixed"` differentiate the steps themselves.',
                )
            )

    def backward(self, inputs: Any, kept: Any, grads: Any, needed: Sequence[bool]) -> list[Tensor | None]:
        """Solves for the adjoint of the fixed point and carries it back over one step."""
        of_state, of_losses = grads
        if any(grad is not None for grad in pytree.tree_leaves(of_losses)):
            raise InputError(
                'backward="implicit" differentiates the last state, not the losses on the way. Compute the outer loss '
                "from the state that `unroll` returns."
            )
        state, draws = kept
        at_rest = (state, inputs[1][-1:], *inputs[2:])
        pairs = zip(self._labels(inputs), needed, strict=True)
        step = _FixedStep(self.steps, at_rest, draws, {label for label, is_needed in pairs if is_needed})
        seeds = {slot: grad for slot, grad in state_slots(of_state).items() if grad is not None}
        _refuse_outside(seeds, step.point)
        right = step.vector(seeds)
        solve = _SOLVERS[self.implicit.solver]
        adjoint = solve(step.product, right, self.implicit.iterations, self.implicit.tolerance)
        found = step.in_inputs(adjoint)
        for slot in seeds.keys() - step.point.keys():  # what no step changes is what it was
            found[None, slot] = seeds[slot] + found.get((None, slot), 0.0)
        return [None if label is None else found.get(label) for label in self._labels(inputs)]

    def _labels(self, inputs: Any) -> list[Label | None]:
        """Returns what each leaf is to the one step at the fixed point; None for what only led there."""
        last = len(inputs[1]) - 1
        found: list[Label | None] = []
        for label in labels_of(inputs):
            if label is None or label[0] not in (None, last) or self._only_starts(label[1]):
                found.append(None)
            else:
                found.append((None if label[0] is None else 0, label[1]))
        return found

    def _only_starts(self, slot: Slot) -> bool:
        return slot.role in _OF_STATE and not (slot.role is Role.PARAM and slot.path not in self.steps.trained)


_OF_STATE = (Role.PARAM, Role.BUFFER, Role.STATE)


def _refuse_outside(seeds: Vector, point: Vector) -> None:
    for slot in seeds:
        if slot not in point and slot.role is not Role.PARAM:
            raise InputError(
                compose_message(
                    f'backward="implicit" cannot differentiate {slot} of the last state',
                    None,
                    "It is no trained parameter, nor a tensor of the optimizer's state with dimensions.",
                    "Let the outer loss depend on the trained parameters only.",
                )
            )


class _FixedStep:
    """One step at the fixed point, recorded once and pulled back as often as it takes."""

    def __init__(self, steps: LoopSteps | TaskSteps, inputs: Any, draws: Any, wanted: set[Any]) -> None:
        leaves, structure = pytree.tree_flatten(inputs)
        tensors, places = distinct(leaves)
        labels = labels_of(inputs)
        self.point: dict[Slot, Tensor] = {}
        self.others: dict[Any, Tensor] = {}
        copies = [tensor.detach() for tensor in tensors]
        for label, place in zip(labels, places, strict=True):
            if label is None or place is None or not copies[place].is_floating_point():
                continue
            is_new = not copies[place].requires_grad
            if _settles(label[1], copies[place].dim() - steps.task_dims, steps.trained):
                if is_new:
                    self.point[label[1]] = copies[place].requires_grad_()
            elif label in wanted and is_new:
                self.others[label] = copies[place].requires_grad_()
        flat = [leaf if place is None else copies[place] for leaf, place in zip(leaves, places, strict=True)]
        state, batches, hyper, meta = pytree.tree_unflatten(flat, structure)
        with torch.enable_grad():
            after = state_slots(steps.step(state, batches[0], hyper, meta, dict(draws))[0])
        self.after = {slot: after[slot] for slot in self.point if slot in after}

    def vector(self, seeds: Vector) -> dict[Slot, Tensor]:
        """Returns the adjoints of the fixed point, zero where there are none."""
        return {slot: seeds.get(slot, torch.zeros_like(value)) for slot, value in self.point.items()}

    def product(self, vector: Vector) -> dict[Slot, Tensor]:
        """Returns the vector times the derivative of the step in the state."""
        grads = self._pull(vector, list(self.point.values()))
        pairs = zip(self.point.items(), grads, strict=True)
        return {slot: torch.zeros_like(value) if grad is None else grad for (slot, value), grad in pairs}

    def in_inputs(self, vector: Vector) -> dict[Any, Tensor]:
        """Returns the vector times the derivative of the step in everything else, by label."""
        grads = zip(self.others, self._pull(vector, list(self.others.values())), strict=True)
        return {label: grad for label, grad in grads if grad is not None}

    def _pull(self, vector: Vector, sources: list[Tensor]) -> Sequence[Tensor | None]:
        outputs = [(value, vector[slot]) for slot, value in self.after.items() if value.requires_grad]
        if not outputs or not sources:
            return [None] * len(sources)
        results, seeds = zip(*outputs, strict=True)
        return torch.autograd.grad(results, sources, seeds, retain_graph=True, allow_unused=True)


def _settles(slot: Slot, dims: int, trained: Collection[str]) -> bool:
    if slot.role is Role.PARAM:
        return slot.path in trained
    return slot.role is Role.STATE and dims > 0


def _norm(tensors: list[Tensor]) -> float:
    real = (torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors)
    return float(sum(tensor.double().pow(2).sum() for tensor in real)) ** 0.5
