"""Learns an optimizer: an LSTM that turns gradients into steps, trained by gradients through its own training runs.

    python examples/learned_optimizer.py            # some minutes on two cores

The setting is that of "Learning to learn by gradient descent by gradient descent" (Andrychowicz et al., 2016). The
optimizer is an ordinary `torch.optim.Optimizer` that owns a small LSTM and runs it for every coordinate of every
parameter. The library finds the LSTM's weights on the optimizer by itself, and differentiates through training runs,
of many problems at once. There are two kinds of problems, each with an LSTM of its own: random quadratics as in the
paper, and small networks that classify scikit-learn's digits. At the end the live optimizer meets problems that it has
never seen, against SGD and Adam with the learning rate that is best on other problems of the kind.

What to expect: at the number of steps that it was trained for, the learned optimizer is ahead of tuned Adam on the
digits and level with it on the quadratics (in the mean; in the median Adam is ahead), and it gets there faster. Beyond,
it stops to improve while Adam goes on: nothing that it was trained on told it to. Meta-learning on the digits is
unstable, as the plot shows: the weights that were best on validation problems are kept.
"""

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import gimli_compile as gimli

OUTPUT = Path(__file__).parent / "output" / "learned_optimizer.png"
SEGMENT = 20  # steps that one meta-gradient looks through, as in the paper
PRECISION = 10.0  # p of the paper's Appendix A: gradients below exp(-p) are shown by value, others by their logarithm
META_LEARNING_RATE = 5e-3
VALIDATION_PERIOD = 5  # epochs
STRETCH = 3  # the comparison takes this many times the steps that were trained for
RATES = [10 ** (power / 4) for power in range(-14, 4)]  # what SGD and Adam may choose from
COLORS = ("tab:gray", "tab:orange", "tab:green")
BATCH_SIZE = 64

Params = dict[str, Tensor]
Batch = tuple[Tensor, Tensor]


# ---------------------------------------------------------------------- the optimizer, without the library


class Rule(nn.Module):
    """Turns the gradient of a coordinate into its step: two LSTM cells and a linear layer."""

    def __init__(self, hidden: int = 20) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(2, hidden), nn.LSTMCell(hidden, hidden)])
        self.head = nn.Linear(hidden, 1)

    def forward(self, gradient: Tensor, hidden: Sequence[Any]) -> tuple[Tensor, list[Any]]:
        """Maps gradients [coordinate] and what the cells remember to steps [coordinate] and the new memory."""
        size = gradient.abs().clamp(min=math.exp(-PRECISION)).log() / PRECISION
        direction = (gradient * math.exp(PRECISION)).clamp(-1, 1)
        out = torch.stack([size, direction], -1)
        memory = []
        for cell, state in zip(self.cells, hidden, strict=True):
            memory.append(cell(out, state))
            out = memory[-1][0]
        return self.head(out).squeeze(-1), memory


class LearnedOptimizer(torch.optim.Optimizer):
    """Steps as its rule says, coordinate by coordinate."""

    def __init__(self, params: Iterable[Tensor], rule: Rule, scale: float = 0.1) -> None:
        super().__init__(params, {})
        self.rule = rule
        self.scale = scale

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Takes a step."""
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                step, state["memory"] = self.rule(param.grad.flatten(), state.get("memory", (None, None)))
                param.add_(step.view_as(param), alpha=self.scale)


# ---------------------------------------------------------------------- what there is to optimize


@dataclass(frozen=True)
class Problems:
    """A kind of problems. Everything may lead with further dimensions: many problems are one with larger tensors.

    `start` draws parameters and `draw` the data of some steps: [problem, ...] and [problem, step, ...]. `judge` makes
    the losses of a segment [problem, step] the one number that meta-learning minimizes.
    """

    name: str
    start: Callable[[int, torch.Generator], Params]
    draw: Callable[[int, int, torch.Generator], Batch]
    loss: Callable[[Params, Batch], Tensor]
    judge: Callable[[Tensor], Tensor]
    tasks: int  # problems that one meta-gradient is the mean of
    epochs: int  # training runs, of so many problems each, to learn from


class Outcome(NamedTuple):
    """What was found out about one kind of problems."""

    name: str
    horizon: int  # the steps that the optimizer was trained for
    validation: list[float]  # the mean loss of validation problems at the horizon, during meta-learning
    references: dict[str, float]  # the same of the other optimizers
    losses: dict[str, Tensor]  # of each optimizer: [problem, step]


def quadratics(epochs: int, size: int = 10) -> Problems:
    """Returns the paper's f(theta) = |W theta - y|^2, all of W, y and the first theta drawn from a normal."""

    def start(count: int, generator: torch.Generator) -> Params:
        return {"theta": torch.randn(count, size, 1, generator=generator)}

    def draw(count: int, steps: int, generator: torch.Generator) -> Batch:
        parts = [torch.randn(count, 1, size, width, generator=generator) for width in (size, 1)]
        matrix, target = (part.expand(-1, steps, -1, -1) for part in parts)
        return matrix, target

    def loss(params: Params, batch: Batch) -> Tensor:
        matrix, target = batch
        return (matrix @ params["theta"] - target).square().sum((-2, -1))

    def judge(losses: Tensor) -> Tensor:
        return losses.log().mean()  # every problem has a scale of its own

    return Problems("random quadratics", start, draw, loss, judge, tasks=32, epochs=epochs)


