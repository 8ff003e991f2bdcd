"""Rewrites calls of torch functions that take concolic numbers into arithmetic with 0-dim tensors.

A 0-dim float64 tensor takes part in arithmetic exactly as a Python float does as long as a floating tensor with
dimensions is present: the result keeps that tensor's dtype, and reduced precisions compute in float32. Where there is
none, and in the few operators that want equal dtypes, the number is cast first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from gimli_compile.call_arguments import tensors_of
from gimli_compile.concolic import IntNumber, Number, bake, plain
from gimli_compile.findings import Baked
from gimli_compile.provenance import current_source

if TYPE_CHECKING:
    from gimli_compile.interception import Interception

Tensor = torch.Tensor
_REDUCED = (torch.bfloat16, torch.float16)
_ELEMENTWISE = frozenset(
    "add sub subtract rsub mul multiply div divide true_divide rdiv rtruediv floor_divide floordiv rfloordiv pow rpow "
    "float_power remainder mod rmod fmod truediv "
    "radd rmul iadd isub imul idiv itruediv ifloordiv ipow imod atan2 copysign hypot maximum minimum fmax fmin "
    "eq ne lt le gt ge not_equal greater greater_equal less less_equal where masked_fill fill xlogy logaddexp "
    "setitem index_fill heaviside nextafter".split()
)
_SAME_DTYPE = frozenset("lerp clamp clip clamp_min clamp_max".split())
_SCALED = {"add": "alpha", "sub": "alpha", "subtract": "alpha", "rsub": "alpha", "addcmul": "value", "addcdiv": "value"}
_DRAWS = {"normal": ("mean", "std", 0.0, 1.0), "uniform": ("from", "to", 0.0, 1.0)}
_PRODUCTS = frozenset("addmm addmv addbmm baddbmm addr".split())


def call_with_numbers(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """Calls `func` so that every concolic number among its arguments stays an input of the program."""
    name = getattr(func, "__name__", str(func)).strip("_")
    with mode:
        if name in _WHOLE:
            return _WHOLE[name](*args, **kwargs)
        if name in _DRAWS:
            return _call_draw(func, name, list(args), dict(kwargs))
        if name in _PRODUCTS:
            return _call_product(func, name, list(args), dict(kwargs))
        if name in _SCALED:
            args, kwargs = _unscramble(name, list(args), dict(kwargs))
            if isinstance(kwargs.get(_SCALED[name]), (Number, Tensor)):
                return _call_scaled(func, name, args, kwargs)
        if name in _SAME_DTYPE:
            return _call_same_dtype(func, list(args), dict(kwargs))
        if name in _ELEMENTWISE:
            like = _floating_operand(args, kwargs)
            convert = _converter(like)
            return func(
                *(_convert(arg, convert) for arg in args), **{k: _convert(v, convert) for k, v in kwargs.items()}
            )
    return _call_baked(mode, func, args, kwargs)


def has_tensor_scale(name: str, args: Any, kwargs: Any) -> bool:
    """Tells whether a call has a 0-dim tensor as `alpha` or `value`, which torch would turn into a plain number."""
    key = _SCALED.get(name.strip("_"))
    return key is not None and (isinstance(kwargs.get(key), Tensor) or len(args) > (2 if key == "alpha" else 3))


def operand(number: Number | Tensor, like: Tensor) -> Tensor:
    """Returns the tensor of a number, ready for arithmetic with `like`."""
    if isinstance(number, Tensor):
        return number.to(device=like.device, dtype=like.dtype) if like.dim() == 0 else number
    tensor = number.tensor
    floating = like.is_floating_point() or like.is_complex()
    if floating and like.dim() > 0 and tensor.dim() == 0:
        return tensor
    plain = number.plain
    dtype = torch.result_type(like.new_empty((1,) * like.dim()), plain) if not floating else like.dtype
    return tensor.to(device=like.device, dtype=dtype)


def _floating_operand(args: Any, kwargs: Any) -> Tensor | None:
    tensors = tensors_of((args, kwargs))
    tensors.sort(key=lambda tensor: (tensor.is_floating_point(), tensor.dim() > 0), reverse=True)
    return tensors[0] if tensors else None


def _converter(like: Tensor | None) -> Callable[[Number], Tensor]:
    return (lambda number: number.tensor) if like is None else (lambda number: operand(number, like))


def _convert(value: Any, convert: Callable[[Number], Tensor]) -> Any:
    if isinstance(value, Number):
        return convert(value)
    if isinstance(value, (list, tuple)):
        return tree_map(
            lambda leaf: bake(leaf, "a number used as an index") if isinstance(leaf, Number) else leaf, value
        )
    return value


def _cast(number: Number, like: Tensor, dtype: torch.dtype) -> Tensor:
    return number.tensor.to(device=like.device, dtype=dtype)


# ---------------------------------------------------------------------- scaled operands


def _unscramble(name: str, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Brings the positional and the deprecated forms (`add_(alpha, other)`) to the keyword form."""
    key = _SCALED[name]
    operands = 2 if key == "alpha" else 3
    for word in ("self", "input", "other", "tensor1", "tensor2"):
        if word in kwargs:
            args.append(kwargs.pop(word))
    if len(args) == operands + 1:
        scale = args.pop(1) if isinstance(args[-1], Tensor) and not isinstance(args[1], Tensor) else args.pop()
        kwargs[key] = scale
    return args, kwargs


