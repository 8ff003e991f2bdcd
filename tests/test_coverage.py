"""The coverage command finds what is right, what is silently wrong and what does not run, on packages made on the fly."""

import itertools
import json
import math
import pkgutil
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from gimli_compile.__main__ import main
from gimli_compile.coverage import Recipe, Status, Verdict, captured, measure
from gimli_compile.coverage.discovery import optimizer_classes
from gimli_compile.coverage.places import places_of
from gimli_compile.coverage.slopes import central_slope, local_slope, nearby_jump, noisy_slope, side_slope
from gimli_compile.coverage.verdict import Line, judge
from gimli_compile.entry import functionalize

SOURCE = '''
import torch
from torch.optim import Optimizer, Adam


class Config:
    def __init__(self):
        self.decays = {"slow": (0.9, 0.5)}


class _Plain(Optimizer):
    def __init__(self, params, lr=0.1, **options):
        super().__init__(params, dict(lr=lr, **options))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.change(group, p)


class Nested(_Plain):
    """Numbers in the group, in its state, and deep inside an attribute."""

    def __init__(self, params, lr=0.1, eps=1e-8):
        super().__init__(params, lr, eps=eps)
        self.config = Config()

    def change(self, group, p):
        state = self.state[p]
        mean = state.setdefault("mean", torch.zeros_like(p))
        mean.mul_(self.config.decays["slow"][0]).add_(p.grad, alpha=self.config.decays["slow"][1])
        p.addcdiv_(mean, p.grad.abs().sqrt().add_(group["eps"]), value=-group["lr"])


class Tie(_Plain):
    """A threshold that every gradient ties with: the slopes of the two sides differ."""

    def __init__(self, params, lr=0.1, threshold=1.0):
        super().__init__(params, lr, threshold=threshold)

    def change(self, group, p):
        p.sub_((p.grad / p.grad.norm()).norm().clamp(max=group["threshold"]) * p.grad * group["lr"])


class Coarse(_Plain):
    def change(self, group, p):
        p.sub_((p.grad.bfloat16() * p.grad.bfloat16()).to(p.dtype) * group["lr"])


class Mixed(_Plain):
    """Runs with float32 parameters only."""

    def change(self, group, p):
        mean = self.state[p].setdefault("mean", torch.zeros(p.shape, dtype=torch.float32))
        p.sub_(mean.lerp_(p.grad, 0.5), alpha=group["lr"])


class Noisy(_Plain):
    def change(self, group, p):
        p.sub_(p.grad + torch.randn_like(p) * group["lr"], alpha=group["lr"])


class Refused(_Plain):
    def change(self, group, p):
        p.sub_(torch.unique(p.grad, dim=0).sum() * group["lr"])


class Horizon(_Plain):
    def __init__(self, params, horizon):
        super().__init__(params, 1.0 / horizon)

    def change(self, group, p):
        p.sub_(p.grad, alpha=group["lr"])


class Searching(_Plain):
    """Solves x^3 + x |g|^2 = target by halving an interval."""

    def __init__(self, params, lr=0.1, target=1.0):
        super().__init__(params, lr, target=target)

    def change(self, group, p):
        square = p.grad.square().sum()
        low, high = 0.0, 4.0
        while high - low > 1e-8:
            middle = (low + high) / 2
            if middle**3 + middle * square < group["target"]:
                low = middle
            else:
                high = middle
        p.sub_(low * p.grad, alpha=group["lr"])


class Matrices(_Plain):
    def change(self, group, p):
        if p.dim() != 2:
            raise ValueError("matrices only")
        p.sub_(p.grad @ p.grad.T @ p.grad, alpha=group["lr"])
'''


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Returns a function that imports a new package with this source."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, source=SOURCE):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(source)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return {kind.__name__: kind for kind in optimizer_classes(name)}

    return make


def verdicts(measurement):
    return {derivative.path: derivative.verdict for derivative in measurement.derivatives}


def errors(measurement):
    return {derivative.path: derivative.error for derivative in measurement.derivatives}


