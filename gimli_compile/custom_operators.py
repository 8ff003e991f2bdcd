"""Operators that are none of torch's own: calls of a program that have the derivative that they were given."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch

from gimli_compile.call_arguments import tensors_of
from gimli_compile.transforms import has_tangent

OTHER_SHAPES = "a custom operator gave results of other shapes than at capture"
_OF_TORCH = {"aten", "prims"}


@lru_cache(maxsize=4096)
def _function_around(operator: Any, shapes: tuple[torch.Size, ...]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        if any(map(has_tangent, tensors_of((args, kwargs)))):
            raise RuntimeError(f"{operator} has no forward-mode AD")
        out = operator(*args, **kwargs)
        if tuple(tensor.shape for tensor in tensors_of(out)) != shapes:
            raise RuntimeError(OTHER_SHAPES)
        return out

    call.__name__ = f"{operator.namespace}_{operator._opname}"
    cast(Any, call).is_custom_function = True
    return call


def function_of(operator: Any, out: Any) -> Any:
    """Returns what a node that gives `out` calls: the operator, or, if it is none of torch's own, a function around it.

    Of a custom operator (`torch.library`), torch drops the tangents of forward mode without a word, and nothing says
    whether the shapes of its results follow from those of its arguments: the function refuses tangents, and other
    shapes than at capture.
    """
    if not isinstance(operator, torch._ops.OpOverload) or operator.namespace in _OF_TORCH:
        return operator
    if any(one.alias_info is not None for one in (*operator._schema.arguments, *operator._schema.returns)):
        return operator
    return _function_around(operator, tuple(tensor.shape for tensor in tensors_of(out)))
