"""What the element-wise operators of a program mean for one element, as sympy expressions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction

_DENOMINATORS = (1, 2, 3, 4, 6, 8, 16, 32, 64)


def number(value: float) -> Any:
    """Returns a number of Python as sympy has it: whole numbers and simple fractions exactly, others as floats."""
    if isinstance(value, float) and math.isfinite(value):
        for denominator in _DENOMINATORS:
            if round(value * denominator) / denominator == value:
                return sympy.Rational(round(value * denominator), denominator)
    return sympy.sympify(value)


def is_condition(value: Any) -> bool:
    """Tells whether an expression is true or false; symbols are numbers here."""
    return isinstance(value, (Relational, BooleanFunction, BooleanAtom))


def as_number(value: Any) -> Any:
    """Returns 1 and 0 for true and false, and numbers as they are."""
    if isinstance(value, BooleanAtom):
        return sympy.Integer(1 if value else 0)
    return sympy.Piecewise((1, value), (0, True)) if is_condition(value) else value


def as_condition(value: Any) -> Any:
    """Returns `value != 0` for a number, and conditions as they are."""
    return value if is_condition(value) else sympy.Ne(value, 0)


def _select(condition: Any, chosen: Any, other: Any) -> Any:
    return sympy.Piecewise((as_number(chosen), as_condition(condition)), (as_number(other), True))


def _lerp(start: Any, end: Any, weight: Any) -> Any:
    return start * (1 - weight) + end * weight


def _clamp(value: Any, low: Any = None, high: Any = None, **bounds: Any) -> Any:
    low, high = bounds.get("min", low), bounds.get("max", high)
    value = value if low is None else sympy.Max(value, low)
    return value if high is None else sympy.Min(value, high)


def _divide(left: Any, right: Any, rounding_mode: str | None = None) -> Any:
    quotient = left / right
    if rounding_mode is None:
        return quotient
    return sympy.floor(quotient) if rounding_mode == "floor" else truncate(quotient)


def truncate(value: Any) -> Any:
    """Returns the whole part of a number, as casts to integers and `trunc` have it."""
    return value if value.is_integer else sympy.sign(value) * sympy.floor(sympy.Abs(value))


def _log_base(base: int) -> Callable[[Any], Any]:
    return lambda x: sympy.log(x) / sympy.log(base)


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda x, y, alpha=1: x + alpha * y,
    "sub": lambda x, y, alpha=1: x - alpha * y,
    "rsub": lambda x, y, alpha=1: y - alpha * x,
    "mul": lambda x, y: x * y,
    "div": _divide,
    "floor_divide": lambda x, y: sympy.floor(x / y),
    "remainder": lambda x, y: sympy.Mod(x, y),
    "pow": lambda x, y: x**y,
    "addcmul": lambda x, y, z, value=1: x + value * y * z,
    "addcdiv": lambda x, y, z, value=1: x + value * y / z,
    "lerp": _lerp,
    "neg": lambda x: -x,
    "reciprocal": lambda x: 1 / x,
    "square": lambda x: x**2,
    "sqrt": sympy.sqrt,
    "rsqrt": lambda x: 1 / sympy.sqrt(x),
    "abs": sympy.Abs,
    "sign": sympy.sign,
    "sgn": sympy.sign,
    "floor": sympy.floor,
    "ceil": sympy.ceiling,
    "trunc": truncate,
    "exp": sympy.exp,
    "expm1": lambda x: sympy.exp(x) - 1,
    "log": sympy.log,
    "log1p": lambda x: sympy.log(1 + x),
    "log2": _log_base(2),
    "log10": _log_base(10),
    "sin": sympy.sin,
    "cos": sympy.cos,
    "tan": sympy.tan,
    "tanh": sympy.tanh,
    "sinh": sympy.sinh,
    "cosh": sympy.cosh,
    "atan": sympy.atan,
    "atan2": sympy.atan2,
    "hypot": lambda x, y: sympy.sqrt(x**2 + y**2),
    "sigmoid": lambda x: 1 / (1 + sympy.exp(-x)),
    "erf": sympy.erf,
    "maximum": sympy.Max,
    "minimum": sympy.Min,
    "clamp": _clamp,
    "clamp_min": lambda x, low: sympy.Max(x, low),
    "clamp_max": lambda x, high: sympy.Min(x, high),
    "relu": lambda x: sympy.Max(x, 0),
    "eq": sympy.Eq,
    "ne": sympy.Ne,
    "lt": sympy.Lt,
    "le": sympy.Le,
    "gt": sympy.Gt,
    "ge": sympy.Ge,
}
LOGIC: dict[str, Callable[..., Any]] = {
    "where": _select,
    "masked_fill": lambda x, mask, value: _select(mask, value, x),
    "logical_and": lambda x, y: sympy.And(as_condition(x), as_condition(y)),
    "logical_or": lambda x, y: sympy.Or(as_condition(x), as_condition(y)),
    "logical_xor": lambda x, y: sympy.Xor(as_condition(x), as_condition(y)),
    "logical_not": lambda x: sympy.Not(as_condition(x)),
}
MADE: dict[str, Callable[..., Any]] = {
    "full": lambda _, value: value,
    "full_like": lambda _, value: value,
    "fill": lambda _, value: value,
    "new_full": lambda _, __, value: value,
    "scalar_tensor": lambda value: value,
    "copy": lambda _, value: value,
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), lambda *_: sympy.Integer(0)),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), lambda *_: sympy.Integer(1)),
}
IDENTITIES = frozenset("_to_copy clone detach alias expand lift_fresh lift_fresh_copy contiguous".split())
SAME_ELEMENTS = frozenset("view reshape _unsafe_view squeeze unsqueeze".split())
