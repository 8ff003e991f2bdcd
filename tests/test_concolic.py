"""Numbers that are concrete and symbolic at once, and the ways in which they would become plain ones."""

import copy
import math
import operator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from recorded import call, trace

import gimli_compile as gimli
from gimli_compile.concolic import FloatNumber, IntNumber, Number, make_number, plain
from gimli_compile.errors import CaptureError
from gimli_compile.escapes import escapes_closed, modules_of
from gimli_compile.recording import Recorder

X = torch.tensor([0.5, -1.25, 2.0], dtype=torch.float64)


def evaluate(program, numbers):
    """Returns the first result of a program of numbers, as a Python float."""
    values = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in numbers.items()}
    return call(program, values)["output[0]"].item()


def slope(program, numbers, name):
    values = {key: torch.tensor(float(value), dtype=torch.float64) for key, value in numbers.items()}
    values[name].requires_grad_()
    result = call_differentiably(program, values)
    if not result.requires_grad:
        return 0.0
    (gradient,) = torch.autograd.grad(result, values[name], allow_unused=True)
    return 0.0 if gradient is None else gradient.item()


def call_differentiably(program, values):
    return next(iter(program({slot: values[slot.path] for slot in program.inputs}).values()))


def difference(function, numbers, name):
    """Returns the fourth-order central difference of a Python function of floats."""
    step = 1e-3 * (abs(numbers[name]) or 1.0)

    def at(offset):
        return float(function(**{**numbers, name: numbers[name] + offset}))

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


def check(function, numbers, others, *, smooth=True):
    """Checks a function of numbers: Python's own value and type, the program's values at other numbers, its slopes."""
    made = trace(function, numbers=numbers)
    expected = function(**numbers)
    assert isinstance(made.value, Number)
    assert type(plain(made.value)) is type(expected)
    assert plain(made.value) == expected and math.copysign(1, plain(made.value)) == math.copysign(1, expected)
    assert made.baked == []
    for given in (numbers, *others):
        assert evaluate(made.program, given) == pytest.approx(function(**given), rel=1e-15, abs=0)
    if smooth:
        for name in numbers:
            if isinstance(numbers[name], float):
                expected = difference(function, numbers, name)
                assert slope(made.program, numbers, name) == pytest.approx(expected, rel=1e-8, abs=1e-10)
    return made


# ---------------------------------------------------------------------- arithmetic

OPERATORS = {name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}
PAIRS = [(2.5, 0.75), (2.5, 3), (7, 0.75), (7, 3), (0.3, 0.1), (0.01, 7)]
SIGNED = [(-2.5, 0.75), (2.5, -0.75), (-7, 3), (7, -3), (-7, -3), (-0.5, 2)]
SMOOTH = ("add", "sub", "mul", "truediv", "pow")


def moved(value):
    return value + 1 if isinstance(value, int) else value * 1.125


REAL = [(n, a, b) for n in OPERATORS for a, b in PAIRS + SIGNED if n != "pow" or a > 0 or isinstance(b, int)]


@pytest.mark.parametrize(("name", "a", "b"), REAL)
def test_two_numbers(name, a, b):
    function = OPERATORS[name]
    made = check(
        lambda a, b: function(a, b), {"a": a, "b": b}, [{"a": moved(a), "b": moved(b)}], smooth=name in SMOOTH and a > 0
    )
    assert made.outcomes == []


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_a_number_and_a_plain_one(name, a, b):
    function = OPERATORS[name]
    check(lambda a: function(a, b), {"a": a}, [{"a": moved(a)}], smooth=name in SMOOTH)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("a", "b"), [(a, b) for a, b in PAIRS if isinstance(a, int) or isinstance(b, float)])
def test_a_plain_number_and_one(name, a, b):
    function = OPERATORS[name]
    check(lambda b: function(a, b), {"b": b}, [{"b": moved(b)}], smooth=name in SMOOTH)


@pytest.mark.parametrize("name", ["floordiv", "mod"])
def test_slopes_of_whole_quotients(name):
    function = OPERATORS[name]
    program = trace(lambda a, b: function(a, b), numbers={"a": 7.5, "b": 2.0}).program
    expected = {"floordiv": (0.0, 0.0), "mod": (1.0, -3.0)}[name]
    assert tuple(slope(program, {"a": 7.5, "b": 2.0}, key) for key in "ab") == expected


