"""Derivatives of live code by differences to both sides, so that a kink is told from an error."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from eager_reference import directions, eager_params, functional_params, projection, run_functional
from torch.overrides import TorchFunctionMode

_NARROW = {torch.float32, torch.bfloat16, torch.float16}
_CENTER = ((8, 1), (-8, -1), (-1, 2), (1, -2))
_ONE_SIDE = ((-25, 0), (48, 1), (-36, 2), (16, 3), (-3, 4))


class Widened(TorchFunctionMode):
    """Turns every narrow floating dtype that code asks for into float64: differences of rounded steps say nothing."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16):
            return args[0].double()
        return func(*map(_wide, args), **{key: _wide(value) for key, value in (kwargs or {}).items()})


def _wide(value):
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


class Line:
    """A function of one number near 0, each value computed once; NaN where it cannot be computed."""

    def __init__(self, function: Callable[[float], float]) -> None:
        self._function = function
        self._known: dict[float, float] = {}

    def __call__(self, offset):
        if offset not in self._known:
            try:
                self._known[offset] = self._function(offset)
            except Exception:  # code that refuses a value beyond its bounds has no difference to that side
                self._known[offset] = float("nan")
        return self._known[offset]

    def slope(self, stencil, widths, sign=1.0):
        """Returns the estimate that agrees best with that of the width before, and how well it does."""
        found = []
        for width in widths:
            value = sum(weight * self(sign * place * width) for weight, place in stencil) / (12 * sign * width)
            found.append((value, abs(self(0.0)) * 4e-15 / width))
        pairs = [(max(abs(a[0] - b[0]), b[1]), b[0]) for a, b in pairwise(found) if a[0] == a[0] and b[0] == b[0]]
        spread, value = min(pairs) if pairs else (float("inf"), float("nan"))
        return value, spread


def verdict(got, function, scale):
    """Returns None if `got` is the slope of a function at 0 (at a kink: lies between both slopes), else what is wrong.

    The slopes may differ by 1e-6 of the larger one, or by 1e-9.
    """
    line = Line(function)

    def close(value):
        return abs(got - value) <= max(1e-6 * max(abs(got), abs(value)), 1e-9)

    center, _ = line.slope(_CENTER, [scale * 10.0**-power for power in (1.5, 2, 2.5, 3, 4, 5)])
    if close(center):
        return None
    widths = [max(scale, 1e-3) * 10.0**-power for power in (1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7)]
    (right, above), (left, below) = line.slope(_ONE_SIDE, widths), line.slope(_ONE_SIDE, widths, -1.0)
    known = [value for value in (left, right) if value == value]
    if len(known) < 2 or abs(left - right) <= 10 * (above + below):  # no kink that could be seen
        if any(map(close, known)):
            return None
    elif min(known) <= got <= max(known) or any(map(close, known)):
        return None
    return f"{got:.10g} is not {center:.10g}, nor between {left:.10g} (±{below:.1g}) and {right:.10g} (±{above:.1g})"


def complaints(case):
    """Returns what is wrong with the derivatives of a case, by what they are taken in.

    They are those of a random projection of the last parameters in every float hyperparameter, and along one random
    direction in the parameters and in the gradients.
    """
    fn, state, hyper = functional_params(case)
    numbers = {leaf.path for leaf in fn._view.hyper_leaves() if leaf.kind == "float"}
    leaves = {path: leaf for path, leaf in hyper.by_path().items() if path in numbers}
    grads = case.gradients(case.steps)
    slopes = _slopes(case, (fn, state, hyper), grads, [leaves, state.params, *grads])
    found = {path: _in_number(case, path, float(slopes[0][path])) for path in leaves}
    found["params"] = _in_params(case, state.params, slopes[1])
    found["grads"] = _in_grads(case, grads, slopes[2:])
    return {path: text for path, text in found.items() if text is not None}


def complaint_of_state(case):
    """Returns what is wrong with the derivative along one random direction in all floats of a state, or None."""
    fn, state, hyper = functional_params(case)
    floats = {path: value for path, value in state.opt_state.items() if value.is_floating_point()}
    if not floats:
        return None
    first = {id(value): path for path, value in reversed(floats.items())}
    shared = {path: first[id(value)] for path, value in floats.items()}  # equal numbers are one tensor
    (slopes,) = _slopes(case, (fn, state, hyper), case.gradients(case.steps), [{p: floats[p] for p in first.values()}])
    return _in_state(case, floats, shared, slopes)


