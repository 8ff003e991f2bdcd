"""The workloads: what is trained, for how long, and in what the result is differentiated. Plain data, no framework."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from benchmarks.networks import MLP, ConvNet, DenseNet, Network, Transformer, initial_values
from benchmarks.update_rules import RULE

RATES = {"sgd": {"lr": 0.01}, "adam": {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}}
CHECKED_STEPS, CHECKED_TASKS = 20, 4  # of the comparison in float64
LONG = {False: {50: 50, 200: 200, 1000: 1000}, True: {50: 4, 200: 8, 1000: 16}}  # J of W5, and when quick


class Data(NamedTuple):
    """Batches [task, step, ...] (without the task if there is one only) and held-out data [task, ...]."""

    inputs: np.ndarray
    targets: np.ndarray
    held_out_inputs: np.ndarray
    held_out_targets: np.ndarray


@dataclass(frozen=True)
class Workload:
    """An inner loop and a loss after it; with tasks, the mean of their losses.

    Args:
        key: names the workload on the command line and in files: "W3-adam-20".
        title: what it is, for readers.
        network: the model.
        loss: "cross_entropy" or "squared".
        rule: "sgd", "adam" or "lstm" (a learned optimizer).
        steps: J, the inner steps.
        draw: draws one batch of one task from a generator: inputs and targets.
        tasks: how many tasks, None for one without a dimension.
        wanted: in what to differentiate: "params" (where training starts) and "hyper" (what the rule has).
        rates: "shared", or "each" for one learning rate for each parameter tensor.
        same_batch: takes every step on the same batch, as MAML does.
        threads: how many threads it is measured with.
    """

    key: str
    title: str
    network: Network
    loss: str
    rule: str
    steps: int
    draw: Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]
    tasks: int | None = None
    wanted: tuple[str, ...] = ("params",)
    rates: str = "shared"
    same_batch: bool = False
    threads: int = 2
    lr: float | None = None
    note: str = field(default="", compare=False)

    def params(self) -> dict[str, np.ndarray]:
        """Returns the initial parameters, in float64."""
        return initial_values(self.network)

    def hyper(self) -> dict[str, np.ndarray]:
        """Returns the numbers of the rule: learning rates and the like, or the weights of the learned optimizer."""
        if self.rule == "lstm":
            return {name: value * 0.3 for name, value in initial_values(RULE, seed=1).items()}
        hyper = {name: np.asarray(value) for name, value in RATES[self.rule].items()}
        if self.lr is not None:
            hyper["lr"] = np.asarray(self.lr)
        if self.rates == "each":
            count = len(self.network.shapes())
            hyper["rates"] = float(hyper.pop("lr")) * np.linspace(0.5, 1.5, count)
        return hyper

    def data(self) -> Data:
        """Draws the batches, always the same."""
        random = np.random.default_rng(7)
        made = []
        for _ in range(self.tasks or 1):
            state = np.random.default_rng(random.integers(2**32))
            batches = [self.draw(state) for _ in range(1 if self.same_batch else self.steps)]
            batches *= self.steps // len(batches)
            held_out = self.draw(state)
            made.append((*(np.stack(parts) for parts in zip(*batches, strict=True)), *held_out))
        stacked = [np.stack(parts) for parts in zip(*made, strict=True)]
        return Data(*(part if self.tasks else part[0] for part in stacked))

    def checked(self) -> Workload:
        """Returns the workload for the comparison in float64: cut to the steps and tasks that it takes to be sure."""
        tasks = self.tasks and min(self.tasks, CHECKED_TASKS)
        return replace(self, steps=min(self.steps, CHECKED_STEPS), tasks=tasks)


# ---------------------------------------------------------------------- what is drawn: picklable


@dataclass(frozen=True)
class Points:
    """Random inputs of a size, random classes."""

    shape: tuple[int, ...]
    classes: int
    scale: float = 1.0

    def __call__(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        return self.scale * random.standard_normal(self.shape), random.integers(self.classes, size=self.shape[0])


@dataclass(frozen=True)
class Episode:
    """Images around a prototype of their class, so many of each: a task of few-shot classification."""

    ways: int
    shots: int
    size: int

    def __call__(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(self.ways), self.shots)
        prototypes = random.standard_normal((self.ways, 1, self.size, self.size))
        return prototypes[labels] + 0.3 * random.standard_normal((len(labels), 1, self.size, self.size)), labels


@dataclass(frozen=True)
class Sinusoid:
    """Points of a sine with random amplitude and phase."""

    points: int

    def __call__(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        amplitude, phase = random.uniform(0.1, 5), random.uniform(0, math.pi)
        x = random.uniform(-5, 5, (self.points, 1))
        return x, amplitude * np.sin(x + phase)


@dataclass(frozen=True)
class Sequences:
    """Random walks over a vocabulary, and what follows each position."""

    count: int
    length: int
    vocabulary: int

    def __call__(self, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        moves = random.integers(-1, 3, (self.count, self.length + 1))
        walk = np.cumsum(moves, 1) % self.vocabulary
        return walk[:, :-1], walk[:, 1:]


# ---------------------------------------------------------------------- the workloads


def workloads(*, quick: bool = False) -> dict[str, Workload]:
    """Returns all workloads by key; with `quick`, smaller ones under the same keys, which say so."""
    made = [*_few_shot(quick), *_sinusoids(quick), *_small_mlps(quick), *_transformers(quick)]
    made += [*_long_unrolls(quick), *_dense_nets(quick), *_learned_optimizers(quick)]
    note = "quick: smaller than the workload of this name" if quick else ""
    return {workload.key: replace(workload, note=note) for workload in made}


def _few_shot(quick: bool) -> list[Workload]:
    shots, channels, size = (2, 8, 16) if quick else (5, 64, 28)
    return [
        Workload(
            f"W1-{tasks}",
            f"Conv4-{channels}, 5-way {shots}-shot, {size}x{size}, {count} tasks, SGD, J=5",
            ConvNet(5, channels, size),
            "cross_entropy",
            "sgd",
            5,
            Episode(5, shots, size),
            tasks=count,
            same_batch=True,
            lr=0.1,
        )
        for tasks, count in ((4, 2 if quick else 4), (32, 4 if quick else 32))
    ]


def _sinusoids(quick: bool) -> list[Workload]:
    tasks = 3 if quick else 25
    return [
        Workload(
            f"W2-{rule}-{steps}",
            f"sinusoid, MLP 1-40-40-1, {tasks} tasks x 10 points, {rule}, J={length}",
            MLP((1, 40, 40, 1)),
            "squared",
            rule,
            length,
            Sinusoid(10),
            tasks=tasks,
            same_batch=True,
            lr=0.001 if (rule, steps) == ("sgd", 50) else None,  # with 0.01 some of the tasks diverge
        )
        for rule in ("sgd", "adam")
        for steps, length in ((5, 3 if quick else 5), (50, 6 if quick else 50))
    ]


def _small_mlps(quick: bool) -> list[Workload]:
    sizes = (8, 16, 16, 5) if quick else (32, 64, 64, 5)
    return [
        Workload(
            f"W3-{rule}-{steps}",
            f"MLP {'-'.join(map(str, sizes))}, batch 16, {rule}, J={length}, in theta_0 and all hyperparameters",
            MLP(sizes),
            "cross_entropy",
            rule,
            length,
            Points((16, sizes[0]), 5),
            wanted=("params", "hyper"),
            threads=1,
        )
        for rule in ("sgd", "adam")
        for steps, length in ((5, 3 if quick else 5), (20, 5 if quick else 20), (100, 8 if quick else 100))
    ]


def _transformers(quick: bool) -> list[Workload]:
    batch, network = 8, Transformer()
    if quick:
        batch, network = 2, Transformer(16, 16, 2, 2, 8)
    return [
        Workload(
            f"W4-{rule}",
            f"transformer d{network.width} h{network.heads} L{network.blocks} T{network.length}, batch {batch}, "
            f"{rule}, J={3 if quick else 5}",
            network,
            "cross_entropy",
            rule,
            3 if quick else 5,
            Sequences(batch, network.length, network.vocabulary),
        )
        for rule in ("sgd", "adam")
    ]


def _long_unrolls(quick: bool) -> list[Workload]:
    mlp, transformer, batch = MLP((32, 64, 64, 5)), Transformer(blocks=8, length=64), 8
    if quick:
        mlp, transformer, batch = MLP((8, 16, 16, 5)), Transformer(16, 16, 2, 4, 8), 2
    sequences = Sequences(batch, transformer.length, transformer.vocabulary)
    models = {"mlp": (mlp, Points((16, mlp.sizes[0]), 5)), "transformer": (transformer, sequences)}
    titles = {"mlp": f"MLP {'-'.join(map(str, mlp.sizes))}, batch 16"}
    titles["transformer"] = f"transformer d{transformer.width} h{transformer.heads} L{transformer.blocks} "
    titles["transformer"] += f"T{transformer.length}, batch {batch}"
    return [
        Workload(
            f"W5-{name}-{steps}",
            f"long unroll: {titles[name]}, adam, J={length}",
            network,
            "cross_entropy",
            "adam",
            length,
            draw,
        )
        for name, (network, draw) in models.items()
        for steps, length in LONG[quick].items()
    ]


def _dense_nets(quick: bool) -> list[Workload]:
    batch, size, steps = (2, 8, 3) if quick else (8, 32, 15)
    return [
        Workload(
            f"W6-{depth}",
            f"DenseNet-BC k=12 depth {small if quick else depth}, batch {batch} of {size}x{size}, "
            f"a learning rate for each tensor, J={steps}",
            DenseNet(small if quick else depth),
            "cross_entropy",
            "sgd",
            steps,
            Points((batch, 3, size, size), 10),
            wanted=("hyper",),
            rates="each",
        )
        for depth, small in ((40, 10), (100, 16))
    ]


def _learned_optimizers(quick: bool) -> list[Workload]:
    sizes, steps = ((8, 8, 5), 4) if quick else ((32, 32, 5), 20)
    return [
        Workload(
            "W7",
            f"learned optimizer: LSTM of {RULE.hidden} on each coordinate of an MLP {'-'.join(map(str, sizes))}, "
            f"batch 16, J={steps}",
            MLP(sizes),
            "cross_entropy",
            "lstm",
            steps,
            Points((16, sizes[0]), 5),
            wanted=("hyper",),
        )
    ]


def chosen(names: list[str], made: dict[str, Workload]) -> list[Workload]:
    """Returns the workloads whose key is named, or begins with a name: "W3" is all of W3-...; all without names."""
    known: Any = [name for name in names if not any(_is_named(key, name) for key in made)]
    if known:
        raise SystemExit(f"no such workload: {', '.join(known)}. There are {', '.join(made)}.")
    return [workload for key, workload in made.items() if not names or any(_is_named(key, name) for name in names)]


def _is_named(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}-")