@pytest.mark.parametrize("left", [7, 7.5])
def test_slope_of_a_remainder_of_a_plain_number(left):
    """The operator with a plain number on the left has no derivative."""
    program = trace(lambda b: left % b, numbers={"b": 2.0}).program
    assert slope(program, {"b": 2.0}, "b") == -3.0


@pytest.mark.parametrize("name", OPERATORS)
def test_assignment_with_an_operator(name):
    function = getattr(operator, f"i{name}")
    check(lambda a, b: function(a, b), {"a": 2.5, "b": 2}, [{"a": 4.0, "b": 3}], smooth=name in SMOOTH)


@pytest.mark.parametrize("value", [2.5, -2.5, 3, -3, 0.0])
def test_signs(value):
    check(lambda a: -a, {"a": value}, [{"a": moved(value)}])
    check(lambda a: +a, {"a": value}, [{"a": moved(value)}])
    check(lambda a: abs(a), {"a": value}, [{"a": -value}], smooth=value != 0)


@pytest.mark.parametrize("value", [2.5, 3.5, -2.5, 2.4999, 7, -0.3])
def test_roundings(value):
    other = [{"a": value + 1}, {"a": value - 10}]
    check(lambda a: round(a), {"a": value}, other, smooth=False)
    check(lambda a: math.floor(a), {"a": value}, other, smooth=False)
    check(lambda a: math.ceil(a), {"a": value}, other, smooth=False)
    check(lambda a: math.trunc(a), {"a": value}, other, smooth=False)


@pytest.mark.parametrize(("value", "digits"), [(2.34567, 3), (0.125, 2), (1234.5, -2), (1250, -2)])
def test_rounding_to_digits(value, digits):
    check(lambda a: round(a, digits), {"a": value}, [{"a": value * 2}], smooth=False)


@pytest.mark.parametrize(("a", "b"), [(7, 3), (7.5, 2), (-7.5, 2), (7, 2.5)])
def test_divmod(a, b):
    for part in (0, 1):
        check(lambda a, b, part=part: divmod(a, b)[part], {"a": a, "b": b}, [{"a": a + 10, "b": b}], smooth=False)
        check(lambda a, part=part: divmod(a, b)[part], {"a": a}, [{"a": a + 10}], smooth=False)
        if isinstance(a, int):  # Python asks a float first, and it takes any int as it is
            check(lambda b, part=part: divmod(a, b)[part], {"b": b}, [{"b": b * 2}], smooth=False)


def test_sums_of_mixed_lists():
    check(lambda a, b: sum([1.5, a, 2, b]), {"a": 0.25, "b": 3}, [{"a": 7.0, "b": 4}])
    check(lambda b: sum([2, b]), {"b": 3}, [{"b": 9}])


def test_a_bias_correction():
    def corrected(lr, beta, step):
        step += 1
        return lr * (1 - beta**step) / (1 - 0.5 * beta**step)

    numbers = {"lr": 0.1, "beta": 0.99, "step": 4}
    check(corrected, numbers, [{**numbers, "step": step} for step in (5, 100)])


def test_bools_are_plain_operands():
    check(lambda a: a * True + (a - False), {"a": 2.5}, [{"a": 3.0}])


def test_numpy_scalars_are_plain_operands():
    for scalar in (np.float64(1.5), np.float32(1.5), np.int64(2)):
        for function in (lambda a, s: a * s + 1, lambda a, s: s - a, lambda a, s: s / a, lambda a, s: max(a, s)):
            made = trace(lambda a, f=function, s=scalar: f(a, s), numbers={"a": 2.5})
            assert isinstance(made.value, Number) and made.baked == []
            assert plain(made.value) == function(2.5, scalar)
            if function(2.5, scalar) != 2.5:
                assert evaluate(made.program, {"a": 3.0}) == function(3.0, scalar)


