"""Distills 1,200 digits into ten images: a network that trains on nothing else classifies digits.

    python examples/dataset_distillation.py            # about a minute on two cores

The batch itself is what is learned, and the learning rate with it: both are differentiated through ten steps of SGD
on the same ten images, one for each class, so that the loss on real digits is low afterwards. The method is that of
"Dataset distillation" (Wang et al., 2018). The images are learned once for a single initialization, and once for all
of them. At the end live SGD trains on them, and on real images and class means, whose learning rates are tuned.

What to expect: after ten steps, images for one initialization are as good as all digits after 200, on that network and
on no other. Images for all initializations are better than ten real images of every class, after 200 steps too.
"""

import argparse
from collections.abc import Sequence
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

OUTPUT = Path(__file__).parent / "output" / "dataset_distillation.png"
BATCH_SIZE = 256  # real digits that each of the new networks is judged on
LONGER = 20  # how many times as many steps the second comparison takes
RATES = [10 ** (power / 4) for power in range(-4, 5)]  # what the others may choose from
DISTILLED = {"distilled, one initialization": None, "distilled, all initializations": 4}  # networks in a meta-step

Batch = tuple[Tensor, Tensor]
Scores = dict[str, dict[str, Tensor]]  # on the test split, by networks and steps, by contestant


class Distilled(NamedTuple):
    """What was learned, and the loss at every meta-step."""

    images: Tensor
    rate: float
    course: list[float]


class Results(NamedTuple):
    """Everything that the demonstration found out."""

    pictures: dict[str, Tensor]
    distilled: dict[str, Distilled]
    accuracy: Scores


def load_data() -> tuple[Batch, Batch]:
    """Loads scikit-learn's 1,797 digits, always shuffled and split in the same way: training and test."""
    pixels, digits = load_digits(return_X_y=True)
    train, test = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0)).split([1200, 597])
    images, labels = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(digits)
    return (images[train], labels[train]), (images[test], labels[test])


