"""Calls of torch functions that the dispatcher cannot judge: those that take concolic numbers, read values, detach.

The dispatcher sees plain numbers and cannot tell a user's `detach` from the framework's own. This mode sees the
Python-level call before it is lowered.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from gimli_compile.aliases import ALIAS_HANDLERS
from gimli_compile.call_arguments import holds
from gimli_compile.concolic import IntNumber, Number, bake, number_of
from gimli_compile.embedding_rules import EMBEDDING_HANDLERS
from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.operator_forms import OPERATOR_HANDLERS
from gimli_compile.operator_rules import RULE_HANDLERS
from gimli_compile.provenance import called_by_torch, user_source
from gimli_compile.recording import DATA, Recorder, Region
from gimli_compile.refusals import REFUSED_OPERATORS, branch_on_value
from gimli_compile.scalar_rules import call_with_numbers, has_tensor_scale
from gimli_compile.selection_rules import SIZE_HANDLERS, with_dimension
from gimli_compile.size_forms import SIZE_FORMS

Tensor = torch.Tensor
_CHECKS = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")


def _no_torch_function(*_: Any) -> bool:
    return False


@lru_cache(maxsize=4096)
def _body(function: types.FunctionType) -> types.FunctionType:
    """Returns a Python function of torch that runs its own body instead of asking the mode again."""
    names = {**function.__globals__, **dict.fromkeys(_CHECKS, _no_torch_function)}
    body = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    body.__kwdefaults__ = function.__kwdefaults__
    return body


class Interception(TorchFunctionMode):
    """Rewrites calls with concolic numbers to tensor arithmetic, ties values read, marks what stops gradients."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder
        self._active: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Handles one Python-level call."""
        args = tuple(map(_real_kind, args))
        kwargs = {key: _real_kind(value) for key, value in (kwargs or {}).items()}
        handler = _HANDLERS.get(func)
        if handler is not None:
            return handler(self, func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name.startswith("_foreach_"):
            return _each(self, name.removeprefix("_foreach_"), args, kwargs)
        if _has_numbers(args, kwargs) or has_tensor_scale(name, args, kwargs):
            return call_with_numbers(self, func, args, kwargs)
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Calls a function of torch; one that is written in Python runs under this mode."""
        if not isinstance(func, types.FunctionType) or func in self._active:
            return func(*args, **kwargs)
        self._active.append(func)
        try:
            with self:
                return _body(func)(*args, **kwargs)
        finally:
            self._active.pop()


# ---------------------------------------------------------------------- values that are read


def _is_traced(mode: Interception, value: Any) -> bool:
    return isinstance(value, Tensor) and bool(mode.recorder.reach(value))


def _read(mode: Interception, value: Tensor) -> Any:
    recorder = mode.recorder
    if recorder.region is Region.OPTIMIZER:
        return number_of(value, recorder)
    if recorder.reach(value) & DATA and not called_by_torch():
        if not recorder.guards_branches:
            raise branch_on_value()
        with mode:
            value = value.detach()  # as in eager, no derivative goes through a number
    number = number_of(value, recorder)
    # Python's containers read a whole number without asking it: it is a constant from here on.
    return bake(number, "a whole number read from a tensor") if isinstance(number, IntNumber) else number


