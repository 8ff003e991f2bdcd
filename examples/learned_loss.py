"""Learns a loss: a small network that tells regressors what to do about wrong data.

    python examples/learned_loss.py            # about a minute on two cores

A task is a sine wave of random amplitude and phase that forty points show, three in ten of them wrong: their targets
are anywhere from 0 to 10. The inner loop trains a new network by fifteen steps of SGD on the learned loss, which sees
a prediction and a target. The outer loop moves the weights of the loss, which the library takes as `meta`, so that the
error on right points is small afterwards ("Meta-learning via learned loss", Bechtle et al., 2019). At the end live SGD
trains on new tasks, on the learned loss and on ordinary ones, robust ones among them, at learning rates that are tuned.

What to expect: after fifteen steps the median error is less than half of that of the best ordinary loss, and it stays
ahead when all of them take ten times as many. The mean says the same with more noise: some runs go badly.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import huber_loss, l1_loss, mse_loss
from torch.utils._pytree import tree_map

import gimli_compile as gimli

OUTPUT = Path(__file__).parent / "output" / "learned_loss.png"
STRETCH = 10  # times as many steps as were meta-learned for
RATE = 0.1  # of SGD on the learned loss, whose scale is learned
RATES = [10 ** (power / 4) for power in range(-12, 1)]  # what the others may choose from
COLORS = ("tab:gray", "tab:blue", "tab:cyan", "tab:orange", "tab:green")

Batch = tuple[Tensor, Tensor]
Params = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]  # of predictions and targets


class Tasks(NamedTuple):
    """Points to train on, some of them wrong, and right ones to judge by: [task, point, 1]; and first parameters."""

    train: Batch
    judge: Batch
    params: Params


class Results(NamedTuple):
    """Everything that the demonstration found out."""

    learned: nn.Module
    course: list[float]  # the error at every meta-step
    errors: dict[str, Tensor]  # on test tasks, before the first and after every step: [task, step]
    rates: dict[str, float]


class LearnedLoss(nn.Module):
    """Maps predictions and targets to a number."""

    def __init__(self) -> None:
        super().__init__()
        hidden = (nn.Linear(2, 40), nn.Softplus(), nn.Linear(40, 40), nn.Softplus())
        self.layers = nn.Sequential(*hidden, nn.Linear(40, 1))

    def forward(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean over all points."""
        return self.layers(torch.cat([predictions, targets], -1)).mean()


def make_model() -> nn.Module:
    """Makes the regressor."""
    return nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))


def draw_tasks(count: int, seed: int, points: int = 40) -> Tasks:
    """Draws tasks and a new network for each."""
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(seed))
    amplitude, phase = 1 + 3 * draw(count, 1, 1), math.pi * draw(count, 1, 1)
    inputs, wrong = 10 * draw(2, count, points, 1) - 5, 10 * draw(count, points, 1)
    right = amplitude * (inputs - phase).sin()
    given = torch.where(draw(count, points, 1) < 0.3, wrong, right[0])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        params, _ = stack_module_state([make_model() for _ in range(count)])
    return Tasks((inputs[0], given), (inputs[1], right[1]), {name: value.detach() for name, value in params.items()})


def meta_learn(args: argparse.Namespace, progress: Progress) -> tuple[nn.Module, list[float]]:
    """Learns the loss; every meta-step trains new networks on new tasks."""
    torch.manual_seed(args.seed)
    learned = LearnedLoss()
    fn = capture(make_model(), learned)
    phi: Params = dict(learned.named_parameters())  # the live weights: the meta-optimizer trains them in place
    meta_optimizer = torch.optim.Adam(list(phi.values()), lr=3e-3)
    schedule, course = torch.optim.lr_scheduler.CosineAnnealingLR(meta_optimizer, args.meta_steps), []
    for step in progress.track(range(args.meta_steps), description="meta-learning"):
        error = error_after_training(fn, phi, draw_tasks(16, 10_000 * (args.seed + 1) + step), args.steps)
        meta_optimizer.zero_grad()
        error.add(0.1).log().mean().backward()  # of the logarithms, so that runs that fail do not outvote the others
        nn.utils.clip_grad_norm_(phi.values(), 1.0)
        meta_optimizer.step()
        schedule.step()
        course.append(error.median().item())
    return learned, course


def capture(model: nn.Module, learned: nn.Module) -> gimli.Functional:
    """Captures training on the learned loss, whose parameters are the third argument."""

    def loss_fn(model: nn.Module, batch: Batch, phi: Params) -> Tensor:
        inputs, targets = batch
        return functional_call(learned, phi, (model(inputs), targets))

    return gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=RATE), loss_fn)


def error_after_training(fn: gimli.Functional, phi: Params, tasks: Tasks, steps: int) -> Tensor:
    """Trains on all tasks at once; the squared error on right points [task] is differentiable in the loss."""
    start = replace(fn.init(), params=tasks.params)
    state, _ = fn.unroll(start, [tasks.train] * steps, None, phi, tasks=(0, 0, None, None))
    return (fn(state, tasks.judge[0], tasks=True) - tasks.judge[1]).square().mean((1, 2))


def train_live(loss: Loss, rate: float, tasks: Tasks, steps: int) -> tuple[Tensor, Params]:
    """Trains without the library; returns the errors before the first and after every step, and the parameters."""
    model = make_model()  # the networks of all tasks are one of it with larger tensors, which is all the same to SGD
    params = {name: value.clone().requires_grad_() for name, value in tasks.params.items()}
    run = vmap(lambda params, inputs: functional_call(model, params, (inputs,)))
    optimizer, errors = torch.optim.SGD(params.values(), lr=rate), []
    for _ in range(steps + 1):
        errors.append((run(params, tasks.judge[0]).detach() - tasks.judge[1]).square().mean((1, 2)))
        optimizer.zero_grad()
        vmap(loss)(run(params, tasks.train[0]), tasks.train[1]).sum().backward()
        optimizer.step()
    return torch.stack(errors, 1), params


