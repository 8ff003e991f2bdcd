"""What the table of cuts says of each argument of each operator, against autograd itself."""

from typing import Any

import lion_pytorch
import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.fx.node import map_arg

import gimli_compile as gimli
from gimli_compile.gradient_cuts import Passage, arguments, call_of
from gimli_compile.slot import Role


def kinds_of_losses():
    torch.manual_seed(0)  # the cases are made while tests are collected, before any fixture seeds
    x = torch.rand(4, 2, 8, 8, dtype=torch.float64) + 0.1
    y = torch.randn(4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 2, 1])

    def over(*layers):
        return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), *layers, nn.Flatten(), nn.LazyLinear(3)).double(), x

    one = lambda model, batch: model(batch).square().sum(-1).sub(y).square().mean()  # noqa: E731
    yield "pool", *over(nn.ReLU(), nn.MaxPool2d(2)), one
    yield "average", *over(nn.Hardtanh(), nn.AvgPool2d(2)), one
    yield "adaptive", *over(nn.LeakyReLU(), nn.AdaptiveAvgPool2d(2)), one
    yield "padding", *over(nn.ReflectionPad2d(1), nn.Hardswish(), nn.ReplicationPad2d(1)), one
    yield "prelu", *over(nn.PReLU(), nn.LogSigmoid()), one
    yield "shrink", *over(nn.Softshrink(0.1), nn.Hardshrink(0.1)), one
    yield "group norm", *over(nn.GroupNorm(1, 3), nn.GELU()), one
    yield "layer norm", *over(nn.LayerNorm(8), nn.CELU()), one
    yield "batch norm", *over(nn.BatchNorm2d(3), nn.SELU()), one
    yield "nll", *over(nn.ELU()), lambda model, batch: F.nll_loss(model(batch), labels)
    yield "entropy", *over(nn.SiLU()), lambda model, batch: F.cross_entropy(model(batch), labels)
    yield "huber", *over(nn.Softplus()), lambda model, batch: F.huber_loss(model(batch).sum(-1), y)
    yield "largest", *over(nn.Tanh()), lambda model, batch: model(batch).max(-1)[0].sub(y).abs().mean()


def derivative_is_zero(node, argument, values):
    """Tells whether autograd gives a call no derivative in one of its arguments, or zeros, at these values."""
    leaf = values[argument].detach().requires_grad_()
    try:
        out = call(node, {**values, argument: leaf})
    except RuntimeError as error:
        assert "is not differentiable with respect to argument" in str(error)
        return True
    if not out.requires_grad:
        return True
    total = (out * torch.linspace(0.3, 1.7, out.numel(), dtype=out.dtype).reshape(out.shape)).sum()
    (grad,) = torch.autograd.grad(total, [leaf], allow_unused=True)
    return grad is None or not grad.any()


def call(node: Any, values):
    """Calls the operator of a node; of several results the node's own."""
    made: Any = call_of(node)
    args, kwargs = map_arg((made.args, made.kwargs), values.__getitem__)
    out = made.target(*args, **kwargs)
    return out if made is node else out[node.args[1]]


def check_passages(program, values, *, but=()):
    """Compares, for every argument of every call, what the table says with what autograd does.

    `but` are operators that choose between their arguments: at some values they do not choose one at all.
    """
    env = dict(zip(program.placeholders, [values[slot] for slot in program.inputs], strict=True))
    checked = 0
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        with torch.no_grad():
            env[node] = call(node, env)
        if not isinstance(env[node], torch.Tensor) or not env[node].is_floating_point() or node.meta.get("stop"):
            continue
        for argument, passage in arguments(node):
            if env[argument].is_floating_point():
                zero = derivative_is_zero(node, argument, env)
                chosen = zero and node.target._opname in but if call_of(node) is node else False
                assert chosen or zero is (passage is not Passage.GRADIENT), (node.format_node(), argument, passage)
                checked += 1
    return checked


@pytest.mark.parametrize("case", list(kinds_of_losses()), ids=lambda case: case[0])
def test_table_of_cuts_agrees_with_autograd_on_losses(case):
    """For each operator of the inner gradients of many layers: a zero derivative is a zero derivative."""
    _, model, data, loss = case
    with torch.no_grad():
        model(data)
    fn = gimli.functionalize(model, optim.SGD(model.parameters(), lr=0.1), loss)
    fn.step(fn.init(), data)
    program = fn.programs["grad"].latest
    live = {**{(Role.PARAM, n): p.detach() for n, p in model.named_parameters()}, (Role.BATCH, ""): data}
    live.update({(Role.BUFFER, n): b for n, b in model.named_buffers()})
    values = {s: program.constants[s] if s in program.constants else live[s.role, s.path] for s in program.inputs}
    assert check_passages(program, values) > 20


@pytest.mark.parametrize(
    "make", [optim.Adam, optim.Rprop, optim.ASGD, optim.Adamax, lion_pytorch.Lion], ids=lambda make: make.__name__
)
def test_table_of_cuts_agrees_with_autograd_on_updates(make):
    model = nn.Linear(3, 2).double()
    fn = gimli.functionalize(model, make(model.parameters(), lr=0.1))
    program = fn.programs["update"].latest
    values = {
        slot: torch.rand(node.meta["val"].shape).to(node.meta["val"].dtype) + 1
        for slot, node in zip(program.inputs, program.placeholders, strict=True)
    }
    assert check_passages(program, values, but=("where", "index_put", "maximum", "clamp")) > 8
