"""Learns an initialization from which a few steps on a few images suffice: MAML on drawn characters.

    python examples/maml_few_shot.py                   # about three minutes on two cores
    python examples/maml_few_shot.py --shots 5 --ways 20 --learn-rates
    python examples/maml_few_shot.py --omniglot ~/data/omniglot    # real characters in place of drawn ones

A task shows a few images of each of five characters that nobody has seen before, and asks which other images are the
same characters. The inner loop trains on the shown images (the support); the outer loop moves the initialization along
the exact gradient of the loss on the other images (the queries). The method is that of Finn, Abbeel and Levine,
"Model-agnostic meta-learning for fast adaptation of deep networks" (2017); `--learn-rates` also learns the inner
learning rate of every parameter, as Antoniou, Edwards and Storkey do in "How to train your MAML" (2018).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from characters import Episodes, EpisodeSampler, Splits, draw_characters, load_omniglot, split_classes
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._pytree import tree_map

import gimli_compile as gimli

OUTPUT = Path(__file__).parent / "output" / "maml_few_shot.png"
CHANNELS = 32
INNER_RATE = 0.4  # where the inner rates are learned, they start here
META_RATE = 2e-3
SCRATCH_RATE = 0.01
SCRATCH_STEPS = (0, 1, 2, 3, 5, 10, 20, 50)  # when the accuracy of a new network is taken
AT_ONCE = 25  # tasks that are validated or tested together
VALIDATIONS = 20


class Start(NamedTuple):
    """What is meta-learned."""

    params: dict[str, Tensor]
    log_rates: Tensor  # the logarithm of the inner learning rate of every parameter


class Course(NamedTuple):
    """The query accuracy in the course of meta-learning."""

    train: list[float]  # of each meta-batch
    validation: dict[int, float]  # by meta-step


class Results(NamedTuple):
    """Everything that the demonstration found out; accuracies are those on the queries of test tasks."""

    course: Course
    rates: dict[str, float]  # the inner learning rate of every parameter
    maml: Tensor  # [task, step], before the first and after every step, for twice as many as were meta-learned
    scratch: Tensor  # [task, SCRATCH_STEPS]
    nearest: Tensor  # [task]


def make_model(ways: int, size: int = 28) -> nn.Sequential:
    """Makes four blocks of a convolution and batch normalization, and a linear layer.

    The convolutions have stride 2, as Finn's for Omniglot. Batch normalization always uses the batch that it sees.
    """
    layers: list[nn.Module] = []
    channels = 1
    for _ in range(4):
        convolution = nn.Conv2d(channels, CHANNELS, 3, stride=2, padding=1)
        layers += [convolution, nn.BatchNorm2d(CHANNELS, track_running_stats=False), nn.ReLU()]
        channels, size = CHANNELS, (size + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(CHANNELS * size**2, ways))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of the inner loop, written as for any PyTorch training loop."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def accuracies(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the accuracy on each task."""
    return (logits.argmax(-1) == labels).float().mean(-1)


# ---------------------------------------------------------------------- meta-learning


def adapt(fn: gimli.Functional, start: Start, episodes: Episodes, steps: int) -> Tensor:
    """Trains on the support of every task, all tasks at once, and returns the logits of the queries."""
    state = replace(fn.init(), params=start.params)
    support = (episodes.support_images, episodes.support_labels)
    state, _ = fn.unroll(state, [support] * steps, hyperparameters(fn, start), tasks=True)
    return fn(state, episodes.query_images, tasks=True)


def hyperparameters(fn: gimli.Functional, start: Start) -> gimli.Hyperparameters:
    """Returns the hyperparameters of the inner SGD."""
    hyper = fn.hyperparameters()
    for group, log_rate in zip(hyper, start.log_rates, strict=True):
        group["lr"] = log_rate.exp()
    return hyper


