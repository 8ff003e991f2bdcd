"""A model with buffers, of which its forward pass changes one."""

import torch
from torch import nn


class Affine(nn.Module):
    """A linear layer with a buffer that its forward pass changes, and one that it multiplies with."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))
        self.scale: torch.Tensor
        self.register_buffer("scale", torch.full((2,), 1.5, dtype=torch.float64))

    def forward(self, x):
        self.seen.add_(x.mean().detach())
        return self.layer(x).tanh() * self.scale
