"""Runs torch in forms whose operators have second and forward-mode derivatives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


@contextmanager
def differentiable_forms() -> Iterator[None]:
    """Runs attention in its mathematical form, and without cuDNN, oneDNN and the fused encoder layer.

    What `torch.compile` compiled runs uncompiled: under a tracer it raises if it was compiled with `fullgraph=True`.
    Distributions do not check their arguments: a check that raises is no part of a program.
    """
    distribution = torch.distributions.Distribution
    checks = distribution._validate_args
    fused = torch.backends.mha.get_fastpath_enabled()
    distribution.set_default_validate_args(False)
    torch.backends.mha.set_fastpath_enabled(False)
    onednn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        uncompiled = torch.compiler.set_stance("force_eager")
        with torch.backends.cudnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH), uncompiled:
            yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch.backends.mha.set_fastpath_enabled(fused)
        distribution.set_default_validate_args(checks)
