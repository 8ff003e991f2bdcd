"""Learns a learning rate and a weight decay for every parameter of a network, through the optimizer's own code.

    python examples/learn_learning_rates.py            # about a minute on two cores; or: make demo

The inner loop trains a small network on handwritten digits for a few steps with AdaBelief, an optimizer from PyPI that
knows nothing of meta-learning. The outer loop moves the hyperparameters along the exact gradient of the validation loss
after the last step. At the end the live optimizer trains new networks with the numbers that were learned, and the test
split, which nothing has seen before, tells what they are worth. The setting is that of Section 5.1 of "Generalized
Inner Loop Meta-Learning" (Grefenstette et al., 2019), made small.

What is learned fits training runs of the length that was unrolled: a longer run wants other rates (Wu et al.,
"Understanding short-horizon bias in stochastic meta-optimization", 2018).
"""

import argparse
import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pytorch_optimizer import AdaBelief
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import gimli_compile as gimli

OUTPUT = Path(__file__).parent / "output" / "learn_learning_rates.png"
LEARNED = ("lr", "weight_decay")
BATCH_SIZE = 32
FIRST_WEIGHT_DECAY = 0.01  # AdaBelief's own is 0, where a logarithm cannot start
META_LEARNING_RATE = 0.1  # the hyperparameters are learned as logarithms: one meta-step changes them by about a tenth
PROGRAM_LINES = 40

Batches = tuple[Tensor, Tensor]
Settings = Sequence[Mapping[str, float]]  # what the optimizer is told about each parameter


class Data(NamedTuple):
    """Images and labels of each split."""

    train: Batches
    validation: Batches
    test: Batches


class History(NamedTuple):
    """What meta-learning went through: the validation loss before each meta-step, and the values at it."""

    validation_loss: list[float]
    values: dict[str, list[list[float]]]  # by hyperparameter: [meta-step][parameter]


class Runs(NamedTuple):
    """The test loss and accuracy of several live training runs, before the first and after every step: [run, step]."""

    loss: Tensor
    accuracy: Tensor


class Results(NamedTuple):
    """Everything that the demonstration found out."""

    names: list[str]  # of the parameters
    learned: Settings
    history: History
    runs: dict[str, Runs]


def load_data() -> Data:
    """Loads scikit-learn's 1,797 digits, always shuffled and split in the same way."""
    pixels, digits = load_digits(return_X_y=True)
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32)[order], torch.tensor(digits)[order]
    return Data(*zip(images.split([800, 400, 597]), labels.split([800, 400, 597]), strict=True))


def make_model(seed: int) -> nn.Module:
    """Makes a network of four layers, initialized by the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            OrderedDict(
                layer1=nn.Linear(64, 64),
                tanh1=nn.Tanh(),
                layer2=nn.Linear(64, 64),
                tanh2=nn.Tanh(),
                layer3=nn.Linear(64, 64),
                tanh3=nn.Tanh(),
                layer4=nn.Linear(64, 10),
            )
        )


def loss_fn(model: nn.Module, batch: Batches) -> Tensor:
    """The loss of training, written as for any PyTorch training loop."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def draw_batches(split: Batches, steps: int, seed: int) -> Batches:
    """Draws a batch for every inner step: images[step, batch, pixel] and labels[step, batch]."""
    images, labels = split
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randint(len(labels), (steps, BATCH_SIZE), generator=generator)
    return images[picked], labels[picked]


# ---------------------------------------------------------------------- meta-learning


