"""Ways in which a concolic number would silently become a plain one: `math.*`, `float()`, `max()`, `range()`.

While a trace runs, the functions of `math` and the scalar ones of NumPy understand concolic numbers, and the traced
modules see forms of the builtins that do. Everything is put back afterwards.
"""

from __future__ import annotations

import builtins
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from gimli_compile.concolic import Number, bake, binary, guard, make_number, plain, unary
from gimli_compile.host_draws import host_draw_functions
from gimli_compile.recording import Recorder

_UNARY = {
    "sqrt": torch.sqrt, "exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log2": torch.log2,
    "log10": torch.log10, "log1p": torch.log1p, "sin": torch.sin, "cos": torch.cos, "tan": torch.tan,
    "tanh": torch.tanh, "sinh": torch.sinh, "cosh": torch.cosh, "asin": torch.asin, "acos": torch.acos,
    "atan": torch.atan, "fabs": torch.abs, "erf": torch.erf, "cbrt": lambda x: x.sign() * x.abs() ** (1 / 3),
    "degrees": torch.rad2deg, "radians": torch.deg2rad,
}  # fmt: skip
_WHOLE = {"floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc}
_BINARY = {
    "pow": torch.pow, "atan2": torch.atan2, "hypot": torch.hypot, "copysign": torch.copysign, "fmod": torch.fmod,
}  # fmt: skip
_TESTS = {"isnan": torch.isnan, "isinf": torch.isinf, "isfinite": torch.isfinite}
_NUMPY = {
    "sqrt": torch.sqrt, "exp": torch.exp, "log": torch.log, "log1p": torch.log1p, "sin": torch.sin, "cos": torch.cos,
    "tanh": torch.tanh, "abs": torch.abs, "absolute": torch.abs, "square": torch.square, "log2": torch.log2,
    "log10": torch.log10, "expm1": torch.expm1, "floor": torch.floor, "ceil": torch.ceil,
}  # fmt: skip
_NUMPY_BINARY = {"power": torch.pow, "maximum": torch.maximum, "minimum": torch.minimum}


_PACKAGE = __name__.split(".")[0]


def _as_tensor(value: Any) -> torch.Tensor:
    return value.tensor if isinstance(value, Number) else torch.full((), float(value), dtype=torch.float64)


class Escapes:
    """The replacements for one trace."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def _read(self, value: Any) -> Any:
        """Turns a traced tensor into its number, as `math` does by calling `float` on it."""
        if isinstance(value, torch.Tensor) and self._recorder.reach(value):
            return value.item()
        return value

    def unary(self, original: Callable[..., Any], on_tensor: Callable[..., Any]) -> Callable[..., Any]:
        """A function of one number becomes the tensor operator."""

        def function(value: Any, *rest: Any) -> Any:
            value = self._read(value)
            if not isinstance(value, Number) or rest:
                return _with_base(original, value, rest)
            return unary(lambda x: _python_number(original(x)), on_tensor, value)

        return function

    def binary(self, original: Callable[..., Any], on_tensors: Callable[..., Any]) -> Callable[..., Any]:
        """A function of two numbers becomes the tensor operator; with further arguments the numbers are pinned."""

        def function(left: Any, right: Any, *rest: Any, **options: Any) -> Any:
            left, right = self._read(left), self._read(right)
            if not (isinstance(left, Number) or isinstance(right, Number)) or rest or options:
                return self.baking(original)(left, right, *rest, **options)
            number = left if isinstance(left, Number) else right
            value = _python_number(original(plain(left), plain(right)))
            return make_number(value, on_tensors(_as_tensor(left), _as_tensor(right)), number.recorder)

        return function

    def test(self, original: Callable[..., Any], on_tensor: Callable[..., Any]) -> Callable[..., Any]:
        """A test of a number keeps Python's answer and guards it."""

        def function(value: Any) -> Any:
            value = self._read(value)
            if not isinstance(value, Number):
                return original(value)
            return guard(self._recorder, on_tensor(value.tensor), original(value.plain))

        return function

    def extreme(
        self, original: Callable[..., Any], with_constant: Callable[..., Any], between: Callable[..., Any]
    ) -> Callable[..., Any]:
        """`max` and `min` of numbers become a choice between tensors: no branch, no guard.

        Where a number equals a constant, its derivative is the mean of the slopes on both sides, as torch has it. Where
        two numbers are equal, they may be one and the same for many steps, and the mean is no slope of anything.
        """

        def function(*args: Any, **options: Any) -> Any:
            values = list(args[0]) if len(args) == 1 and not isinstance(args[0], torch.Tensor) else list(args)
            if options or not any(isinstance(value, Number) for value in values):
                return original(*args, **options) if len(args) != 1 else original(values, **options)
            if not all(isinstance(value, (int, float)) for value in values):
                return original(values)
            result = values[0]
            for value in values[1:]:
                if isinstance(result, Number) or isinstance(value, Number):
                    both = isinstance(result, Number) and isinstance(value, Number)
                    form = between if both else with_constant
                    result = binary(original, lambda a, b, form=form: form(*_tensors(a, b)), result, value)
                else:
                    result = original(result, value)
            return result

        return function

    def baking(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A function without a tensor form: the numbers that it takes are pinned and reported."""

        def function(*args: Any, **options: Any) -> Any:
            what = f"a number passed to `{original.__name__}`"
            pinned = tree_map(lambda leaf: bake(leaf, what) if isinstance(leaf, Number) else leaf, args)
            return original(*pinned, **options)

        return function

    def range(self, *args: Any) -> builtins.range:
        """A loop count is pinned: the loop is unrolled."""
        counts: list[Any] = [bake(a, "a loop count") if isinstance(a, Number) else a for a in args]
        return builtins.range(*counts)

    def kind(self, original: type, convert: Callable[[Any], Any]) -> type:
        """Returns a class that stands for `float` or `int` and keeps concolic numbers."""
        read = self._read

        class Kind(type):
            stands_for = original

            def __call__(cls, *args: Any, **options: Any) -> Any:
                value = read(args[0]) if len(args) == 1 else None
                return convert(value) if isinstance(value, Number) else original(*args, **options)

            def __instancecheck__(cls, value: Any) -> bool:
                return isinstance(value, original)

            def __subclasscheck__(cls, other: type) -> bool:
                return issubclass(other, original)

            def __eq__(cls, other: object) -> bool:
                return other is original or (isinstance(other, type) and issubclass(other, original))

            def __hash__(cls) -> int:
                return hash(original)

            def __getattr__(cls, name: str) -> Any:
                return getattr(original, name)

        return Kind(original.__name__, (), {})

    def builtins(self) -> dict[str, Any]:
        """The forms of the builtins that traced modules see."""
        return {
            "float": self.kind(float, _to_float),
            "int": self.kind(int, _to_int),
            "max": self.extreme(max, torch.maximum, _later_if(torch.gt)),
            "min": self.extreme(min, torch.minimum, _later_if(torch.lt)),
            "range": self.range,
        }

    def functions(self) -> dict[tuple[ModuleType, str], Callable[..., Any]]:
        """The replacements in `math` and NumPy, by module and name."""
        made: dict[tuple[ModuleType, str], Callable[..., Any]] = {}
        for name, form in (_UNARY | _WHOLE).items():
            if hasattr(math, name):
                made[math, name] = self.unary(getattr(math, name), form)
        for name, form in _BINARY.items():
            made[math, name] = self.binary(getattr(math, name), form)
        for name, form in _TESTS.items():
            made[math, name] = self.test(getattr(math, name), form)
        for name, original in vars(math).items():
            if callable(original) and not name.startswith("_") and (math, name) not in made:
                made[math, name] = self.baking(original)
        for name, form in _NUMPY.items():
            made[np, name] = self.unary(getattr(np, name), form)
        for name, form in _NUMPY_BINARY.items():
            made[np, name] = self.binary(getattr(np, name), form)
        return made


def _later_if(is_better: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Returns the choice that Python makes: the first of equal numbers, whose derivative is then the whole one."""
    return lambda first, later: torch.where(is_better(later, first), later, first)


_LOG = math.log


def _with_base(original: Callable[..., Any], value: Any, rest: tuple[Any, ...]) -> Any:
    """Handles `math.log(x, base)`, the one function here with a second argument."""
    if rest and original is _LOG and (isinstance(value, Number) or isinstance(rest[0], Number)):
        base = rest[0]
        number = value if isinstance(value, Number) else base
        form = torch.log(_as_tensor(value)) / torch.log(_as_tensor(base))
        return make_number(_LOG(plain(value), plain(base)), form, number.recorder)
    return original(value, *rest)


def _tensors(left: Any, right: Any) -> tuple[torch.Tensor, torch.Tensor]:
    def lift(value: Any) -> torch.Tensor:
        return value if isinstance(value, torch.Tensor) else torch.full((), float(value), dtype=torch.float64)

    return lift(left), lift(right)


def _python_number(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _to_float(number: Number) -> Any:
    return make_number(float(number.plain), number.tensor, number.recorder)


def _to_int(number: Number) -> Any:
    form = number.tensor if isinstance(number, int) else torch.trunc(number.tensor)
    return make_number(int(number.plain), form, number.recorder)


def modules_of(classes: Iterable[type], functions: Iterable[FunctionType] = ()) -> list[ModuleType]:
    """Returns the modules in which code of these classes and functions may live.

    Of classes: their own and their packages'. Of functions: their own.
    """
    prefixes = set()
    own = {function.__module__ for function in functions}
    own = {name for name in own if name and name.split(".")[0] not in (*sys.stdlib_module_names, _PACKAGE)}
    for cls in classes:
        for base in cls.__mro__:
            parts = base.__module__.split(".")
            if parts[0] not in sys.stdlib_module_names:
                prefixes.add(".".join(parts[:2]) if parts[0] == "torch" else parts[0])
    prefixes.discard(_PACKAGE)  # what captures is not captured
    named = [(name, module) for name, module in list(sys.modules.items()) if isinstance(module, ModuleType)]
    return [m for name, m in named if name in own or any(name == p or name.startswith(p + ".") for p in prefixes)]


def modules_of_functions(functions: Iterable[Callable[..., Any]]) -> list[ModuleType]:
    """Returns the modules in which functions were written."""
    names = [getattr(inspect.unwrap(function), "__module__", None) for function in functions]
    return [sys.modules[name] for name in names if name in sys.modules and name.split(".")[0] != _PACKAGE]


@contextmanager
def escapes_closed(recorder: Recorder, modules: Iterable[ModuleType]) -> Iterator[None]:
    """Puts the replacements in place while the trace runs."""
    escapes = Escapes(recorder)
    functions, shadows = {**escapes.functions(), **host_draw_functions(recorder)}, escapes.builtins()
    by_original = {id(getattr(module, name)): form for (module, name), form in functions.items()}
    undo: list[tuple[dict[str, Any], str, Any]] = []

    def put(names: dict[str, Any], name: str, value: Any) -> None:
        undo.append((names, name, names.get(name, undo)))
        names[name] = value

    try:
        for module in modules:
            for name, value in list(vars(module).items()):
                if id(value) in by_original:
                    put(vars(module), name, by_original[id(value)])
            for name, value in shadows.items():
                if name not in vars(module):
                    put(vars(module), name, value)
        for (module, name), form in functions.items():
            put(vars(module), name, form)
        yield
    finally:
        for names, name, before in reversed(undo):
            if before is undo:
                del names[name]
            else:
                names[name] = before