def _slopes(case, captured, grads, inputs):
    """Returns the derivatives of the projection in groups of inputs by path."""
    sources = [value.requires_grad_() for group in inputs for value in group.values()]
    fn, state, hyper = captured
    total = projection(run_functional(case, fn, state, hyper, grads)[-1])
    assert total.requires_grad, "the steps do nothing, so that there is nothing to compare"
    found = iter(torch.autograd.grad(total, sources, allow_unused=True, materialize_grads=True))
    return [{path: next(found) for path in group} for group in inputs]


def live(case, prepare=lambda model, optimizer: None, grads=None):
    """Returns the projection of the last parameters of the live run."""
    return float(projection(eager_params(case, prepare, grads)[-1]))


def _in_number(case, path, got):
    base = float(read(case.start()[1], path))
    scale = 1 - base if 0.5 < base < 1 else abs(base) or 1e-3
    return verdict(got, lambda offset: live(case, lambda _, o: write(o, path, base + offset)), scale)


def _in_params(case, params, slopes):
    along = directions(params, 13)

    def prepare(model, offset):
        for name, p in model.named_parameters():
            p.add_(offset * along[name])

    return verdict(_dot(slopes, along), lambda offset: live(case, lambda m, _: prepare(m, offset)), 1.0)


def _in_grads(case, grads, slopes):
    along = [directions(step, 17 + t) for t, step in enumerate(grads)]

    def moved(offset):
        return [{n: g.detach() + offset * d[n] for n, g in step.items()} for step, d in zip(grads, along, strict=True)]

    got = sum(_dot(own, d) for own, d in zip(slopes, along, strict=True))
    return verdict(got, lambda offset: live(case, grads=moved(offset)), 1e-2)


def _in_state(case, floats, shared, slopes):
    """Moves everything by a part of itself, so that small values stay what they are and zeros stay zeros."""
    along = {path: directions({path: floats[path]}, 19)[path] * floats[path].detach() for path in slopes}

    def prepare(model, optimizer, offset):
        owners: dict[str, Any] = {key: value for key, value in optimizer.state.items() if isinstance(key, str)}
        owners.update({name: optimizer.state[p] for name, p in model.named_parameters()})
        for path, source in shared.items():
            name, _, rest = path.partition(".")
            owner, key = (owners[name], rest) if name in owners else (optimizer, path)
            before = read(owner, key)
            if isinstance(before, torch.Tensor):
                before.add_((offset * along[source]).to(before.dtype))
            else:
                write(owner, key, before + offset * float(along[source]))

    return verdict(_dot(slopes, along), lambda offset: live(case, lambda m, o: prepare(m, o, offset)), 0.1)


def _dot(slopes, along):
    return sum(float((slopes[path] * direction).sum()) for path, direction in along.items())


def _walk(owner, path):
    """Returns the objects on the way to a path, each with the key that leads on, and what is there."""
    holder, parts = (
        (owner, path.split(".")) if not path.startswith("groups.") else (owner.param_groups, path.split(".")[1:])
    )
    way = []
    while parts:
        key = parts.pop(0)
        if isinstance(holder, (list, tuple, deque)):
            key = int(key)
        elif isinstance(holder, dict):
            names = {str(name): name for name in holder}
            while key not in names:  # a key that is a number has a point in it
                key = f"{key}.{parts.pop(0)}"
            key = names[key]
        way.append((holder, key))
        holder = holder[key] if isinstance(holder, (list, tuple, deque, dict)) else getattr(holder, str(key))
    return way, holder


def read(owner, path):
    """Returns the number or tensor at a path, as hyperparameters and states name it."""
    return _walk(owner, path)[1]


def write(owner, path, value):
    """Puts a number in its place; the tuples around it are made anew."""
    for holder, key in reversed(_walk(owner, path)[0]):
        if isinstance(holder, tuple):
            value = (*holder[:key], value, *holder[key + 1 :])
            continue
        if isinstance(holder, (list, dict)):
            holder[key] = value
        else:
            setattr(holder, key, value)
        return
