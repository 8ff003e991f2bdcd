"""Learned optimizers as a user would write them: ordinary optimizers whose step runs modules that they own."""

from itertools import pairwise
from typing import Any

import torch
from torch import nn


def network(*sizes):
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).double()


class Learned(torch.optim.Optimizer):
    """Steps every parameter that has a gradient by `rule(group, p)`, without recording gradients."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(self.rule(group, p).reshape(p.shape), alpha=-group["lr"])

    def rule(self, group, p):
        raise NotImplementedError


class Perceptron(Learned):
    """A network of the gradient and the parameter, for each coordinate."""

    def __init__(self, params, net=None):
        super().__init__(params)
        self.net = network(2, 5, 1) if net is None else net

    def rule(self, group, p):
        return self.net(torch.stack([p.grad.flatten(), p.flatten()], -1))


class Cells(torch.optim.Optimizer):
    """An LSTM cell for each coordinate, and a scale that is a tensor; the step records gradients as it likes."""

    def __init__(self, params, lr=0.1, hidden=4):
        super().__init__(params, {"lr": lr})
        self.cell = nn.LSTMCell(1, hidden).double()
        self.head = nn.Linear(hidden, 1).double()
        self.log_scale = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def step(self):  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["hidden"] = self.cell(p.grad.reshape(-1, 1), state.get("hidden"))
                change = self.head(state["hidden"][0]).reshape(p.shape) * self.log_scale.exp()
                with torch.no_grad():
                    p.sub_(group["lr"] * change)


class Recurrent(Learned):
    """A recurrent network of torch over a sequence of one; its hidden state belongs to the parameter."""

    def __init__(self, params, kind: Any = nn.LSTM):
        super().__init__(params)
        self.rnn = kind(1, 3, num_layers=2).double()
        self.head = nn.Linear(3, 1).double()

    def rule(self, group, p):
        state = self.state[p]
        out, state["hidden"] = self.rnn(p.grad.reshape(1, -1, 1), state.get("hidden"))
        return self.head(out[0])


class Stacked(Learned):
    """The optimizer of Andrychowicz et al. 2016: preprocessed gradients, a list of cells, hidden states in lists."""

    def __init__(self, params, hidden=3, layers=2, scale=3.0):
        super().__init__(params)
        self.hidden, self.layers, self.scale = hidden, layers, scale
        self.cells = nn.ModuleList(nn.LSTMCell(hidden if i else 2, hidden) for i in range(layers)).double()
        self.head = nn.Linear(hidden, 1).double()

    def rule(self, group, p):
        state = self.state[p]
        if not state:
            for name in ("h", "c"):
                state[name] = [p.new_zeros(p.numel(), self.hidden) for _ in range(self.layers)]
        out = self.preprocessed(p.grad.flatten())
        for index, cell in enumerate(self.cells):
            state["h"][index], state["c"][index] = cell(out, (state["h"][index], state["c"][index]))
            out = state["h"][index]
        return self.head(out)

    def preprocessed(self, grad):
        bound = torch.tensor(-self.scale, dtype=grad.dtype).exp()
        large = grad.abs() > bound
        size = torch.where(large, torch.where(large, grad.abs(), 1.0).log() / self.scale, -1.0)
        return torch.stack([size, torch.where(large, grad.sign(), grad / bound)], -1)


class ByName(Learned):
    """Modules in a dict and in a list: groups choose among them, and one serves all."""

    def __init__(self, params):
        weight, *rest = params
        super().__init__([{"params": [weight], "rule": "fast"}, {"params": rest, "rule": "slow"}])
        self.rules = {"fast": network(1, 3, 1), "slow": network(1, 2, 1)}
        self.shared = [network(1, 1)]

    def rule(self, group, p):
        grad = p.grad.reshape(-1, 1)
        return self.rules[group["rule"]](grad) + self.shared[0](grad)


class InGroups(Learned):
    """A module among the options of the groups, the same one for two of them."""

    def __init__(self, params):
        weight, *rest = params
        net = network(1, 3, 1)
        groups = [{"params": [weight], "net": net}, {"params": rest[:1], "net": net}]
        super().__init__([*groups, {"params": rest[1:], "net": network(1, 1)}])

    def rule(self, group, p):
        return group["net"](p.grad.reshape(-1, 1))


class Noisy(Learned):
    """Dropout and batch normalization in train mode."""

    def __init__(self, params):
        super().__init__(params)
        layers = nn.Linear(1, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.4), nn.LayerNorm(4), nn.Linear(4, 1)
        self.net = nn.Sequential(*layers).double()

    def rule(self, group, p):
        return self.net(torch.cat([p.grad.reshape(-1, 1), p.reshape(-1, 1)]))[: p.numel()]


class Attending(Learned):
    """Coordinates that attend to one another, in evaluation mode, where torch would take its fused layer."""

    def __init__(self, params):
        super().__init__(params)
        self.embed = nn.Linear(1, 4).double()
        self.layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).double().eval()
        self.head = nn.Linear(4, 1).double()

    def rule(self, group, p):
        return self.head(self.layer(self.embed(p.grad.reshape(1, -1, 1))))


class Rule(nn.Module):
    """A module of the user's own: raw parameters, a buffer that it changes, numbers, nested modules."""

    average: torch.Tensor
    inner: Any

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((), 0.7, dtype=torch.float64))
        self.inner = nn.ModuleDict({"net": network(1, 3, 1)})
        self.register_buffer("average", torch.zeros((), dtype=torch.float64))
        self.decay = 0.6
        self.calls = 0

    def forward(self, grad):
        self.calls += 1
        self.average.lerp_(grad.square().mean(), 1 - self.decay)
        return self.gain * self.inner["net"](grad / (self.average + 0.1).sqrt()) / self.calls**0.5


