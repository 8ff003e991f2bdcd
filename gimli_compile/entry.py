"""The way in: `functionalize`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gimli_compile.functional import Functional, LossFunction, TrainStep
from gimli_compile.torch_support import check_torch


def functionalize(
    model: Any,
    optimizer: Any,
    loss_fn: LossFunction | None = None,
    *,
    train_step: TrainStep | None = None,
    per_parameter: bool = False,
    scheduler: Any = None,
    branches: str = "refuse",
    objects: Mapping[str, Any] | None = None,
    buffers: str = "thread",
    example: Any = None,
    example_meta: Any = None,
) -> Functional:
    """Turns a live model and optimizer into pure, differentiable functions; neither is changed, but for `example`.

    Args:
        model: any `nn.Module` whose parameters are initialized; or what is trained in its place: a tensor, or a pytree
            of modules and tensors, such as `(generator, discriminator)` or `{"model": model, "images": images}`. The
            loss gets the same structure; tensors are known by their paths, as `images` or `model.0.weight`.
        optimizer: any optimizer over the model's parameters, fresh or in the middle of training; or a list, tuple or
            dict of several, which the train step gets as they are (without one, they step along the gradient of the
            same loss in turn). Their groups are numbered through; see `Hyperparameters`.
        loss_fn: `loss_fn(model, batch)` or `loss_fn(model, batch, meta)`, returning a scalar tensor. It calls the model
            as usual; `meta` is a pytree of tensors to differentiate with respect to. Needed for `step` and `unroll`.
            The default step evaluates it, runs the backward pass and lets the optimizer step; an optimizer whose `step`
            wants a closure, or gradients with their graph, gets them.
        train_step: the loop body that you have, in place of a loss: `train_step(model, optimizer, batch)` or
            `train_step(model, optimizer, batch, meta)`. It calls `zero_grad`, `backward` and `step` as usual, clips,
            accumulates, evaluates as often as it likes, and returns the loss (or a pytree of tensors).
        per_parameter: gives every parameter a group, and so hyperparameters, of its own.
        scheduler: a learning-rate scheduler of the optimizer (of any of several), or a list of them: after
            `optimizer.step()`, every update runs `scheduler.step()`, or `scheduler.step(loss)` where an argument is
            required (then only whole steps have a program). What it assigns is state, the learning rate among it
            (`groups.0.lr` of the initial state); what it reads is a hyperparameter
            (`hyper.attributes["scheduler.gamma"]`). With `train_step`, which steps its schedulers itself, this only
            declares them: their numbers are then part of the program.
        branches: what to do where the model or the loss asks in Python for a value that depends on parameters, as in
            `if out.norm() > 1:`. "refuse" says which line does; "guard" gives each outcome a program, which computes
            its conditions too: where they fail, the step is captured again. See docs/models.md.
        objects: other objects that the train step uses and changes, by name: `{"scaler": GradScaler("cpu")}`, an
            average of the weights, a counter. What they hold is state (`state.opt_state["scaler._scale"]`), or a
            hyperparameter if no step changes it (`hyper.attributes["scaler._growth_factor"]`).
        buffers: "thread" hands buffers on from step to step, as live training does. "freeze" gives a state after a step
            the buffers before it, all of them: running statistics stay, and in training mode batch norm still
            normalizes by the batch. That is MAML's usual batch norm: no statistics of one task in another.
        example: a batch, where the model has lazy modules that never ran (`nn.LazyLinear`). They are initialized on it:
            the loss or the train step is called with it, with an optimizer that does nothing, until the last parameter
            has its shape; without either, the model (`model(example)`, a tuple as arguments, a dict as keywords). This
            is torch's own dry run, and the only change of the live model ever made: its parameters then have the
            values that `model(x)` gives them in this place, and buffers, gradients, attributes and generators are as
            before. An optimizer that was created before stays valid. Without lazy modules nothing is run.
        example_meta: the `meta` for that run, where the loss or the train step takes one and needs it.

    Raises:
        InputError: the optimizer has parameters that the model does not have, the model is not initialized, or the
            example does not go through it.
        CaptureError: a step of the optimizer does not run.
    """
    check_torch()
    return Functional(
        model,
        optimizer,
        loss_fn,
        train_step=train_step,
        per_parameter=per_parameter,
        scheduler=scheduler,
        branches=branches,
        objects=objects,
        buffers=buffers,
        example=example,
        example_meta=example_meta,
    )
