"""Calls of torch functions that take concolic numbers: same results as with plain ones, and derivatives."""

import math

import pytest
import torch
from recorded import call, trace

from gimli_compile.errors import CaptureError
from gimli_compile.passes.mutation import functionalize

GENERATOR = torch.Generator().manual_seed(3)
SQUARE = torch.randn(4, 4, generator=GENERATOR, dtype=torch.float64)
OTHER = torch.randn(4, 4, generator=GENERATOR, dtype=torch.float64) + 0.1
THIRD = torch.rand(4, 4, generator=GENERATOR, dtype=torch.float64) + 0.5
BATCHES = torch.randn(2, 4, 4, generator=GENERATOR, dtype=torch.float64)
TENSORS = {"x": SQUARE, "y": OTHER, "z": THIRD}


def writes(method, *before):
    """Returns a call of an in-place method on a copy: `writes("add_")(x, y, alpha=n)`."""

    def function(x, *args, **kwargs):
        made = x.clone()
        getattr(made, method)(*args, **kwargs)
        return made

    return function


def each(name, *lists, **options):
    """Calls a `_foreach_` function and returns the results stacked; in-place forms work on copies."""
    if name.endswith("_"):
        lists = ([tensor.clone() for tensor in lists[0]], *lists[1:])
    results = getattr(torch, f"_foreach_{name}")(*lists, **options)
    return torch.stack(list(lists[0] if name.endswith("_") else results))


foreach_sqrt = vars(torch)["_foreach_sqrt"]

