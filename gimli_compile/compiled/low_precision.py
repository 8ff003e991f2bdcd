"""Rounding in programs of Inductor: after each operator, as it happens without a compiler."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._inductor import config as inductor_config
from torch._inductor.codegen.cpp import CppKernel


@contextmanager
def rounded_as_written(module: fx.GraphModule) -> Iterator[None]:
    """Within this, Inductor rounds what a graph computes in float16 or bfloat16 wherever the graph does.

    Otherwise it keeps what it fuses in float32, even across conversions that the user wrote: an optimizer that rounds
    its state on purpose would not, and Muon's steps are off by some thousandths.
    """
    if not _has_low_precision(module):
        yield
        return
    # Torch 2.11 takes the value before a conversion for what is converted back, whatever the setting says.
    with (
        inductor_config.patch(emulate_precision_casts=True),
        mock.patch.object(CppKernel, "cache_dtype_convert", _forget),
    ):
        yield


def _forget(_kernel: CppKernel, *_conversion: Any) -> None:
    """Keeps no conversion in mind."""


def _has_low_precision(module: fx.GraphModule) -> bool:
    values = (node.meta.get("val") for node in module.graph.nodes)
    return any(isinstance(v, torch.Tensor) and v.dtype in (torch.float16, torch.bfloat16) for v in values)
