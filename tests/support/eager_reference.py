"""The yardstick: the live eager optimizer, run step by step, and central finite differences of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

import gimli_compile as gimli


class Holder(nn.Module):
    """A model that only holds parameters."""

    def __init__(self, shapes, dtype=torch.float64, frozen=()):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for index, shape in enumerate(shapes):
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            self.register_parameter(f"p{index}", nn.Parameter(value, requires_grad=index not in frozen))


@dataclass
class Case:
    """One optimizer with options, the shapes of its parameters, and how long it trains before capture."""

    make: Callable[[list[Any]], Any]
    shapes: tuple[tuple[int, ...], ...] = ((3, 2), (4,), (2, 2, 2))
    dtype: torch.dtype = torch.float64
    warm: int = 0
    steps: int = 5
    without_grad: tuple[int, ...] = ()
    frozen: tuple[int, ...] = ()
    groups: Callable[[list[Any]], list[Any]] = field(default=lambda params: params)
    grad_scale: float = 1.0
    per_parameter: bool = False

    def start(self) -> tuple[Any, Any]:
        """Returns a fresh model and optimizer, trained for `warm` steps."""
        torch.manual_seed(29)
        model = Holder(self.shapes, self.dtype, self.frozen)
        optimizer = self.make(self.groups(list(model.parameters())))
        for grads in self.gradients(self.warm, seed=5):
            eager_step(model, optimizer, grads)
        return model, optimizer

    def gradients(self, count, seed=7):
        """Returns the gradients by name for each step."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for _ in range(count):
            grads = {}
            for index, shape in enumerate(self.shapes):
                value = torch.randn(shape, generator=generator, dtype=torch.float64) * self.grad_scale
                skip = index in self.without_grad or index in self.frozen
                grads[f"p{index}"] = None if skip else value.to(self.dtype)
            made.append(grads)
        return made


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def eager_step(model, optimizer, grads):
    for name, parameter in model.named_parameters():
        parameter.grad = None if grads[name] is None else grads[name].detach().clone()
    optimizer.step()


def eager_params(case, prepare=lambda model, optimizer: None, grads=None):
    """Runs the live code; `prepare` may change it after the warm-up. Returns the parameters after each step."""
    model, optimizer = case.start()
    if case.per_parameter:
        optimizer.param_groups = [{**g, "params": [p]} for g in optimizer.param_groups for p in g["params"]]
    with torch.no_grad():
        prepare(model, optimizer)
    seed_all(23)
    history = []
    for step_grads in case.gradients(case.steps) if grads is None else grads:
        eager_step(model, optimizer, step_grads)
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return history


def functional_params(case):
    """Runs the captured programs on the same values. Returns all that a test needs."""
    model, optimizer = case.start()
    fn = gimli.functionalize(model, optimizer, per_parameter=case.per_parameter)
    state, hyper = fn.init(), fn.hyperparameters()
    return fn, state, hyper


def run_functional(case, fn, state, hyper, grads):
    params, opt_state = state.params, state.opt_state
    seed_all(23)
    history = []
    for step_grads in grads:
        params, opt_state = fn.update(params, step_grads, opt_state, hyper)
        history.append(params)
    return history


def relative_error(value, expected):
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).abs().max() / expected.abs().max().clamp(min=1e-30)) if value.numel() else 0.0


def worst_value_error(case):
    """Returns the largest relative difference to eager over all steps and parameters."""
    expected = eager_params(case)
    fn, state, hyper = functional_params(case)
    got = run_functional(case, fn, state, hyper, case.gradients(case.steps))
    return max(relative_error(got[t][n], expected[t][n]) for t in range(case.steps) for n in expected[t])


def projection(params) -> Any:
    """Returns a fixed random linear function of the parameters."""
    generator = torch.Generator().manual_seed(11)
    total = 0.0
    for value in params.values():
        total = (
            total + (torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype) * value).sum()
        )
    return total


def directions(tensors, seed):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in tensors.items()}


def set_number(optimizer, path, value):
    """Sets `groups.0.betas.1` on a live optimizer."""
    _, index, key, *rest = path.split(".")
    group = groups_of(optimizer)[int(index)]
    if rest:
        entries = list(group[key])
        entries[int(rest[0])] = value
        group[key] = tuple(entries)
    elif isinstance(group[key], torch.Tensor):
        group[key] = torch.as_tensor(value, dtype=group[key].dtype)
    else:
        group[key] = value


def get_number(optimizer, path):
    _, index, key, *rest = path.split(".")
    value = groups_of(optimizer)[int(index)][key]
    return float(value[int(rest[0])] if rest else value)


def groups_of(optimizer):
    """Returns the groups of an optimizer, or of a tuple, list or dict of optimizers."""
    each = optimizer if isinstance(optimizer, (tuple, list)) else getattr(optimizer, "values", lambda: [optimizer])()
    return [group for one in each for group in one.param_groups]


def central(function, h):
    """Returns the fourth-order central difference at 0."""
    return (8 * (function(h) - function(-h)) - (function(2 * h) - function(-2 * h))) / (12 * h)