def meta_learn(
    fn: gimli.Functional, data: Splits, args: argparse.Namespace, progress: Progress
) -> tuple[Start, Course]:
    """Learns the initialization, and with `--learn-rates` the inner learning rates, on the training classes."""
    sampler = EpisodeSampler(data.train, args.ways, args.shots, seed=args.seed, rotations=True)
    validation = EpisodeSampler(data.validation, args.ways, args.shots, seed=args.seed).sample(AT_ONCE)
    start = Start(
        params={name: param.requires_grad_() for name, param in fn.init().params.items()},
        log_rates=torch.stack([group["lr"].log() for group in fn.hyperparameters()]).requires_grad_(args.learn_rates),
    )
    learned = [tensor for tensor in (*start.params.values(), start.log_rates) if tensor.requires_grad]
    meta_optimizer = torch.optim.Adam(learned, lr=META_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(meta_optimizer, args.meta_steps)

    course = Course([], {})
    bar = progress.add_task("meta-learning", total=args.meta_steps)
    for step in range(1, args.meta_steps + 1):
        episodes = sampler.sample(args.tasks)
        logits = adapt(fn, start, episodes, args.inner_steps)
        loss = cross_entropy(logits.flatten(0, 1), episodes.query_labels.flatten())
        meta_optimizer.zero_grad()
        loss.backward()
        meta_optimizer.step()
        schedule.step()

        course.train.append(accuracies(logits, episodes.query_labels).mean().item())
        if step % max(1, args.meta_steps // VALIDATIONS) == 0:
            with torch.no_grad():
                logits = adapt(fn, start, validation, args.inner_steps)
            course.validation[step] = accuracies(logits, validation.query_labels).mean().item()
        progress.update(bar, advance=1, description=f"meta-learning: training accuracy {course.train[-1]:.2f}")
    return start, course


# ---------------------------------------------------------------------- testing


@torch.no_grad()
def learning_curves(
    fn: gimli.Functional,
    params: Mapping[str, Tensor],
    hyper: gimli.Hyperparameters,
    episodes: Episodes,
    steps: Sequence[int],
) -> Tensor:
    """Trains on every task from its own parameters, and returns the query accuracies after so many steps."""
    tasks = len(episodes.support_labels)
    state = tree_map(lambda tensor: tensor.expand(tasks, *tensor.shape), fn.init())
    state = replace(state, params=dict(params))
    support = (episodes.support_images, episodes.support_labels)
    curves = []
    for before, after in pairwise((0, *steps)):
        if after > before:
            state, _ = fn.unroll(state, [support] * (after - before), hyper, tasks=(0, 0, None, None))
        curves.append(accuracies(fn(state, episodes.query_images, tasks=True), episodes.query_labels))
    return torch.stack(curves, 1)


def maml_curves(fn: gimli.Functional, start: Start, episodes: Episodes, steps: int) -> Tensor:
    """Trains from the learned initialization."""
    tasks = len(episodes.support_labels)
    params = {name: param.expand(tasks, *param.shape) for name, param in start.params.items()}
    return learning_curves(fn, params, hyperparameters(fn, start), episodes, range(steps + 1))


def scratch_curves(fn: gimli.Functional, ways: int, episodes: Episodes) -> Tensor:
    """Trains a new network on every task."""
    models = [make_model(ways) for _ in episodes.support_labels]
    params, _ = torch.func.stack_module_state(models)
    return learning_curves(fn, params, fn.hyperparameters(), episodes, SCRATCH_STEPS)


def nearest_accuracies(episodes: Episodes) -> Tensor:
    """Gives every query the label of the support image that is nearest to it, pixel by pixel."""
    distances = torch.cdist(episodes.query_images.flatten(2), episodes.support_images.flatten(2))
    guesses = episodes.support_labels.gather(1, distances.argmin(-1))
    return (guesses == episodes.query_labels).float().mean(-1)


def evaluate(
    fn: gimli.Functional, start: Start, data: Splits, args: argparse.Namespace, progress: Progress
) -> tuple[Tensor, Tensor, Tensor]:
    """Judges MAML, new networks and the nearest support image on characters that meta-learning has not seen."""
    sampler = EpisodeSampler(data.test, args.ways, args.shots, seed=args.seed)
    model = make_model(args.ways)
    from_scratch = gimli.functionalize(model, torch.optim.Adam(model.parameters(), lr=SCRATCH_RATE), loss_fn)
    maml, scratch, nearest = [], [], []
    for done in progress.track(range(0, args.test_tasks, AT_ONCE), description="testing"):
        episodes = sampler.sample(min(AT_ONCE, args.test_tasks - done))
        maml.append(maml_curves(fn, start, episodes, 2 * args.inner_steps))
        scratch.append(scratch_curves(from_scratch, args.ways, episodes))
        nearest.append(nearest_accuracies(episodes))
    return torch.cat(maml), torch.cat(scratch), torch.cat(nearest)


# ---------------------------------------------------------------------- telling


def interval(accuracies: Tensor) -> tuple[float, float]:
    """Returns the mean over tasks, and half of its 95 % confidence interval."""
    return accuracies.mean().item(), 1.96 * accuracies.std().item() / len(accuracies) ** 0.5


def final_accuracies(results: Results, inner_steps: int) -> dict[str, Tensor]:
    """Returns the accuracies to compare: MAML after as many steps as it was meta-learned for."""
    return {
        "nearest support image": results.nearest,
        f"from scratch ({SCRATCH_STEPS[-1]} steps)": results.scratch[:, -1],
        f"MAML ({inner_steps} steps)": results.maml[:, inner_steps],
    }


def print_results(results: Results, args: argparse.Namespace, console: Console) -> None:
    """Prints the test accuracies, and the learning rates if they were learned."""
    if args.learn_rates:
        table = Table("parameter", "inner learning rate")
        for name, rate in results.rates.items():
            table.add_row(name, f"{rate:.3f}")
        console.print(table)
    table = Table(f"{args.ways}-way {args.shots}-shot", "accuracy on test classes (95 % confidence)")
    for name, final in final_accuracies(results, args.inner_steps).items():
        table.add_row(name, "{:.1%} ± {:.1%}".format(*interval(final)))
    console.print(table)


def plot(results: Results, task: Episodes, args: argparse.Namespace) -> None:
    """Draws a task, the course of meta-learning, the learning curves on test tasks, and the final accuracies."""
    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "axes.axisbelow": True}):
        figure = Figure(figsize=(13, 9), layout="constrained", dpi=110)
        (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
        plot_task(top_left, task)
        plot_course(top_right, results.course)
        plot_curves(bottom_left, results)
        plot_bars(bottom_right, final_accuracies(results, args.inner_steps))
        for axes in (top_right, bottom_left, bottom_right):
            axes.axhline(1 / args.ways, color="black", linewidth=1, linestyle=":", label="chance")
            axes.set(ylabel="query accuracy", ylim=(0, 1))
        for axes in (top_right, bottom_left):
            axes.legend(loc="lower right", ncols=3)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output)