def make_model(seed: int) -> nn.Module:
    """Makes a network of two layers, initialized by the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of training, written as for any PyTorch training loop."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def train_on(fn: gimli.Functional, images: Tensor, rate: Tensor, seeds: Sequence[int], steps: int) -> gimli.TrainState:
    """Trains a network of every seed on the images of the ten classes; differentiable in images and rate."""
    params, _ = torch.func.stack_module_state([make_model(seed) for seed in seeds])
    state = replace(fn.init(), params={name: param.detach() for name, param in params.items()})
    hyper = fn.hyperparameters()
    hyper[0]["lr"] = rate
    batches = images.expand(steps, -1, -1), torch.arange(10).expand(steps, -1)
    return fn.unroll(state, batches, hyper, tasks=(0, None, None, None))[0]


def distill(train: Batch, networks: int | None, args: argparse.Namespace, progress: Progress) -> Distilled:
    """Learns the images for so many new networks in every meta-step, or for the one network of the seed."""
    model = make_model(args.seed)
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.3), loss_fn)
    images, log_rate = class_means(train).requires_grad_(), fn.hyperparameters()[0]["lr"].log().requires_grad_()
    meta_optimizer = torch.optim.Adam([images, log_rate], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(meta_optimizer, args.meta_steps)
    generator, course = torch.Generator().manual_seed(args.seed), []
    for step in progress.track(range(args.meta_steps), description="meta-learning"):
        first = 10_000 * (args.seed + 1) + step * (networks or 0)  # no network comes twice, nor in the comparison
        seeds = range(first, first + networks) if networks else [args.seed]
        state = train_on(fn, images, log_rate.exp(), seeds, args.steps)
        picked = torch.randint(len(train[1]), (len(seeds), BATCH_SIZE), generator=generator)
        logits = fn(state, train[0][picked], tasks=True)
        loss = cross_entropy(logits.flatten(0, 1), train[1][picked].flatten())
        meta_optimizer.zero_grad()
        loss.backward()
        meta_optimizer.step()
        schedule.step()
        course.append(loss.item())
    return Distilled(images.detach(), log_rate.exp().item(), course)


# ---------------------------------------------------------------------- what it is worth, without the library


def train_live(batch: Batch, rate: float, seed: int, steps: int, judge: Batch) -> float:
    """Trains a network on one batch in an ordinary loop, and returns its accuracy on others."""
    model = make_model(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
    return (model(judge[0]).argmax(1) == judge[1]).float().mean().item()


def class_means(split: Batch) -> Tensor:
    """Returns the mean image of every class."""
    return torch.stack([split[0][split[1] == digit].mean(0) for digit in range(10)])


def draw_real(split: Batch, each: int, seed: int) -> Batch:
    """Draws so many images of every class."""
    order = torch.randperm(len(split[1]), generator=torch.Generator().manual_seed(seed))
    picked = torch.cat([order[split[1][order] == digit][:each] for digit in range(10)])
    return split[0][picked], split[1][picked]


def tune(batch: Batch, train: Batch, seeds: Sequence[int], steps: int) -> float:
    """Returns the learning rate with the best mean accuracy on all training digits."""
    return max(RATES, key=lambda rate: sum(train_live(batch, rate, seed, steps, train) for seed in seeds))


def compare(distilled: dict[str, Distilled], train: Batch, test: Batch, args: argparse.Namespace) -> Scores:
    """Trains the network that one set of images was made for, and new ones, on every set of images."""
    sets = {
        "real, 1 of each class": [draw_real(train, 1, draw) for draw in range(5)],
        "real, 10 of each class": [draw_real(train, 10, draw) for draw in range(5)],
        "class means": [(class_means(train), torch.arange(10))],
        "all 1,200 digits": [train],
    }
    new = range(args.seed + 1, args.seed + 1 + args.networks)
    contestants = {name: [(batch, tune(batch, train, new[:3], args.steps)) for batch in sets[name]] for name in sets}
    contestants |= {name: [((found.images, torch.arange(10)), found.rate)] for name, found in distilled.items()}

    def accuracies(seeds: Sequence[int], steps: int, settings: list[tuple[Batch, float]]) -> Tensor:
        return torch.tensor([train_live(*setting, seed, steps, test) for setting in settings for seed in seeds])

    columns = (("the one network", [args.seed], 1), ("new networks", new, 1), ("new networks", new, LONGER))
    return {
        f"{column}, {more * args.steps} steps": {
            name: accuracies(seeds, more * args.steps, settings) for name, settings in contestants.items()
        }
        for column, seeds, more in columns
    }


def print_results(results: Results, console: Console) -> None:
    """Prints the test accuracies."""
    table = Table("trained on", *results.accuracy, title="test accuracy (mean ± std)")
    for name in next(iter(results.accuracy.values())):
        column = [accuracy[name] for accuracy in results.accuracy.values()]
        table.add_row(name, *(f"{found.mean():.3f} ± {found.std(correction=0):.3f}" for found in column))
    console.print(table)


def plot(results: Results, path: Path) -> None:
    """Draws the images, the course of meta-learning and the test accuracies."""
    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        figure = Figure(figsize=(13, 9), layout="constrained", dpi=110)
        pictures, course, bars = figure.subplot_mosaic("AA;BC").values()
        plot_pictures(pictures, results.pictures)
        for (name, found), color in zip(results.distilled.items(), ("tab:green", "tab:olive"), strict=True):
            course.plot(found.course, color=color, label=name, linewidth=0.8)
        course.set(title="Meta-learning: loss on real digits", xlabel="meta-step", yscale="log")
        course.legend()
        plot_bars(bars, results.accuracy)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def plot_pictures(axes: Axes, pictures: dict[str, Tensor]) -> None:
    """Draws a row of ten images for each contestant."""
    rows = [torch.cat([*nn.functional.pad(row.view(10, 8, 8), (0, 1, 0, 1))], 1) for row in pictures.values()]
    axes.imshow(torch.cat(rows).numpy(), cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set_yticks([9 * row + 3.5 for row in range(len(rows))], list(pictures))
    axes.set_xticks([9 * digit + 3.5 for digit in range(10)], [str(digit) for digit in range(10)])
    axes.set_title("What the networks are trained on (red is ink, blue is less than none)")
    axes.grid(visible=False)


def plot_bars(axes: Axes, accuracy: Scores) -> None:
    """Draws the test accuracies."""
    height = 0.8 / len(accuracy)
    for index, (column, found) in enumerate(accuracy.items()):
        places = [row + height * index for row in range(len(found))]
        means, spreads = zip(*((a.mean().item(), a.std(correction=0).item()) for a in found.values()), strict=True)
        bars = axes.barh(places, means, height, xerr=spreads, label=column, alpha=0.8)
        axes.bar_label(bars, [f" {mean:.1%}" for mean in means], fontsize=8)
        axes.set_yticks([row + height for row in range(len(found))], list(found))
    axes.set(title="Test accuracy (mean ± std)", xlim=(0, 1.15))
    axes.invert_yaxis()
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.06), ncols=3, fontsize=8)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Distills digits into ten images by gradients.")
    parser.add_argument("--meta-steps", type=int, default=600, help="updates of the images")
    parser.add_argument("--steps", type=int, default=10, help="steps of training on them")
    parser.add_argument("--networks", type=int, default=20, help="networks that the images are compared on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the plot goes (.png, .svg or .pdf)")
    parser.add_argument("--smoke", action="store_true", help="tries everything in a few seconds, and learns little")
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.meta_steps, parsed.networks = 30, 2
    return parsed


def main(arguments: Sequence[str] | None = None) -> Results:
    """Runs the demonstration."""
    args = parse_arguments(arguments)
    console = Console()
    train, test = load_data()
    with Progress(console=console) as progress:
        distilled = {name: distill(train, networks, args, progress) for name, networks in DISTILLED.items()}
    pictures = {"real, one draw": draw_real(train, 1, 0)[0], "class means": class_means(train)}
    pictures |= {name: found.images for name, found in distilled.items()}
    results = Results(pictures, distilled, compare(distilled, train, test, args))
    print_results(results, console)
    plot(results, args.output)
    console.print(f"The plot is in {args.output}", soft_wrap=True)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # the operators are too small to be shared out
    main()