def tune(loss: Loss, tasks: Tasks, steps: int) -> float:
    """Returns the rate with the lowest median error."""
    ends = {rate: train_live(loss, rate, tasks, steps)[0][:, -1] for rate in RATES}
    return min(RATES, key=lambda rate: ends[rate].nan_to_num(math.inf).median().item())


def compare(learned: nn.Module, args: argparse.Namespace) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Trains on test tasks, on the learned loss and on ordinary ones; returns the errors and the rates."""
    others, tasks = draw_tasks(args.test_tasks, args.seed + 1), draw_tasks(args.test_tasks, args.seed + 2)
    losses: dict[str, Loss] = {"squared": mse_loss, "absolute": l1_loss}
    losses |= {f"Huber, delta {delta}": partial(huber_loss, delta=delta) for delta in (0.3, 1.0)}
    rates = {name: tune(loss, others, args.steps) for name, loss in losses.items()} | {"learned": RATE}
    losses["learned"] = learned
    return {name: train_live(losses[name], rates[name], tasks, STRETCH * args.steps)[0] for name in losses}, rates


def print_results(results: Results, steps: int, console: Console) -> None:
    """Prints the errors after as many steps as were meta-learned for, and at the end."""
    horizons = [steps, STRETCH * steps]
    table = Table("error: median (mean ± std)", *(f"after {horizon} steps" for horizon in horizons))
    for name, errors in results.errors.items():
        table.add_row(
            name, *(f"{end.median():.2f} ({end.mean():.2f} ± {end.std():.2f})" for end in errors[:, horizons].T)
        )
    console.print(table)


def plot(results: Results, args: argparse.Namespace) -> None:
    """Draws a test task, the learned loss, the course of meta-learning and the errors on test tasks."""
    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "legend.framealpha": 0.9}):
        figure = Figure(figsize=(13, 9), layout="constrained", dpi=110)
        (task, slopes), (course, test) = figure.subplots(2, 2)
        plot_task(task, results, args)
        plot_slopes(slopes, results.learned)
        course.plot(results.course, color=COLORS[-1], linewidth=0.8)
        course.set(title="Meta-learning: median error of new tasks", xlabel="meta-step", yscale="log")
        for (name, errors), color in zip(results.errors.items(), COLORS, strict=True):
            test.plot(errors.median(0).values, color=color, label=name)
        test.axvline(args.steps, color="black", linestyle=":", label="meta-learned up to here")
        test.set(title="Median error of test tasks", xlabel="step of live SGD", yscale="log")
        test.legend()
        args.output.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(args.output)


def plot_task(axes: Axes, results: Results, args: argparse.Namespace) -> None:
    """Draws the test task whose error is the median of the learned loss, and what was learned from it."""
    middle = results.errors["learned"][:, args.steps].argsort()[args.test_tasks // 2]
    task = tree_map(lambda part: part[middle, None], draw_tasks(args.test_tasks, args.seed + 2))
    inputs, order = task.judge[0][0].sort(0)
    axes.plot(inputs, task.judge[1][0][order.flatten()], color="black", label="right")
    axes.scatter(*task.train, color="tab:red", s=20, label="points to train on")
    for name, loss, color in (("absolute", l1_loss, COLORS[1]), ("learned", results.learned, COLORS[-1])):
        _, params = train_live(loss, results.rates[name], task, args.steps)
        fitted = functional_call(make_model(), {key: value[0].detach() for key, value in params.items()}, (inputs,))
        axes.plot(inputs, fitted, color=color, label=name)
    axes.set(title=f"A test task after {args.steps} steps", xlabel="input", ylabel="target")
    axes.legend()


def plot_slopes(axes: Axes, learned: nn.Module) -> None:
    """Draws the slope of the learned loss: where it is negative, SGD raises the prediction."""
    for target in (-3, 0, 3, 6, 9):
        predictions = torch.linspace(-5, 8, 200, requires_grad=True)
        total = 200 * learned(predictions[:, None], torch.full((200, 1), float(target)))
        (slope,) = torch.autograd.grad(total, predictions)
        color = matplotlib.colormaps["viridis"]((target + 3) / 14)
        axes.plot(predictions.detach(), slope, color=color, label=f"target {target}")
    axes.axhline(0, color="black", linewidth=1)
    axes.set(title="The learned loss: its slope in the prediction", xlabel="prediction")
    axes.legend(loc="upper left")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Learns a loss by gradients.")
    parser.add_argument("--meta-steps", type=int, default=1000, help="updates of the loss")
    parser.add_argument("--steps", type=int, default=15, help="steps of training on a task")
    parser.add_argument("--test-tasks", type=int, default=200, help="tasks that the losses are compared on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the plot goes (.png, .svg or .pdf)")
    parser.add_argument("--smoke", action="store_true", help="tries everything in a few seconds, and learns little")
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.meta_steps, parsed.steps, parsed.test_tasks = 10, 5, 8
    return parsed


def main(arguments: Sequence[str] | None = None) -> Results:
    """Runs the demonstration."""
    args = parse_arguments(arguments)
    console = Console()
    with Progress(console=console) as progress:
        learned, course = meta_learn(args, progress)
    results = Results(learned, course, *compare(learned, args))
    print_results(results, args.steps, console)
    plot(results, args)
    console.print(f"The plot is in {args.output}", soft_wrap=True)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # the operators are too small to be shared out
    main()