CALLS = {
    # arithmetic
    "tensor + n": lambda x, y, z, n: x + n,
    "n + tensor": lambda x, y, z, n: n + x,
    "tensor - n": lambda x, y, z, n: x - n,
    "n - tensor": lambda x, y, z, n: n - x,
    "tensor * n": lambda x, y, z, n: x * n,
    "n * tensor": lambda x, y, z, n: n * x,
    "tensor / n": lambda x, y, z, n: x / n,
    "n / tensor": lambda x, y, z, n: n / z,
    "tensor ** n": lambda x, y, z, n: z**n,
    "n ** tensor": lambda x, y, z, n: n**x,
    "tensor % n": lambda x, y, z, n: x % n,
    "n % tensor": lambda x, y, z, n: n % z,
    "tensor // n": lambda x, y, z, n: x // n,
    "n // tensor": lambda x, y, z, n: n // z,
    "torch.add": lambda x, y, z, n: torch.add(x, n),
    "torch.sub": lambda x, y, z, n: torch.sub(x, n),
    "torch.subtract": lambda x, y, z, n: torch.subtract(x, n),
    "torch.rsub": lambda x, y, z, n: torch.rsub(x, n),
    "torch.mul": lambda x, y, z, n: torch.mul(x, n),
    "torch.multiply": lambda x, y, z, n: torch.multiply(x, n),
    "torch.div": lambda x, y, z, n: torch.div(x, n),
    "torch.true_divide": lambda x, y, z, n: torch.true_divide(x, n),
    "div with rounding": lambda x, y, z, n: torch.div(x, n, rounding_mode="trunc"),
    "torch.pow": lambda x, y, z, n: torch.pow(z, n),
    "torch.pow of n": lambda x, y, z, n: torch.pow(n, x),
    "float_power": lambda x, y, z, n: torch.float_power(z, n),
    "remainder": lambda x, y, z, n: torch.remainder(x, n),
    "fmod": lambda x, y, z, n: torch.fmod(x, n),
    "floor_divide": lambda x, y, z, n: torch.floor_divide(x, n),
    "copysign": lambda x, y, z, n: torch.copysign(x, n),
    "xlogy": lambda x, y, z, n: torch.xlogy(n, z),
    "add_": lambda x, y, z, n: writes("add_")(x, n),
    "sub_": lambda x, y, z, n: writes("sub_")(x, n),
    "mul_": lambda x, y, z, n: writes("mul_")(x, n),
    "div_": lambda x, y, z, n: writes("div_")(x, n),
    "pow_": lambda x, y, z, n: writes("pow_")(z, n),
    "remainder_": lambda x, y, z, n: writes("remainder_")(x, n),
    "iadd": lambda x, y, z, n: writes("__iadd__")(x, n),
    "imul": lambda x, y, z, n: writes("__imul__")(x, n),
    "itruediv": lambda x, y, z, n: writes("__itruediv__")(x, n),
    "mul out": lambda x, y, z, n: torch.mul(x, n, out=torch.zeros_like(x)),
    "negated": lambda x, y, z, n: x.mul(-n),
    # alpha
    "add alpha": lambda x, y, z, n: torch.add(x, y, alpha=n),
    "sub alpha": lambda x, y, z, n: torch.sub(x, y, alpha=n),
    "method add alpha": lambda x, y, z, n: x.add(y, alpha=-n),
    "add_ alpha": lambda x, y, z, n: writes("add_")(x, y, alpha=n),
    "sub_ alpha": lambda x, y, z, n: writes("sub_")(x, y, alpha=n),
    "add_ alpha of a row": lambda x, y, z, n: writes("add_")(x, y[0], alpha=n),
    "add alpha of an element": lambda x, y, z, n: x.add(y[0, 0], alpha=n),
    "add of a number, alpha": lambda x, y, z, n: torch.add(x, 2.0, alpha=n),
    "add of n, alpha": lambda x, y, z, n: torch.add(x, n, alpha=n),
    "add of n, plain alpha": lambda x, y, z, n: torch.add(x, n, alpha=2),
    "add by name": lambda x, y, z, n: torch.add(input=x, other=y, alpha=n),
    "add_ by name": lambda x, y, z, n: writes("add_")(x, other=y, alpha=n),
    "rsub alpha": lambda x, y, z, n: torch.rsub(x, y, alpha=n),
    "add out alpha": lambda x, y, z, n: torch.add(x, y, alpha=n, out=torch.zeros_like(x)),
    # value
    "addcmul": lambda x, y, z, n: torch.addcmul(x, y, z, value=n),
    "addcdiv": lambda x, y, z, n: torch.addcdiv(x, y, z, value=n),
    "addcmul_": lambda x, y, z, n: writes("addcmul_")(x, y, z, value=-n),
    "addcdiv_": lambda x, y, z, n: writes("addcdiv_")(x, y, z, value=-n),
    "addcmul by name": lambda x, y, z, n: x.addcmul(tensor1=y, tensor2=z, value=n),
    "addcdiv_ of a row": lambda x, y, z, n: writes("addcdiv_")(x, y[0], z, value=n),
    # equal dtypes
    "lerp": lambda x, y, z, n: torch.lerp(x, y, n),
    "lerp above a half": lambda x, y, z, n: torch.lerp(x, y, 1 - n * 0.125),
    "lerp_": lambda x, y, z, n: writes("lerp_")(x, y, n),
    "lerp_ by name": lambda x, y, z, n: writes("lerp_")(x, y, weight=n),
    "clamp": lambda x, y, z, n: torch.clamp(x, -n, n),
    "clamp min": lambda x, y, z, n: x.clamp(min=n),
    "clamp max": lambda x, y, z, n: x.clamp(max=n),
    "clamp between n and plain": lambda x, y, z, n: x.clamp(-0.25, n),
    "clip": lambda x, y, z, n: torch.clip(x, max=n),
    "clamp_": lambda x, y, z, n: writes("clamp_")(x, min=n),
    "clamp_min": lambda x, y, z, n: torch.clamp_min(x, n),
    "clamp_max_": lambda x, y, z, n: writes("clamp_max_")(x, n),
    "clamp out": lambda x, y, z, n: torch.clamp(x, max=n, out=torch.zeros_like(x)),
    # products
    "addmm": lambda x, y, z, n: torch.addmm(x, y, z, beta=n, alpha=2),
    "addmm alpha": lambda x, y, z, n: torch.addmm(x, y, z, alpha=-n),
    "addmm both": lambda x, y, z, n: torch.addmm(x, y, z, beta=n, alpha=n),
    "addmm_": lambda x, y, z, n: writes("addmm_")(x, y, z, beta=n, alpha=0.5),
    "addmm of a row": lambda x, y, z, n: torch.addmm(x[0], y, z, beta=n),
    "addmv": lambda x, y, z, n: torch.addmv(x[0], y, z[0], beta=n, alpha=n),
    "addr": lambda x, y, z, n: torch.addr(x, y[0], z[0], beta=n, alpha=n),
    "baddbmm": lambda x, y, z, n: torch.baddbmm(BATCHES.to(x.dtype), BATCHES.to(x.dtype), BATCHES.to(x.dtype), beta=n),
    "addbmm": lambda x, y, z, n: torch.addbmm(x, BATCHES.to(x.dtype), BATCHES.to(x.dtype), beta=n, alpha=n),
    # filling
    "fill_": lambda x, y, z, n: writes("fill_")(x, n) * x,
    "fill_ of a part": lambda x, y, z, n: writes("__setitem__")(x, 1, n),
    "setitem of a slice": lambda x, y, z, n: writes("__setitem__")(x, (slice(None), 2), n * 2),
    "setitem of a mask": lambda x, y, z, n: writes("__setitem__")(x, x > 0, n),
    "fill": lambda x, y, z, n: torch.fill(x, n),
    "masked_fill": lambda x, y, z, n: x.masked_fill(y > 0, n),
    "masked_fill_": lambda x, y, z, n: writes("masked_fill_")(x, y > 0, n),
    "where": lambda x, y, z, n: torch.where(y > 0, x, n),
    "where n first": lambda x, y, z, n: torch.where(y > 0, n, x),
    "where n and plain": lambda x, y, z, n: torch.where(y > 0, n, 0.0) * x,
    "where n twice": lambda x, y, z, n: torch.where(y > 0, n, -n) + x,
    "method where": lambda x, y, z, n: x.where(y > 0, n),
    "full": lambda x, y, z, n: torch.full((4, 4), n, dtype=x.dtype) * x,
    "full by name": lambda x, y, z, n: torch.full(size=(4,), fill_value=n, dtype=x.dtype) * x,
    "full_like": lambda x, y, z, n: torch.full_like(x, n) * y,
    "new_full": lambda x, y, z, n: x.new_full((4,), n) * y,
    "new_tensor": lambda x, y, z, n: x.new_tensor([n, 2.0, n, 4.0]) * x,
    "tensor": lambda x, y, z, n: torch.tensor([n, 2.0, 3, -n], dtype=x.dtype) * x,
    "tensor of n": lambda x, y, z, n: torch.tensor(n, dtype=x.dtype) * x,
    "as_tensor": lambda x, y, z, n: torch.as_tensor(n, dtype=x.dtype) * x,
    "scalar_tensor": lambda x, y, z, n: torch.scalar_tensor(n, dtype=x.dtype) * x,
    "asarray": lambda x, y, z, n: torch.asarray([n, n, 1.0, 2.0], dtype=x.dtype) * x,
    # foreach
    "foreach mul": lambda x, y, z, n: each("mul", [x, y], n),
    "foreach mul_": lambda x, y, z, n: each("mul_", [x, y], n),
    "foreach mul_ list": lambda x, y, z, n: each("mul_", [x, y], [n, 2.0]),
    "foreach add scalars": lambda x, y, z, n: each("add", [x, y], [n, n]),
    "foreach add alpha": lambda x, y, z, n: each("add", [x, y], [y, z], alpha=n),
    "foreach sub_ alpha": lambda x, y, z, n: each("sub_", [x, y], [y, z], alpha=n),
    "foreach div": lambda x, y, z, n: each("div", [x, y], n),
    "foreach div_ list": lambda x, y, z, n: each("div_", [x, y], [n, n]),
    "foreach pow": lambda x, y, z, n: each("pow", [z, z + 1], n),
    "foreach pow list": lambda x, y, z, n: each("pow", [z, z + 1], [n, 2.0]),
    "foreach lerp": lambda x, y, z, n: each("lerp", [x, y], [y, z], n),
    "foreach lerp_": lambda x, y, z, n: each("lerp_", [x, y], [y, z], n),
    "foreach addcmul": lambda x, y, z, n: each("addcmul", [x, y], [y, z], [z, z], value=n),
    "foreach addcmul_ list": lambda x, y, z, n: each("addcmul_", [x, y], [y, z], [z, z], [n, 2.0]),
    "foreach addcdiv_ list": lambda x, y, z, n: each("addcdiv_", [x, y], [y, z], [z, z], [n, -n]),
    "foreach addcdiv scalars": lambda x, y, z, n: each("addcdiv", [x, y], [y, z], [z, z], scalars=[n, -n]),
    "foreach addcdiv value": lambda x, y, z, n: each("addcdiv_", [x, y], [y, z], [z, z], n),
    "foreach maximum": lambda x, y, z, n: each("maximum", [x, y], n),
    "foreach minimum_": lambda x, y, z, n: each("minimum_", [x, y], [n, 0.5]),
    "foreach clamp_min": lambda x, y, z, n: each("clamp_min", [x, y], n),
    "foreach clamp_max_": lambda x, y, z, n: each("clamp_max_", [x, y], [n, n]),
    "foreach sqrt then mul": lambda x, y, z, n: each("mul", foreach_sqrt([z, z]), n),
}  # fmt: skip
FLAT = {"copysign", "div with rounding"}
WITHOUT_DERIVATIVE_IN_EAGER = {"floor_divide", "tensor // n", "n // tensor"}
IN_DEFAULT_DTYPE = {"where n and plain", "where n twice"}  # float32 in eager code as well
VALUES = (0.375, 0.1)


