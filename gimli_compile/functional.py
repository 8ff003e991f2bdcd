"""`functionalize`: a model and an optimizer as pure, differentiable functions of everything they use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gimli_compile.argument_checks import (
    check_callable,
    check_constants,
    check_functions,
    check_method,
    check_model,
    check_optimizer,
    check_optimizer_params,
    check_options,
    check_plain,
    check_state,
    check_tensors,
    check_train_state,
)
from gimli_compile.compiled.backends import choose_backend
from gimli_compile.compiled.calls import unroll_compiled
from gimli_compile.compiled.unrolling import LoopCompiler
from gimli_compile.errors import InputError, compose_message
from gimli_compile.hyper_values import hyper_values
from gimli_compile.loss_table import LossTable
from gimli_compile.model_view import ModelView
from gimli_compile.optimizer_view import MethodView, OptimizerView
from gimli_compile.programs import Programs
from gimli_compile.protocol import choose_protocol, quadratic_loss
from gimli_compile.recording import Baked
from gimli_compile.requirement_capture import capture_for_requirements
from gimli_compile.requirements import Requirements, decide_requirements
from gimli_compile.restoring import write_back
from gimli_compile.row_gradients import as_rows
from gimli_compile.schedulers import Schedulers, check_schedulers
from gimli_compile.state import Hyperparameters, OptState, Tensors, TrainState, build_hyperparameters
from gimli_compile.step_capture import capture_step
from gimli_compile.step_view import StepView
from gimli_compile.stepping import SplitStepper, StepInputs, WholeStepper
from gimli_compile.symbolic_rule import UpdateRule, derive_update_rule
from gimli_compile.tasks import Tasks
from gimli_compile.train_steps import DefaultStep, UserStep
from gimli_compile.transforms import is_differentiated
from gimli_compile.unrolling import Loop, unroll_steps
from gimli_compile.update_table import UpdateTable
from gimli_compile.update_values import UpdateInputs

LossFunction = Callable[..., torch.Tensor]
TrainStep = Callable[..., Any]


def functionalize(
    model: Any,
    optimizer: Any,
    loss_fn: LossFunction | None = None,
    *,
    train_step: TrainStep | None = None,
    per_parameter: bool = False,
    scheduler: Any = None,
) -> Functional:
    """Turns a live model and optimizer into pure, differentiable functions; neither is changed.

    Args:
        model: any `nn.Module` whose parameters are initialized; or what is trained in its place: a tensor, or a pytree
            of modules and tensors, such as `(generator, discriminator)` or `{"model": model, "images": images}`. The
            loss gets the same structure; tensors are known by their paths, as `images` or `model.0.weight`.
        optimizer: any optimizer over the model's parameters, fresh or in the middle of training.
        loss_fn: `loss_fn(model, batch)` or `loss_fn(model, batch, meta)`, returning a scalar tensor. It calls the model
            as usual; `meta` is a pytree of tensors to differentiate with respect to. Needed for `step` and `unroll`.
            The default step evaluates it, runs the backward pass and lets the optimizer step; an optimizer whose `step`
            wants a closure, or gradients with their graph, gets them.
        train_step: the loop body that you have, in place of a loss: `train_step(model, optimizer, batch)` or
            `train_step(model, optimizer, batch, meta)`. It calls `zero_grad`, `backward` and `step` as usual, clips,
            accumulates, evaluates as often as it likes, and returns the loss (or a pytree of tensors).
        per_parameter: gives every parameter a group, and so hyperparameters, of its own.
        scheduler: a learning-rate scheduler of the optimizer, or a list of them: after `optimizer.step()`, every update
            runs `scheduler.step()`, or `scheduler.step(loss)` where an argument is required (then only whole steps have
            a program). What it assigns is state, the learning rate among it (`groups.0.lr` of the initial state); what
            it reads is a hyperparameter (`hyper.attributes["scheduler.gamma"]`). With `train_step`, which steps its
            schedulers itself, this only declares them: their numbers are then part of the program.

    Raises:
        InputError: the optimizer has parameters that the model does not have, or the model is not initialized.
        CaptureError: a step of the optimizer does not run.
    """
    return Functional(
        model, optimizer, loss_fn, train_step=train_step, per_parameter=per_parameter, scheduler=scheduler
    )


class Functional:
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
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.loss_fn = loss_fn
        self.train_step = train_step
        check_optimizer(optimizer)
        check_functions(loss_fn, train_step)
        self._schedulers = Schedulers(scheduler, are_declared=train_step is not None)
        check_schedulers(self._schedulers, optimizer, per_parameter=per_parameter)
        self._model_view = ModelView(model)
        check_optimizer_params(optimizer, self._model_view)
        names, modules = self._model_view.param_names, set(map(id, self._model_view.modules()))
        self._view = OptimizerView(
            optimizer, names, per_parameter=per_parameter, opaque=modules, schedulers=self._schedulers
        )
        kind = type(optimizer)
        self._title = f"{kind.__module__}.{kind.__qualname__} over {type(model).__name__}"
        self._losses = LossTable(self._model_view, loss_fn, type(model).__name__)
        self._protocol = choose_protocol(self._view, is_needed=train_step is None)
        self._updates = UpdateTable(self._view, self._title)
        self._methods: dict[str, UpdateTable] = {}
        self._identity = self._model_view.identity()
        self._trained = [n for n in self._view.param_names() if self._model_view.live_params[n].requires_grad]
        self._stepper = self._make_stepper()
        self._compiler: LoopCompiler | None = None

    def compile(self, backend: str = "auto", *, verify: bool = True) -> Functional:
        """Returns the same functions with loops that run compiled programs, one for a step and one for its adjoint.

        Args:
            backend: "inductor" (machine code; needs a C++ compiler, or a GPU), "torchscript", "eager" (operator by
                operator, with everything bound once), or "auto": Inductor where there is a compiler.
            verify: each program compares itself, in its first call, with the program that it was compiled from.

        Raises:
            InputError: there is no such backend.
            CompileError: (by a first call) a compiled program computes something else.
        """
        made = copy.copy(self)
        made._compiler = LoopCompiler(self._stepper, choose_backend(backend), verify=verify)
        return made

    def _make_stepper(self) -> SplitStepper | WholeStepper:
        if self.train_step is not None:
            return self._whole(UserStep(self.train_step))
        assert self._protocol is not None
        if self._protocol.is_plain:
            return SplitStepper(self._losses, self._updates, self._trained)
        return self._whole(DefaultStep(self.loss_fn or _missing_loss, self._protocol, self._schedulers))

    def _whole(self, train_step: DefaultStep | UserStep) -> WholeStepper:
        view = StepView(self._view, self._model_view, train_step)
        return WholeStepper(self._model_view, UpdateTable(view, self._title, capture_step))

    # ------------------------------------------------------------------ values

    def init(self) -> TrainState:
        """Returns copies of the live parameters, buffers and optimizer state, as they are at this moment."""
        check_options(self._view)
        params = {name: p.detach().clone() for name, p in self._model_view.live_params.items()}
        buffers = {name: b.detach().clone() for name, b in self._model_view.live_buffers.items()}
        return TrainState(params, buffers, self._view.opt_state())

    def hyperparameters(self) -> Hyperparameters:
        """Returns the live hyperparameters as tensors: all numbers of group i at `hyper[i]`, float64 and 0-dim.

        Replace an entry by a tensor that requires a gradient to differentiate with respect to it; by one of the shape
        of the group's parameter to have one value for each element. Parameters of the optimizer's own modules are at
        `hyper.modules`, numbers and trained tensors elsewhere on the optimizer at `hyper.attributes`, both by path.
        """
        check_options(self._view)
        skeleton, values = self._view.read()
        used = self._used_paths() | self._view.companion_paths()
        leaves = self._view.hyper_leaves()
        shown = {leaf.path for leaf in leaves if leaf.is_tensor or leaf.path.startswith("groups.") or leaf.path in used}
        return build_hyperparameters(skeleton, values, shown)

    def _used_paths(self) -> set[str]:
        """Returns the paths of the hyperparameters that updates use; looks at the first two if there are others."""
        every, shown = {leaf.path for leaf in self._view.hyper_leaves()}, self._view.companion_paths()
        if all(path.startswith("groups.") or path in shown for path in every):
            return every
        table = self._example_table()
        return every if table is None else table.used_hyperparameters()

    def _example_table(self) -> UpdateTable | None:
        """Returns captured updates along made-up gradients, or along a made-up loss; None if there is no way."""
        if self._protocol is None:
            return None
        if self._protocol.is_plain:
            if not self._updates.variants:
                self._updates.example(self.init(), self._hyper_values(None), self._trained)
            return self._updates
        state, hyper = self.init(), self._hyper_values(None)
        evaluate = quadratic_loss(self.optimizer)
        stepper = self._whole(DefaultStep(lambda *_: evaluate(), self._protocol, self._schedulers))
        with torch.random.fork_rng(), torch.no_grad():
            for _ in range(2):
                state, _ = stepper.step(StepInputs(state, None, hyper, None))
        return stepper.table

    def _hyper_values(self, hyper: Hyperparameters | None, tasks: Tasks = False) -> dict[str, torch.Tensor]:
        check_options(self._view)
        check_model(self._model_view, self._identity)
        return hyper_values(self._view, hyper, tasks)

    # ------------------------------------------------------------------ functions

    def forward(self, params: Tensors, buffers: Tensors, *args: Any, **kwargs: Any) -> tuple[Any, Tensors]:
        """Calls the model with these parameters and buffers; returns its output and the new buffers."""
        check_callable(self.model)
        check_tensors(params, self._model_view.live_params, "params")
        check_tensors(buffers, self._model_view.live_buffers, "buffers")
        return self._losses.forward(params, buffers, args, kwargs)

    def __call__(self, state: TrainState, *args: Any, tasks: bool = False, **kwargs: Any) -> Any:
        """Returns the model's output for a train state; with `tasks`, for one state and one input for each task."""

        def call(params: Tensors, buffers: Tensors, args: Any, kwargs: Any) -> Any:
            return self.forward(params, buffers, *args, **kwargs)[0]

        run = torch.func.vmap(call, randomness="different") if tasks else call
        return run(state.params, state.buffers, args, kwargs)

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
        check_plain(self._protocol, type(self.optimizer).__name__)
        rows = {name: as_rows(grad) for name, grad in grads.items()}
        return self._updates.run(UpdateInputs(params, rows, opt_state, self._hyper_values(hyper)))

    def call_optimizer(self, method: str, state: TrainState, hyper: Hyperparameters | None = None) -> TrainState:
        """Calls a method of the optimizer without arguments, such as the `eval` and `train` of schedule-free ones.

        Returns the state with what the method does to parameters and optimizer state; differentiable like `update`.
        """
        check_train_state(state)
        check_state(state.opt_state, self._view)
        check_method(self.optimizer, method)
        if method not in self._methods:
            title = self._title.replace(" over ", f".{method} over ", 1)
            self._methods[method] = UpdateTable(MethodView(self._view, method), title)
        inputs = UpdateInputs(state.params, {}, state.opt_state, self._hyper_values(hyper))
        params, opt_state = self._methods[method].run(inputs)
        return TrainState(params, state.buffers, opt_state)

    def step(
        self, state: TrainState, batch: Any, hyper: Hyperparameters | None = None, meta: Any = None
    ) -> tuple[TrainState, torch.Tensor]:
        """Takes one inner step: loss, gradient, update. Returns the new state and the loss (0-dim) before the step."""
        self._check_step(state)
        if self._compiler is not None:
            state, losses = self.unroll(state, [batch], hyper, meta)
            return state, pytree.tree_map_only(torch.Tensor, lambda loss: loss.squeeze(-1), losses)
        return self._stepper.step(StepInputs(state, batch, self._hyper_values(hyper), meta))

    def _check_step(self, state: TrainState) -> None:
        if self.loss_fn is None and self.train_step is None:
            raise InputError(
                compose_message(
                    "`step` and `unroll` need a loss",
                    None,
                    "`functionalize(model, optimizer)` was given none.",
                    "Call `functionalize(model, optimizer, loss_fn)`.",
                )
            )
        check_train_state(state)
        check_tensors(state.params, self._model_view.params, "state.params")
        check_tensors(state.buffers, self._model_view.buffers, "state.buffers")
        check_state(state.opt_state, self._view)

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
    ) -> tuple[TrainState, torch.Tensor]:
        """Takes J inner steps; differentiable with respect to state, hyper, meta and batches.

        Args:
            state: where training starts.
            batches: a list (or iterator) of J batches, or a pytree of tensors with a leading dimension J.
            hyper: hyperparameters, the same in all steps; the live ones by default.
            meta: the third argument of the loss.
            backward: "reverse": every step is differentiated by autograd, as Algorithm 1 of Gimli does.
            checkpoint: None keeps what every step computed; "step" or an int k keeps the states of every (k-th) step
                and computes the steps again in the backward pass; "sqrt" takes k near the root of J.
            order: 2 is exact; 1 takes the inner gradients as constants (first-order MAML).
            truncate: differentiates the last k steps only (truncated backpropagation; Shaban et al. 2019).
            tasks: True runs many tasks at once: batches lead with (task, step), a list of batches with task; state,
                hyper and meta are shared; results lead with task. A tuple says which dimension of state, batches,
                hyper and meta is the task's, in the terms of `torch.func.vmap` (None: shared;
                shared batches lead with step).

        Returns:
            The last state, and the losses before each step (J).

        Raises:
            InputError: no steps, leading dimensions that differ, or an option that does not exist.
        """
        values = self._hyper_values(hyper, tasks)

        model_key = self._model_view.options
        if self._compiler is not None:
            self._check_step(state)
            loop = Loop(state, batches, values, meta)
            return unroll_compiled(self._compiler, loop, model_key, backward, checkpoint, order, truncate, tasks)
        checked: list[bool] = []

        def step(now: TrainState, batch: Any, hyper: Any, meta: Any, draws: Any) -> tuple[TrainState, torch.Tensor]:
            if not checked:  # later states are made here
                self._check_step(now)
                checked.append(True)
            made = self._stepper.step(StepInputs(now, batch, hyper, meta, order, draws, model_key))
            if checkpoint is not None:
                check_constants(self._stepper.constants())
            return made

        return unroll_steps(
            step,
            Loop(state, batches, values, meta),
            backward=backward,
            checkpoint=checkpoint,
            order=order,
            truncate=truncate,
            tasks=tasks,
        )

    # ------------------------------------------------------------------ looking and writing back

    @property
    def programs(self) -> Programs:
        """The captured programs by name, with all variants: "forward", "grad", "update", "step"."""
        whole = self._stepper.table if isinstance(self._stepper, WholeStepper) else None
        if self._protocol is not None and self._protocol.is_plain:
            self._example_table()
        return Programs(self._losses, self._updates, whole)

    def update_rule(self, variant: int | None = None, parameter: str | None = None) -> UpdateRule:
        """Returns the update of one element of a parameter as formulas (sympy), read off the captured program.

        `variant` counts the variants of `programs["update"]` from 0, and is by default one that steps with state take;
        `parameter` is by default the first trained one.
        """
        check_plain(self._protocol, type(self.optimizer).__name__)
        return derive_update_rule(self.programs["update"].variants, variant, parameter)

    def requirements(
        self, hyper: Hyperparameters | None = None, meta: Any = None, state: TrainState | None = None, batch: Any = None
    ) -> Requirements:
        """Decides the requirements for meta-learning (Gimli, section 2.4) on the captured programs.

        Args:
            hyper: hyperparameters; those that require a gradient are those to be learned. The live ones by default.
            meta: the third argument of the loss.
            state: where training starts; `init()` by default.
            batch: a batch to capture the loss on. By default the loss that `step` captured last.

        Returns:
            The verdicts, with the operators and source lines that cut gradients; print it to read it.
        """
        check_plain(self._protocol, type(self.optimizer).__name__)
        values = self._hyper_values(hyper)
        start = self.init() if state is None else state
        captured = capture_for_requirements(self._losses, self._updates, start, values, self._trained, batch, meta)
        wanted = [path for path, value in values.items() if hyper is not None and is_differentiated(value)]
        return decide_requirements(captured, [*self.hyperparameters().by_path()], wanted)

    def report(self) -> list[Baked]:
        """Returns the numbers that are constants of the captured programs, each with the line that made it one."""
        whole = self._stepper.table.variants if isinstance(self._stepper, WholeStepper) else []
        return [entry for variant in (*self._updates.variants, *whole) for entry in variant.baked]

    def load_into(self, model: Any, optimizer: Any, state: TrainState, scheduler: Any = None) -> None:
        """Writes parameters, buffers and optimizer state into a live model and optimizer of the same structure.

        The state of schedulers goes into `scheduler`; by default, with the optimizer that `functionalize` was given,
        into the scheduler given there.
        """
        live = ModelView(model)
        check_tensors(state.params, live.live_params, "state.params")
        check_tensors(state.buffers, live.live_buffers, "state.buffers")
        write_back(self._view, live, optimizer, state, Schedulers(scheduler))

    def __repr__(self) -> str:
        return f"Functional({type(self.model).__name__}, {type(self.optimizer).__name__})"

    def __deepcopy__(self, memo: Any) -> Functional:
        return copy.copy(self)


def _missing_loss(*_: Any) -> torch.Tensor:
    raise InputError("There is no loss. Call `functionalize(model, optimizer, loss_fn)`.")
