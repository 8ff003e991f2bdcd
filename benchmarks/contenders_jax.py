"""JAX: `jit` of the gradient through `scan`, `vmap` over tasks; with rules by hand and with optax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import optax
from jax import numpy as jnp

from benchmarks import jax_operators as ops
from benchmarks.meta_gradient import NotThereError, Run, Setting
from benchmarks.update_rules import first_state, take_step
from benchmarks.workloads import Workload

Tree = Any


def _losses(workload: Workload) -> Callable[[Tree, Tree], Any]:
    kinds = {"cross_entropy": ops.cross_entropy, "squared": lambda out, y: ((out - y) ** 2).mean()}

    def loss(params: Tree, batch: Tree) -> Any:
        return kinds[workload.loss](workload.network.apply(ops, params, batch[0]), batch[1])

    return loss


def _by_hand(workload: Workload, hyper: Tree) -> tuple[Any, Any]:
    def init(params: Tree) -> Tree:
        return first_state(workload.rule, ops, params), jnp.ones((), next(iter(params.values())).dtype)

    def update(params: Tree, grads: Tree, state: Tree) -> Tree:
        memory, count = state
        params = {name: params[name] for name in workload.network.shapes()}  # JAX sorts a dict's keys
        params, memory = take_step(workload.rule, ops, hyper, (params, grads, memory), count)
        return params, (memory, count + 1)

    return init, update


def _optax(workload: Workload, hyper: Tree) -> tuple[Any, Any]:
    if workload.rule == "lstm" or "rates" in hyper:
        raise NotThereError("optax has no rule of this kind")
    if workload.rule == "sgd":
        rule = optax.sgd(hyper["lr"])
    else:
        rule = optax.adam(hyper["lr"], b1=hyper["beta1"], b2=hyper["beta2"], eps=hyper["eps"])

    def update(params: Tree, grads: Tree, state: Tree) -> Tree:
        steps, state = rule.update(grads, state, params)
        return optax.apply_updates(params, steps), state

    return rule.init, update


RULES = {"hand": _by_hand, "optax": _optax}


def _trained(workload: Workload, rule: str, *, checkpoint: bool) -> Callable[..., Tree]:
    """Returns the function from parameters, hyperparameters and batches [step] to the last parameters."""
    loss = _losses(workload)

    def train(params: Tree, hyper: Tree, batches: Tree) -> Tree:
        init, update = RULES[rule](workload, hyper)

        def step(carry: Tree, batch: Tree) -> tuple[Tree, None]:
            params, state = carry
            return update(params, jax.grad(loss)(params, batch), state), None

        step = jax.checkpoint(step) if checkpoint else step
        (params, _), _ = jax.lax.scan(step, (params, init(params)), batches)
        return params

    return train


class _Prepared:
    """Values and batches on the device."""

    def __init__(self, workload: Workload, setting: Setting) -> None:
        jax.config.update("jax_enable_x64", True)
        if setting.device == "cuda" and jax.default_backend() == "cpu":
            raise NotThereError("JAX was installed without CUDA")
        cast = partial(_cast, dtype=setting.dtype)
        self.params = jax.tree.map(cast, workload.params())
        self.hyper = jax.tree.map(cast, workload.hyper())
        x, y, held_x, held_y = map(cast, workload.data())
        self.batches, self.held_out = (x, y), (held_x, held_y)


def _cast(values: Any, dtype: str) -> Any:
    kind = dtype if values.dtype.kind == "f" else "int32"
    return jnp.asarray(values, kind)


class Compiled:
    """A run of a compiled function; `temporary` is what XLA plans to allocate in it, in bytes."""

    def __init__(self, function: Callable[..., Tree], arguments: Tree) -> None:
        self.program = jax.jit(function).lower(*arguments).compile()
        self.arguments = arguments
        self.temporary = getattr(self.program.memory_analysis(), "temp_size_in_bytes", None)

    def __call__(self) -> Tree:
        return jax.block_until_ready(self.program(*self.arguments))


def meta_gradient(workload: Workload, setting: Setting, *, rule: str = "hand", checkpoint: bool = False) -> Run:
    """The meta-gradient, with every step recomputed if `checkpoint`."""
    values = _Prepared(workload, setting)
    train, loss = _trained(workload, rule, checkpoint=checkpoint), _losses(workload)

    def objective(wanted: Tree, others: Tree, batches: Tree, held_out: Tree) -> Any:
        every = others | wanted
        run = partial(train, every["params"], every["hyper"])
        if workload.tasks is None:
            return loss(run(batches), held_out)
        return jax.vmap(lambda batches, held_out: loss(run(batches), held_out))(batches, held_out).mean()

    groups = {"params": values.params, "hyper": values.hyper}
    wanted = {name: group for name, group in groups.items() if name in workload.wanted}
    others = {name: group for name, group in groups.items() if name not in workload.wanted}

    def outcome(*arguments: Tree) -> Tree:
        value, grads = jax.value_and_grad(objective)(*arguments)
        return {"loss": value} | grads

    return Compiled(outcome, (wanted, others, values.batches, values.held_out))


def plain_training(workload: Workload, setting: Setting) -> Run:
    """The same steps without any meta-gradient."""
    values = _Prepared(workload, setting)
    train = _trained(workload, "hand", checkpoint=False)
    mapped = train if workload.tasks is None else jax.vmap(train, in_axes=(None, None, 0))
    run = Compiled(mapped, (values.params, values.hyper, values.batches))
    return _Silent(run)


class _Silent:
    """A run without an outcome to compare."""

    def __init__(self, run: Compiled) -> None:
        self.run, self.temporary = run, run.temporary

    def __call__(self) -> Tree:
        self.run()
        return {}
