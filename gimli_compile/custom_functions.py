"""Custom autograd functions and operators: the user's own derivative is kept, to every order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import torch
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointFunction

from gimli_compile.recomputation import recomputation_recorded, run_reentrant
from gimli_compile.recording import Recorder

_OF_OPERATORS = "torch._library.autograd"  # where torch gives custom operators their derivatives


@lru_cache(maxsize=1024)
def _call_of(kind: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Returns the function that a node of the graph calls for `kind.apply`, always the same one."""

    def call(*args: Any) -> Any:
        return kind.apply(*args)

    call.__name__ = kind.__name__
    cast(Any, call).is_custom_function = True
    return call


@contextmanager
def custom_functions_recorded(recorder: Recorder) -> Iterator[None]:
    """Records each `Function.apply` as one call of that function.

    What its `forward` computes inside runs without gradients and is recorded as such (its backward may have saved it),
    but the results are those of the one call, so that differentiating the program uses the function's own `backward`.
    That of a reentrant checkpoint only saves memory: what it runs is recorded. A custom operator (`torch.library`) is
    one call already, and brings its derivative with it.
    """

    def apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        if kind is CheckpointFunction:
            return run_reentrant(*args)
        out = cast(Any, super(_SingleLevelFunction, kind)).apply(*args, **kwargs)
        if kind.__module__ == _OF_OPERATORS:  # the operator itself was recorded
            recorder.mark_differentiable(out)
            return out
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        reach = 0
        for tensor in tensors:
            reach |= recorder.reach(tensor)
        if reach and not kwargs and not recorder.is_paused:
            nodes = tree_map_only(torch.Tensor, recorder.node_of, args)
            recorder.add_call(_call_of(kind), nodes, {}, out, override=True)
        return out

    # `Function.apply`, also one that was bound before, asks this class for the call itself.
    asked = cast(Any, _SingleLevelFunction)
    asked.apply = classmethod(apply)
    try:
        with recomputation_recorded(recorder):
            yield
    finally:
        del asked.apply