class Corrupted:
    """A `Functional` whose update is changed."""

    def __init__(self, fn, change):
        self._fn, self._change = fn, change

    def __getattr__(self, name):
        return getattr(self._fn, name)

    def update(self, params, grads, state, hyper):
        return self._change(self._fn, params, grads, state, hyper)


def corrupt(monkeypatch, change):
    monkeypatch.setattr(captured, "functionalize", lambda *args: Corrupted(functionalize(*args), change))


def scale_params(fn, params, grads, state, hyper):
    params, state = fn.update(params, grads, state, hyper)
    return {name: value * (1 + 1e-9) for name, value in params.items()}, state


def detach_grads(fn, params, grads, state, hyper):
    return fn.update(params, {name: grad.detach() for name, grad in grads.items()}, state, hyper)


def detach_hyper(fn, params, grads, state, hyper):
    return fn.update(params, grads, state, fn.hyperparameters())


def spoil_hyper(fn, params, grads, state, hyper):
    params, state = fn.update(params, grads, state, hyper)
    spoiled = (hyper[0]["lr"] - hyper[0]["lr"].detach()) * math.nan
    return {name: value + torch.where(spoiled == 0, spoiled, 0.0) for name, value in params.items()}, state


# ---------------------------------------------------------------------- one class


def test_numbers_are_found_wherever_they_are(shelf):
    found = measure(shelf("nested")["Nested"])
    assert found.status is Status.RIGHT and found.value_error <= 1e-12
    wanted = {"groups.0.lr", "groups.0.eps", "config.decays.slow.0", "config.decays.slow.1", "params", "grads"}
    assert set(verdicts(found)) == wanted | {"state mean"}
    assert max(errors(found).values()) <= 1e-6
    assert found.variants == 2 and found.nodes > 5 and found.baked == ()


def test_places_are_changed_in_the_live_objects(shelf):
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = shelf("places")["Nested"]([p])
    p.grad = torch.ones(2)
    optimizer.step()
    places = places_of(optimizer, {"p": p})
    places["config.decays.slow.1"].move(0.25)
    places["groups.0.lr"].move(1.0)
    places["p.mean"].move(torch.tensor([1.0, 0.0]))
    assert optimizer.config.decays == {"slow": (0.9, 0.75)}
    assert optimizer.param_groups[0]["lr"] == 1.1
    assert optimizer.state[p]["mean"].tolist() == [1.5, 0.5]


def test_a_tie_is_a_kink(shelf):
    found = measure(shelf("tie")["Tie"])
    assert found.status is Status.RIGHT
    assert verdicts(found)["groups.0.threshold"] is Verdict.KINK


def test_a_search_is_a_staircase(shelf):
    """The library says so, and the slopes between the jumps are the program's."""
    found = measure(shelf("searching")["Searching"], Recipe(steps=3, shapes=((3, 2),)))
    assert found.status is Status.STAIRCASE and found.value_error <= 1e-12
    known = verdicts(found)
    assert known["grads"] is known["groups.0.target"] is Verdict.STAIRCASE
    assert known["params"] is known["groups.0.lr"] is Verdict.EXACT
    assert errors(found)["grads"] > 1e-3 and any("`x = x - f(x) / slope`" in entry for entry in found.baked)


def test_a_staircase_of_which_the_library_does_not_speak_is_wrong(shelf, monkeypatch):
    monkeypatch.setattr("gimli_compile.update_capture.find_search", lambda *_: ())
    found = measure(shelf("silent")["Searching"], Recipe(steps=2, shapes=((3, 2),)))
    assert verdicts(found)["grads"] is Verdict.STAIRCASE and found.status is Status.WRONG


def test_low_precision_inside_is_stated_and_its_derivatives_are_exact(shelf):
    found = measure(shelf("coarse")["Coarse"])
    assert found.status is Status.RIGHT and found.precision == "bfloat16"
    assert set(verdicts(found).values()) == {Verdict.EXACT}


def test_mixed_dtypes_are_measured_in_float64(shelf):
    found = measure(shelf("mixed")["Mixed"])
    assert found.status is Status.RIGHT and found.widened