@pytest.mark.parametrize("function", [lambda a: a // 0, lambda a: a / 0, lambda a: a % 0, lambda a: 0.0 ** (-a)])
def test_what_python_refuses_is_refused(function):
    with pytest.raises(ZeroDivisionError):
        trace(function, numbers={"a": 2.0})


def test_texts_are_an_error_as_ever():
    for function in (lambda a: a + "1", lambda a: "1" + a, lambda a: a < "1", lambda a: [] * a):
        with pytest.raises(TypeError):
            trace(function, numbers={"a": 2.0})


def test_a_complex_power_is_refused():
    with pytest.raises(CaptureError, match=r"became complex\n.*test_concolic\.py:\d+ in .*a\*\*0\.5"):
        trace(lambda a: a**0.5, numbers={"a": -2.0})


BITS = {
    "n & 1": lambda n: n & 1,
    "3 & n": lambda n: 3 & n,
    "n | 4": lambda n: n | 4,
    "n ^ 1": lambda n: n ^ 1,
    "n >> 1": lambda n: n >> 1,
    "n << 1": lambda n: n << 1,
    "1 << n": lambda n: 1 << n,
    "~n": lambda n: ~n,
    "[0] * n": lambda n: [0] * n,
    "n * 'a'": lambda n: n * "a",
    "bit_length": lambda n: n.bit_length(),
}


@pytest.mark.parametrize("name", BITS)
def test_what_reads_a_whole_number_pins_it_at_least(name):
    made = trace(BITS[name], numbers={"n": 6})
    value = made.value
    assert (plain(value) if isinstance(value, Number) else value) == BITS[name](6)
    assert isinstance(value, Number) or made.outcomes


class Counting(torch.optim.Optimizer):
    """Steps along the gradient, `factor(step)` times `lr`; keeps its count as a plain int."""

    def __init__(self, params, factor, lr=0.5):
        super().__init__(params, {"lr": lr, "step": 0})
        self.factor = factor

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                p.add_(p.grad, alpha=-group["lr"] * self.factor(group["step"]))


READ_BY_C = {
    "a plain float on the left": lambda n: 1.5 / n,
    "a plain base": lambda n: 1 - 0.5**n,
    "bits": lambda n: n & 2,
    "shift": lambda n: 1 / (1 << n),
    "index": lambda n: [0.0, 2.0, 3.0, 5.0, 7.0, 11.0][n],
    "repetition": lambda n: len([0] * n),
    "member of a set": lambda n: 2 if n in {2, 4} else 1,
    "key of a dict": lambda n: {3: 5.0}.get(n, 1.0),
    "divmod": lambda n: divmod(n, 2)[1],
    "remainder": lambda n: 2 if n % 3 == 0 else 1,
    "text": lambda n: len(f"{'':>{n}}"),
    "factorial": lambda n: 1 / math.factorial(n),
    "power of two": lambda n: math.ldexp(1.0, -n),
    "numpy": lambda n: float(np.float64(0.5) ** n),
    "bytes": lambda n: len(bytes(n)),
    "range": lambda n: sum(range(n)),
    "range of the builtins": lambda n: len(list(__builtins__["range"](n))),
    "str": lambda n: int(str(n)[-1]),
}


@pytest.mark.filterwarnings("ignore::gimli_compile.errors.BakedValueWarning")
@pytest.mark.parametrize("name", READ_BY_C)
def test_a_count_that_c_code_reads_is_never_silently_a_constant(name):
    """Python hands an int subclass to C code without asking it; such a step must be captured again for each count."""
    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    optimizer = Counting(model.parameters(), READ_BY_C[name])
    fn = gimli.functionalize(model, optimizer)
    state = fn.init()
    params, opt_state = state.params, state.opt_state
    for _ in range(5):
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        params, opt_state = fn.update(params, {"weight": torch.ones_like(model.weight)}, opt_state)
        assert torch.equal(params["weight"], model.weight)


# ---------------------------------------------------------------------- answers and guards

COMPARISONS = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


@pytest.mark.parametrize("name", COMPARISONS)
@pytest.mark.parametrize(("a", "b"), [(1.5, 2.5), (2.5, 2.5), (3, 2), (2, 2.0), (2, 2.5)])
def test_comparisons_are_pythons_and_guarded(name, a, b):
    function = COMPARISONS[name]
    forms = (
        (lambda a, b: function(a, b), {"a": a, "b": b}),
        (lambda a: function(a, b), {"a": a}),
        (lambda b: function(a, b), {"b": b}),
    )
    for form, numbers in forms:
        made = trace(form, numbers=numbers)
        assert made.value is function(a, b)
        assert made.outcomes == [made.value]
        for given in ({"a": 1.0, "b": 9.0}, {"a": 9.0, "b": 1.0}, {"a": 2.0, "b": 2.0}):
            given = {key: given[key] for key in numbers}
            values = {key: torch.tensor(value, dtype=torch.float64) for key, value in given.items()}
            assert call(made.program, values)["guard[0]"].item() is form(**given)


def test_guards_name_their_line():
    made = trace(lambda a: 1 if a > 2 else 0, numbers={"a": 3.0})
    (guard,) = made.recorder.guards
    assert "made = trace(lambda a: 1 if a > 2 else 0" in str(guard.source)


@pytest.mark.parametrize("value", [0.0, 0, 1e-300, -1, 2.5, math.nan])
def test_truth(value):
    made = trace(lambda a: bool(a), numbers={"a": value})
    assert made.value is bool(value) and made.outcomes == [bool(value)]
    made = trace(lambda a: not a, numbers={"a": value})
    assert made.value is (not value) and made.outcomes == [bool(value)]


def test_other_kinds_compare_without_a_guard():
    made = trace(lambda a: [a == "x", a != None, a in ("x", None)], numbers={"a": 2.0})  # noqa: E711
    assert made.value == [False, True, False] and made.outcomes == []


def test_whole_floats():
    made = trace(lambda a: (a * 2).is_integer(), numbers={"a": 1.5})
    assert made.value is True and made.outcomes == [True]


def test_membership_of_a_tuple_is_guarded():
    made = trace(lambda n: n in (3, 5, 7), numbers={"n": 5})
    assert made.value is True and made.outcomes == [False, True]
    made = trace(lambda n: n in (3, 5), numbers={"n": 4})
    assert made.value is False and made.outcomes == [False, False]


def test_a_dict_finds_a_number_and_the_find_is_guarded():
    made = trace(lambda n: {3: "three", 5: "five"}[n], numbers={"n": 5})
    assert made.value == "five" and hash(make_number(5, X[0], Recorder("unused"))) == hash(5)
    assert made.outcomes == [True, True]  # of the hash, and of the comparison
    assert call(made.program, {"n": torch.tensor(3.0, dtype=torch.float64)})["guard[0]"].item() is False


@pytest.mark.parametrize("table", [{3: 1.0, 5: 2.0}, {3, 5}, frozenset({3, 5})])
def test_a_look_up_that_misses_is_guarded_as_well(table):
    made = trace(lambda n: n in table, numbers={"n": 4})
    assert made.value is False
    assert made.outcomes
    for found in (3, 5):
        guards = call(made.program, {"n": torch.tensor(float(found), dtype=torch.float64)})
        assert [bool(value) for value in guards.values()] != made.outcomes


# ---------------------------------------------------------------------- numbers that are made plain


@pytest.mark.parametrize(("convert", "value"), [(float, 2.5), (int, 2.5), (float, 3), (int, 3)])
def test_conversions_outside_of_the_escapes_pin(convert, value):
    made = trace(lambda a: convert(a), numbers={"a": value})
    assert made.value == convert(value) and type(made.value) is convert
    assert made.outcomes == [True]
    guards = call(made.program, {"a": torch.tensor(value + 1, dtype=torch.float64)})
    assert guards["guard[0]"].item() is False


def test_a_float_that_is_made_plain_is_reported_and_an_int_is_only_pinned():
    made = trace(lambda a, n: float(a) + int(n), numbers={"a": 2.5, "n": 3})
    assert len(made.baked) == 1 and "a number that `float()` made plain" in made.baked[0]
    assert "float(a) + int(n)" in str(made.recorder.baked[0])
    assert made.outcomes == [True, True]


def test_a_number_read_from_a_tensor_cannot_be_made_plain():
    with pytest.raises(CaptureError, match=r"a number read from a tensor that `float\(\)` made plain\n.*test_concolic"):
        trace(lambda x: float(x.sum().item()), {"x": X}, {})


def test_copies_are_the_number_itself():
    made = trace(lambda a: [copy.copy(a) is a, copy.deepcopy({"a": [a]})["a"][0] is a], numbers={"a": 2.5})
    assert made.value == [True, True]


def test_texts_show_the_plain_value():
    made = trace(lambda a, n: f"{a} {a:.2f} {n} {n:d} %g %d" % (a, n), numbers={"a": 2.5, "n": 3})
    assert made.value == "2.5 2.50 3 3 2.5 3" and made.outcomes == []


def test_make_number_takes_ints_and_floats_only():
    recorder = Recorder("unused")
    assert type(make_number(2, X[0], recorder)) is IntNumber
    assert type(make_number(2.0, X[0], recorder)) is FloatNumber
    refused: list[Any] = [True, "2", None, 2j]
    for value in refused:
        with pytest.raises(TypeError, match="stands for an int or a float"):
            make_number(value, X[0], recorder)


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, 1e-320, 2.5])
def test_plain_values_are_kept_to_the_bit(value):
    number = make_number(value, X[0], Recorder("unused"))
    assert type(number.plain) is float and math.copysign(1, number.plain) == math.copysign(1, value)
    assert number.plain == value
    assert math.isnan(make_number(math.nan, X[0], Recorder("unused")).plain)


