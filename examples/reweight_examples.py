"""Finds out which labels are wrong: a weight for every training example, from the gradient of a few clean examples.

    python examples/reweight_examples.py            # about half a minute on two cores

Half of the labels of 1,000 training digits are wrong, 50 digits are known to be right. Two ways to learn the weights:

- "Learning to reweight examples for robust deep learning" (Ren et al., 2018): before every step of training, a trial
  step tells how the weight of each example of the batch would change the loss on the clean digits, by `fn.step`.
  Examples that would raise it get no weight.
- The weights are learned ahead through training runs of new networks, by `fn.unroll` (Shaban et al., 2019), and kept.

What to expect: where the wrong labels agree with each other (they all say 0, the "background" of Ren et al.), the clean
digits alone give 80 % and equal weights less; both ways reach 90 %. Where wrong labels are random they nearly cancel
each other: nothing is ahead of simply giving half of the weight to the clean digits.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gimli_compile as gimli

OUTPUT = Path(__file__).parent / "output" / "reweight_examples.png"
KINDS = ("wrong labels say 0", "wrong labels are random")
SIZES = (1000, 50, 747)  # training, clean and test digits
BATCH_SIZE = 100
UNROLLED = 20  # steps of the runs that weights are learned ahead through
COLORS = ("tab:gray", "tab:blue", "tab:cyan", "tab:orange", "tab:green", "black")

Batch = tuple[Tensor, Tensor]
Weigh = Callable[[gimli.TrainState, Batch, Tensor], Tensor]  # from the state, a batch and its indices


class Data(NamedTuple):
    """Images and labels of each split, and which of the labels for training are right."""

    train: Batch
    clean: Batch
    test: Batch
    right: Tensor


class Outcome(NamedTuple):
    """What was found out about one kind of noise."""

    kind: str
    accuracy: dict[str, Tensor]  # of each contestant, before the first and after every step: [run, step]
    weights: Tensor  # learned ahead: [run, example]
    right: Tensor  # [run, example]


def load_data(kind: str, seed: int) -> Data:
    """Loads scikit-learn's digits, shuffled by the seed, and spoils labels for training."""
    generator = torch.Generator().manual_seed(seed)
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=generator)
    images = torch.tensor(pixels / 16, dtype=torch.float32)[order].split(SIZES)
    labels = torch.tensor(digits)[order].split(SIZES)
    spoiled = torch.rand(SIZES[0], generator=generator) < 0.5
    others = (labels[0] + torch.randint(1, 10, SIZES[:1], generator=generator)) % 10
    wrong = torch.zeros_like(others) if kind == KINDS[0] else others
    given = torch.where(spoiled, wrong, labels[0])
    return Data((images[0], given), *zip(images[1:], labels[1:], strict=True), right=given == labels[0])