def _item(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    return _read(mode, args[0]) if _is_traced(mode, args[0]) else func(*args, **kwargs)


def _tolist(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    tensor = args[0]
    if not _is_traced(mode, tensor):
        mode.recorder.outside.pin([tensor])
        return func(*args, **kwargs)
    if tensor.dim() == 0:
        return _read(mode, tensor)
    return [_tolist(mode, func, (part,), {}) for part in tensor.unbind()]


def _bool(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    return bool(_read(mode, args[0])) if _is_traced(mode, args[0]) else func(*args, **kwargs)


def _plain_conversion(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    if not _is_traced(mode, args[0]):
        return func(*args, **kwargs)
    number = _read(mode, args[0])
    value = bake(number, f"a number that `{func.__name__}` made plain") if isinstance(number, Number) else number
    return int(value) if func in (Tensor.__int__, Tensor.__index__) else float(value)


def _equal(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    left, right = args[:2]
    if not (_is_traced(mode, left) or _is_traced(mode, right)):
        return func(*args, **kwargs)
    mode.recorder.extents.fix(left, right)
    if left.shape != right.shape:
        return False
    return bool(_read(mode, (left == right).all()))


def _allclose(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    if not any(_is_traced(mode, arg) for arg in args[:2]):
        return func(*args, **kwargs)
    return bool(_read(mode, torch.isclose(*args, **kwargs).all()))


# ---------------------------------------------------------------------- gradients that are stopped


def _detach(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    out = func(*args, **kwargs)
    mode.recorder.mark_stop(out)
    return out


def _is_same_memory(left: Tensor, right: Tensor) -> bool:
    """Tells whether two tensors are the same elements of the same memory."""
    if left.layout is not torch.strided or right.layout is not torch.strided or left.dtype is not right.dtype:
        return left is right
    where = [(t.data_ptr(), t.storage_offset(), t.shape, t.stride()) for t in (left, right)]
    return left.numel() > 0 and where[0] == where[1]


def _set_data(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """Makes `p.data = x`, which never reaches the dispatcher, a copy."""
    target, value = args
    if not (mode.recorder.knows(target) or mode.recorder.knows(value)):
        return func(*args, **kwargs)
    if _is_same_memory(target, value):  # as `module.to(dtype)` does where nothing is to be converted
        return None
    if target.shape != value.shape or target.dtype != value.dtype:
        raise CaptureError(
            compose_message(
                "`tensor.data = other` changes the shape or dtype of a captured tensor",
                user_source(),
                "A slot of a program has one shape and one dtype.",
                "Create a new tensor instead of giving an old one other data.",
            )
        )
    with torch.no_grad():
        target.copy_(value)
    return None


# ---------------------------------------------------------------------- lists of tensors


def _each(mode: Interception, name: str, args: Any, kwargs: Any) -> Any:
    """Makes a `_foreach_` call one call for each tensor: the list operators lack derivatives."""
    count = len(next(arg for arg in args if isinstance(arg, (list, tuple))))

    def pick(value: Any, index: int) -> Any:
        return value[index] if isinstance(value, (list, tuple)) else value

    results = []
    with mode:
        for index in range(count):
            own_args = [pick(arg, index) for arg in args]
            own_kwargs = {key: pick(value, index) for key, value in kwargs.items()}
            results.append(_one_of_each(name, own_args, own_kwargs, index))
    return None if name.endswith("_") else results


def _one_of_each(name: str, args: list[Any], kwargs: dict[str, Any], index: int) -> Any:
    base = name.removesuffix("_")
    scalars = kwargs.pop("scalars", None)
    if scalars is not None:
        kwargs["value"] = scalars
    if base in ("addcmul", "addcdiv"):
        if len(args) == 4:
            kwargs["value"] = args.pop()
        value = kwargs.get("value", 1)
        if isinstance(value, Tensor):
            kwargs["value"] = (value[index] if value.dim() else value).item()
    if base == "norm":
        order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
        return torch.linalg.vector_norm(args[0], order, dtype=kwargs.get("dtype"))
    if base in ("maximum", "minimum"):
        return _extreme(name, args)
    if base == "pow" and not isinstance(args[0], Tensor):
        return torch.pow(*args)
    return getattr(Tensor, name)(*args, **kwargs)


def _extreme(name: str, args: list[Any]) -> Any:
    base = name.removesuffix("_")
    if isinstance(args[1], Tensor):
        result = getattr(torch, base)(*args)
    else:
        result = getattr(Tensor, "clamp_min" if base == "maximum" else "clamp_max")(*args)
    return args[0].copy_(result) if name.endswith("_") else result


# ---------------------------------------------------------------------- numbers that become tensors


def _new_tensor(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.tensor(data)` and its kin, when the data holds numbers or traced tensors."""
    is_method = func is Tensor.new_tensor
    data = args[1] if is_method else (args[0] if args else kwargs["data"])
    if isinstance(data, Tensor) or not holds(data, (Number, Tensor)):
        return func(*args, **kwargs)
    options = {key: kwargs[key] for key in ("dtype", "device") if kwargs.get(key) is not None}
    if is_method:
        options = {"dtype": args[0].dtype, "device": args[0].device, **options}
    leaves = tree_leaves(data)
    default = torch.get_default_dtype() if any(_is_floating(leaf) for leaf in leaves) else torch.int64
    options.setdefault("dtype", default)
    return _stack(mode, data).to(**options)


def _is_floating(leaf: Any) -> bool:
    return leaf.is_floating_point() if isinstance(leaf, Tensor) else isinstance(leaf, float)


def _stack(mode: Interception, data: Any) -> Tensor:
    if isinstance(data, (list, tuple)):
        return torch.stack([_stack(mode, item) for item in data])
    if isinstance(data, Tensor):
        return data.detach().to(torch.float64)
    if isinstance(data, Number):
        return data.tensor.clone()
    return torch.full((), data, dtype=torch.float64)


def _full(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """`full`, `full_like`, `new_full` with a concolic fill value: an empty tensor that is filled."""
    names = (
        ("input", "size", "fill_value")
        if func is Tensor.new_full
        else (("input", "fill_value") if func is torch.full_like else ("size", "fill_value"))
    )
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    value = given.pop("fill_value")
    if not isinstance(value, Number):
        return func(*args, **kwargs)
    if func is torch.full and given.get("dtype") is None:
        given["dtype"] = torch.get_default_dtype() if isinstance(value, float) else torch.int64
    sized = {key: given.pop(key) for key in ("input", "size") if key in given}
    maker = {torch.full: torch.zeros, torch.full_like: torch.zeros_like, Tensor.new_full: Tensor.new_zeros}[func]
    with mode:
        out = maker(*sized.values(), **given)
        return out.copy_(value.tensor) if value.tensor.dim() else out.fill_(value)


def _real_kind(value: Any) -> Any:
    """Returns the builtin in place of the form of it that traced modules see: torch takes `float` as a dtype."""
    return getattr(value, "stands_for", value) if isinstance(value, type) else value


def _get_item(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    return func(*with_dimension(mode, args[0], _pinned_index(args[1])))


def _set_item(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    target, index, value = args
    target, index = with_dimension(mode, target, _pinned_index(index))
    if isinstance(value, Number):
        return call_with_numbers(mode, func, (target, index, value), kwargs)
    if isinstance(index, Tensor) and index.dtype is torch.bool and mode.recorder.extents.knows(value):
        return target.index_put_((index,), value)  # torch would drop the dimension of a single selected element
    return func(target, index, value)


def _to_numpy(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    if not _is_traced(mode, args[0]):
        mode.recorder.outside.pin([args[0]])
        return func(*args, **kwargs)
    raise CaptureError(
        compose_message(
            "a captured tensor is turned into a Python value: a NumPy array",
            user_source(),
            "NumPy computes outside of torch, where no program can be captured.",
            "Use the operators of torch, such as `torch.where`.",
        )
    )


def _normal(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    """`torch.normal(mean, std)` of tensors: a standard draw that is scaled and shifted, as torch itself does it."""
    given = {**dict(zip(("mean", "std"), args[:2], strict=False)), **kwargs}
    tensors = [value for value in (given.get("mean"), given.get("std")) if isinstance(value, Tensor)]
    if not tensors or len(args) > 2 or given.get("out") is not None:
        return call_with_numbers(mode, func, args, kwargs) if _has_numbers(args, kwargs) else func(*args, **kwargs)
    shape = torch.broadcast_shapes(*(tensor.shape for tensor in tensors))
    dtype = torch.result_type(tensors[0], tensors[-1])
    with mode:
        noise = torch.empty(shape, dtype=dtype, device=tensors[0].device).normal_(generator=given.get("generator"))
        return noise * given.get("std", 1.0) + given["mean"]


def _has_numbers(args: Any, kwargs: Any) -> bool:
    return holds((args, kwargs), Number)


def _plain_only(mode: Interception, func: Any, args: Any, kwargs: Any) -> Any:
    return mode.call(func, tree_map(_pin, args), tree_map(_pin, kwargs))


def _pinned_index(index: Any) -> Any:
    if isinstance(index, slice):
        return slice(*map(_pin, (index.start, index.stop, index.step)))
    if type(index) in (tuple, list):
        return type(index)(map(_pinned_index, index))
    return _pin(index)


def _pin(leaf: Any) -> Any:
    return bake(leaf, "a number used as a size or an index") if isinstance(leaf, Number) else leaf


_HANDLERS: dict[Any, Callable[[Interception, Any, Any, Any], Any]] = {
    Tensor.item: _item,
    Tensor.tolist: _tolist,
    Tensor.__bool__: _bool,
    torch.is_nonzero: _bool,
    Tensor.__float__: _plain_conversion,
    Tensor.__int__: _plain_conversion,
    Tensor.__index__: _plain_conversion,
    torch.equal: _equal,
    Tensor.equal: _equal,
    torch.allclose: _allclose,
    Tensor.allclose: _allclose,
    Tensor.detach: _detach,
    torch.detach: _detach,
    Tensor.detach_: _detach,
    torch.detach_: _detach,
    cast(Any, Tensor.data).__get__: _detach,
    cast(Any, Tensor.data).__set__: _set_data,
    torch.tensor: _new_tensor,
    torch.as_tensor: _new_tensor,
    torch.asarray: _new_tensor,
    torch.scalar_tensor: _new_tensor,
    Tensor.new_tensor: _new_tensor,
    torch.full: _full,
    torch.full_like: _full,
    Tensor.new_full: _full,
    Tensor.__getitem__: _get_item,
    Tensor.__setitem__: _set_item,
    Tensor.numpy: _to_numpy,
    Tensor.__array__: _to_numpy,
    torch.normal: _normal,
    **ALIAS_HANDLERS,
    **REFUSED_OPERATORS,
    **RULE_HANDLERS,
    **SIZE_HANDLERS,
    **SIZE_FORMS,
    **EMBEDDING_HANDLERS,
    **OPERATOR_HANDLERS,
}