def test_numbers_are_of_their_python_type():
    made = trace(
        lambda a, n: [isinstance(a, float), isinstance(n, int), isinstance(n, float)], numbers={"a": 2.5, "n": 3}
    )
    assert made.value == [True, True, False]


# ---------------------------------------------------------------------- numbers of tensors


def test_items_are_tied_to_their_tensor():
    made = trace(lambda x: x.sum().item() * 2, {"x": X}, {})
    assert isinstance(made.value, FloatNumber) and plain(made.value) == 2.5
    assert call(made.program, {"x": X * 3})["output[0]"].item() == 7.5


def test_lists_are_tied_to_their_tensor():
    made = trace(lambda x: x.tolist()[1] + x[None].tolist()[0][2], {"x": X}, {})
    assert plain(made.value) == 0.75
    assert call(made.program, {"x": X * 3})["output[0]"].item() == 2.25


def test_truth_of_a_tensor_is_guarded():
    made = trace(lambda x: bool((x > 1).any()), {"x": X}, {})
    assert made.value is True and made.outcomes == [True]
    assert call(made.program, {"x": -X.abs()})["guard[0]"].item() is False


@pytest.mark.parametrize("function", [lambda x: 1 if x.max() > 1 else 0, lambda x: int(torch.equal(x, x * 2))])
def test_branches_on_tensors_are_guarded(function):
    made = trace(function, {"x": X}, {})
    assert made.value == function(X) and made.outcomes == [bool(function(X))]


