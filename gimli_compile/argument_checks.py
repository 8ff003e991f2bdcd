"""Checks of what users pass: each fault is named by its path, with the cure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from gimli_compile.errors import InputError, compose_message
from gimli_compile.model_view import ModelView
from gimli_compile.optimizer_view import OptimizerView
from gimli_compile.protocol import Protocol
from gimli_compile.several_optimizers import kind_of, members
from gimli_compile.state import Hyperparameters, OptState, TrainState


def check_plain(protocol: Protocol | None, name: str) -> None:
    """Refuses to speak of the update alone where it is no function of gradients, or does not run on its own."""
    if protocol is None:
        raise InputError(
            compose_message(
                f"`{name}.step` runs in the train step only",
                None,
                "It ran neither along made-up gradients nor with a made-up loss, so that no update is known apart.",
                "Use `step` and `unroll`, and look at `programs['step']`. What is differentiable in what, "
                "`torch.autograd.grad` of their results says.",
            )
        )
    if not protocol.is_plain:
        raise InputError(
            compose_message(
                f"`{name}.step` is no function of gradients alone",
                None,
                "It evaluates the loss or differentiates gradients, or a scheduler needs the loss: only the step can.",
                "Use `step` and `unroll`, and look at `programs['step']`. What is differentiable in what, "
                "`torch.autograd.grad` of their results says.",
            )
        )


def check_method(optimizer: Any, method: str) -> None:
    """Refuses a method that the optimizer does not have."""
    if not any(callable(getattr(one, method, None)) for one in members(optimizer)):
        raise InputError(f"`{kind_of(optimizer)}` has no method {method!r}.")


def check_callable(model: Any) -> None:
    """Refuses to call what is no model but a collection of modules and tensors."""
    if not callable(model):
        raise InputError(
            compose_message(
                f"the model is a {type(model).__name__}, which cannot be called",
                None,
                "`forward` calls the model itself, and a collection of modules and tensors has no forward pass.",
                "Compute what you need from `state.params` and `state.buffers`, for example with `functional_call`.",
            )
        )


def check_optimizer_params(optimizer: Any, view: ModelView) -> None:
    """Refuses an optimizer over parameters that the model does not have."""
    for index, group in enumerate(optimizer.param_groups):
        for place, param in enumerate(group["params"]):
            if id(param) not in view.param_names:
                raise InputError(
                    compose_message(
                        f"parameter {place} of the optimizer's group {index} (shape {tuple(param.shape)}) "
                        "is none of the model's",
                        None,
                        "A program knows parameters by the names that the model gives them.",
                        "Create the optimizer from this model's `parameters()`, or from the very tensors of a "
                        "collection; if they were copied, moved or re-initialized since, create it again.",
                    )
                )


def check_options(view: OptimizerView) -> None:
    """Refuses to run programs of an optimizer whose options changed since they were made for it."""
    held = view.read()
    if held is view.last_checked:  # nothing changed: it would have been read anew
        return
    now = view.read_options()
    if now == view.options:
        view.last_checked = held
        return
    changed = "the number of parameter groups"
    if len(now) == len(view.options):
        changed = ", ".join(
            f"groups.{index}.{key}"
            for index, (old, new) in enumerate(zip(view.options, now, strict=True))
            for key in sorted({entry[0] for entry in set(old) ^ set(new)})
        )
    raise InputError(
        compose_message(
            f"the optimizer's options changed after `functionalize`: {changed}",
            None,
            "Programs are made for the options that the optimizer had then.",
            "Call `functionalize` again. Numbers, such as a learning rate, may change at any time.",
        )
    )


def check_model(view: ModelView, before: Mapping[str, tuple[int, bool]]) -> None:
    """Refuses to run programs of a model whose parameters were replaced, frozen or freed since."""
    now = view.identity()
    if now == before:
        return
    changed = sorted(name for name in {*now, *before} if now.get(name) != before.get(name))
    raise InputError(
        compose_message(
            f"the model's parameters changed after `functionalize`: {', '.join(changed[:4])}",
            None,
            "Programs are made for the parameters that the model had then, trained or frozen as they were.",
            "Call `functionalize` again. The values of parameters may change at any time.",
        )
    )


def check_functions(loss_fn: Any, train_step: Any) -> None:
    """Refuses a loss or a train step that cannot be called as one, and both at once."""
    if loss_fn is not None and (isinstance(loss_fn, torch.Tensor) or not callable(loss_fn)):
        raise InputError(
            f"the loss is a {type(loss_fn).__name__}. Pass a function `loss_fn(model, batch)` or "
            "`loss_fn(model, batch, meta)` that returns a scalar tensor."
        )
    if train_step is not None and not callable(train_step):
        raise InputError(
            f"the train step is a {type(train_step).__name__}. Pass a function `train_step(model, optimizer, batch)` "
            "or `train_step(model, optimizer, batch, meta)` that returns the loss."
        )
    if loss_fn is not None and train_step is not None:
        raise InputError("`loss_fn` and `train_step` exclude each other: a train step evaluates the loss itself.")


def are_kept(buffers: str) -> bool:
    """Tells whether a policy for buffers keeps them as they are; refuses one that does not exist."""
    if buffers not in ("thread", "freeze"):
        raise InputError(f"buffers={buffers!r} is not an option. Use 'thread' or 'freeze'.")
    return buffers == "freeze"


def check_loss_given(loss_fn: Any, train_step: Any) -> None:
    """Refuses to step without a loss."""
    if loss_fn is None and train_step is None:
        raise InputError(
            compose_message(
                "`step` and `unroll` need a loss",
                None,
                "`functionalize(model, optimizer)` was given none.",
                "Call `functionalize(model, optimizer, loss_fn)`.",
            )
        )


def check_has_loss(loss_fn: Any) -> None:
    """Refuses to evaluate a loss that there is none of."""
    if loss_fn is None:
        raise InputError(
            compose_message(
                "`loss` needs a loss function",
                None,
                "`functionalize` was given none; a train step computes its loss itself.",
                "Call `functionalize(model, optimizer, loss_fn)`, or compute the loss of the output `fn(state, x)`.",
            )
        )


def guards_branches(branches: Any) -> bool:
    """Tells whether branches on values are to be guarded; refuses a word for them that means nothing."""
    if branches not in ("refuse", "guard"):
        raise InputError(f'branches={branches!r} means nothing. Use "refuse" or "guard": see `functionalize`.')
    return branches == "guard"


def check_train_state(state: Any) -> None:
    """Refuses what is no train state."""
    if not isinstance(state, TrainState):
        raise InputError(f"the state is a {type(state).__name__}. Use the TrainState that `init()` returns.")


def check_constants(constants: Iterable[torch.Tensor]) -> None:
    """Refuses to recompute steps that hold a tensor to differentiate which is none of their arguments."""
    for tensor in constants:
        if tensor.requires_grad:
            raise InputError(
                compose_message(
                    f"the loss or the optimizer uses a tensor of shape {tuple(tensor.shape)} that requires a gradient "
                    "and is no argument",
                    None,
                    "With `checkpoint`, a step is computed again from its arguments only: the gradient would be lost.",
                    "Pass the tensor as `meta`, let the optimizer hold it as an attribute, or use `checkpoint=None`.",
                )
            )


def check_shapes(hyper: Mapping[str, torch.Tensor], view: OptimizerView) -> None:
    """Refuses a hyperparameter with dimensions that do not fit every parameter of its group, or not the live tensor."""
    _check_tensor_shapes(hyper, view)
    if not any(value.dim() for value in hyper.values()):
        return
    names = view.group_names()
    shapes = {name: p.shape for p, name in view.live_params()}
    owned = {leaf.path for leaf in view.hyper_leaves() if leaf.is_parameter}
    for path, value in hyper.items():
        if not value.dim() or not path.startswith("groups.") or path in owned:
            continue
        for name in names[int(path.split(".")[1])]:
            fits = len(value.shape) <= len(shapes[name]) and all(
                size in (1, full) for size, full in zip(value.shape[::-1], shapes[name][::-1], strict=False)
            )
            if not fits:
                raise InputError(
                    compose_message(
                        f"hyper[{path}] has shape {tuple(value.shape)}, "
                        f"but {name!r} of its group {tuple(shapes[name])}",
                        None,
                        "A hyperparameter is one number for the group, or one for each element of its parameter.",
                        "Use `functionalize(..., per_parameter=True)` and a tensor of the parameter's own shape.",
                    )
                )


def _check_tensor_shapes(hyper: Mapping[str, torch.Tensor], view: OptimizerView) -> None:
    """Refuses another shape for a parameter of a module of the optimizer, or for a tensor that it holds."""
    for leaf in view.hyper_leaves():
        live, value = view.values[leaf.path], hyper.get(leaf.path)
        if value is None or not isinstance(live, torch.Tensor):
            continue
        if value.shape != live.shape and (leaf.is_parameter or not leaf.path.startswith("groups.")):
            raise InputError(
                compose_message(
                    f"hyper[{leaf.path}] has shape {tuple(value.shape)}, but the optimizer's is {tuple(live.shape)}",
                    None,
                    "A program is made for tensors of the shapes that the optimizer holds.",
                    "Take `hyperparameters()` and replace entries by tensors of the same shape.",
                )
            )


def check_tensors(given: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor], what: str) -> None:
    """Refuses parameters or buffers whose names, shapes or dtypes are not the model's."""
    for name in (*live, *given):
        if name not in given or name not in live:
            side = "lacks" if name not in given else "has an extra"
            raise InputError(
                compose_message(
                    f"{what} {side} {name!r}",
                    None,
                    "A state belongs to the model that `functionalize` was given.",
                    "Make the state with `init()` of this object, and keep all its entries.",
                )
            )
    for name, value in given.items():
        if not isinstance(value, torch.Tensor) or value.shape != live[name].shape:
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise InputError(
                compose_message(
                    f"{what}[{name!r}] is {shape}, but the model's is {tuple(live[name].shape)}",
                    None,
                    "A state belongs to the model that `functionalize` was given.",
                    "Make the state with `init()` of this object.",
                )
            )