def _call_scaled(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """`add(x, y, alpha=a)` and `addcdiv(x, y, z, value=a)`: the number multiplies the second operand.

    torch computes `x + a * y` with one rounding, as `addcmul(x, y, a)` does, and `x + a * y / z` from left to right.
    """
    scale = kwargs.pop(_SCALED[name])
    if name == "rsub":
        args, name = args[::-1], "sub"
    target, first = args[0], args[1]
    if not isinstance(first, Tensor):
        return getattr(torch, name)(target, first * scale)
    if _SCALED[name] == "alpha" and target.is_floating_point() and first.is_floating_point():
        factor = operand(scale, first if first.dim() else target)
        factor = factor.to(device=first.device)
        return _finish(func, target, torch.addcmul(target, first, factor if name == "add" else -factor), kwargs)
    if target.dtype in _REDUCED:
        wide = [arg.to(torch.float32) for arg in args]
        wide[1] = wide[1] * operand(scale, wide[1])
        return _finish(func, target, getattr(torch, name)(*wide).to(target.dtype), kwargs)
    result = getattr(torch, name)(target, first * operand(scale, first), *args[2:])
    return _finish(func, target, result, kwargs)


def _finish(func: Any, target: Tensor, result: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Puts a result where `func` would have put it."""
    if kwargs.get("out") is not None:
        return kwargs["out"].copy_(result)
    name = func.__name__
    in_place = name.endswith("_") and not name.endswith("__")
    return target.copy_(result) if in_place else result


def _call_draw(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """`normal_(mean, std)` and `uniform_(low, high)`: a standard draw that is scaled and shifted."""
    first, second, *defaults = _DRAWS[name]
    target, *rest = args
    given = {**dict(zip((first, second), rest, strict=False)), **kwargs}
    shift, other = given.pop(first, defaults[0]), given.pop(second, defaults[1])
    scale = other if name == "normal" else other - shift
    if func.__name__.endswith("_"):
        return getattr(target, func.__name__)(**given).mul_(scale).add_(shift)
    return torch.normal(0.0, 1.0, **given) * scale + shift


def _call_batch_norm(
    value: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """Batch normalization whose momentum is a number, as in a cumulative average of the statistics."""
    if not training or running_mean is None or running_var is None:
        statistics = (running_mean, running_var)
        return torch.nn.functional.batch_norm(value, *statistics, weight, bias, training, 0.0, eps)
    with torch.no_grad():
        variance, mean = torch.var_mean(value.detach(), [0, *range(2, value.dim())], correction=1)
        running_mean.mul_(1 - momentum).add_(mean * momentum)
        running_var.mul_(1 - momentum).add_(variance * momentum)
    return torch.nn.functional.batch_norm(value, None, None, weight, bias, True, 0.0, eps)


def _call_product(func: Any, name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """`beta * input + alpha * (a @ b)`."""
    beta, alpha = kwargs.pop("beta", 1), kwargs.pop("alpha", 1)
    target, left, right = args
    multiply = {"addmm": torch.mm, "addmv": torch.mv, "addr": torch.outer}.get(name, torch.bmm)
    dtype = target.dtype
    if dtype in _REDUCED:  # eager rounds once, after the sum
        target_, left, right = target.float(), left.float(), right.float()
    else:
        target_ = target
    product = multiply(left, right)
    if name == "addbmm":
        product = product.sum(0)
    return _finish(func, target, (target_ * beta + product * alpha).to(dtype), kwargs)


# ---------------------------------------------------------------------- operators that want equal dtypes


def _call_same_dtype(func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
    target = args[0]
    wide = torch.float32 if target.dtype in _REDUCED else target.dtype
    numbers = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, (int, float))]
    if not target.is_floating_point():
        for number in numbers:
            wide = torch.result_type(target.new_empty(1, dtype=wide), plain(number))

    def convert(value: Any) -> Any:
        if isinstance(value, Number):
            return _cast(value, target, wide)
        if isinstance(value, Tensor):
            return value.to(wide) if value.is_floating_point() else value
        return torch.full((), value, dtype=wide, device=target.device) if isinstance(value, (int, float)) else value

    name = func.__name__.strip("_")
    result = getattr(torch, name)(*map(convert, args), **{key: convert(value) for key, value in kwargs.items()})
    return _finish(func, target, result.to(target.dtype) if target.is_floating_point() else result, {})


# ---------------------------------------------------------------------- everything else


def _call_baked(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """Calls a function that has no tensor form of its number: ints are pinned, floats pinned and reported."""
    name = getattr(func, "__name__", str(func))
    what = f"a number passed to `{name}`"
    places = _quantities(name)
    for place, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, IntNumber) and place in places:
            value.recorder.baked.append(Baked(f"{what} is a constant of the program", current_source()))

    def pin(leaf: Any) -> Any:
        return bake(leaf, what) if isinstance(leaf, Number) else leaf

    return mode.call(func, tree_map(pin, args), tree_map(pin, kwargs))


@lru_cache(maxsize=1024)
def _quantities(name: str) -> frozenset[int | str]:
    """Returns which arguments of an operator, by position and by name, are quantities and no sizes or dimensions."""
    packet = getattr(torch.ops.aten, name.strip("_"), None)
    found: set[int | str] = set()
    for overload in packet.overloads() if packet is not None else ():
        for place, argument in enumerate(getattr(packet, overload)._schema.arguments):
            if str(argument.type) in ("number", "Scalar", "float"):
                found |= {place, argument.name}
    return frozenset(found)


def _call_softplus(value: Tensor, beta: Any = 1, threshold: Any = 20) -> Tensor:
    """`log(1 + exp(beta * x)) / beta`, and `x` itself where `beta * x` is above the threshold."""
    scaled = value * beta
    above = scaled > threshold
    return torch.where(above, value, torch.log1p(torch.exp(scaled.masked_fill(above, 0.0))) / beta)


_WHOLE: dict[str, Callable[..., Tensor]] = {"batch_norm": _call_batch_norm, "softplus": _call_softplus}
