"""The lines along which the live code is moved: one for each hyperparameter, for all parameters, gradients, state."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from gimli_compile.coverage.captured import Gradients
from gimli_compile.coverage.live import Drive, ParameterHolder, Trial, projection
from gimli_compile.coverage.places import Place, places_of
from gimli_compile.coverage.verdict import Line

_PROBE = 1e-3  # how far a number is moved to see whether the constructor takes it
_TINY = 1e-4  # numbers below this, zero and the constants that guard divisions, are moved to the right...
_SCALE = 0.1  # ...on this scale


@dataclass(frozen=True)
class Start:
    """Where lines start: a trial after `warm` live steps, with the places of its numbers then.

    `counters` are whole numbers that the next step changes.
    """

    trial: Trial
    warm: int
    places: Mapping[str, Place]
    param_names: tuple[str, ...]
    counters: frozenset[str]

    @classmethod
    def of(cls, trial: Trial, warm: int) -> Start:
        """Looks at live objects after the warm-up."""
        (model, optimizer), (later_model, later) = trial.start(warm), trial.start(warm + 1)
        params = dict(model.named_parameters())
        places, after = places_of(optimizer, params), places_of(later, dict(later_model.named_parameters()))
        whole = (path for path, place in places.items() if place.kind == "int" and path in after)
        counters = frozenset(path for path in whole if places[path].value != after[path].value)
        return cls(trial, warm, places, tuple(params), counters)

    def moved(self, moves: Mapping[str, torch.Tensor | float], offset: float) -> list[Drive]:
        """Returns the live parameters after each step when the values at these paths are moved by `offset` times that.

        Paths that share one tensor move once.
        """

        def prepare(model: Any, optimizer: Any) -> None:
            places = places_of(optimizer, dict(model.named_parameters()))
            done: set[int] = set()
            for path, along in moves.items():
                place = places[path]
                if not (isinstance(place.value, torch.Tensor) and id(place.value) in done):
                    place.move(offset * along)
                done.add(id(place.value))

        return self.trial.history(self.warm, prepare)


def hyper_lines(start: Start, gradients: Gradients) -> Iterator[tuple[Line, float]]:
    """Yields a line for each hyperparameter, with the program's derivative along it."""
    for path, gradient in gradients.hyper.items():
        place = start.places.get(path)
        if place is None or path in start.counters:
            continue
        if isinstance(place.value, torch.Tensor) and place.value.dim():
            along = _relative(place.value, 31)
            yield Line(path, _function(start, {path: along})), _dot(gradient, along)
        else:
            left, right = _rooms(start, place)
            line = Line(path, _function(start, {path: 1.0}), left, right, count=place.kind == "int")
            yield line, 0.0 if gradient is None else float(gradient)


def parameter_lines(start: Start, gradients: Gradients) -> Iterator[tuple[Line, float]]:
    """Yields a line for the parameters and one for what drives the steps."""
    model, _ = start.trial.start(start.warm)
    ways = {name: _relative(p, 13) for name, p in model.named_parameters() if p.requires_grad}

    def along_params(offset: float) -> float:
        def prepare(model: Any, optimizer: Any) -> None:
            for name, p in model.named_parameters():
                if name in ways:
                    p.add_(offset * ways[name])

        return float(projection(start.trial.history(start.warm, prepare)[-1]))

    yield Line("params", along_params), sum(_dot(gradients.params.get(name), way) for name, way in ways.items())
    drives = start.trial.drives(start.trial.recipe.steps)
    turns = [{name: _relative(value, 17 + step) for name, value in drive.items()} for step, drive in enumerate(drives)]

    def along_drives(offset: float) -> float:
        pairs = zip(drives, turns, strict=True)
        moved = [{name: value + offset * turn[name] for name, value in drive.items()} for drive, turn in pairs]
        return float(projection(start.trial.history(start.warm, drives=moved)[-1]))

    slope = sum(_dot(gradients.drives[t].get(name), way) for t, turn in enumerate(turns) for name, way in turn.items())
    yield Line("batches" if start.trial.driven_by_loss else "grads", along_drives), slope


