"""The example scripts that learn what is trained on: losses, data, and the weights of data."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from scripts import load_script, run_script
from torch.nn.functional import cross_entropy

import gimli_compile as gimli


@pytest.fixture(scope="module")
def reweight() -> ModuleType:
    return load_script("reweight_examples")


@pytest.fixture(scope="module")
def distillation() -> ModuleType:
    return load_script("dataset_distillation")


@pytest.fixture(scope="module")
def learned_loss() -> ModuleType:
    return load_script("learned_loss")


def test_examples_are_reweighted_and_compared(
    reweight: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "reweight.png"
    outcomes = run_script(reweight, path)
    assert [outcome.kind for outcome in outcomes] == list(reweight.KINDS)
    for outcome in outcomes:
        assert len(outcome.accuracy) == 6
        assert all(accuracy.shape == (1, 41) for accuracy in outcome.accuracy.values())
        assert len({float(accuracy[0, 0]) for accuracy in outcome.accuracy.values()}) == 1
        assert len({float(accuracy[0, -1]) for accuracy in outcome.accuracy.values()}) > 3
        assert outcome.weights[outcome.right].mean() > 0.5 > outcome.weights[~outcome.right].mean()
    agreeing = outcomes[0].accuracy
    assert agreeing["learned at every step"][0, -1] > agreeing["all equal"][0, -1] + 0.3
    assert str(path) in capsys.readouterr().out

    for outcome, again in zip(outcomes, run_script(reweight, tmp_path / "again.png"), strict=True):
        assert torch.equal(again.weights, outcome.weights)
        assert all(torch.equal(again.accuracy[name], curve) for name, curve in outcome.accuracy.items())


@pytest.mark.parametrize("kind", [0, 1])
def test_half_of_the_labels_are_wrong(reweight: ModuleType, kind: int) -> None:
    data, again = (reweight.load_data(reweight.KINDS[kind], seed=1) for _ in range(2))
    assert torch.equal(data.train[1], again.train[1])
    assert [len(split[1]) for split in data[:3]] == [1000, 50, 747]
    assert len(torch.cat([split[0] for split in data[:3]]).unique(dim=0)) == 1797
    assert 0.45 < data.right.float().mean() < 0.6
    assert (data.train[1][~data.right] == 0).all() == (kind == 0)


def test_weights_of_one_step_are_the_slopes_of_live_training(reweight: ModuleType) -> None:
    """After a warm-up step, so that there is momentum; against central differences of a live step."""
    data = reweight.load_data(reweight.KINDS[1], seed=0)
    clean = data.clean[0].double(), data.clean[1]
    batches = [(data.train[0][k : k + 6].double(), data.train[1][k : k + 6]) for k in (0, 6)]
    weights = torch.full((6,), 1 / 6, dtype=torch.float64)

    def warmed_up():
        model = reweight.make_model(seed=3).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        step(model, optimizer, batches[0], weights)
        return model, optimizer

    def step(model, optimizer, batch, weights):
        optimizer.zero_grad()
        reweight.loss_fn(model, batch, weights).backward()
        optimizer.step()

    def gain(weights):
        model, optimizer = warmed_up()
        step(model, optimizer, batches[1], weights)
        return -cross_entropy(model(clean[0]), clean[1]).item()

    model, optimizer = warmed_up()
    fn = gimli.functionalize(model, optimizer, reweight.loss_fn)
    h = 1e-4
    slopes = [(gain(h * row) - gain(-h * row)) / (2 * h) for row in torch.eye(6, dtype=torch.float64)]
    expected = torch.tensor(slopes, dtype=torch.float64).clamp(min=0)
    assert 0 < (expected > 0).sum() < 6
    torch.set_default_dtype(torch.float64)
    try:
        found = reweight.weigh_by_one_step(fn, fn.init(), batches[1], clean)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected / expected.sum(), rtol=1e-6, atol=1e-9)


def test_images_are_distilled_and_compared(
    distillation: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "distilled.png"
    results = run_script(distillation, path)
    assert [len(found.course) for found in results.distilled.values()] == [30, 30]
    assert all(found.course[-1] < found.course[0] - 0.5 for found in results.distilled.values())
    assert all(found.images.shape == (10, 64) for found in results.distilled.values())
    assert len(results.pictures) == 4
    the_one, new, longer = results.accuracy.values()
    assert list(the_one) == list(new) == list(longer)
    assert [len(found) for found in the_one.values()] == [5, 5, 1, 1, 1, 1]
    assert [len(found) for found in new.values()] == [10, 10, 2, 2, 2, 2]
    assert all(0.4 < found.mean() < 1 for found in the_one.values())
    assert longer["all 1,200 digits"].mean() > new["all 1,200 digits"].mean() + 0.05
    assert str(path) in capsys.readouterr().out

    again = run_script(distillation, tmp_path / "again.png")
    for name, found in results.distilled.items():
        assert torch.equal(again.distilled[name].images, found.images)
        assert torch.equal(next(iter(again.accuracy.values()))[name], the_one[name])


@pytest.mark.parametrize("seeds", [[3], [4, 5]])
def test_the_gradient_of_the_images_is_that_of_live_training(distillation: ModuleType, seeds: list[int]) -> None:
    """The loss equals the live loop's, and the slope its central differences, along one direction."""
    torch.set_default_dtype(torch.float64)
    try:
        (x, y), _ = distillation.load_data()
        held_out = x[:40].double(), y[:40]
        images = distillation.class_means((x, y)).double().requires_grad_()
        rate = torch.tensor(0.7, requires_grad=True)
        model = distillation.make_model(0)
        fn = gimli.functionalize(model, torch.optim.SGD(model.parameters(), lr=0.3), distillation.loss_fn)
        state = distillation.train_on(fn, images, rate, seeds, steps=10)
        logits = fn(state, held_out[0].expand(len(seeds), -1, -1), tasks=True)
        loss = cross_entropy(logits.flatten(0, 1), held_out[1].repeat(len(seeds)))
        way = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(loss, [images, rate])
        slope = float((grads[0] * way).sum() - grads[1])

        def live(offset: float) -> float:
            losses = []
            for seed in seeds:
                trained = distillation.make_model(seed)
                optimizer = torch.optim.SGD(trained.parameters(), lr=0.7 - offset)
                for _ in range(10):
                    optimizer.zero_grad()
                    distillation.loss_fn(trained, (images.detach() + offset * way, torch.arange(10))).backward()
                    optimizer.step()
                losses.append(distillation.loss_fn(trained, held_out).item())
            return sum(losses) / len(losses)

        assert loss.item() == pytest.approx(live(0.0), rel=1e-12)
        h = 1e-4
        near, far = (live(k * h) - live(-k * h) for k in (1, 2))
        assert slope == pytest.approx((8 * near - far) / (12 * h), rel=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_loss_is_learned_and_compared(
    learned_loss: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "loss.png"
    results = run_script(learned_loss, path)
    assert len(results.course) == 10
    assert list(results.errors) == list(results.rates)
    assert list(results.errors)[-1] == "learned"
    starts = torch.stack([errors[:, 0] for errors in results.errors.values()])
    assert torch.equal(starts, starts[:1].expand_as(starts))
    assert all(errors.shape == (8, 51) for errors in results.errors.values())
    assert len({float(errors.median(0).values[-1]) for errors in results.errors.values()}) == 5
    torch.manual_seed(0)
    before = dict(learned_loss.LearnedLoss().named_parameters())
    trained = [name for name, weight in results.learned.named_parameters() if (weight != before[name]).all()]
    assert set(before) - set(trained) <= {"layers.4.bias"}  # a constant of the loss, which trains nothing
    assert str(path) in capsys.readouterr().out

    again = run_script(learned_loss, tmp_path / "again.png")
    assert again.course == results.course
    assert all(torch.equal(again.errors[name], errors) for name, errors in results.errors.items())


def test_points_to_judge_by_are_right_and_others_partly_wrong(learned_loss: ModuleType) -> None:
    tasks = learned_loss.draw_tasks(200, seed=5)
    (inputs, given), (others, right) = tasks.train, tasks.judge
    assert given.shape == inputs.shape == others.shape == right.shape == (200, 40, 1)
    assert right.abs().max() <= 4
    waves = torch.stack([others.sin(), others.cos()], -1).squeeze(2).double()
    solution = torch.linalg.lstsq(waves, right.double()).solution
    torch.testing.assert_close(waves @ solution, right.double(), rtol=0, atol=1e-5)
    wrong = (torch.stack([inputs.sin(), inputs.cos()], -1).squeeze(2).double() @ solution - given).abs() > 1e-4
    assert 0.27 < wrong.double().mean() < 0.33
    assert given[wrong].min() >= 0
    assert 9 < given[wrong].max() <= 10


def test_the_gradient_of_the_loss_is_that_of_live_training(learned_loss: ModuleType) -> None:
    """The errors equal the live loop's, and the slope its central differences, along a random direction."""
    torch.set_default_dtype(torch.float64)
    try:
        tasks = learned_loss.draw_tasks(3, seed=5)
        torch.manual_seed(0)
        learned = learned_loss.LearnedLoss()
        phi = dict(learned.named_parameters())
        fn = learned_loss.capture(learned_loss.make_model(), learned)
        errors = learned_loss.error_after_training(fn, phi, tasks, steps=6)
        grads = torch.autograd.grad(errors.sum(), list(phi.values()), materialize_grads=True, allow_unused=True)
        ways = [torch.randn_like(weight) for weight in phi.values()]
        slope = sum(float((grad * way).sum()) for grad, way in zip(grads, ways, strict=True))

        def live(offset: float) -> torch.Tensor:
            moved = learned_loss.LearnedLoss()
            values = zip(phi.items(), ways, strict=True)
            moved.load_state_dict({name: weight.detach() + offset * way for (name, weight), way in values})
            return learned_loss.train_live(moved, learned_loss.RATE, tasks, steps=6)[0][:, -1]

        torch.testing.assert_close(errors.detach(), live(0.0), rtol=1e-12, atol=0)
        h = 1e-4
        near, far = (float((live(k * h) - live(-k * h)).sum()) for k in (1, 2))
        assert slope == pytest.approx((8 * near - far) / (12 * h), rel=1e-6)
    finally:
        torch.set_default_dtype(torch.float32)