def meta_learn(
    fn: gimli.Functional, data: Data, inner_steps: int, seeds: Sequence[int], progress: Progress
) -> tuple[Settings, History]:
    """Learns the hyperparameters; every meta-step unrolls the training of a new network on new batches."""
    logs = {name: torch.stack([group[name].log() for group in fn.hyperparameters()]) for name in LEARNED}
    meta_optimizer = torch.optim.Adam([log.requires_grad_() for log in logs.values()], lr=META_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(meta_optimizer, len(seeds))
    history = History([], {name: [] for name in LEARNED})
    bar = progress.add_task("meta-learning", total=len(seeds))
    for seed in seeds:
        loss = validation_loss_after_training(fn, logs, data, inner_steps, seed)
        record(history, loss, logs)
        meta_optimizer.zero_grad()
        loss.backward()
        meta_optimizer.step()
        schedule.step()
        progress.update(bar, advance=1, description=f"meta-learning: validation loss {loss.item():.3f}")
    learned = {name: log.exp().tolist() for name, log in logs.items()}
    return [dict(zip(learned, values, strict=True)) for values in zip(*learned.values(), strict=True)], history


def validation_loss_after_training(
    fn: gimli.Functional, logs: Mapping[str, Tensor], data: Data, inner_steps: int, seed: int
) -> Tensor:
    """Trains a new network in the inner loop; the result is differentiable with respect to the logarithms."""
    hyper = fn.hyperparameters()
    for index, group in enumerate(hyper):
        for name, log in logs.items():
            group[name] = log[index].exp()
    state = replace(fn.init(), params={name: p.detach() for name, p in make_model(seed).named_parameters()})
    state, _ = fn.unroll(state, draw_batches(data.train, inner_steps, seed), hyper)
    images, labels = data.validation
    return cross_entropy(fn(state, images), labels)


def record(history: History, loss: Tensor, logs: Mapping[str, Tensor]) -> None:
    """Adds a meta-step to the history."""
    history.validation_loss.append(loss.item())
    for name, log in logs.items():
        history.values[name].append(log.exp().tolist())


# ---------------------------------------------------------------------- what it is worth, without the library


def train_live(settings: Settings, train: Batches, judge: Batches, inner_steps: int, seeds: Sequence[int]) -> Runs:
    """Trains new networks in an ordinary loop with the live optimizer, and judges them after every step."""
    losses, accuracies = [], []
    for seed in seeds:
        model = make_model(seed)
        groups = [{"params": [p], **setting} for p, setting in zip(model.parameters(), settings, strict=True)]
        optimizer = AdaBelief(groups)
        scores = [score(model, judge)]
        for batch in zip(*draw_batches(train, inner_steps, seed), strict=True):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
            scores.append(score(model, judge))
        loss, accuracy = zip(*scores, strict=True)
        losses.append(loss)
        accuracies.append(accuracy)
    return Runs(torch.tensor(losses), torch.tensor(accuracies))


@torch.no_grad()
def score(model: nn.Module, split: Batches) -> tuple[float, float]:
    """Returns the loss and the accuracy."""
    images, labels = split
    logits = model(images)
    return cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()


def tune_single_rate(params: int, data: Data, inner_steps: int, seeds: Sequence[int]) -> Settings:
    """Returns the one learning rate for all parameters, out of nine, that has the lowest validation loss."""

    def validation_loss(settings: Settings) -> float:
        return train_live(settings, data.train, data.validation, inner_steps, seeds).loss[:, -1].mean().item()

    candidates = [[{"lr": 10 ** (-3 + power / 4)}] * params for power in range(9)]
    return min(candidates, key=validation_loss)


def compare(
    learned: Settings, data: Data, inner_steps: int, tuning_seeds: Sequence[int], seeds: Sequence[int]
) -> dict[str, Runs]:
    """Trains new networks with the learned hyperparameters and with others, and judges them on the test split."""
    contestants = {
        "defaults": [{}] * len(learned),
        "best single learning rate": tune_single_rate(len(learned), data, inner_steps, tuning_seeds),
        "learned": learned,
    }
    return {
        name: train_live(settings, data.train, data.test, inner_steps, seeds) for name, settings in contestants.items()
    }


# ---------------------------------------------------------------------- telling


def print_program(fn: gimli.Functional, console: Console) -> None:
    """Prints the beginning of the optimizer's update as a program, without the list of its inputs."""
    title, *lines = fn.programs["update"].code.splitlines()
    body = lines[lines.index("):") + 1 :]
    shown = [title, "def update(...):", *body[:PROGRAM_LINES]]
    console.rule("AdaBelief's update, as captured")
    console.print("\n".join(shown), markup=False, highlight=False, soft_wrap=True)
    console.print(f'... and {len(body) - PROGRAM_LINES} more lines: print(fn.programs["update"]) shows all.\n')


def print_results(results: Results, console: Console) -> None:
    """Prints what was learned, and the test scores of all contestants."""
    table = Table("parameter", *LEARNED, title="Learned hyperparameters")
    for name, setting in zip(results.names, results.learned, strict=True):
        table.add_row(name, *(f"{setting[hyperparameter]:.1e}" for hyperparameter in LEARNED))
    console.print(table)
    networks, scores = results.runs["learned"].loss.shape
    console.print(f"The test split after {scores - 1} steps of the live optimizer, over {networks} new networks:")
    table = Table("hyperparameters", "accuracy (mean ± std)", "loss (mean ± std)")
    for name, (loss, accuracy) in results.runs.items():
        table.add_row(name, *(f"{final.mean():.3f} ± {final.std():.3f}" for final in (accuracy[:, -1], loss[:, -1])))
    console.print(table)


def plot(results: Results, path: Path) -> None:
    """Draws the course of meta-learning and the test scores."""
    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "legend.framealpha": 0.9}):
        figure = Figure(figsize=(13, 9), layout="constrained", dpi=110)
        (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
        plot_validation_loss(top_left, results.history.validation_loss)
        plot_values(top_right, results, "lr", "Learning rate of every parameter")
        plot_values(bottom_left, results, "weight_decay", "Weight decay of every parameter")
        plot_runs(bottom_right, results.runs)
        lines, labels = top_right.get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def plot_validation_loss(axes: Axes, losses: Sequence[float]) -> None:
    """Draws the loss that meta-learning minimizes."""
    axes.plot(losses, color="tab:blue", linewidth=1.5)
    axes.set(title="Validation loss at the end of the inner loop", xlabel="meta-step", ylabel="cross-entropy")
    axes.set_ylim(bottom=0)


def plot_values(axes: Axes, results: Results, hyperparameter: str, title: str) -> None:
    """Draws one line for every parameter: a colour for each layer, dashed for a bias."""
    colors = matplotlib.colormaps["plasma"]
    values = torch.tensor(results.history.values[hyperparameter])
    for index, name in enumerate(results.names):
        color = colors(0.9 * (index // 2) / (len(results.names) // 2))
        axes.plot(values[:, index], label=name, color=color, linestyle="--" if name.endswith("bias") else "-")
    axes.set(title=title, xlabel="meta-step", ylabel=title.split(" of")[0].lower(), yscale="log")


def plot_runs(axes: Axes, runs: Mapping[str, Runs]) -> None:
    """Draws the mean and the spread of the test accuracy over the steps of the live optimizer."""
    for (name, (_, accuracy)), color in zip(runs.items(), ("tab:gray", "tab:orange", "tab:green"), strict=True):
        mean, spread = accuracy.mean(0), accuracy.std(0)
        axes.plot(mean, color=color, linewidth=2, label=f"{name}: {mean[-1]:.1%} ± {spread[-1]:.1%}")
        axes.fill_between(range(len(mean)), mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    axes.set(title="Test accuracy of the live optimizer (mean ± std)", xlabel="inner step", ylabel="accuracy")
    axes.set_ylim(0, 1)
    axes.legend(loc="lower right")


# ---------------------------------------------------------------------- the whole


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Learns hyperparameters by gradients.")
    parser.add_argument("--meta-steps", type=int, default=200, help="updates of the hyperparameters")
    parser.add_argument("--inner-steps", type=int, default=40, help="training steps that each of them looks through")
    parser.add_argument("--runs", type=int, default=20, help="networks that are trained to compare the results")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the plot goes (.png, .svg or .pdf)")
    parser.add_argument("--smoke", action="store_true", help="tries everything in a few seconds, and learns little")
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.meta_steps, parsed.inner_steps, parsed.runs = 4, 5, 2
    return parsed


def main(arguments: Sequence[str] | None = None) -> Results:
    """Runs the demonstration."""
    args = parse_arguments(arguments)
    console = Console()
    data = load_data()

    model = make_model(args.seed)
    optimizer = AdaBelief(model.parameters(), weight_decay=FIRST_WEIGHT_DECAY)
    fn = gimli.functionalize(model, optimizer, loss_fn, per_parameter=True)
    print_program(fn, console)

    seeds = random.Random(args.seed).sample(range(2**32), args.meta_steps + 2 * args.runs)  # no network comes twice
    meta_seeds, live_seeds = seeds[: args.meta_steps], seeds[args.meta_steps :]
    with Progress(console=console) as progress:
        learned, history = meta_learn(fn, data, args.inner_steps, meta_seeds, progress)
    runs = compare(learned, data, args.inner_steps, live_seeds[: args.runs], live_seeds[args.runs :])

    results = Results([name for name, _ in model.named_parameters()], learned, history, runs)
    print_results(results, console)
    plot(results, args.output)
    console.print(f"The plot is in {args.output}", soft_wrap=True)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # the operators are too small to be shared out
    main()
