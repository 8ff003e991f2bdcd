"""`Functional.compile`: the same functions, each step of a loop run by compiled programs."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