def test_per_element_numbers_are_compared_as_one():
    def function(a):
        return 1 if a > 2 else 0

    recorder = Recorder("test")
    with recorder:
        assert function(make_number(3.0, torch.tensor([3.0, 4.0], dtype=torch.float64), recorder)) == 1
        with pytest.raises(CaptureError, match="takes both branches of a comparison at once"):
            function(make_number(3.0, torch.tensor([3.0, 1.0], dtype=torch.float64), recorder))


# ---------------------------------------------------------------------- escapes


@pytest.fixture
def library():
    """A third-party module that took names out of `math`, as the traced one."""
    module = ModuleType("some_library_of_optimizers")
    source = """
import math
import math as m
import numpy
import numpy as np
from math import sqrt, log as ln
from numpy import exp

own_max = max

def use(function, **given):
    return eval(function, {**globals(), **given})
"""
    exec(source, vars(module))
    return module


def closed(module):
    """Returns what makes the context in which a module is traced."""
    return lambda recorder: escapes_closed(recorder, [module])


FUNCTIONS = {
    "math.sqrt(a)": {"a": 2.5}, "m.exp(a)": {"a": 0.5}, "math.expm1(a)": {"a": 0.5}, "ln(a)": {"a": 2.5},
    "math.log(a, 2)": {"a": 2.5}, "math.log(2.0, a)": {"a": 2.5}, "math.log2(a)": {"a": 2.5}, "math.log10(a)": {"a": 2.5},
    "math.log1p(a)": {"a": 2.5}, "math.sin(a)": {"a": 2.5}, "math.cos(a)": {"a": 2.5}, "math.tan(a)": {"a": 0.5},
    "math.tanh(a)": {"a": 0.5}, "math.sinh(a)": {"a": 0.5}, "math.cosh(a)": {"a": 0.5}, "math.asin(a)": {"a": 0.5},
    "math.acos(a)": {"a": 0.5}, "math.atan(a)": {"a": 0.5}, "math.fabs(a)": {"a": -2.5}, "math.erf(a)": {"a": 0.5},
    "math.cbrt(a)": {"a": 2.5}, "math.degrees(a)": {"a": 0.5}, "math.radians(a)": {"a": 50.0}, "sqrt(a) + sqrt(4)": {"a": 2.5},
    "math.pow(a, b)": {"a": 2.5, "b": 0.7}, "math.pow(2, b)": {"b": 3}, "math.atan2(a, b)": {"a": 2.5, "b": 0.7},
    "math.hypot(a, b)": {"a": 2.5, "b": 0.7}, "math.copysign(a, b)": {"a": 2.5, "b": -0.7},
    "math.fmod(a, b)": {"a": 2.5, "b": 0.7},
    "np.sqrt(a)": {"a": 2.5}, "numpy.exp(a)": {"a": 0.5}, "exp(a)": {"a": 0.5}, "np.log(a)": {"a": 2.5}, "np.log1p(a)": {"a": 2.5},
    "np.sin(a)": {"a": 2.5}, "np.cos(a)": {"a": 2.5}, "np.tanh(a)": {"a": 2.5}, "np.abs(a)": {"a": -2.5}, "np.square(a)": {"a": 2.5},
    "np.power(a, b)": {"a": 2.5, "b": 0.7}, "np.maximum(a, b)": {"a": 2.5, "b": 0.7}, "np.minimum(a, b)": {"a": 2.5, "b": 0.7},
    "max(a, b)": {"a": 2.5, "b": 0.7}, "max(1.5, a, b)": {"a": 2.5, "b": 0.7}, "max([a, b])": {"a": 2.5, "b": 0.7},
    "min(a, b)": {"a": 2.5, "b": 3}, "min(a, 1.0)": {"a": 2.5}, "min(x * 2 for x in (a, b))": {"a": 2.5, "b": 0.7},
    "max(a, float('-inf'))": {"a": 2.5}, "own_max(a, b)": {"a": 2.5, "b": 0.7},
    "float(a)": {"a": 2.5}, "float(a) * 2": {"a": 3}, "max(a, 2) * 1.5": {"a": 3},
}  # fmt: skip


