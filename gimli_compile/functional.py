"""`functionalize`: a model and an optimizer as pure, differentiable functions of everything they use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gimli_compile.argument_checks import (
    are_kept,
    check_functions,
    check_has_loss,
    check_loss_given,
    check_method,
    check_model,
    check_optimizer_params,
    check_options,
    check_plain,
    check_start,
    check_state,
    check_tensors,
    check_train_state,
    guards_branches,
)
from gimli_compile.compiled.backends import choose_backend
from gimli_compile.compiled.call_reading import CallReader
from gimli_compile.compiled.calls import Compiler, replay, step_compiled, unroll_compiled
from gimli_compile.environment import Environment
from gimli_compile.environment_walk import Reached
from gimli_compile.evaluation import evaluate
from gimli_compile.example_steps import example_table, used_paths
from gimli_compile.hyper_values import HyperReader
from gimli_compile.implicit_mode import Implicit
from gimli_compile.inspection import Inspection
from gimli_compile.kept_attributes import keep_attributes
from gimli_compile.lazy_modules import initialize_lazy_modules
from gimli_compile.loop_options import LoopOptions, loop_options
from gimli_compile.loop_plan import Plan
from gimli_compile.loop_steps import LoopSteps
from gimli_compile.loss_table import Asked, LossTable
from gimli_compile.meta_gradients import Asked as GradientAsked
from gimli_compile.meta_gradients import meta_gradient
from gimli_compile.method_view import MethodView
from gimli_compile.model_view import ModelView
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.protocol import choose_protocol
from gimli_compile.reached import reached_from
from gimli_compile.restoring import write_back
from gimli_compile.row_gradients import as_rows, gradients_of, put_gradients
from gimli_compile.schedulers import Schedulers, check_objects, check_schedulers
from gimli_compile.several_optimizers import as_one, check_default_step, full_kind_of, groups_by_optimizer, kind_of
from gimli_compile.state import Hyperparameters, OptState, Tensors, TrainState, build_hyperparameters
from gimli_compile.step_adjoint import StepAdjoint
from gimli_compile.step_capture import capture_step
from gimli_compile.step_view import StepView
from gimli_compile.stepping import SplitStepper, StepInputs, WholeStepper
from gimli_compile.tasks import Loop, Tasks, state_of_one_task
from gimli_compile.train_steps import DefaultStep, UserStep
from gimli_compile.unrolling import unroll_steps
from gimli_compile.update_table import UpdateTable
from gimli_compile.update_values import UpdateInputs

LossFunction = Callable[..., torch.Tensor]
TrainStep = Callable[..., Any]


class Functional(Inspection):
    """The functions of one model and optimizer: see `functionalize`.

    Programs are captured on first use and again, by themselves, for inputs of another form, for another structure of
    the optimizer's state, or where a branch that the step takes on its numbers turns out otherwise.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any,
        loss_fn: LossFunction | None,
        *,
        train_step: TrainStep | None = None,
        per_parameter: bool = False,
        scheduler: Any = None,
        branches: str = "refuse",
        objects: Mapping[str, Any] | None = None,
        buffers: str = "thread",
        example: Any = None,
        example_meta: Any = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.train_step = train_step
        check_functions(loss_fn, train_step)
        check_objects(objects, has_train_step=train_step is not None)
        self._keeps_buffers = are_kept(buffers)
        one = as_one(optimizer)
        self._schedulers = Schedulers(scheduler, are_declared=train_step is not None, objects=objects)
        check_schedulers(self._schedulers, one, per_parameter=per_parameter)
        initialize_lazy_modules(model, optimizer, loss_fn, train_step, example, example_meta)
        self._model_view = ModelView(model, guards_branches=guards_branches(branches))
        check_optimizer_params(one, self._model_view)
        keep_attributes(self._schedulers, self._model_view, train_step)
        names, modules = self._model_view.param_names, set(map(id, self._model_view.modules()))
        self._view = OptimizerView(one, names, per_parameter=per_parameter, opaque=modules, schedulers=self._schedulers)
        self._hyper_reader = HyperReader(self._view)
        self._title = f"{full_kind_of(one)} over {type(model).__name__}"
        self._losses = LossTable(self._model_view, loss_fn, type(model).__name__)
        self._protocol = choose_protocol(self._view, is_needed=train_step is None)
        self._updates = UpdateTable(self._view, self._title)
        self._methods: dict[str, UpdateTable] = {}
        self._identity = self._model_view.identity()
        self._trained = [n for n in self._view.param_names() if self._model_view.live_params[n].requires_grad]
        self._view.environment = self._model_view.environment = Environment(self._reached)
        self._stepper = self._make_stepper()
        self.last_plan: Plan | None = None
        self._adjoint = StepAdjoint(self._stepper) if isinstance(self._stepper, SplitStepper) else None
        self._compiler: Compiler | None = None

    def compile(self, backend: str = "auto", *, verify: bool = True, mode: str | None = None) -> Functional:
        """Returns the same functions, with loops and forward passes that run compiled programs and their adjoints.

        A loop is one program for a step and one for its adjoint, whatever the number of steps. Gradients go through
        once: what is to be differentiated twice is left uncompiled, and so are `update` and `call_optimizer`.

        Args:
            backend: "inductor" (machine code; needs a C++ compiler, or a GPU), "torchscript", "eager" (operator by
                operator, with everything bound once), or "auto": Inductor where there is a compiler.
            verify: each program compares itself, in its first call, with the program that it was compiled from.
            mode: "reduce-overhead" records loops as CUDA graphs (docs/loops.md); on a CPU it changes nothing.

        Raises:
            InputError: there is no such backend or mode.
            CompileError: (by a first call) a compiled program computes something else.
        """
        made, reader = copy.copy(self), CallReader(self._view, self._model_view, self._hyper_reader)
        backend = choose_backend(backend)
        made._compiler = Compiler(self._stepper, self._losses, reader, backend, verify=verify, mode=mode)
        return made

    def _make_stepper(self) -> SplitStepper | WholeStepper:
        if self.train_step is not None:
            return self._whole(UserStep(self.train_step))
        assert self._protocol is not None
        if self._protocol.is_plain:
            return SplitStepper(self._losses, self._updates, self._trained, self._keeps_buffers)
        check_default_step(self._view.optimizer)
        return self._whole(DefaultStep(self.loss_fn, self._protocol, self._schedulers))

    def _whole(self, train_step: DefaultStep | UserStep) -> WholeStepper:
        view = StepView(self._view, self._model_view, train_step)
        return WholeStepper(self._model_view, UpdateTable(view, self._title, capture_step), self._keeps_buffers)

    def _reached(self) -> Reached:
        tables = (self._losses, self._updates, *self._methods.values())
        return reached_from((self.loss_fn, self.train_step), self._view, self._model_view, self._stepper, tables)

    # ------------------------------------------------------------------ values

    def init(self) -> TrainState:
        """Returns copies of the live parameters, buffers and optimizer state, as they are at this moment."""
        check_options(self._view)
        params = {name: p.detach().clone() for name, p in self._model_view.live_params.items()}
        buffers = {name: b.detach().clone() for name, b in self._model_view.live_buffers.items()}
        held = {} if self.train_step is None else gradients_of(self._model_view.live_params)
        return TrainState(params, buffers, self._view.opt_state(), held)

    def hyperparameters(self) -> Hyperparameters:
        """Returns the live hyperparameters as tensors: all numbers of group i at `hyper[i]`, float64 and 0-dim.

        Replace an entry by a tensor that requires a gradient to differentiate with respect to it; by one of the shape
        of the group's parameter to have one value for each element. Parameters of the optimizer's own modules are at
        `hyper.modules`, numbers and trained tensors elsewhere on the optimizer at `hyper.attributes`, both by path.
        """
        check_options(self._view)
        skeleton, values = self._view.read()
        used = used_paths(self._view, self._example_table) | self._view.companion_paths()
        leaves = self._view.hyper_leaves()
        shown = {leaf.path for leaf in leaves if leaf.is_tensor or leaf.path.startswith("groups.") or leaf.path in used}
        optimizers = groups_by_optimizer(self._view.optimizer, per_parameter=self._view.per_parameter)
        return build_hyperparameters(skeleton, values, shown, optimizers)

    def _example_table(self) -> UpdateTable | None:
        return example_table(
            self._protocol, self._updates, self._trained, self._whole, lambda: (self.init(), self._hyper_values(None))
        )

    def _hyper_values(self, hyper: Hyperparameters | None, tasks: Tasks = False) -> dict[str, torch.Tensor]:
        check_options(self._view)
        check_model(self._model_view, self._identity)
        return self._hyper_reader.values(hyper, tasks)

    # ------------------------------------------------------------------ functions

    def forward(self, params: Tensors, buffers: Tensors, *args: Any, **kwargs: Any) -> tuple[Any, Tensors]:
        """Calls the model with these parameters and buffers; returns its output and the new buffers."""
        return self._evaluate(Asked(params, buffers, (args, kwargs)))

    def __call__(self, state: TrainState, *args: Any, tasks: bool = False, **kwargs: Any) -> Any:
        """Returns the model's output for a train state; with `tasks`, for one state and one input for each task."""
        return self._evaluate(Asked(state.params, state.buffers, (args, kwargs)), tasks=tasks)[0]

    def loss(self, state: TrainState, batch: Any, meta: Any = None, *, tasks: bool = False) -> torch.Tensor:
        """Returns the loss (0-dim) of a train state on a batch, if `functionalize` was given one; takes no step.

        With `tasks`, one loss for each task: state and batch lead with the task, and meta is shared.
        """
        check_has_loss(self.loss_fn)
        return self._evaluate(Asked(state.params, state.buffers, batch, meta, is_loss=True), tasks=tasks)[0]

    def _evaluate(self, asked: Asked, *, tasks: bool = False) -> tuple[Any, Tensors]:
        return evaluate(self._losses, self._compiler, asked, self._model_view, tasks=tasks)

    def update(
        self,
        params: Tensors,
        grads: Mapping[str, torch.Tensor | None],
        opt_state: OptState,
        hyper: Hyperparameters | None = None,
    ) -> tuple[Tensors, OptState]:
        """Takes one step of the optimizer from `params` along `grads` (by name; None or missing: none).

        Returns the new parameters and the new state. `hyper` defaults to the live hyperparameters.
        """
        check_tensors(params, self._model_view.live_params, "params")
        check_state(opt_state, self._view)
        check_plain(self._protocol, kind_of(self._view.optimizer))
        rows = {name: as_rows(grad) for name, grad in grads.items()}
        return self._updates.run(UpdateInputs(params, rows, opt_state, self._hyper_values(hyper)))

    def call_optimizer(self, method: str, state: TrainState, hyper: Hyperparameters | None = None) -> TrainState:
        """Calls a method of the optimizer without arguments, such as the `eval` and `train` of schedule-free ones.

        Returns the state with what the method does to parameters and optimizer state; differentiable like `update`.
        """
        check_train_state(state)
        check_state(state.opt_state, self._view)
        check_method(self._view.optimizer, method)
        if method not in self._methods:
            self._view.environment.follow(method)
            title = self._title.replace(" over ", f".{method} over ", 1)
            self._methods[method] = UpdateTable(MethodView(self._view, method), title)
        inputs = UpdateInputs(state.params, state.grads, state.opt_state, self._hyper_values(hyper))
        params, opt_state = self._methods[method].run(inputs)
        return replace(state, params=params, opt_state=opt_state)

    def step(
        self, state: TrainState, batch: Any, hyper: Hyperparameters | None = None, meta: Any = None
    ) -> tuple[TrainState, torch.Tensor]:
        """Takes one inner step: loss, gradient, update. Returns the new state and the loss (0-dim) before the step."""
        check_loss_given(self.loss_fn, self.train_step)
        call, replayed = replay(self._compiler, state, [batch], hyper, meta, LoopOptions(), single=True)
        if replayed is not None:
            return replayed
        values = self._hyper_values(hyper)
        check_start(state, self._model_view, self._view)
        inputs = StepInputs(state, batch, values, meta, model_key=self._model_view.options)
        if self._compiler is not None:
            return step_compiled(self._compiler.loops, inputs, call)
        return self._stepper.step(inputs)

    def unroll(
        self,
        state: TrainState,
        batches: Any,
        hyper: Hyperparameters | None = None,
        meta: Any = None,
        *,
        backward: str = "reverse",
        checkpoint: str | int | None = None,
        order: int = 2,
        truncate: int | None = None,
        tasks: Tasks = False,
        implicit: Implicit | None = None,
        memory: str | int | None = None,
    ) -> tuple[TrainState, torch.Tensor]:
        """Takes J inner steps; differentiable with respect to state, hyper, meta and batches.

        Args:
            state: where training starts.
            batches: a list (or iterator) of J batches, or a pytree of tensors with a leading dimension J.
            hyper: hyperparameters, the same in all steps; the live ones by default.
            meta: the third argument of the loss.
            backward: the way through the backward pass (docs/loops.md). "reverse": every step is differentiated by
                autograd, as Algorithm 1 of Gimli does, to any order. "mixed": the same adjoint with the inner gradient
                differentiated forward and in blocks, which keeps the states between steps and no activations.
                "forward": tangents, for few numbers; keeps nothing. "implicit": the gradient of the fixed point that
                training ended at, zero in where it started. "auto": the fastest exact one that fits into `memory`,
                then `fn.last_plan`. All but "reverse" can be differentiated once.
            checkpoint: None keeps what every step computed; "step" (so does "mixed") or an int k keeps the states of
                every (k-th) step and computes steps again in the backward pass; "sqrt" takes k near the root of J.
            order: 2 is exact; 1 takes the inner gradients as constants (first-order MAML).
            truncate: differentiates the last k steps only (truncated backpropagation; Shaban et al. 2019).
            tasks: True runs many tasks at once: batches lead with (task, step), a list of batches with task; state,
                hyper and meta are shared; results lead with task. A tuple says which dimension of state, batches,
                hyper and meta is the task's, in the terms of `torch.func.vmap` (None: shared;
                shared batches lead with step).
            implicit: how the implicit gradient is solved for: see `gimli_compile.Implicit`.
            memory: for "auto", bytes or a text such as "2GiB".

        Returns:
            The last state, and the losses before each step (J).

        Raises:
            InputError: no steps, leading dimensions that differ, or an option that does not exist or fit.
        """
        check_loss_given(self.loss_fn, self.train_step)
        options = loop_options(backward, checkpoint, order, truncate, tasks, implicit, memory)
        call, replayed = replay(self._compiler, state, batches, hyper, meta, options)
        if replayed is not None:
            self.last_plan = None
            return replayed
        values = self._hyper_values(hyper, tasks)
        model_key = self._model_view.options
        loop = Loop(state, batches, values, meta)
        steps = LoopSteps(
            self._stepper,
            self._adjoint,
            partial(check_start, model=self._model_view, view=self._view),
            order=order,
            model_key=model_key,
            recomputes=options.recomputes,
            trained=self._trained,
        )
        if self._compiler is None:
            made = unroll_steps(steps, loop, options)
        else:
            check_start(state_of_one_task(state, tasks), self._model_view, self._view)
            made = unroll_compiled(self._compiler.loops, loop, options, steps, call)
        self.last_plan = steps.plan
        return made

    def meta_gradient(
        self,
        state: TrainState,
        batches: Any,
        held_out: Any,
        hyper: Hyperparameters | None = None,
        meta: Any = None,
        *,
        inputs: Any,
        allow_unused: bool = False,
        **options: Any,
    ) -> tuple[torch.Tensor, Any]:
        """Returns the loss on held-out data after J inner steps (0-dim, detached), and its gradient.

        That is `unroll`, then `loss`, then `torch.autograd.grad` (Gimli, Algorithm 1); small compiled loops are faster
        at once.

        Args:
            state: where training starts.
            batches: those of the J steps, as for `unroll`.
            hyper: hyperparameters; the live ones by default.
            meta: the third argument of the loss, in the steps and after them.
            held_out: the batch of the loss; with `tasks`, it leads with the task, and the loss is the mean over tasks.
            inputs: a pytree of tensors that require a gradient, from which state, hyper, meta or batches are made.
            allow_unused: an input that no argument holds or comes from has zeros, and is not refused.
            options: those of `unroll`: `tasks`, `backward`, `checkpoint`, `order`, `truncate`, `implicit`, `memory`.

        Raises:
            InputError: there is no loss function, or no way from an input to the arguments.
        """
        check_has_loss(self.loss_fn)
        asked = GradientAsked(state, batches, held_out, hyper, meta, inputs, allow_unused, options)
        return meta_gradient(self, self._compiler, asked)

    # ------------------------------------------------------------------ writing back

    def load_into(
        self,
        model: Any,
        optimizer: Any,
        state: TrainState,
        scheduler: Any = None,
        objects: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes parameters, buffers and optimizer state into a live model and optimizer of the same structure.

        With `train_step`, also the gradients that it left, into `p.grad`.
        The state of schedulers and objects goes into `scheduler` and `objects`; by default, with the optimizer that
        `functionalize` was given, into those given there.
        """
        live = ModelView(model)
        check_tensors(state.params, live.live_params, "state.params")
        check_tensors(state.buffers, live.live_buffers, "state.buffers")
        write_back(self._view, live, as_one(optimizer), state, Schedulers(scheduler, objects=objects))
        if self.train_step is not None:
            put_gradients(live.live_params, state.grads)

    def __repr__(self) -> str:
        return f"Functional({type(self.model).__name__}, {kind_of(self._view.optimizer)})"

    def __deepcopy__(self, memo: Any) -> Functional:
        return copy.copy(self)