def check_evaluated(params: Any, buffers: Any, model: ModelView, *, tasks: bool) -> None:
    """Refuses what is no parameters and buffers of this model, which was read for this call; all of one task."""
    given = [{n: _of_first(v) for n, v in of.items()} if tasks else of for of in (params, buffers)]
    check_tensors(given[0], model.params, "params")
    check_tensors(given[1], model.buffers, "buffers")


def _of_first(value: Any) -> Any:
    return value[0] if isinstance(value, torch.Tensor) and value.dim() else value


def check_start(state: Any, model: ModelView, view: OptimizerView) -> None:
    """Refuses to step from what is no state of this model, which was read for this call, and optimizer."""
    check_train_state(state)
    check_tensors(state.params, model.params, "state.params")
    check_tensors(state.buffers, model.buffers, "state.buffers")
    check_gradients(state.grads, model.params)
    check_state(state.opt_state, view)


def check_gradients(given: Mapping[str, Any], live: Mapping[str, torch.Tensor]) -> None:
    """Refuses gradients of other parameters, or of other shapes."""
    for name, grad in given.items():
        shape = tuple(getattr(getattr(grad, "dense", grad), "shape", ()))
        if name not in live or shape != tuple(live[name].shape):
            raise InputError(
                compose_message(
                    f"state.grads[{name!r}] has shape {shape}, and is the gradient of no parameter of that shape",
                    None,
                    "A train step finds it in `p.grad`.",
                    "Take states from `init()` and `step()`; an empty dict is that of `zero_grad()`.",
                )
            )