@pytest.mark.parametrize("text", FUNCTIONS)
def test_functions_of_the_library_stay_symbolic(library, text):
    numbers = FUNCTIONS[text]
    others = [{name: value * 2 if isinstance(value, int) else value * 1.0625 for name, value in numbers.items()}]
    made = trace(lambda **given: library.use(text, **given), numbers=numbers, around=closed(library))
    expected = library.use(text, **numbers)
    assert isinstance(made.value, Number)
    assert type(plain(made.value)) is (float if isinstance(expected, np.floating) else type(expected))
    assert plain(made.value) == expected
    assert made.outcomes == [] or "own_max" in text
    for given in (numbers, *others):
        assert evaluate(made.program, given) == pytest.approx(library.use(text, **given), rel=1e-14)
    for name, value in numbers.items():
        if isinstance(value, float):
            expected = difference(lambda text=text, **given: library.use(text, **given), numbers, name)
            assert slope(made.program, numbers, name) == pytest.approx(expected, rel=1e-8, abs=1e-9)


LOST = (
    "math.hypot(a, 1.5, 2)", "math.dist([a], [2])", "math.exp2(a)", "math.gamma(a)", "math.lgamma(a)", "math.erfc(a)",
    "math.asinh(a)", "math.acosh(a)", "math.atanh(a / 8)", "math.prod([a, 2.0])", "math.fsum([a, 2])", "math.modf(a)[0]",
    "math.frexp(a)[0]", "math.ldexp(a, 2)", "math.remainder(a, 2)", "math.isclose(a, 2.5)", "math.nextafter(a, 0)",
    "np.float64(2.0) * a", "np.exp2(a)", "np.clip(a, 0, 2)", "np.array([a, 2.0]).sum()", "np.sign(a)", "np.mean([a, 2.0])",
    "sorted([a, 2.0])[0]", "a.real", "a.__float__()", "round(a, 1)", "divmod(a, 2)[1]",
    "[a, 2.0].index(2.5)", "np.interp(a, [0, 4], [0, 1])", "abs(a)", "complex(a).real",
)  # fmt: skip


