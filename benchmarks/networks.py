"""The networks, written once for torch and JAX: `ops` is `benchmarks.torch_operators` or `benchmarks.jax_operators`.

A network is plain data. `shapes()` names its parameters in the order in which every contender has them, and
`apply(ops, params, x)` is its function of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

Shape = tuple[int, ...]


class Network(Protocol):
    """A function of named parameters and one input."""

    def shapes(self) -> dict[str, Shape]:
        """Returns the shape of every parameter; what is called `scale` starts at one."""
        ...

    def apply(self, ops: Any, params: Mapping[str, Any], x: Any) -> Any:
        """Returns the output."""
        ...


def initial_values(network: Network, seed: int = 0) -> dict[str, np.ndarray]:
    """Draws parameters in float64: uniform with He's variance for weights, small shifts and biases, scales of one."""
    random = np.random.default_rng(seed)
    values = {}
    for name, shape in network.shapes().items():
        fan_in = math.prod(shape[1:]) if len(shape) > 1 else shape[0]
        bound = math.sqrt(6 / fan_in) if len(shape) > 1 else 0.1
        values[name] = np.ones(shape) if name.endswith("scale") else random.uniform(-bound, bound, shape)
    return values


@dataclass(frozen=True)
class MLP:
    """Linear layers with ReLU between them."""

    sizes: tuple[int, ...]

    def shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for index, (before, after) in enumerate(pairwise(self.sizes)):
            shapes |= {f"weight{index}": (after, before), f"bias{index}": (after,)}
        return shapes

    def apply(self, ops: Any, params: Mapping[str, Any], x: Any) -> Any:
        last = len(self.sizes) - 2
        for index in range(last + 1):
            x = ops.linear(x, params[f"weight{index}"], params[f"bias{index}"])
            x = x if index == last else ops.relu(x)
        return x


@dataclass(frozen=True)
class ConvNet:
    """Blocks of convolution, batch normalization, ReLU and max-pooling, and a linear layer: the network of MAML."""

    ways: int = 5
    channels: int = 64
    size: int = 28
    blocks: int = 4

    def shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        before, width, size = 1, self.channels, self.size
        for index in range(self.blocks):
            shapes |= {f"conv{index}": (width, before, 3, 3)} | _norm(f"conv{index}", width)
            before, size = width, size // 2
        return shapes | {"weight": (self.ways, width * size * size), "bias": (self.ways,)}

    def apply(self, ops: Any, params: Mapping[str, Any], x: Any) -> Any:
        for index in range(self.blocks):
            x = ops.conv(x, params[f"conv{index}"], padding=1)
            x = ops.relu(ops.batch_norm(x, params[f"conv{index}_scale"], params[f"conv{index}_shift"]))
            x = ops.max_pool(x)
        return ops.linear(ops.reshape(x, (x.shape[0], -1)), params["weight"], params["bias"])