def digits(epochs: int, hidden: int = 10) -> Problems:
    """Returns the paper's small network with sigmoid units, on the digits of scikit-learn instead of MNIST's."""
    pixels, labels = load_digits(return_X_y=True)
    images, classes = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)

    def start(count: int, generator: torch.Generator) -> Params:
        shapes = {"w1": (64, hidden), "b1": (1, hidden), "w2": (hidden, 10), "b2": (1, 10)}
        return {
            name: (0.1 if name[0] == "w" else 0.0) * torch.randn(count, *shape, generator=generator)
            for name, shape in shapes.items()
        }

    def draw(count: int, steps: int, generator: torch.Generator) -> Batch:
        picked = torch.randint(len(classes), (count, steps, BATCH_SIZE), generator=generator)
        return images[picked], nn.functional.one_hot(classes[picked], 10).float()

    def loss(params: Params, batch: Batch) -> Tensor:
        inputs, targets = batch
        features = (inputs @ params["w1"] + params["b1"]).sigmoid()
        logits = features @ params["w2"] + params["b2"]
        return -(logits.log_softmax(-1) * targets).sum(-1).mean(-1)

    return Problems("a network on digits", start, draw, loss, Tensor.mean, tasks=4, epochs=epochs)


KINDS = (quadratics, digits)


# ---------------------------------------------------------------------- meta-learning


def meta_learn(problems: Problems, args: argparse.Namespace, progress: Progress) -> tuple[Rule, list[float]]:
    """Returns the weights that were best on validation problems, and the mean loss there over the epochs."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    rule = Rule()
    template = {name: value[0].requires_grad_() for name, value in problems.start(1, generator).items()}
    fn = gimli.functionalize(template, LearnedOptimizer(template.values(), rule), problems.loss)
    meta_optimizer = torch.optim.Adam(rule.parameters(), lr=META_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(meta_optimizer, problems.epochs)
    validation, best = [], copied(rule)
    bar = progress.add_task(problems.name, total=problems.epochs)
    for epoch in range(problems.epochs):
        train_epoch(fn, rule, meta_optimizer, problems, args, generator)
        schedule.step()
        if epoch % VALIDATION_PERIOD == 0 or epoch == problems.epochs - 1:
            learned = partial(LearnedOptimizer, rule=rule)
            losses = train_live(problems, learned, args.steps, args.problems, args.seed + 1)
            validation.append(losses[:, -1].mean().item())
            best = copied(rule) if validation[-1] == min(validation) else best
        progress.update(bar, advance=1, description=f"{problems.name}: validation loss {validation[-1]:.3f}")
    rule.load_state_dict(best)
    return rule, validation


def train_epoch(
    fn: gimli.Functional,
    rule: Rule,
    meta_optimizer: torch.optim.Optimizer,
    problems: Problems,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> None:
    """Trains the rule on new problems, all at once: a meta-step after each segment of their training runs."""
    hyper = fn.hyperparameters()
    for name, weight in rule.named_parameters():
        hyper.modules[f"rule.{name}"] = weight  # the live weights themselves: the meta-optimizer trains them in place
    batches = problems.draw(problems.tasks, args.steps, generator)
    state = replace(fn.init(), params=problems.start(problems.tasks, generator))
    for begin in range(0, args.steps, SEGMENT):
        segment = tuple(part[:, begin : begin + SEGMENT] for part in batches)
        state, losses = fn.unroll(state, segment, hyper, tasks=(0, 0, None, None))
        meta_optimizer.zero_grad()
        problems.judge(losses).backward()
        nn.utils.clip_grad_norm_(rule.parameters(), 1.0)
        meta_optimizer.step()
        state = pytree.tree_map_only(Tensor, Tensor.detach, state)


def copied(rule: Rule) -> dict[str, Tensor]:
    """Returns copies of the weights."""
    return {name: weight.clone() for name, weight in rule.state_dict().items()}


# ---------------------------------------------------------------------- what it is worth, without the library


def train_live(problems: Problems, make: Callable[..., Any], steps: int, count: int, seed: int) -> Tensor:
    """Trains new problems in an ordinary loop; returns the loss before the first and after every step: [problem, step].

    All problems are one with larger tensors, since the optimizers treat every coordinate on its own.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {name: value.requires_grad_() for name, value in problems.start(count, generator).items()}
    batches = problems.draw(count, steps + 1, generator)
    optimizer = make(list(params.values()))
    history = []
    for step in range(steps + 1):
        losses = problems.loss(params, (batches[0][:, step], batches[1][:, step]))
        history.append(losses.detach())
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
    return torch.stack(history, -1)


def tune(problems: Problems, kind: Callable[..., Any], args: argparse.Namespace) -> float:
    """Returns the learning rate with the lowest mean loss at the horizon, on problems of its own."""

    def final_loss(rate: float) -> float:
        losses = train_live(problems, partial(kind, lr=rate), args.steps, args.problems, args.seed + 2)
        return losses[:, -1].nan_to_num(math.inf).mean().item()

    return min(RATES, key=final_loss)