def test_noise_is_the_same_in_both(shelf):
    found = measure(shelf("noisy")["Noisy"])
    assert found.status is Status.RIGHT
    assert errors(found)["groups.0.lr"] <= 1e-6


def test_shapes_fall_back(shelf):
    assert measure(shelf("matrices")["Matrices"]).shapes == ((3, 2), (2, 4))


def test_a_refusal_has_its_reason(shelf):
    found = measure(shelf("refused")["Refused"])
    assert found.status is Status.REFUSED
    assert "torch.unique(p.grad, dim=0)" in found.reason


def test_a_class_that_cannot_be_made_runs_by_a_recipe(shelf):
    kind = shelf("horizon")["Horizon"]
    found = measure(kind)
    assert found.status is Status.NOT_RUN
    assert "missing 1 required positional argument: 'horizon'" in found.reason
    assert measure(kind, Recipe(arguments={"horizon": 10})).status is Status.RIGHT


@pytest.mark.parametrize(
    ("change", "path"),
    ((detach_grads, "grads"), (detach_hyper, "groups.0.lr"), (spoil_hyper, "groups.0.lr")),
)
def test_derivatives_that_are_lost_are_wrong(monkeypatch, change, path):
    corrupt(monkeypatch, change)
    found = measure(torch.optim.SGD)
    assert found.status is Status.WRONG and found.value_error <= 1e-12
    assert verdicts(found)[path] is Verdict.WRONG


def test_derivatives_that_are_lost_in_low_precision_are_wrong(monkeypatch, shelf):
    corrupt(monkeypatch, detach_grads)
    found = measure(shelf("lost")["Coarse"])
    assert verdicts(found)["grads"] is Verdict.WRONG and verdicts(found)["groups.0.lr"] is Verdict.EXACT


def test_values_that_differ_are_wrong(monkeypatch):
    corrupt(monkeypatch, scale_params)
    found = measure(torch.optim.SGD)
    assert found.status is Status.WRONG and 1e-12 < found.value_error < 1e-7


def test_a_loss_can_drive_the_steps(shelf):
    def loss(model, batch):
        return torch.stack([((p - batch[name]) ** 4).sum() for name, p in model.named_parameters()]).sum() / 100

    found = measure(torch.optim.Adam, Recipe(loss=loss, arguments={"lr": 0.1}))
    assert found.status is Status.RIGHT and found.driven_by == "a loss"
    assert verdicts(found)["batches"] is Verdict.EXACT


def test_time_can_be_limited(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(ticks)))
    found = measure(torch.optim.SGD, time_limit=30)
    assert found.status is Status.STOPPED
    assert verdicts(found)["groups.0.lr"] is Verdict.EXACT
    assert verdicts(found)["grads"] is Verdict.UNMEASURED


# ---------------------------------------------------------------------- slopes


def test_slopes_of_smooth_and_stiff_functions():
    for function, exact in ((math.sin, 1.0), (lambda x: math.exp(3 * x) + 2, 3.0), (lambda x: 1 / (x + 1e-3), -1e6)):
        room = 1e-3 if exact == -1e6 else 1.0
        for slope in (central_slope(function, room), side_slope(function, room, 1)):
            assert slope is not None and slope.jump == 0
            assert slope.value == pytest.approx(exact, rel=1e-8)
            assert abs(slope.value - exact) <= 10 * slope.uncertainty + 1e-12


def test_a_side_without_values_has_no_slope():
    assert side_slope(math.sqrt, 1.0, -1) is None


def test_a_jump_is_seen():
    slope = side_slope(lambda x: 2 * x + (0.1 if x > 0 else 0.0), 1.0, 1)
    assert slope is not None and slope.value == pytest.approx(2) and slope.jump == pytest.approx(0.1)


def test_slopes_through_noise_know_how_good_they_are():
    def rounded(x):
        return float(torch.tensor(1.3 + 0.7 * x + 0.2 * x * x).bfloat16())

    slope = noisy_slope(rounded, 1.0, (-1, 1), 2.0**-7)
    assert slope is not None and 0 < slope.uncertainty < 0.05
    assert abs(slope.value - 0.7) < 4 * slope.uncertainty


