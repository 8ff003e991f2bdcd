"""The example scripts: they run to a picture, are reproducible, and compute what the same loops by hand compute."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.progress import Progress
from scripts import EXAMPLES, load_script
from scripts import run_script as run
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import gimli_compile as gimli


@pytest.fixture(scope="module")
def load() -> Iterator[Callable[[str], ModuleType]]:
    """Loads scripts as Python does when it runs them: with their folder on the path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield load_script


@pytest.fixture(scope="module")
def rates(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("learn_learning_rates")


@pytest.fixture(scope="module")
def maml(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("maml_few_shot")


@pytest.fixture(scope="module")
def learned(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("learned_optimizer")


def test_hyperparameters_are_learned_and_compared(
    rates: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "rates.png"
    results = run(rates, path)
    assert results.names == [f"layer{layer}.{kind}" for layer in (1, 2, 3, 4) for kind in ("weight", "bias")]
    assert len(results.history.validation_loss) == 4
    for hyperparameter, first in (("lr", 1e-3), ("weight_decay", 1e-2)):
        values = torch.tensor(results.history.values[hyperparameter], dtype=torch.float64)
        assert values.shape == (4, 8)
        torch.testing.assert_close(values[0], torch.full_like(values[0], first), rtol=1e-6, atol=0)
        assert (values[1:] != values[:-1]).all()
    assert list(results.runs) == ["defaults", "best single learning rate", "learned"]
    for loss, accuracy in results.runs.values():
        assert loss.shape == accuracy.shape == (2, 6)
        assert torch.equal(loss[:, 0], results.runs["defaults"].loss[:, 0])
        assert (loss[:, -1] < loss[:, 0]).all()
        assert ((accuracy > 0) & (accuracy < 1)).all()

    printed = capsys.readouterr().out
    assert "pytorch_optimizer/optimizer/adabelief.py" in printed
    assert 'print(fn.programs["update"]) shows all' in printed
    assert "best single learning rate" in printed
    assert str(path) in printed

    again = run(rates, tmp_path / "again.png")
    assert again.history == results.history
    assert again.learned == results.learned
    assert all(torch.equal(again.runs[name].loss, runs.loss) for name, runs in results.runs.items())


def test_the_inner_loop_is_the_live_training(rates: ModuleType) -> None:
    """The loss that is meta-learned on is what the optimizer reaches outside of the library."""
    data = rates.load_data()
    model = rates.make_model(seed=3)
    optimizer = rates.AdaBelief(model.parameters(), weight_decay=0.01)
    fn = gimli.functionalize(model, optimizer, rates.loss_fn, per_parameter=True)
    logs = {
        "lr": torch.linspace(-6, -4, 8, dtype=torch.float64),
        "weight_decay": torch.linspace(-3, 1, 8, dtype=torch.float64),
    }
    loss = rates.validation_loss_after_training(fn, logs, data, inner_steps=6, seed=5)
    settings = [
        {"lr": lr, "weight_decay": decay}
        for lr, decay in zip(logs["lr"].exp().tolist(), logs["weight_decay"].exp().tolist(), strict=True)
    ]
    live = rates.train_live(settings, data.train, data.validation, inner_steps=6, seeds=[5])
    assert loss.item() == pytest.approx(live.loss[0, -1].item(), rel=1e-5)
    assert abs(live.loss[0, -1] - live.loss[0, 0]) > 0.1


def test_the_splits_of_the_digits_are_disjoint_and_fixed(rates: ModuleType) -> None:
    data, again = rates.load_data(), rates.load_data()
    assert [len(labels) for _, labels in data] == [800, 400, 597]
    assert all(
        torch.equal(a, b) for split, other in zip(data, again, strict=True) for a, b in zip(split, other, strict=True)
    )
    assert len(torch.cat([images for images, _ in data]).unique(dim=0)) == 1797


def test_maml_learns_and_is_compared(maml: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "maml.png"
    results = run(maml, path, "--learn-rates")
    assert len(results.course.train) == 4
    assert list(results.course.validation) == [1, 2, 3, 4]
    assert len(results.rates) == 18
    assert all(0 < abs(rate - 0.4) < 0.01 for name, rate in results.rates.items() if name.endswith("weight"))
    assert results.maml.shape == (10, 5)
    assert results.scratch.shape == (10, len(maml.SCRATCH_STEPS))
    assert results.nearest.shape == (10,)
    assert results.scratch[:, 0].mean() < 0.35
    assert results.scratch[:, -1].mean() > 0.5
    assert results.maml[:, -1].mean() > results.maml[:, 0].mean() + 0.1

    printed = capsys.readouterr().out
    assert "MAML (2 steps)" in printed
    assert "inner learning rate" in printed
    assert str(path) in printed

    again = run(maml, tmp_path / "again.png", "--learn-rates")
    assert again.course == results.course
    assert again.rates == results.rates
    assert torch.equal(again.maml, results.maml)
    assert torch.equal(again.scratch, results.scratch)


def test_the_meta_gradient_of_maml_is_that_of_the_loops_by_hand(maml: ModuleType) -> None:
    images = maml.draw_characters(classes=8, drawings=4, size=8)
    episodes = maml.EpisodeSampler(images, ways=3, shots=1, queries=2).sample(2)
    episodes = maml.Episodes(*(t.double() if t.is_floating_point() else t for t in episodes))
    model = maml.make_model(ways=3, size=8).double()
    fn = gimli.functionalize(
        model, torch.optim.SGD(model.parameters(), lr=maml.INNER_RATE), maml.loss_fn, per_parameter=True
    )
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    log_rates = torch.linspace(-2, -1, len(params), dtype=torch.float64).requires_grad_()
    leaves = [*params.values(), log_rates]

    logits = maml.adapt(fn, maml.Start(params, log_rates), episodes, steps=3)
    found = torch.autograd.grad(cross_entropy(logits.flatten(0, 1), episodes.query_labels.flatten()), leaves)

    by_hand = []
    for support, labels, query, _ in zip(*episodes, strict=True):
        adapted = params
        for _ in range(3):
            loss = cross_entropy(functional_call(model, adapted, (support,)), labels)
            grads = torch.autograd.grad(loss, list(adapted.values()), create_graph=True)
            steps = zip(adapted.items(), grads, log_rates.exp(), strict=True)
            adapted = {name: param - rate * grad for (name, param), grad, rate in steps}
        by_hand.append(functional_call(model, adapted, (query,)))
    torch.testing.assert_close(logits, torch.stack(by_hand), rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(cross_entropy(torch.cat(by_hand), episodes.query_labels.flatten()), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_the_inner_rates_of_maml_stay_unless_they_are_learned(maml: ModuleType) -> None:
    data = maml.split_classes(maml.draw_characters(classes=40, size=28))
    args = maml.parse_arguments(["--smoke"])
    model = maml.make_model(args.ways)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.4), maml.loss_fn, per_parameter=True)
    start, _ = maml.meta_learn(fn, data, args, Progress())
    assert start.log_rates.exp().tolist() == pytest.approx([0.4] * 18)
    assert all((start.params[name] != before[name]).any() for name in before if name.endswith("weight"))
    assert all(torch.equal(param, before[name]) for name, param in model.named_parameters())


def test_optimizers_are_learned_and_compared(
    learned: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "learned.png"
    outcomes = run(learned, path)
    assert [outcome.name for outcome in outcomes] == ["random quadratics", "a network on digits"]
    for outcome in outcomes:
        assert outcome.horizon == 10
        assert len(outcome.validation) == 2
        assert len(outcome.losses) == 3
        assert len(outcome.references) == 2
        assert all(losses.shape == (8, 31) for losses in outcome.losses.values())
        starts = torch.stack([losses[:, 0] for losses in outcome.losses.values()])
        assert torch.equal(starts, starts[:1].expand_as(starts))
        tuned = [losses for name, losses in outcome.losses.items() if name != "learned"]
        assert all(losses[:, -1].mean() < 0.7 * losses[:, 0].mean() for losses in tuned)

    printed = capsys.readouterr().out
    assert "random quadratics: mean (median) loss of 8 new" in " ".join(printed.split())
    assert str(path) in printed

    for outcome, again in zip(outcomes, run(learned, tmp_path / "again.png"), strict=True):
        assert again.validation == outcome.validation
        assert all(torch.equal(again.losses[name], losses) for name, losses in outcome.losses.items())


@pytest.mark.parametrize("kind", [0, 1])
def test_the_meta_gradient_of_a_learned_optimizer_is_that_of_live_training(learned: ModuleType, kind: int) -> None:
    """The losses equal those of the live loop, and the slope its central differences, along a random direction."""
    torch.set_default_dtype(torch.float64)
    try:
        single = learned.KINDS[kind](epochs=1)

        def draw(count: int, steps: int, generator: torch.Generator):
            return tuple(part.double() for part in single.draw(count, steps, generator))

        problems = replace(single, draw=draw)
        rule = learned.Rule(4)
        steps, count = 5, 3
        generator = torch.Generator().manual_seed(7)
        params = problems.start(count, generator)
        batches = problems.draw(count, steps + 1, generator)
        template = {name: value[0].clone().requires_grad_() for name, value in params.items()}
        fn = gimli.functionalize(template, learned.LearnedOptimizer(template.values(), rule), problems.loss)
        hyper = fn.hyperparameters()
        for name, weight in rule.named_parameters():
            hyper.modules[f"rule.{name}"] = weight
        _, losses = fn.unroll(replace(fn.init(), params=params), batches, hyper, tasks=(0, 0, None, None))
        grads = torch.autograd.grad(losses.mean(), list(rule.parameters()))
        along = [torch.randn_like(grad) for grad in grads]
        slope = sum(float((grad * way).sum()) for grad, way in zip(grads, along, strict=True))

        def live(offset: float) -> torch.Tensor:
            moved = learned.Rule(4)
            moved.load_state_dict(rule.state_dict())
            with torch.no_grad():
                for weight, way in zip(moved.parameters(), along, strict=True):
                    weight.add_(offset * way)
            return learned.train_live(problems, lambda p: learned.LearnedOptimizer(p, moved), steps, count, seed=7)

        torch.testing.assert_close(losses.detach(), live(0.0), rtol=1e-10, atol=1e-12)
        h = 1e-4
        near, far = (float((live(k * h) - live(-k * h)).mean()) for k in (1, 2))
        assert slope == pytest.approx((8 * near - far) / (12 * h), rel=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