def plot_task(axes: Axes, task: Episodes, queries: int = 8) -> None:
    """Draws the first task of some episodes: a row for each character, its support and then some of its queries."""
    rows = []
    for label in task.support_labels[0].unique():
        support = task.support_images[0, task.support_labels[0] == label]
        query = task.query_images[0, task.query_labels[0] == label][:queries]
        rows.append(torch.cat([*support, *query], dim=-1)[0])
    axes.imshow(torch.cat(rows).numpy(), cmap="gray_r")
    border = task.support_images.shape[-1] * task.support_images.shape[1] / len(rows) - 0.5
    axes.axvline(border, color="tab:green", linewidth=2)
    axes.set(title="A test task: support | some queries", xticks=[], yticks=[])


def plot_course(axes: Axes, course: Course) -> None:
    """Draws the accuracy on training and validation classes."""
    steps = range(1, len(course.train) + 1)
    axes.plot(steps, course.train, color="tab:blue", alpha=0.35, linewidth=0.8, label="training tasks")
    axes.plot(*zip(*course.validation.items(), strict=True), "o-", color="tab:green", label="validation tasks")
    axes.set(title="Accuracy after the inner loop", xlabel="meta-step")


def plot_curves(axes: Axes, results: Results) -> None:
    """Draws the accuracy on test tasks over the steps of training on their support."""
    contestants = (
        ("MAML", range(results.maml.shape[1]), results.maml, "tab:green"),
        ("from scratch", SCRATCH_STEPS, results.scratch, "tab:orange"),
    )
    for name, steps, curves, color in contestants:
        means, halves = zip(*(interval(curve) for curve in curves.T), strict=True)
        axes.errorbar(steps, means, halves, color=color, marker="o", markersize=4, capsize=3, label=name)
    axes.set(title="Training on the support of test tasks (95 % confidence)", xlabel="step")
    axes.set_xscale("symlog", linthresh=5)
    axes.set_xticks(SCRATCH_STEPS, [str(step) for step in SCRATCH_STEPS])
    axes.set_xticks([], minor=True)


