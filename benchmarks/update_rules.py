"""The optimizers, copied by hand for torch and JAX alike: what contenders without a library step with.

A rule's state is a tuple for each parameter. `hyper` holds what is learned about the rule: numbers by name, one for
each parameter tensor where there is a list of them, or the weights of a learned optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.networks import CoordinateLSTM

LSTM_SCALE = 0.01  # of the learned optimizer's steps
RULE = CoordinateLSTM()


def first_state(rule: str, ops: Any, params: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Returns the state of every parameter before the first step."""
    if rule == "sgd":
        return {name: () for name in params}
    if rule == "adam":
        return {name: (ops.zeros_like(p), ops.zeros_like(p)) for name, p in params.items()}
    shapes = {name: (p.reshape(-1).shape[0], RULE.hidden) for name, p in params.items()}
    return {name: (ops.zeros_like(p, shapes[name]), ops.zeros_like(p, shapes[name])) for name, p in params.items()}


def take_step(rule: str, ops: Any, hyper: Mapping[str, Any], values: tuple[Any, Any, Any], count: Any) -> Any:
    """Steps all parameters: `values` are parameters, gradients and state by name; `count` is 1 in the first step."""
    params, grads, state = values
    stepped, remembered = {}, {}
    for index, (name, p) in enumerate(params.items()):
        own = {key: value[index] if key == "rates" else value for key, value in hyper.items()}
        stepped[name], remembered[name] = RULES[rule](ops, own, (p, grads[name], state[name]), count)
    return stepped, remembered


def _sgd(ops: Any, hyper: Mapping[str, Any], values: tuple[Any, Any, Any], count: Any) -> Any:
    p, grad, state = values
    return p - hyper.get("rates", hyper.get("lr")) * grad, state


def _adam(ops: Any, hyper: Mapping[str, Any], values: tuple[Any, Any, Any], count: Any) -> Any:
    p, grad, (mean, square) = values
    b1, b2 = hyper["beta1"], hyper["beta2"]
    mean = b1 * mean + (1 - b1) * grad
    square = b2 * square + (1 - b2) * grad * grad
    root = ops.guarded_sqrt(square / (1 - b2**count))
    return p - hyper["lr"] * (mean / (1 - b1**count)) / (root + hyper["eps"]), (mean, square)


def _learned(ops: Any, hyper: Mapping[str, Any], values: tuple[Any, Any, Any], count: Any) -> Any:
    p, grad, (hidden, cell) = values
    step, hidden, cell = RULE.apply(ops, hyper, (ops.reshape(grad, (-1,)), hidden, cell))
    return p - LSTM_SCALE * ops.reshape(step, p.shape), (hidden, cell)


RULES = {"sgd": _sgd, "adam": _adam, "lstm": _learned}