class Custom(Learned):
    def __init__(self, params):
        super().__init__(params)
        self.rule_of = Rule()

    def rule(self, group, p):
        return self.rule_of(p.grad.reshape(-1, 1))


class Adapting(Learned):
    """Trains one of its two modules in its own step, by autograd: that one is state."""

    def __init__(self, params, adaptation=0.05):
        super().__init__(params)
        self.fixed = network(1, 3, 1)
        self.adapted = network(1, 3, 1)
        self.adaptation = adaptation

    def rule(self, group, p):
        grad = p.grad.reshape(-1, 1)
        weights = list(self.adapted.parameters())
        with torch.enable_grad():
            error = (self.adapted(grad) - grad.tanh()).square().mean()
            slopes = torch.autograd.grad(error, weights)
        for weight, slope in zip(weights, slopes, strict=True):
            weight.sub_(self.adaptation * slope)
        return self.fixed(grad) + self.adapted(grad)


class OnAttributes(Learned):
    """Hidden state on the optimizer itself, absent at first, and trained tensors outside of any module."""

    def __init__(self, params):
        super().__init__(params)
        self.cell = nn.GRUCell(2, 3).double()
        self.weights = {"out": nn.Parameter(torch.randn(3, 1, dtype=torch.float64)), "bias": [torch.zeros(1).double()]}
        self.weights["bias"][0].requires_grad_()
        self.hidden = None

    def rule(self, group, p):
        summary = torch.stack([p.grad.norm(), p.grad.mean()]).reshape(1, 2)
        self.hidden = self.cell(summary, self.hidden)
        return (self.hidden @ self.weights["out"] + self.weights["bias"][0]) * p.grad


OPTIMIZERS = {
    "perceptron": Perceptron,
    "cells": Cells,
    "lstm": Recurrent,
    "gru": lambda params: Recurrent(params, nn.GRU),
    "rnn": lambda params: Recurrent(params, nn.RNN),
    "stacked": Stacked,
    "by-name": ByName,
    "in-groups": InGroups,
    "noisy": Noisy,
    "attending": Attending,
    "custom": Custom,
    "adapting": Adapting,
    "on-attributes": OnAttributes,
}


def held_tensors(optimizer):
    """Returns every tensor that requires a gradient outside of the groups' parameters and the state, by path."""
    found = {}

    def visit(value, path):
        if isinstance(value, torch.Tensor):
            if value.requires_grad and value.is_leaf:
                found.setdefault(id(value), (".".join(path), value))
        elif isinstance(value, nn.Module):
            for name, p in value.named_parameters():
                found.setdefault(id(p), (".".join((*path, name)), p))
        elif isinstance(value, (dict, list, tuple)):
            pairs = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in pairs:
                if key != "params":
                    visit(item, (*path, str(key)))

    visit(optimizer.param_groups, ("groups",))
    visit({k: v for k, v in vars(optimizer).items() if k not in ("param_groups", "state", "defaults")}, ())
    return dict(found.values())
