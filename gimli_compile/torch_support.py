"""What is taken for granted of the installed torch, and would make gradients wrong in silence if it were not so."""

from __future__ import annotations

from functools import cache

import torch
from torch.fx.experimental.proxy_tensor import make_fx

from gimli_compile.errors import CaptureError, compose_message
from gimli_compile.transforms import outside_transforms


@cache
def check_torch() -> None:
    """Refuses a torch in which tracing loses where a gradient stops.

    Programs are traced again when they are compiled and differentiated. Up to 2.13, a `detach` stays what it is; since
    2.14, torch traces it as an alias, through which gradients go.

    Raises:
        CaptureError: a traced `detach` is none.
    """
    with outside_transforms():
        graph = make_fx(torch.Tensor.detach)(torch.zeros(1)).graph
    if not any(node.target is torch.ops.aten.detach.default for node in graph.nodes):
        raise CaptureError(
            compose_message(
                f"torch {torch.__version__} is not supported",
                None,
                "It traces `detach` as an alias: gradients that the model, the loss or `order=1` stop would go on.",
                "Install torch>=2.11,<2.14.",
            )
        )