def test_the_slope_between_jumps_is_found_and_so_are_they():
    def stairs(x):
        return 0.3 * x + 0.5 * math.floor(x * 1e8 + 0.5) * 1e-8 + 1.0

    slope = local_slope(stairs, 1.0, (-1, 1))
    assert slope is not None and abs(slope.value - 0.3) <= 4 * slope.uncertainty < 1e-4
    assert nearby_jump(stairs, 0.3, 1e-3) == pytest.approx(5e-9, rel=1e-3)
    assert nearby_jump(lambda x: math.sin(x) + x * x, 0.3, 1e-3) == 0


def test_a_fine_staircase_is_not_taken_for_the_line_through_its_steps():
    """Over a million steps of 1e-10 a line fits with less uncertainty than between two of them."""

    def stairs(x):
        return 0.3 * x + 0.5 * math.floor(x * 1e10 + 0.5) * 1e-10 + 1.0

    slope = local_slope(stairs, 1.0, (-1, 1))
    assert slope is not None and abs(slope.value - 0.3) <= 4 * slope.uncertainty < 1e-3
    assert judge(Line("x", stairs), 0.3).verdict is Verdict.STAIRCASE
    assert judge(Line("x", stairs), 0.31).verdict is Verdict.WRONG


@pytest.mark.parametrize(
    ("function", "got", "verdict"),
    (
        (lambda x: 0.3 * x + 1e-8 * round(5e7 * x), 0.3, Verdict.STAIRCASE),
        (lambda x: 0.3 * x + 1e-8 * round(5e7 * x), 0.4, Verdict.WRONG),
        (abs, 0.5, Verdict.KINK),
        (abs, 1.5, Verdict.WRONG),
        (abs, math.nan, Verdict.WRONG),
        (lambda x: 3 * x, 3.0 + 1e-7, Verdict.EXACT),
        (lambda x: 3 * x, 3.0 + 1e-4, Verdict.WRONG),
        (lambda x: float(x > 0), 0.0, Verdict.JUMP),
        (lambda x: float(x > 0), math.inf, Verdict.WRONG),
        (lambda x: math.nan, 1.0, Verdict.UNMEASURED),
    ),
)
def test_verdicts(function, got, verdict):
    assert judge(Line("x", function), got).verdict is verdict


def test_verdicts_at_the_end_of_a_range():
    """A tie lies between the slopes; a branch that belongs to values that are not allowed has a derivative of none."""
    assert judge(Line("x", lambda x: max(x, 0.0), left=0.0), 0.5).verdict is Verdict.KINK
    assert judge(Line("x", lambda x: max(x, 0.0), left=0.0), 0.0).verdict is Verdict.WRONG
    assert judge(Line("x", lambda x: max(x, 0.0), left=0.0, reported=True), 0.0).verdict is Verdict.REPORTED


def test_a_bend_beside_a_tiny_constant_is_no_reason_to_call_it_wrong():
    """The slope at 0 is 2; from 1e-7 on it is 1, and a wide surrounding sees nothing else."""
    line = Line("x", lambda x: x + 1e-8 * math.tanh(x / 1e-8) + 1.0, left=1e-8, right=0.1)
    assert judge(line, 2.0).verdict in (Verdict.EXACT, Verdict.UNMEASURED)
    assert judge(line, 1.5).verdict in (Verdict.WRONG, Verdict.JUMP)


def test_verdicts_of_counts():
    assert judge(Line("x", lambda x: len(range(2 + x)), count=True), 0.0).verdict is Verdict.COUNT  # type: ignore[arg-type]
    assert judge(Line("x", lambda x: 2 * x, count=True), 0.0).verdict is Verdict.WRONG


def test_verdicts_in_low_precision():
    def rounded(x):
        return float(torch.tensor(1.3 + 0.7 * x).bfloat16())

    line = Line("x", rounded, rounding=2.0**-7)
    assert judge(line, 0.71).verdict is Verdict.PRECISION
    assert judge(line, 0.0).verdict is Verdict.WRONG


# ---------------------------------------------------------------------- the command