def finite_difference(function, scale, lowest=1e-9):
    """Returns the best of estimates over widths from `scale` down: the one that agrees best with its neighbour."""
    widths = [scale * 10.0**-power for power in range(2, 9) if scale * 10.0**-power > lowest]
    estimates = [estimate for estimate in (central(function, width) for width in widths) if estimate == estimate]
    pairs = [(abs(a - b), b) for a, b in pairwise(estimates)]
    return min(pairs)[1]


def hyper_leaves(hyper, skip=()):
    """Returns the hyperparameters of the groups by path, each but those of `skip` made to require a gradient."""
    found = {}
    for index, group in enumerate(hyper.groups):
        for key, value in group.items():
            items = value if isinstance(value, (tuple, list)) else None
            if items is None:
                found[f"groups.{index}.{key}"] = value
            else:
                for place, item in enumerate(items):
                    if isinstance(item, torch.Tensor):
                        found[f"groups.{index}.{key}.{place}"] = item
    return {path: leaf.requires_grad_() for path, leaf in found.items() if path not in skip}


def gradient_errors(case, skip=(), state_too=True):
    """Returns, for each hyperparameter and for params, grads and state, the error against finite differences.

    The error is relative to the larger of the two derivatives, or absolute below 1e-3.
    """
    fn, state, hyper = functional_params(case)
    live_options = {path for path in hyper_leaves(fn.hyperparameters())}
    leaves = hyper_leaves(hyper, skip)
    for value in (*state.params.values(), *state.opt_state.values()):
        if value.is_floating_point():
            value.requires_grad_()
    grads = case.gradients(case.steps)
    for step_grads in grads:
        for value in step_grads.values():
            if value is not None:
                value.requires_grad_()
    final = run_functional(case, fn, state, hyper, grads)[-1]
    sources = {f"hyper {p}": leaf for p, leaf in leaves.items()}
    sources.update({f"param {n}": p for n, p in state.params.items()})
    sources.update({f"grad {t} {n}": g for t, gs in enumerate(grads) for n, g in gs.items() if g is not None})
    sources.update({f"state {p}": v for p, v in state.opt_state.items() if v.requires_grad})
    got = torch.autograd.grad(projection(final), list(sources.values()), allow_unused=True)
    got = dict(zip(sources, got, strict=True))
    assert live_options
    errors = {}
    for path in leaves:
        errors[path] = _error(got[f"hyper {path}"], _hyper_difference(case, path))
    errors["params"] = _params_error(case, state, got)
    errors["grads"] = _grads_error(case, grads, got)
    if state_too:
        errors.update(_state_errors(case, state, got))
    return errors


def _error(got, expected):
    value = 0.0 if got is None else float(got)
    return abs(value - expected) / max(abs(value), abs(expected), 1e-3)


def _hyper_difference(case, path):
    start = path if not case.per_parameter else f"groups.0.{path.split('.', 2)[2]}"
    base = get_number(case.start()[1], start)

    def function(offset):
        return float(projection(eager_params(case, lambda m, o: set_number(o, path, base + offset))[-1]))

    return finite_difference(function, _room(base))


def _room(base):
    """Returns how far a number can move: a decay rate stays below 1, a tiny constant is moved by much of a grid."""
    if 0.5 < base < 1:
        return 1 - base
    return max(abs(base), 1e-3)


def _params_error(case, state, got):
    along = directions(state.params, 13)
    value = sum(float((got[f"param {n}"] * d).sum()) for n, d in along.items() if got[f"param {n}"] is not None)

    def function(offset):
        def prepare(model, optimizer):
            for name, p in model.named_parameters():
                p.add_(offset * along[name].to(p.dtype))

        return float(projection(eager_params(case, prepare)[-1]))

    return _error(value, finite_difference(function, 1.0))


def _grads_error(case, grads, got):
    along = [directions({n: g for n, g in gs.items() if g is not None}, 17 + t) for t, gs in enumerate(grads)]
    value = sum(
        float((got[f"grad {t} {n}"] * d).sum())
        for t, ds in enumerate(along)
        for n, d in ds.items()
        if got[f"grad {t} {n}"] is not None
    )

    def function(offset):
        moved = [
            {n: None if g is None else g.detach() + offset * along[t][n] for n, g in gs.items()}
            for t, gs in enumerate(grads)
        ]
        return float(projection(eager_params(case, grads=moved)[-1]))

    return _error(value, finite_difference(function, 1e-2))


def _state_errors(case, state, got):
    errors = {}
    for path, value in state.opt_state.items():
        name, _, key = path.partition(".")
        if not value.is_floating_point() or value.dim() == 0 or name.startswith("groups"):
            continue
        along = directions({path: value}, 19)[path] * (value.detach() != 0)  # zeros are where signs jump
        derivative = got[f"state {path}"]

        def function(offset, name=name, key=key, along=along):
            def prepare(model, optimizer):
                optimizer.state[dict(model.named_parameters())[name]][key].add_(offset * along)

            return float(projection(eager_params(case, prepare)[-1]))

        slope = 0.0 if derivative is None else float((derivative * along).sum())
        scale = float(value.detach().abs()[value.detach() != 0].min().clamp(min=1e-4)) if value.any() else 1.0
        errors[f"state {path}"] = _error(slope, finite_difference(function, scale))
    return errors