@dataclass(frozen=True)
class Transformer:
    """A decoder with layer normalization before attention and before the feed-forward layers; attention written out."""

    vocabulary: int = 64
    width: int = 64
    heads: int = 4
    blocks: int = 2
    length: int = 32

    def shapes(self) -> dict[str, Shape]:
        d = self.width
        shapes: dict[str, Shape] = {"embedding": (self.vocabulary, d), "positions": (self.length, d)}
        for index in range(self.blocks):
            block = {"attend_scale": (d,), "attend_shift": (d,), "qkv": (3 * d, d), "mix": (d, d)}
            block |= {"feed_scale": (d,), "feed_shift": (d,), "up": (4 * d, d), "up_bias": (4 * d,)}
            block |= {"down": (d, 4 * d), "down_bias": (d,)}
            shapes |= {f"block{index}_{name}": shape for name, shape in block.items()}
        return shapes | {"out_scale": (d,), "out_shift": (d,), "out": (self.vocabulary, d)}

    def apply(self, ops: Any, params: Mapping[str, Any], x: Any) -> Any:
        x = ops.embedding(x, params["embedding"]) + params["positions"]
        for index in range(self.blocks):
            block = {name: params[f"block{index}_{name}"] for name in BLOCK}
            x = x + self._attend(ops, block, ops.layer_norm(x, block["attend_scale"], block["attend_shift"]))
            hidden = ops.layer_norm(x, block["feed_scale"], block["feed_shift"])
            hidden = ops.relu(ops.linear(hidden, block["up"], block["up_bias"]))
            x = x + ops.linear(hidden, block["down"], block["down_bias"])
        return ops.linear(ops.layer_norm(x, params["out_scale"], params["out_shift"]), params["out"])

    def _attend(self, ops: Any, block: Mapping[str, Any], x: Any) -> Any:
        batch, length, width = x.shape
        by_head = (batch, length, self.heads, width // self.heads)
        parts = ops.split(ops.linear(x, block["qkv"]), 3)
        query, key, value = (ops.transpose(ops.reshape(part, by_head), 1, 2) for part in parts)
        scores = query @ ops.transpose(key, 2, 3) / math.sqrt(width // self.heads)
        mixed = ops.softmax(ops.mask_future(scores)) @ value
        return ops.linear(ops.reshape(ops.transpose(mixed, 1, 2), (batch, length, width)), block["mix"])


BLOCK = ("attend_scale", "attend_shift", "qkv", "mix", "feed_scale", "feed_shift", "up", "up_bias", "down", "down_bias")


@dataclass(frozen=True)
class DenseNet:
    """DenseNet-BC: three dense blocks of bottleneck layers, halved channels between them (Huang et al., 2017)."""

    depth: int = 40
    growth: int = 12
    classes: int = 10

    @property
    def layers(self) -> int:
        """The bottleneck layers of a block."""
        return (self.depth - 4) // 6

    def shapes(self) -> dict[str, Shape]:
        channels = 2 * self.growth
        shapes: dict[str, Shape] = {"stem": (channels, 3, 3, 3)}
        for block in range(3):
            for layer in range(self.layers):
                name, inner = f"b{block}l{layer}", 4 * self.growth
                shapes |= _norm(f"{name}_a", channels) | {f"{name}_a": (inner, channels, 1, 1)}
                shapes |= _norm(f"{name}_b", inner) | {f"{name}_b": (self.growth, inner, 3, 3)}
                channels += self.growth
            if block < 2:
                shapes |= _norm(f"b{block}", channels) | {f"b{block}": (channels // 2, channels, 1, 1)}
                channels //= 2
        return shapes | _norm("out", channels) | {"out": (self.classes, channels), "out_bias": (self.classes,)}

    def apply(self, ops: Any, params: Mapping[str, Any], x: Any) -> Any:
        def normalized(x: Any, name: str) -> Any:
            return ops.relu(ops.batch_norm(x, params[f"{name}_scale"], params[f"{name}_shift"]))

        x = ops.conv(x, params["stem"], padding=1)
        for block in range(3):
            for layer in range(self.layers):
                name = f"b{block}l{layer}"
                made = ops.conv(normalized(x, f"{name}_a"), params[f"{name}_a"])
                made = ops.conv(normalized(made, f"{name}_b"), params[f"{name}_b"], padding=1)
                x = ops.concatenate((x, made), 1)
            if block < 2:
                x = ops.average_pool(ops.conv(normalized(x, f"b{block}"), params[f"b{block}"]))
        return ops.linear(ops.mean(normalized(x, "out"), (2, 3)), params["out"], params["out_bias"])


def _norm(name: str, channels: int) -> dict[str, Shape]:
    return {f"{name}_scale": (channels,), f"{name}_shift": (channels,)}


@dataclass(frozen=True)
class CoordinateLSTM:
    """An LSTM cell and a linear layer, for every coordinate by itself: the learned optimizer (Andrychowicz, 2016)."""

    hidden: int = 20

    def shapes(self) -> dict[str, Shape]:
        gates = 4 * self.hidden
        return {
            "from_input": (gates, 1),
            "from_hidden": (gates, self.hidden),
            "gate_bias": (gates,),
            "head": (1, self.hidden),
        }

    def apply(self, ops: Any, params: Mapping[str, Any], x: Any) -> Any:
        """Maps gradients [coordinate] and memory, two of [coordinate, hidden], to steps and the new memory."""
        gradient, hidden, cell = x
        gates = ops.linear(ops.reshape(gradient, (-1, 1)), params["from_input"], params["gate_bias"])
        enter, forget, new, leave = ops.split(gates + ops.linear(hidden, params["from_hidden"]), 4)
        cell = ops.sigmoid(forget) * cell + ops.sigmoid(enter) * ops.tanh(new)
        hidden = ops.sigmoid(leave) * ops.tanh(cell)
        return ops.reshape(ops.linear(hidden, params["head"]), (-1,)), hidden, cell