def ulps(found, expected, largest):
    """Returns the difference in units of the last place of the largest operand or result."""
    scale = max(largest, float(expected.detach().double().abs().max()))
    unit = torch.finfo(expected.dtype).eps * 2.0 ** math.floor(math.log2(scale))
    return float((found.double() - expected.double()).abs().max()) / unit


def cast(dtype):
    return {name: value.to(dtype) for name, value in TENSORS.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_those_of_the_eager_call(name, dtype):
    function, tensors = CALLS[name], cast(dtype)
    largest = max(float(value.abs().max()) for value in tensors.values())
    for value in VALUES:
        made = trace(function, tensors, {"n": value})
        expected = function(**tensors, n=value)
        assert made.value.dtype == expected.dtype and made.value.shape == expected.shape
        assert made.baked == [] and made.outcomes == []
        assert ulps(made.value, expected, largest) <= 2
        number = torch.tensor(value, dtype=torch.float64)
        again = call(made.program, {**tensors, "n": number})["output[0]"]
        assert torch.equal(again, made.value)


@pytest.mark.parametrize("name", CALLS)
def test_programs_follow_the_number(name):
    made = trace(CALLS[name], TENSORS, {"n": VALUES[0]})
    for value in (0.375, 0.7, 1.5):
        found = call(made.program, {**TENSORS, "n": torch.tensor(value, dtype=torch.float64)})["output[0]"]
        expected = CALLS[name](**TENSORS, n=value)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in WITHOUT_DERIVATIVE_IN_EAGER])