def investigate(problems: Problems, args: argparse.Namespace, progress: Progress) -> Outcome:
    """Learns an optimizer and compares it with others on new problems, over more steps than it was trained for."""
    rule, validation = meta_learn(problems, args, progress)
    rates = {kind: tune(problems, kind, args) for kind in (torch.optim.SGD, torch.optim.Adam)}
    contestants: dict[str, Callable[..., Any]] = {
        f"{kind.__name__}, lr {rate:.2g}": partial(kind, lr=rate) for kind, rate in rates.items()
    }
    references = {
        name: train_live(problems, make, args.steps, args.problems, args.seed + 1)[:, -1].mean().item()
        for name, make in contestants.items()
    }
    contestants["learned"] = partial(LearnedOptimizer, rule=rule)
    losses = {
        name: train_live(problems, make, STRETCH * args.steps, args.problems, args.seed + 3)
        for name, make in contestants.items()
    }
    return Outcome(problems.name, args.steps, validation, references, losses)


# ---------------------------------------------------------------------- telling


def print_outcome(outcome: Outcome, console: Console) -> None:
    """Prints the losses at the horizon and at the end."""
    horizon = outcome.horizon
    count, length = next(iter(outcome.losses.values())).shape
    table = Table("optimizer", *(f"after {steps} steps" for steps in (horizon, length - 1)))
    table.title = f"{outcome.name}: mean (median) loss of {count} new problems"
    for name, losses in outcome.losses.items():
        ends = (losses[:, horizon], losses[:, -1])
        table.add_row(name, *(f"{end.mean():.4f} ({end.median():.4f})" for end in ends))
    console.print(table)


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draws, for each kind of problems, the losses over the steps and the course of meta-learning."""
    with matplotlib.rc_context({"font.size": 10, "axes.grid": True, "grid.alpha": 0.3, "legend.framealpha": 0.9}):
        figure = Figure(figsize=(13, 9), layout="constrained", dpi=110)
        for column, outcome in zip(figure.subplots(2, len(outcomes)).T, outcomes, strict=True):
            plot_losses(column[0], outcome)
            plot_course(column[1], outcome)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)


def plot_losses(axes: Axes, outcome: Outcome) -> None:
    """Draws the mean loss and the middle half of the problems, over the steps of the live optimizers."""
    for (name, losses), color in zip(outcome.losses.items(), COLORS, strict=True):
        low, high = losses.quantile(torch.tensor([0.25, 0.75]), 0)
        axes.plot(losses.mean(0), color=color, linewidth=2, label=name)
        axes.fill_between(range(losses.shape[1]), low, high, color=color, alpha=0.15, linewidth=0)
    axes.axvline(outcome.horizon, color="black", linestyle=":", label="trained up to here")
    axes.set(title=f"New problems: {outcome.name}", xlabel="step", yscale="log")
    axes.set_ylabel("loss: mean, and middle half of the problems")
    axes.legend(loc="lower left")


def plot_course(axes: Axes, outcome: Outcome) -> None:
    """Draws the loss of validation problems with the learned optimizer, and with the others."""
    epochs = [VALIDATION_PERIOD * index for index in range(len(outcome.validation))]
    axes.plot(epochs, outcome.validation, color=COLORS[-1], linewidth=2, marker=".", label="learned")
    for (name, loss), color in zip(outcome.references.items(), COLORS, strict=False):
        axes.axhline(loss, color=color, linestyle="--", label=name)
    title = f"Meta-learning: loss after {outcome.horizon} steps"
    axes.set(title=title, xlabel="epoch", ylabel="mean loss of validation problems", yscale="log")
    axes.legend(loc="upper right")


# ---------------------------------------------------------------------- the whole


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="Learns an optimizer by gradients.")
    parser.add_argument(
        "--epochs", type=int, nargs=2, default=(200, 60), help="training runs to learn from, for each kind of problems"
    )
    parser.add_argument("--steps", type=int, default=100, help="length of a training run")
    parser.add_argument("--problems", type=int, default=64, help="problems that the optimizers are compared on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where the plot goes (.png, .svg or .pdf)")
    parser.add_argument(
        "--smoke", "--quick", action="store_true", help="tries everything in a few seconds, and learns little"
    )
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.epochs, parsed.steps, parsed.problems = (3, 3), 10, 8
    return parsed


def main(arguments: Sequence[str] | None = None) -> list[Outcome]:
    """Runs the demonstration."""
    args = parse_arguments(arguments)
    console = Console()
    with Progress(console=console) as progress:
        outcomes = [investigate(kind(epochs), args, progress) for kind, epochs in zip(KINDS, args.epochs, strict=True)]
    for outcome in outcomes:
        print_outcome(outcome, console)
    plot(outcomes, args.output)
    console.print(f"The plot is in {args.output}", soft_wrap=True)
    return outcomes


if __name__ == "__main__":
    torch.set_num_threads(1)  # the operators are too small to be shared out
    main()