@pytest.mark.parametrize("text", LOST)
def test_no_function_loses_a_number_silently(library, text):
    """What cannot stay symbolic must be pinned, or refused with the line."""
    try:
        made = trace(lambda a: library.use(text, a=a), numbers={"a": 2.5}, around=closed(library))
    except (CaptureError, TypeError):
        return
    value = plain(made.value) if isinstance(made.value, Number) else made.value
    assert value == library.use(text, a=2.5)
    assert isinstance(made.value, Number) or made.outcomes


WHOLE = {
    "int(a)": 2.75, "int(a * 2)": -1.75, "int(a) + 1": 3, "math.floor(a)": 2.75, "math.ceil(a)": -2.75, "math.trunc(a)": -2.75,
    "round(a)": 2.5, "int(round(a))": 3.5, "max(int(a), 1)": 2.75, "math.floor(a) % 2": 5.5, "int(a) // 2": 7.5,
}  # fmt: skip


@pytest.mark.parametrize("text", WHOLE)
def test_whole_parts_stay_symbolic(library, text):
    value = WHOLE[text]
    made = trace(lambda a: library.use(text, a=a), numbers={"a": value}, around=closed(library))
    assert type(made.value) is IntNumber and plain(made.value) == library.use(text, a=value)
    assert made.outcomes == [] and made.baked == []
    for other in (value + 1, value * 4):
        assert evaluate(made.program, {"a": other}) == library.use(text, a=other)


@pytest.mark.parametrize("text", ["math.isnan(a)", "math.isinf(a)", "math.isfinite(a)"])
def test_tests_are_guarded(library, text):
    made = trace(lambda a: library.use(text, a=a), numbers={"a": 2.5}, around=closed(library))
    assert made.value is library.use(text, a=2.5) and made.outcomes == [made.value]
    values = {"a": torch.tensor(math.inf, dtype=torch.float64)}
    assert call(made.program, values)["guard[0]"].item() is library.use(text, a=math.inf)


def test_a_range_is_pinned_by_its_length(library):
    made = trace(lambda n: library.use("sum(range(a))", a=n), numbers={"n": 4}, around=closed(library))
    assert made.value == 6 and made.outcomes == [True] and made.baked == []
    assert call(made.program, {"n": torch.tensor(5.0, dtype=torch.float64)})["guard[0]"].item() is False
    assert list(library.use("range(1, 7, 2)")) == [1, 3, 5]


def test_tensors_given_to_math_stay_tied(library):
    made = trace(
        lambda x: library.use("math.sqrt(a.sum()) + float(a.max())", a=x), {"x": X}, {}, around=closed(library)
    )
    assert plain(made.value) == math.sqrt(1.25) + 2.0
    assert call(made.program, {"x": X * 4})["output[0]"].item() == pytest.approx(math.sqrt(5.0) + 8.0)


def test_extremes_of_other_things_are_pythons(library):
    texts = {
        "max('abc', 'abd')": "abd", "max([3, 1], key=lambda x: -x)": 1, "max([], default=7)": 7, "min({3: 0, 1: 0})": 1,
        "max(2, 7.5)": 7.5, "min(iter([4, 2]))": 2, "max(True, False)": True, "float('1e-3')": 1e-3, "int('ff', 16)": 255,
        "int()": 0, "float.fromhex('0x1p-1')": 0.5, "math.log(8, 2)": 3.0, "math.hypot(3, 4)": 5.0, "np.maximum(2, 3)": 3,
        "isinstance(2.0, float) and isinstance(2, (int, float)) and not isinstance(2, float)": True,
        "issubclass(bool, int)": True, "type(2.0) == float": True, "{float: 1}[float]": 1, "float | None": None,
        "np.sqrt(np.ones(2)).sum()": 2.0, "max(a, key=abs)": -5,
    }  # fmt: skip
    with escapes_closed(Recorder("unused"), [library]):
        found = {text: library.use(text, a=[3, -5]) for text in texts}
    assert {text: value for text, value in found.items() if text != "float | None"} == {
        text: value for text, value in texts.items() if text != "float | None"
    }


