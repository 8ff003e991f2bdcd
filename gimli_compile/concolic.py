"""Numbers that are concrete and symbolic at once: Python floats and ints that carry the tensor they stand for.

Arithmetic gives such numbers again and records tensor arithmetic (0-dim float64) beside Python's own; a comparison
gives Python's own answer and records it as a guard. A conversion that Python forces to a plain number is recorded as a
guard that pins the value, and reported as baked.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.findings import Baked, Guard
from gimli_compile.provenance import current_source, user_source
from gimli_compile.recording import COUNTED, DATA, Recorder, Region

Plain = float | int
_DISGUISE = -(2**70)  # no index, no size, and no loop over it runs for long


class Number:
    """What the float and the int kind share: `tensor`, its recorder and the arithmetic."""

    tensor: torch.Tensor
    recorder: Recorder

    @property
    def plain(self) -> Plain:
        """The concrete value as an ordinary number."""
        raise TypeError("Number is the shared half of FloatNumber and IntNumber")

    def __copy__(self) -> Number:
        return self

    def __deepcopy__(self, memo: Any) -> Number:
        return self

    __array_ufunc__ = None  # NumPy scalars leave arithmetic with a number to the number

    def __hash__(self) -> int:
        """Pins the value: a look-up in a dict or a set branches on it."""
        value = self.plain
        compare(operator.eq, self, value)
        return hash(value)

    def __divmod__(self: Any, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self: Any, other: Any) -> Any:
        return other // self, other % self

    def __bool__(self) -> bool:
        return compare(operator.ne, self, 0)

    def __float__(self) -> float:
        return float(bake(self, "a number that `float()` made plain"))

    def __int__(self) -> int:
        return int(bake(self, "a number that `int()` made plain"))

    def __round__(self, digits: int | None = None) -> Any:
        if digits is None:
            return unary(round, torch.round, self)
        return unary(lambda value: round(value, digits), lambda tensor: torch.round(tensor, decimals=digits), self)

    @property
    def real(self) -> Any:
        """The number itself."""
        return self

    def conjugate(self) -> Any:
        """Returns the number itself."""
        return self

    def is_integer(self: Any) -> bool:
        """Tells whether the value is whole, and guards the answer."""
        return compare(operator.eq, self % 1, 0)

    def __getnewargs__(self) -> tuple[Plain]:
        return (self.plain,)


class FloatNumber(Number, float):
    """A float that carries a tensor."""

    @property
    def plain(self) -> float:
        """The concrete value as an ordinary float."""
        return float.__add__(self, 0.0) if float.__ne__(self, 0.0) else float.__pos__(self)


class IntNumber(Number, int):
    """An int that carries a tensor, and its concrete value apart from what it is as an int."""

    value: int

    @property
    def plain(self) -> int:
        """The concrete value as an ordinary int."""
        return self.value


def make_number(value: Plain, tensor: torch.Tensor, recorder: Recorder) -> Any:
    """Returns a number of `value` that stands for `tensor` (0-dim float64, or of a parameter's shape)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a number stands for an int or a float, not for {type(value).__name__}")
    number = _make_int(value, tensor, recorder) if isinstance(value, int) else FloatNumber(value)
    number.tensor = tensor
    number.recorder = recorder
    return number


def _make_int(value: int, tensor: torch.Tensor, recorder: Recorder) -> IntNumber:
    counts = recorder.reach(tensor) & (COUNTED | DATA) == COUNTED
    recorder.counted |= counts
    number = IntNumber(_DISGUISE if counts and recorder.disguised else value)
    number.value = value
    return number


def plain(value: Any) -> Any:
    """Returns a number without what it stands for, a NumPy scalar as Python's; anything else unchanged."""
    if isinstance(value, Number):
        return value.plain
    return value.item() if isinstance(value, np.generic) else value


def number_of(tensor: torch.Tensor, recorder: Recorder) -> Any:
    """Returns the Python number of a traced one-element tensor, as `item()` does, tied to the tensor."""
    with recorder.paused():
        value = tensor.detach().reshape(()).item()
    if not recorder.reach(tensor) or isinstance(value, complex):
        return value
    carried = tensor.detach()
    carried = carried.reshape(()) if carried.dim() else carried
    if isinstance(value, bool):
        return guard(recorder, carried, value)
    carried = carried if carried.dtype == torch.float64 else carried.to(torch.float64)
    return make_number(value, carried.cpu(), recorder)


# ---------------------------------------------------------------------- operations


def unary(python: Callable[[Any], Any], on_tensor: Callable[[Any], Any], number: Number) -> Any:
    """Applies a function of one number to the concrete and to the symbolic value."""
    return make_number(python(number.plain), on_tensor(number.tensor), number.recorder)


def binary(python: Callable[..., Any], on_tensors: Callable[..., Any], left: Any, right: Any) -> Any:
    """Applies a function of two numbers, at least one of them concolic."""
    recorder = (left if isinstance(left, Number) else right).recorder
    value = python(plain(left), plain(right))
    if isinstance(value, complex):
        raise CaptureError(
            compose_message(
                "a number of the optimizer became complex",
                user_source(),
                "Captured numbers are real.",
                "Check the hyperparameters: a negative number is raised to a fractional power.",
            )
        )
    return make_number(value, on_tensors(_carried(left), _carried(right)), recorder)


def _carried(value: Any) -> Any:
    if isinstance(value, Number):
        return value.tensor
    if isinstance(value, np.generic):
        value = value.item()
    return int(value) if isinstance(value, bool) else value


def compare(python: Callable[..., Any], left: Any, right: Any) -> bool:
    """Returns Python's own answer to a comparison and records it as a guard."""
    recorder = (left if isinstance(left, Number) else right).recorder
    return guard(recorder, python(_carried(left), _carried(right)), python(plain(left), plain(right)))


def guard(recorder: Recorder, condition: torch.Tensor, outcome: bool) -> bool:
    """Records that a 0-dim bool tensor had `outcome`; a condition on a tensor of numbers must be unanimous."""
    if condition.dim() > 0:
        with recorder.paused():
            unanimous = bool((condition == outcome).all())
        if not unanimous:
            raise CaptureError(
                compose_message(
                    "a hyperparameter that is a tensor takes both branches of a comparison at once",
                    user_source(),
                    "The elements of a per-element hyperparameter must all take the same branch.",
                    "Keep all elements on one side, for example all of them positive.",
                )
            )
        condition = condition.all() if outcome else condition.any()
    recorder.guards.append(Guard(recorder.node_of(condition), outcome, current_source()))
    return outcome


def bake(number: Number, what: str) -> Plain:
    """Returns the plain value and pins it with a guard; the loss of its derivative is reported."""
    value = number.plain
    recorder = number.recorder
    follows = recorder.guards_branches and recorder.region is not Region.OPTIMIZER and isinstance(number, int)
    if recorder_reach(number) & DATA and not follows:
        raise CaptureError(
            compose_message(
                f"{what.replace('a number', 'a number read from a tensor', 1)}",
                user_source(),
                "The program would hold the value of this one step as a constant.",
                "Leave the number as `item()` returned it, or use tensor operators.",
            )
        )
    compare(operator.eq, number, value)
    if isinstance(number, float):
        number.recorder.baked.append(Baked(f"{what} is a constant of the program", current_source()))
    return value


def recorder_reach(number: Number) -> int:
    """Returns what the number's value depends on."""
    return number.recorder.reach(number.tensor)


# ---------------------------------------------------------------------- the methods of the two kinds


def _lifted(left: Any) -> torch.Tensor:
    return left if isinstance(left, torch.Tensor) else torch.full((), float(left), dtype=torch.float64)


_TENSOR_FORM: dict[Callable[..., Any], Callable[..., Any]] = {
    operator.truediv: lambda left, right: torch.div(_lifted(left), right),
    operator.floordiv: lambda left, right: torch.div(_lifted(left), right, rounding_mode="floor"),
    operator.mod: lambda left, right: torch.remainder(_lifted(left), right),
}
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def _is_operand(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating))


