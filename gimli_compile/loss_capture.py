"""Captures the model, and the loss with its inner gradient, as programs."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from gimli_compile.aliases import memory_followed
from gimli_compile.custom_functions import custom_functions_recorded
from gimli_compile.differentiable_forms import differentiable_forms
from gimli_compile.errors import BakedValueWarning, CaptureError, compose_message
from gimli_compile.escapes import escapes_closed, modules_of
from gimli_compile.interception import Interception
from gimli_compile.loss_conditions import Captured, with_conditions
from gimli_compile.metadata import storage_of
from gimli_compile.model_view import ModelView, changed_attributes
from gimli_compile.owned_generators import draws_refused
from gimli_compile.pipeline import LOSS_PASSES, lower
from gimli_compile.program import Program
from gimli_compile.provenance import user_source
from gimli_compile.recording import DATA, HOST, Recorder, Region
from gimli_compile.records import rebuilt
from gimli_compile.slot import Role, Slot
from gimli_compile.state import Tensors
from gimli_compile.tree_slots import Returned, reach_of, tree_slots

Place = tuple[int, str]


@dataclass(frozen=True)
class Forward:
    """A captured forward pass of the model, or of the loss: the program and the structure of what it returns."""

    captured: Captured
    returned: Returned
    name: str

    def program(self, order: int) -> Program:
        """Returns the program; without an inner gradient it is of any order."""
        return self.captured.program

    def assemble(self, results: Mapping[Slot, torch.Tensor]) -> Any:
        """Returns the model's output from the program's results."""
        return self.returned.assemble(results)


def takes_meta(function: Callable[..., Any], places: int = 3) -> bool:
    """Tells whether a loss takes a third argument, the meta-parameters; a train step takes them as its fourth."""
    try:
        called = function.forward if isinstance(function, torch.nn.Module) else function
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):
        return True
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    positional = [p for p in parameters if p.kind in kinds]
    return len(positional) >= places or any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)


class LossRun:
    """One traced run of the model on copies of the tensors that it is given.

    `leaves` are what to differentiate by: those of the inputs `wanted`.
    """

    def __init__(self, view: ModelView, params: Tensors, buffers: Tensors, wanted: Collection[Slot] = ()) -> None:
        self.view = view
        self.wanted = frozenset(wanted)
        self.leaves: dict[Slot, torch.Tensor] = {}
        self.recorder = Recorder("loss")
        self.recorder.guards_branches = view.guards_branches
        self.live = live = view.live_params
        self.recorder.live = {storage_of(tensor): name for name, tensor in (live | view.live_buffers).items()}
        self.params = {name: self._add_param(name, params[name]) for name in live}
        self.buffers = {
            name: self.add(Slot(Role.BUFFER, name), value, HOST if value.dim() == 0 else reach_of(value))
            for name, value in buffers.items()
        }

    def _add_param(self, name: str, value: torch.Tensor) -> torch.Tensor:
        slot, traced = Slot(Role.PARAM, name), self.view.as_leaf(name, value)
        if slot in self.wanted:
            self.leaves[slot] = traced.requires_grad_()
        self.recorder.add_input(slot, traced, DATA)
        self.recorder.keep(traced, name)
        return traced

    def after_accumulation(self, grads: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor | None]:
        """Runs the hooks that the live parameters have for the moment when their gradient is there."""
        for name, grad in grads.items():
            traced = self.params[name]
            for hook in (getattr(traced, "_post_accumulate_grad_hooks", None) or {}).values():
                traced.grad = grad
                with torch.no_grad():
                    hook(traced)
                grads[name], traced.grad = traced.grad, None
        return grads

    def add(self, slot: Slot, value: torch.Tensor, reach: int) -> torch.Tensor:
        """Announces a copy of a tensor and returns it; of one to differentiate by, a copy that may be written to."""
        traced = value.detach().clone()
        if slot in self.wanted:
            self.leaves[slot] = traced.requires_grad_()
            with torch.enable_grad():
                traced = traced.clone()
        self.recorder.add_input(slot, traced, reach)
        return traced

    def add_tree(self, role: Role, tree: Any) -> Any:
        """Announces the tensors of a pytree and returns the pytree of their traced copies."""
        slots = tree_slots(role, tree)
        traced = iter([self.add(slot, value, reach_of(value)) for slot, value in slots.items()])
        return rebuilt(pytree.tree_map(lambda leaf: next(traced) if isinstance(leaf, torch.Tensor) else leaf, tree))

    @contextmanager
    def tracing(self, kept: Mapping[Place, torch.Tensor] | None = None) -> Iterator[None]:
        """Runs the model with the traced tensors, everything recorded; `kept` are attributes that a run before set."""
        before, attributes = self.view.signature(), self.view.tensor_attributes()
        tensors = {**self.params, **self.buffers}
        with self.view.substituted(tensors), differentiable_forms(), torch.enable_grad():
            self.view.set_attributes(kept or {})
            recorder = self.recorder
            modules = modules_of(type(module) for module in self.view.modules())
            with (
                recorder.in_region(Region.LOSS),
                draws_refused(recorder),
                custom_functions_recorded(recorder),
                escapes_closed(recorder, modules),
                memory_followed(recorder),
                recorder,
                Interception(recorder),
            ):
                yield
            self.new_buffers = self.view.read_buffers()
            refuse_grown(self.view, self.recorder, tensors)
            self._refuse_replaced(attributes)
            after = self.view.tensor_attributes().items()
            self.left = {
                place: value.detach().clone()
                for place, value in after
                if attributes.get(place) is not value and recorder.reach(value)
            }
            warn_of_changes(changed_attributes(before, self.view.signature()))

    def _refuse_replaced(self, before: Mapping[Place, torch.Tensor]) -> None:
        after = self.view.tensor_attributes()
        self.refuse_use({place: tensor for place, tensor in before.items() if after.get(place) is not tensor})

    def refuse_use(self, set_by_runs: Mapping[Place, torch.Tensor]) -> None:
        """Refuses a model that reads a plain tensor attribute which its runs set."""
        used = {id(tensor) for tensor in self.recorder.constants.values()}
        for place, tensor in set_by_runs.items():
            if id(tensor) in used:
                raise CaptureError(
                    compose_message(
                        f"the model reads its attribute `{place[1]}`, which its runs replace by other tensors",
                        None,
                        "The next step of eager training depends on it, and the program would not.",
                        "Make it a buffer: `register_buffer`. If only the first run sets it, call the model once on a "
                        "batch before `functionalize`.",
                    )
                )

    def gradient_results(self, grads: Mapping[str, torch.Tensor | None]) -> dict[Slot, fx.Node]:
        """Returns the nodes of gradients by slot; of a sparse one, those of its dense form and of its rows."""
        results = {}
        for name, grad in grads.items():
            if self.recorder.sparse.knows(grad):
                assert grad is not None
                grad, rows = self.recorder.sparse.parts(grad)
                results[Slot(Role.ROWS, name)] = self.recorder.node_of(rows)
            if grad is not None:
                results[Slot(Role.GRAD, name)] = self.recorder.node_of(grad)
        return results

    def buffer_results(self) -> dict[Slot, fx.Node]:
        """Returns the nodes of the new buffers."""
        return {
            Slot(Role.BUFFER, name): self.recorder.node_of(self.new_buffers[name])
            for name in self.buffers
            if name in self.new_buffers
        }

    def finish(self, title: str, name: str, results: dict[Slot, fx.Node]) -> Captured:
        """Returns the lowered program of these results and of the conditions that held."""
        recorder = self.recorder
        outcomes = {}
        for guard in recorder.guards:
            slot = Slot(Role.GUARD, str(len(outcomes)))
            results[slot] = guard.node
            outcomes[slot] = guard.outcome
        recorder.graph.output(tuple(results.values()))
        program = Program(
            title, name, recorder.graph, tuple(recorder.inputs), tuple(results), recorder.constants, recorder.draws
        )
        return with_conditions(lower(program, LOSS_PASSES), outcomes)


def refuse_grown(view: ModelView, recorder: Recorder, known: Mapping[str, torch.Tensor]) -> None:
    """Refuses a model that makes parameters while it runs, or buffers that are not the same in every run."""
    before = {**view.param_names, **view.buffer_names}  # a pytree holds its own tensors beside the modules
    new = {n: p for n, p in view.live_params.items() if n not in known and id(p) not in before}
    made = dict.fromkeys(new, "parameter")
    new = {n: b for n, b in view.live_buffers.items() if n not in known and id(b) not in before}
    made |= {name: "buffer" for name, value in new.items() if recorder.reach(value)}
    for name, kind in made.items():
        raise CaptureError(
            compose_message(
                f"the model makes its {kind} {name!r} while it runs",
                None,
                "All parameters and buffers are inputs of a program, and this one is not there before the first step.",
                "Call the model once on a batch (`model(x)`), then create the optimizer and call `functionalize`.",
            )
        )


def warn_of_changes(names: Iterable[str]) -> None:
    """Warns of plain attributes that the model changes while it runs."""
    for name in names:
        warnings.warn(
            f"the model changes its attribute `{name}` while it runs. It is no tensor, so the program holds the value "
            "that it had at capture. Register it with `register_buffer` if later steps depend on it.",
            BakedValueWarning,
            stacklevel=2,
        )


def capture_forward(
    view: ModelView, params: Tensors, buffers: Tensors, args: tuple[Any, ...], kwargs: dict[str, Any], title: str
) -> Forward:
    """Captures `model(*args, **kwargs)`."""

    def begin() -> tuple[LossRun, Callable[[], Any]]:
        run = LossRun(view, params, buffers)
        traced_args, traced_kwargs = run.add_tree(Role.BATCH, (args, kwargs))
        return run, lambda: view.model(*traced_args, **traced_kwargs)

    return _captured_forward(begin, title, "forward")


def capture_loss(
    view: ModelView,
    loss_fn: Callable[..., Any],
    params: Tensors,
    buffers: Tensors,
    batch: Any,
    meta: Any,
    title: str,
) -> Forward:
    """Captures the loss alone."""

    def begin() -> tuple[LossRun, Callable[[], Any]]:
        run = LossRun(view, params, buffers)
        arguments = arguments_of_loss(run, loss_fn, batch, meta)

        def call() -> Any:
            loss = loss_fn(*arguments)
            check_loss(loss, loss_fn)
            return loss

        return run, call

    return _captured_forward(begin, title, "loss")


def _captured_forward(begin: Callable[[], tuple[LossRun, Callable[[], Any]]], title: str, name: str) -> Forward:
    run, call = begin()
    with run.tracing():
        out = call()
    _look_again(run, begin)
    returned, tensors = Returned.of(out, Role.OUTPUT)
    results = {slot: run.recorder.node_of(tensor) for slot, tensor in tensors.items()}
    return Forward(run.finish(title, name, {**results, **run.buffer_results()}), returned, name)


def arguments_of_loss(run: LossRun, loss_fn: Callable[..., Any], batch: Any, meta: Any) -> tuple[Any, ...]:
    """Announces batch and meta to a run; returns what to call a loss with."""
    traced_batch = run.add_tree(Role.BATCH, batch)
    arguments = (run.view.filled({**run.params, **run.buffers}), traced_batch)
    return (*arguments, run.add_tree(Role.META, meta)) if takes_meta(loss_fn) else arguments


def capture_gradient(
    view: ModelView,
    loss_fn: Callable[..., Any],
    params: Tensors,
    buffers: Tensors,
    batch: Any,
    meta: Any,
    wanted: Iterable[str],
    title: str,
) -> Captured:
    """Captures the loss, its gradient in the parameters `wanted`, and the new buffers."""

    def begin() -> tuple[LossRun, Callable[[], Any]]:
        run = LossRun(view, params, buffers)
        arguments = arguments_of_loss(run, loss_fn, batch, meta)
        return run, lambda: loss_fn(*arguments)

    run, call = begin()
    trained = {name: run.params[name] for name in wanted}
    with run.tracing():
        loss = call()
        check_loss(loss, loss_fn)
        with run.recorder.in_region(Region.BACKWARD):
            grads = run.after_accumulation(inner_gradient(loss, trained, loss_fn))
    _look_again(run, begin)
    results = {Slot(Role.LOSS): run.recorder.node_of(loss), **run.gradient_results(grads)}
    return run.finish(title, "grad", {**results, **run.buffer_results()})


def _look_again(run: LossRun, begin: Callable[[], tuple[LossRun, Callable[[], Any]]]) -> None:
    """Runs the code once more, with the attributes that the first run left: later steps must not depend on them."""
    if not run.left:
        return
    again, call = begin()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with again.tracing(run.left):
            call()
    again.refuse_use(run.left)


def inner_gradient(
    loss: torch.Tensor, trained: Mapping[str, torch.Tensor], loss_fn: Callable[..., Any]
) -> dict[str, torch.Tensor | None]:
    """Returns the gradient of a loss by name, None where there is none."""
    if not loss.requires_grad:
        raise CaptureError(
            compose_message(
                f"the loss of `{_name(loss_fn)}` does not depend on any trained parameter",
                _definition(loss_fn),
                "There is no inner gradient to step along.",
                "Check for `detach`, `no_grad` or `argmax` on the way, "
                "and that the optimizer has the model's parameters.",
            )
        )
    # With `create_graph` the framework chooses the derivatives that have derivatives themselves.
    grads = torch.autograd.grad(loss, list(trained.values()), allow_unused=True, create_graph=True)
    return dict(zip(trained, grads, strict=True))


def check_loss(loss: Any, loss_fn: Callable[..., Any]) -> None:
    """Refuses a loss that is not one finite number."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        kind = f"a tensor of shape {tuple(loss.shape)} and {loss.dtype}" if isinstance(loss, torch.Tensor) else loss
        raise CaptureError(
            compose_message(
                f"the loss of `{_name(loss_fn)}` is not a scalar: it returned {kind!s}",
                _definition(loss_fn),
                "The inner gradient is that of one number.",
                "Reduce the loss, for example with `.mean()`.",
            )
        )
    if not math.isfinite(_untraced(loss)):
        raise CaptureError(
            compose_message(
                f"the loss of `{_name(loss_fn)}` is {_untraced(loss)} on the values that it is captured with",
                _definition(loss_fn),
                "A program captured from such values could not be checked.",
                "Check the batch and the parameters for NaN and infinity.",
            )
        )


def _untraced(tensor: torch.Tensor) -> float:
    """Returns the value of one element; no mode follows."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return float(tensor.detach().to("cpu", torch.float64).numpy().item())


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _definition(function: Callable[..., Any]) -> Any:
    code = getattr(function, "__code__", None)
    if code is None:
        return user_source()
    return f"{code.co_filename.rsplit('/', 1)[-1]}:{code.co_firstlineno} in {code.co_name}"