@pytest.mark.parametrize(
    "text",
    [
        "torch.zeros(2, dtype=float).dtype",
        "torch.ones(2).to(float).dtype",
    ],
)
def test_types_given_as_dtypes_are_understood(library, text):
    library.torch = torch
    expected = library.use(text)
    # torch takes no class but the builtin itself as a dtype: loud, where a traced module writes it so.
    with escapes_closed(Recorder("unused"), [library]), pytest.raises(TypeError, match="Kind"):
        library.use(text)
    assert library.use(text) == expected


def test_an_extreme_with_a_key_is_guarded(library):
    text = "max(a, b, key=lambda x: -x)"
    made = trace(lambda a, b: library.use(text, a=a, b=b), numbers={"a": 2.5, "b": 0.7}, around=closed(library))
    assert plain(made.value) == 0.7 and isinstance(made.value, Number) and len(made.outcomes) == 1


def names_of(module):
    return {name: value for name, value in vars(module).items() if name != "__builtins__"}


def test_everything_is_restored(library):
    before = names_of(library), names_of(math), names_of(np)
    with escapes_closed(Recorder("unused"), [library]):
        assert library.sqrt is not before[0]["sqrt"] and library.ln is not before[0]["ln"]
        assert math.sqrt is not before[1]["sqrt"] and np.exp is not before[2]["exp"]
        assert library.sqrt is math.sqrt and library.exp is np.exp
        assert "float" in vars(library) and "float" not in before[0]
    after = names_of(library), names_of(math), names_of(np)
    assert [list(names) for names in after] == [list(names) for names in before]
    for found, expected in zip(after, before, strict=True):
        assert all(found[name] is value for name, value in expected.items())


def test_everything_is_restored_after_an_exception(library):
    before = names_of(library), names_of(math), names_of(np)
    with pytest.raises(KeyError), escapes_closed(Recorder("unused"), [library]):
        raise KeyError("inside")
    after = names_of(library), names_of(math), names_of(np)
    for found, expected in zip(after, before, strict=True):
        assert found.keys() == expected.keys()
        assert all(found[name] is value for name, value in expected.items())


def test_a_capture_inside_a_capture_restores_in_turn(library):
    original = math.sqrt
    with escapes_closed(Recorder("outer"), [library]):
        outer = math.sqrt, library.float
        with escapes_closed(Recorder("inner"), [library]):
            assert math.sqrt is not outer[0]
            assert library.use("math.sqrt(4.0) + float(1)") == 3.0
        assert (math.sqrt, library.float) == outer
    assert math.sqrt is original is library.sqrt


def test_a_module_with_its_own_name_keeps_it(library):
    library.max = lambda *args: "its own"
    with escapes_closed(Recorder("unused"), [library]):
        assert library.use("max(1, 2)") == "its own"


def test_modules_of_a_class():
    names = {module.__name__ for module in modules_of([torch.optim.Adam])}
    assert {"torch.optim", "torch.optim.adam", "torch.optim.optimizer"} <= names
    assert not any(name.startswith(("torch.nn", "collections", "builtins")) for name in names)


# ---------------------------------------------------------------------- arrays


@pytest.mark.parametrize(
    "function",
    [
        lambda n: float((np.arange(3.0) * n).sum()),
        lambda n: float((n / np.arange(1.0, 3.0)).sum()),
        lambda n: int((np.arange(3) == n).sum()),
        lambda n: int((n > np.arange(3)).sum()),
    ],
)
def test_a_number_that_meets_an_array_is_pinned(function):
    made = trace(function, numbers={"n": 2})
    assert made.value == function(2) and made.outcomes == [True]
    made = trace(function, numbers={"n": 1.5})
    assert made.value == function(1.5)
    assert made.baked == ["a number that meets a NumPy array is a constant of the program"]