def check_state(state: Any, view: OptimizerView) -> None:
    """Refuses an optimizer state of something else."""
    if not isinstance(state, OptState):
        raise InputError(
            f"the optimizer state is a {type(state).__name__}. "
            "Use the `opt_state` of the TrainState that `init()` returns."
        )
    owner = state.skeleton.root.owner
    if owner is not view.optimizer:
        raise InputError(
            compose_message(
                f"the optimizer state is that of another optimizer, a {type(owner).__name__}",
                None,
                "A state has the structure of the optimizer that it was made for.",
                "Make the state with `init()` of this object.",
            )
        )


def check_hyper(hyper: Any, expected: set[str]) -> dict[str, torch.Tensor]:
    """Returns the hyperparameters by path; refuses a structure that is not the optimizer's."""
    if not isinstance(hyper, Hyperparameters):
        raise InputError(
            f"hyper is a {type(hyper).__name__}. Take `hyperparameters()` of this object and replace entries of it."
        )
    given = hyper.by_path()
    if given.keys() != expected:
        _check_entries(given, expected)
    return {path: _as_tensor(path, value) for path, value in given.items()}


def _check_entries(given: Mapping[str, Any], expected: set[str]) -> None:
    wanted = {path for path in expected if path.startswith("groups.")}
    for path in sorted(set(given) - expected):
        raise InputError(
            compose_message(
                f"hyper has an entry {path!r} that the optimizer has no hyperparameter for",
                None,
                "It would have no effect.",
                f"The optimizer's are: {', '.join(sorted(wanted))}.",
            )
        )
    for path in sorted(wanted - set(given)):
        raise InputError(
            compose_message(
                f"hyper lacks {path!r}",
                None,
                "Every hyperparameter is an input of the program.",
                "Take `hyperparameters()` and replace single entries; do not remove any.",
            )
        )


def _as_tensor(path: str, value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            return value
        return value.to(torch.float64)
    if isinstance(value, (int, float)):
        return torch.tensor(float(value), dtype=torch.float64)
    raise InputError(f"hyper[{path}] is a {type(value).__name__}. A hyperparameter is a tensor or a number.")