def test_derivatives_in_the_number_are_those_of_the_eager_call(name):
    program = functionalize(trace(CALLS[name], TENSORS, {"n": VALUES[0]}).program)
    number = torch.tensor(VALUES[0], dtype=torch.float64, requires_grad=True)
    result = call(program, {**TENSORS, "n": number})["output[0]"]
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)

    def projected(value):
        return float((CALLS[name](**TENSORS, n=value) * weights).sum())

    step = 1e-4
    near, far = (projected(VALUES[0] + k * step) - projected(VALUES[0] - k * step) for k in (1, 2))
    expected = (8 * near - far) / (12 * step)
    slope = (
        torch.autograd.grad((result * weights).sum(), number, allow_unused=True)[0] if result.requires_grad else None
    )
    tolerance = 1e-3 if name in IN_DEFAULT_DTYPE else 1e-8
    assert (0.0 if slope is None else slope.item()) == pytest.approx(expected, rel=tolerance, abs=1e-9)
    assert slope is not None or name in FLAT


# ---------------------------------------------------------------------- powers

POWERS = (2.0, 2, 0.5, 3, -1, 1, 0, -0.5, 1.0, 1.7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", POWERS)
def test_powers_that_eager_treats_apart(exponent, dtype):
    z = THIRD.to(dtype)
    for function in (lambda z, n: z**n, lambda z, n: torch.pow(z, n), lambda z, n: z.clone().pow_(n)):
        made = trace(function, {"z": z}, {"n": exponent})
        expected = function(z=z, n=exponent)
        assert made.value.dtype == expected.dtype
        assert ulps(made.value, expected, 0.0) <= 2


@pytest.mark.parametrize("base", [2, 2.0, 0.9, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_powers_of_a_number(base, dtype):
    made = trace(lambda x, n: n**x, {"x": SQUARE.to(dtype)}, {"n": base})
    assert ulps(made.value, base ** SQUARE.to(dtype), 0.0) <= 2


# ---------------------------------------------------------------------- dtypes

KINDS = {
    "whole tensor, whole number": (lambda i, n: (i + n, i * n, n - i, i // n, i % n, i**n), {"n": 3}),
    "whole tensor, float": (lambda i, n: (i + n, i * n, n - i, i / n, i**n, i // n), {"n": 2.5}),
    "whole tensor, division": (lambda i, n: (i / n, n / (i + 1), torch.true_divide(i, n)), {"n": 3}),
    "whole tensor, clamp": (lambda i, n: (i.clamp(max=n), i.clamp(-n, n), i.clamp_min(n)), {"n": 3}),
    "whole tensor, clamp to a float": (lambda i, n: (i.clamp(max=n), i.clamp_min(n)), {"n": 2.5}),
    "whole tensor, alpha": (lambda i, n: (i.add(i, alpha=n), i.sub(i, alpha=n)), {"n": 3}),
    "whole tensor, where": (lambda i, n: (torch.where(i > 2, i, n), torch.where(i > 2, n, n)), {"n": 3}),
    "whole tensor, where float": (lambda i, n: (torch.where(i > 2, i, n), torch.where(i > 2, n, 0.0)), {"n": 2.5}),
    "whole tensor, fill": (lambda i, n: (i.clone().fill_(n), i.masked_fill(i > 2, n), torch.full_like(i, n)), {"n": 3}),
    "bool tensor": (lambda i, n: ((i > 2) * n, (i > 2) + n, torch.where(i > 2, n, 1)), {"n": 3}),
    "bool tensor, float": (lambda i, n: ((i > 2) * n, (i > 2) + n), {"n": 2.5}),
    "comparisons": (lambda i, n: (i > n, n > i, i == n, i.eq(n), torch.le(i, n), torch.ne(i, n)), {"n": 3}),
    "comparisons with a float": (lambda i, n: (i > n, n > i, i == n, torch.less_equal(i, n)), {"n": 2.5}),
    "full without a dtype": (lambda i, n: (torch.full((2,), n), torch.full([2], 2 * n), torch.tensor(n)), {"n": 2.5}),
    "full of a whole number": (
        lambda i, n: (torch.full((2,), n), torch.full([2], 2 * n), torch.tensor([n, 1])),
        {"n": 3},
    ),
    "tensor of mixed kinds": (lambda i, n: (torch.tensor([n, 1.5]), torch.tensor([[n], [2]])), {"n": 3}),
    "index": (lambda i, n: (i[n], i[:n], i[n:], i[None, n]), {"n": 3}),
    "index on the left": (
        lambda i, n: (writes("__setitem__")(i, n, 7), writes("__setitem__")(i, slice(n), 7)),
        {"n": 3},
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_dtypes_are_those_of_the_eager_call(name):
    function, numbers = KINDS[name]
    made = trace(function, {"i": torch.arange(6)}, numbers)
    for found, expected in zip(made.value, function(i=torch.arange(6), **numbers), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_tensors_without_dimensions_keep_their_dtype(dtype):
    calls = (
        lambda s, n: s + n, lambda s, n: n * s, lambda s, n: s**n, lambda s, n: s.clamp(max=n), lambda s, n: s.lerp(s + 1, n),
        lambda s, n: s.add(s, alpha=n), lambda s, n: s.addcmul(s, s, value=n), lambda s, n: torch.where(s > 0, s, n),
        lambda s, n: s.clone().mul_(n), lambda s, n: s.clone().fill_(n), lambda s, n: n / s, lambda s, n: s > n,
    )  # fmt: skip
    s = torch.tensor(0.7, dtype=dtype)
    for function in calls:
        made, expected = trace(function, {"s": s}, {"n": 0.1}), function(s, 0.1)
        assert made.value.dtype == expected.dtype and made.value.shape == ()
        assert expected.dtype == torch.bool or ulps(made.value, expected, 1.0) <= 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comparisons_round_as_eager(dtype):
    x = torch.tensor([0.1, 0.2, 0.3], dtype=dtype)
    for function in (lambda x, n: x == n, lambda x, n: x >= n, lambda x, n: x < n, lambda x, n: n > x):
        for value in (0.1, 0.2, 0.30000001):
            assert torch.equal(trace(function, {"x": x}, {"n": value}).value, function(x, value))


@pytest.mark.parametrize("name", ["add_", "mul_", "sub_", "div_"])
def test_float32_arithmetic_is_bit_equal(name):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1000, generator=generator)
    for value in (0.1, 1e-3, 0.999, 3e-5, 7):
        made = trace(lambda x, n: writes(name)(x, n), {"x": x}, {"n": value})
        assert torch.equal(made.value, writes(name)(x, value))


FUSED = {
    "add_": lambda x, y, z, n: writes("add_")(x, y, alpha=-n),
    "lerp_": lambda x, y, z, n: writes("lerp_")(x, y, n),
    "addcmul_": lambda x, y, z, n: writes("addcmul_")(x, y, y, value=n),
    "addcdiv_": lambda x, y, z, n: writes("addcdiv_")(x, y, z, value=-n),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSED)
def test_the_optimizers_operators_within_two_roundings(name, dtype):
    """Long enough for the vectorized kernels and their remainder, elements far apart in size."""
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-6, 3, 1003, dtype=torch.float64)
    x, y = (torch.randn(1003, generator=generator, dtype=torch.float64) * sizes for _ in range(2))
    tensors = {"x": x.to(dtype), "y": y.to(dtype), "z": (y.abs() + 1e-3).to(dtype)}
    for value in (0.1, 1e-3, 0.999):
        found = trace(FUSED[name], tensors, {"n": value}).value
        expected = FUSED[name](**tensors, n=value)
        scale = torch.maximum(expected.double().abs(), torch.maximum(x.abs(), (value * y).abs()))
        assert ((found.double() - expected.double()).abs() <= 2 * torch.finfo(dtype).eps * scale).all()


# ---------------------------------------------------------------------- what has no tensor form


def test_a_float_without_a_tensor_form_is_pinned_and_reported():
    made = trace(lambda x, n: torch.nn.functional.hardshrink(x, n), {"x": SQUARE}, {"n": 0.5})
    assert torch.equal(made.value, torch.nn.functional.hardshrink(SQUARE, 0.5))
    assert made.outcomes == [True] and len(made.baked) == 1
    assert "hardshrink" in made.baked[0]


@pytest.mark.parametrize(
    "function", [lambda x, n: x.repeat(n, 1), lambda x, n: x.sum(n), lambda x, n: torch.zeros(n) + x[:, :n].sum()]
)
def test_sizes_and_dimensions_are_pinned(function):
    made = trace(function, {"x": BATCHES[0]}, {"n": 1})
    assert torch.equal(made.value, function(BATCHES[0], 1))
    assert made.outcomes and all(made.outcomes) and made.baked == []


def test_a_number_read_from_a_tensor_is_refused_as_a_size():
    with pytest.raises(CaptureError, match="number read from a tensor"):
        trace(lambda x: x.repeat(2, int(x.abs().sum().item())), {"x": SQUARE}, {})


def test_per_element_numbers_take_part_elementwise():
    """A hyperparameter may be a tensor of the parameter's shape."""
    made = trace(lambda x, y, z, n: x.lerp(y, n).add(z, alpha=-n).addcdiv(y, z, value=n), TENSORS, {"n": 0.5})
    weight = torch.rand(4, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = call(made.program, {**TENSORS, "n": weight})["output[0]"]
    expected = SQUARE.lerp(OTHER, weight) - weight * THIRD + weight * OTHER / THIRD
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