def test_the_script_is_the_command():
    scripts = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["scripts"]
    assert pkgutil.resolve_name(scripts["gimli-compile"]) is main


def run(capsys, *arguments):
    status = main(["coverage", *arguments])
    return status, capsys.readouterr()


def test_text(capsys, shelf):
    shelf("texts")
    status, printed = run(capsys, "texts", "--select", "Nested", "Refused", "Horizon")
    assert status == 0
    lines = printed.out.splitlines()
    assert [line.split()[:2] for line in lines[:5] if not line.startswith(" ")] == [
        ["class", "status"], ["Horizon", "not"], ["Nested", "right"], ["Refused", "refused"],
    ]  # fmt: skip
    assert "config.decays.slow.1 " in printed.out
    assert lines[-1] == "3 classes: 1 right, 1 refused, 1 not run."
    assert printed.err.splitlines()[-1].startswith("[3/3] texts.")


def test_markdown_into_a_file(capsys, shelf, tmp_path):
    shelf("marked")
    path = tmp_path / "table.md"
    status, printed = run(capsys, "marked", "--select", "Nested", "--format", "markdown", "--output", str(path))
    assert status == 0 and printed.out == ""
    text = path.read_text()
    assert "Made by `gimli-compile coverage marked --select Nested --format markdown`" in text
    assert "| Nested | right | " in text and "- `Nested`: lr " in text


def test_json(capsys, shelf):
    shelf("objects")
    status, printed = run(capsys, "objects", "--select", "Refused", "Nested", "--format", "json")
    assert status == 0
    nested, refused = json.loads(printed.out)["classes"]
    assert nested["name"] == "objects.Nested" and nested["status"] == "right"
    assert {"path", "verdict", "error", "got", "expected", "uncertainty"} == set(nested["derivatives"][0])
    assert refused["value_error"] is None and "torch.unique" in refused["reason"]


def test_recipes_come_from_a_file(capsys, shelf, tmp_path):
    shelf("recipes")
    path = tmp_path / "recipes.txt"
    path.write_text(
        "from gimli_compile.coverage import Recipe\nRECIPES = {'recipes.Horizon': Recipe(arguments={'horizon': 8})}\n"
    )
    status, printed = run(capsys, "recipes", "--select", "Horizon", "--recipes", str(path))
    assert status == 0 and "1 classes: 1 right." in printed.out


def test_the_status_tells_of_a_silently_wrong_class(capsys, monkeypatch):
    corrupt(monkeypatch, detach_grads)
    status, printed = run(capsys, "--select", "SGD")
    assert status == 1 and "grads wrong 1e+00" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        (("no_such_package",), "'no_such_package' cannot be imported"),
        (("json",), "'json' has no optimizers"),
        (("torch.optim", "--select", "Nothing"), "no class is named Nothing"),
        (("torch.optim", "--select", "SGD", "--recipes", __file__ + ".missing"), "is no file of recipes"),
    ),
)
def test_arguments_that_do_not_fit(capsys, arguments, message):
    status, printed = run(capsys, *arguments)
    assert status == 2 and message in printed.err


def test_several_processes(capsys):
    status, printed = run(capsys, "--select", "SGD", "Rprop", "--jobs", "2")
    assert status == 0 and "2 classes: 2 right." in printed.out


def test_a_bar_where_there_is_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    status, printed = run(capsys, "--select", "SGD")
    assert status == 0 and "[1/1]" not in printed.err and "SGD" in printed.err


def test_classes_of_other_packages_are_left_out(shelf):
    assert set(shelf("own")) == {
        "Nested", "Tie", "Coarse", "Mixed", "Noisy", "Refused", "Horizon", "Matrices", "Searching",
    }  # fmt: skip


def test_submodules_are_searched_where_nothing_is_exported(shelf, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "__init__.py").write_text("")
    (tmp_path / "deep" / "broken.py").write_text("raise ImportError('needs a library')")
    (tmp_path / "deep" / "__main__.py").write_text("raise SystemExit(3)")
    (tmp_path / "deep" / "inner.py").write_text(SOURCE)
    assert "Nested" in {kind.__name__ for kind in optimizer_classes("deep")}