def state_lines(start: Start, gradients: Gradients) -> Iterator[tuple[Line, float]]:
    """Yields a line for each kind of tensor and each number of the state; counters are left out."""
    ways: dict[str, dict[str, Any]] = {}
    slopes: dict[str, float] = {}
    for paths, gradient in gradients.state.items():
        known = [path for path in paths if path in start.places]
        if not known:
            continue
        value = torch.as_tensor(start.places[known[0]].value, dtype=torch.float64)
        if value.dim() == 0 and float(value).is_integer():
            continue
        label = f"state {_kind_of(known[0], start.param_names)}"
        along = _relative(value, 19) if value.dim() else torch.ones((), dtype=torch.float64) * _scale(float(value))
        ways.setdefault(label, {}).update(dict.fromkeys(known, along))
        slopes[label] = slopes.get(label, 0.0) + _dot(gradient, along)
    for label, moves in ways.items():
        plain = {path: along if along.dim() else float(along) for path, along in moves.items()}
        yield Line(label, _function(start, plain)), slopes[label]


def constants(start: Start, known: set[str], expected: list[Drive]) -> list[str]:
    """Returns the paths of other numbers, such as attributes, that the live result depends on."""
    found = []
    for path, place in start.places.items():
        if path in known or place.kind != "float":
            continue
        try:
            moved = start.moved({path: place.value * 1e-2 or _PROBE}, 1.0)
        except Exception:
            continue
        pairs = zip(moved, expected, strict=True)
        if any(not torch.allclose(a[name], b[name], rtol=1e-9, atol=0) for a, b in pairs for name in a):
            found.append(path)
    return found


def with_facts(line: Line, *, reported: bool, rounding: float) -> Line:
    """Returns the line with what is known of the program."""
    return replace(line, reported=reported, rounding=rounding)


def _function(start: Start, moves: Mapping[str, Any]) -> Any:
    return lambda offset: float(projection(start.moved(moves, offset)[-1]))


def _relative(value: torch.Tensor, seed: int) -> torch.Tensor:
    """Returns a random direction that moves each element by a part of itself: zeros, where signs jump, stay."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    return noise * value.detach().to(torch.float64).abs()


def _scale(value: float) -> float:
    return abs(value) or 1.0


def _dot(gradient: torch.Tensor | None, along: torch.Tensor) -> float:
    return 0.0 if gradient is None else float((gradient.detach().to(torch.float64) * along).sum())


def _kind_of(path: str, names: tuple[str, ...]) -> str:
    name = max((name for name in names if path.startswith(f"{name}.")), key=len, default=None)
    return path if name is None else path[len(name) + 1 :]


def _rooms(start: Start, place: Place) -> tuple[float, float]:
    """Returns how far a number may go to the left and to the right: a decay rate stays below 1, an epsilon above 0."""
    base = float(place.value)
    left, right = (abs(base) or _SCALE), (abs(base) if abs(base) >= _TINY else _SCALE)
    if 0.5 < base < 1:
        left = right = 1 - base
    allowed = left, right
    if not _is_taken(start, place, base - min(left / 2, _PROBE)):
        left = 0.0
    if not _is_taken(start, place, base + min(right / 2, _PROBE)):
        right = 0.0
    return (left, right) if left or right else allowed


def _is_taken(start: Start, place: Place, value: float) -> bool:
    """Tells whether the constructor takes a value for a group's number; True where it is not an argument of it."""
    _, _, name = place.path.partition("groups.0.")
    name, _, index = name.partition(".")
    trial = start.trial
    if trial.recipe.make is not None or not name or name not in inspect.signature(trial.kind).parameters:
        return True
    model = ParameterHolder(trial.shapes) if trial.recipe.model is None else trial.recipe.model()
    now = trial.recipe.arguments.get(name, inspect.signature(trial.kind).parameters[name].default)
    try:
        trial.make(model, **{name: _with(now, index, value)})
    except Exception:
        return False
    return True


def _with(now: Any, index: str, value: float) -> Any:
    if not index or not isinstance(now, (list, tuple)):
        return value
    return tuple(value if str(place) == index else entry for place, entry in enumerate(now))