def make_model(seed: int) -> nn.Module:
    """Makes a network of two layers, initialized by the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def loss_fn(model: nn.Module, batch: Batch, weights: Tensor) -> Tensor:
    """The weighted loss; the weights are what is differentiated."""
    images, labels = batch
    return (weights * cross_entropy(model(images), labels, reduction="none")).sum()


def loss_by_index(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], weights: Tensor) -> Tensor:
    """The same with a weight for every training example, of which the batch has some."""
    images, labels, picked = batch
    return loss_fn(model, (images, labels), weights[picked] / weights[picked].sum())


def capture(loss: Callable[..., Tensor], seed: int) -> gimli.Functional:
    """Captures the network, the optimizer and a loss."""
    model = make_model(seed)
    return gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loss)


# ---------------------------------------------------------------------- two ways to learn the weights


def weigh_by_one_step(fn: gimli.Functional, state: gimli.TrainState, batch: Batch, clean: Batch) -> Tensor:
    """Returns how much each example would lower the loss on the clean ones, at least 0, of sum 1."""
    nothing = torch.zeros(len(batch[1]), requires_grad=True)
    after, _ = fn.step(state, batch, None, nothing)
    (gradient,) = torch.autograd.grad(cross_entropy(fn(after, clean[0]), clean[1]), nothing)
    gains = (-gradient).clamp(min=0)
    return gains / gains.sum().clamp(min=1e-30)


def learn_ahead(data: Data, runs: int, seed: int, advance: Callable[[], None]) -> Tensor:
    """Learns a weight in (0, 1) for every example; every meta-step unrolls the training of a new network."""
    fn = capture(loss_by_index, seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(SIZES[0], requires_grad=True)
    meta_optimizer = torch.optim.Adam([logits], lr=0.1)
    images, labels = data.train
    for run in range(runs):
        picked = torch.randint(len(labels), (UNROLLED, BATCH_SIZE), generator=generator)
        model = make_model(10_000 * seed + run + 1)
        state = replace(fn.init(), params={name: p.detach() for name, p in model.named_parameters()})
        state, _ = fn.unroll(state, (images[picked], labels[picked], picked), None, logits.sigmoid())
        meta_optimizer.zero_grad()
        cross_entropy(fn(state, data.clean[0]), data.clean[1]).backward()
        meta_optimizer.step()
        advance()
    return logits.detach().sigmoid()


# ---------------------------------------------------------------------- what they are worth


def train(fn: gimli.Functional, data: Data, split: Batch, weigh: Weigh, steps: int, seed: int) -> Tensor:
    """Trains on a split, and returns the test accuracy before the first and after every step."""
    generator = torch.Generator().manual_seed(seed)
    state, accuracy = fn.init(), []
    for _ in range(steps + 1):
        accuracy.append((fn(state, data.test[0]).argmax(1) == data.test[1]).float().mean())
        picked = torch.randint(len(split[1]), (BATCH_SIZE,), generator=generator)
        batch = split[0][picked], split[1][picked]
        weights = weigh(state, batch, picked)
        with torch.no_grad():
            state, _ = fn.step(state, batch, None, weights)
    return torch.stack(accuracy)


def compare(data: Data, weights: Tensor, steps: int, seed: int) -> dict[str, Tensor]:
    """Trains the same network in six ways; the last is told which labels are right."""
    fn = capture(loss_fn, seed)
    everything = torch.cat([data.train[0], data.clean[0]]), torch.cat([data.train[1], data.clean[1]])
    halves = torch.cat([torch.full((size,), 1 / size) for size in SIZES[:2]])

    def share(values: Tensor) -> Weigh:
        return lambda state, batch, picked: values[picked] / values[picked].sum()

    contestants = {
        "all equal": (data.train, share(torch.ones(SIZES[0]))),
        "clean digits only": (data.clean, share(torch.ones(SIZES[1]))),
        "half on the clean digits": (everything, share(halves)),
        "learned at every step": (data.train, lambda state, batch, _: weigh_by_one_step(fn, state, batch, data.clean)),
        "learned ahead": (data.train, share(weights)),
        "right labels only (told)": (data.train, share(data.right.float())),
    }
    return {name: train(fn, data, split, weigh, steps, seed) for name, (split, weigh) in contestants.items()}


def investigate(kind: str, args: argparse.Namespace, progress: Progress) -> Outcome:
    """Learns weights under one kind of noise and compares, over several shuffles of the digits."""
    bar = progress.add_task(kind, total=args.repeats * args.meta_steps)
    accuracies, weights, right = [], [], []
    for seed in range(args.seed, args.seed + args.repeats):
        data = load_data(kind, seed)
        weights.append(learn_ahead(data, args.meta_steps, seed, lambda: progress.advance(bar)))
        right.append(data.right)
        accuracies.append(compare(data, weights[-1], args.steps, seed))
    accuracy = {name: torch.stack([curves[name] for curves in accuracies]) for name in accuracies[0]}
    return Outcome(kind, accuracy, torch.stack(weights), torch.stack(right))


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """Prints the test accuracies."""
    for outcome in outcomes:
        table = Table("weights", "test accuracy (mean ± std)", "at the step with the best", title=outcome.kind)
        for name, accuracy in outcome.accuracy.items():
            ends = (accuracy[:, -1], accuracy.amax(1))
            table.add_row(name, *(f"{end.mean():.3f} ± {end.std(correction=0):.3f}" for end in ends))
        console.print(table)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draws, for each kind of noise, the accuracies and the weights that were learned ahead."""
    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "legend.framealpha": 0.9}):
        figure = Figure(figsize=(13, 9), layout="constrained", dpi=110)
        for column, outcome in zip(figure.subplots(2, len(outcomes)).T, outcomes, strict=True):
            plot_accuracy(column[0], outcome.accuracy, outcome.kind)
            sides = [outcome.weights[outcome.right == side].numpy() for side in (True, False)]
            names = ["right labels", "wrong labels"]
            column[1].hist(sides, bins=20, range=(0, 1), color=["tab:green", "tab:red"], label=names)
            column[1].set(title="Weights that were learned ahead", xlabel="weight", ylabel="examples")
            column[1].legend()
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def plot_accuracy(axes: Axes, accuracies: Mapping[str, Tensor], kind: str) -> None:
    """Draws the test accuracy over the steps."""
    for (name, accuracy), color in zip(accuracies.items(), COLORS, strict=True):
        mean, spread = accuracy.mean(0), accuracy.std(0, correction=0)
        axes.plot(mean, color=color, linewidth=1.5, label=name, linestyle=":" if "told" in name else "-")
        axes.fill_between(range(len(mean)), mean - spread, mean + spread, color=color, alpha=0.15, linewidth=0)
    axes.set(title=f"Test accuracy (mean ± std): {kind}", xlabel="step", ylabel="accuracy", ylim=(0, 1))
    axes.legend(loc="lower right", ncols=2)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Learns the weights of examples by gradients.")
    parser.add_argument("--meta-steps", type=int, default=150, help="runs that weights are learned ahead through")
    parser.add_argument("--steps", type=int, default=300, help="length of the runs that are compared")
    parser.add_argument("--repeats", type=int, default=3, help="shuffles of the digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the plot goes (.png, .svg or .pdf)")
    parser.add_argument("--smoke", action="store_true", help="tries everything in a few seconds, and learns little")
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.meta_steps, parsed.steps, parsed.repeats = 8, 40, 1
    return parsed


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Runs the demonstration."""
    args = parse_arguments(arguments)
    console = Console()
    with Progress(console=console) as progress:
        outcomes = [investigate(kind, args, progress) for kind in KINDS]
    print_outcomes(outcomes, console)
    plot(outcomes, args.output)
    console.print(f"The plot is in {args.output}", soft_wrap=True)
    return outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)  # the operators are too small to be shared out
    main()