def _make_arithmetic(python: Callable[..., Any], *, swapped: bool) -> Callable[..., Any]:
    on_tensors = _TENSOR_FORM.get(python, python)

    def method(self: Any, other: Any, *rest: Any) -> Any:
        if python is operator.mul and isinstance(self, IntNumber) and isinstance(other, (list, tuple, str)):
            return other * int(bake(self, "a number of repetitions"))
        if isinstance(other, np.ndarray) and not rest:
            return _with_array(python, self, other, swapped=swapped)
        if not _is_operand(other) or rest:
            return NotImplemented
        return binary(python, on_tensors, other, self) if swapped else binary(python, on_tensors, self, other)

    return method


def _with_array(python: Callable[..., Any], number: Any, array: Any, *, swapped: bool) -> Any:
    """Arrays of NumPy have no tensor form: the number is pinned."""
    value = bake(number, "a number that meets a NumPy array")
    return python(array, value) if swapped else python(value, array)


def _make_comparison(python: Callable[..., bool]) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        if isinstance(other, np.ndarray):
            return _with_array(python, self, other, swapped=False)
        return compare(python, self, other) if _is_operand(other) else NotImplemented

    return method


def _make_unary(python: Callable[..., Any], on_tensor: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self: unary(python, on_tensor, self)


def _make_pinned(python: Callable[..., Any], *, swapped: bool) -> Callable[..., Any]:
    """Bits of a counter: no tensor form, so that the value is pinned."""

    def method(self: Any, other: Any) -> Any:
        value, other = bake(self, "a number whose bits are used"), plain(other)
        return python(other, value) if swapped else python(value, other)

    return method


def _install_methods() -> None:
    for name in _BITWISE:
        python = getattr(operator, f"{name}_" if name in ("and", "or") else name)
        setattr(IntNumber, f"__{name}__", _make_pinned(python, swapped=False))
        setattr(IntNumber, f"__r{name}__", _make_pinned(python, swapped=True))
    for name in ("__invert__", "bit_length", "bit_count"):
        setattr(IntNumber, name, lambda self, name=name: getattr(bake(self, "a number whose bits are used"), name)())
    unaries = {
        "__neg__": (operator.neg, torch.neg),
        "__pos__": (operator.pos, torch.positive),
        "__abs__": (abs, torch.abs),
        "__trunc__": (int, torch.trunc),
    }
    for name, pair in unaries.items():
        setattr(Number, name, _make_unary(*pair))
    roundings = {"__floor__": torch.floor, "__ceil__": torch.ceil}
    for name, on_tensor in roundings.items():
        setattr(Number, name, _make_unary(lambda value, name=name: getattr(float(value), name)(), on_tensor))
    for name in _ARITHMETIC:
        python = getattr(operator, name)
        setattr(Number, f"__{name}__", _make_arithmetic(python, swapped=False))
        setattr(Number, f"__r{name}__", _make_arithmetic(python, swapped=True))
    for name in _COMPARISONS:
        setattr(Number, f"__{name}__", _make_comparison(getattr(operator, name)))


_install_methods()