def plot_bars(axes: Axes, final: Mapping[str, Tensor]) -> None:
    """Draws the final accuracies with their confidence intervals."""
    means, halves = zip(*(interval(accuracies) for accuracies in final.values()), strict=True)
    colors = ["tab:gray", "tab:orange", "tab:green"]
    bars = axes.bar(list(final), means, yerr=halves, capsize=6, color=colors, width=0.6)
    axes.bar_label(bars, [f"{mean:.1%}" for mean in means], label_type="center", color="white", weight="bold")
    axes.set(title="Test accuracy (95 % confidence)")
    axes.grid(visible=False, axis="x")


# ---------------------------------------------------------------------- the whole


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Learns an initialization by MAML.")
    parser.add_argument("--ways", type=int, default=5, help="characters in a task")
    parser.add_argument("--shots", type=int, default=1, help="images of each that are shown")
    parser.add_argument("--meta-steps", type=int, default=1000, help="updates of the initialization")
    parser.add_argument("--tasks", type=int, default=4, help="tasks in a meta-batch")
    parser.add_argument("--inner-steps", type=int, default=5, help="steps of the inner SGD")
    parser.add_argument("--learn-rates", action="store_true", help="learn an inner learning rate for every parameter")
    parser.add_argument("--test-tasks", type=int, default=200, help="tasks to compare the results on")
    parser.add_argument("--classes", type=int, default=1200, help="characters that are drawn")
    parser.add_argument("--omniglot", type=Path, help="a folder with the real characters, to be used instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the plot goes (.png, .svg or .pdf)")
    parser.add_argument("--smoke", action="store_true", help="tries everything in a few seconds, and learns little")
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.meta_steps, parsed.tasks, parsed.inner_steps, parsed.test_tasks, parsed.classes = 4, 2, 2, 10, 60
    return parsed


def main(arguments: Sequence[str] | None = None) -> Results:
    """Runs the demonstration."""
    args = parse_arguments(arguments)
    console = Console()
    data = split_classes(load_omniglot(args.omniglot) if args.omniglot else draw_characters(args.classes))

    torch.manual_seed(args.seed)
    model = make_model(args.ways)
    optimizer = torch.optim.SGD(model.parameters(), lr=INNER_RATE)
    fn = gimli.functionalize(model, optimizer, loss_fn, per_parameter=True)
    with Progress(console=console) as progress:
        start, course = meta_learn(fn, data, args, progress)
        accuracies = evaluate(fn, start, data, args, progress)

    rates = dict(zip(start.params, start.log_rates.exp().tolist(), strict=True))
    results = Results(course, rates, *accuracies)
    print_results(results, args, console)
    plot(results, EpisodeSampler(data.test, args.ways, args.shots, seed=args.seed).sample(1), args)
    console.print(f"The plot is in {args.output}", soft_wrap=True)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # the operators are too small to be shared out
    main()
