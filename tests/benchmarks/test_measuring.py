"""Contenders are measured in processes of their own; the right ones agree with the reference, others are marked."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import roster
from benchmarks.measuring import Limits, References, judge, measure, relative_error
from benchmarks.results import Row, load
from benchmarks.roster import CONTENDERS, Contender
from benchmarks.seats import OutError, Seat
from benchmarks.tables import fastest, plain_of, table
from benchmarks.worker import Job
from benchmarks.workloads import chosen, workloads

TINY = replace(workloads(quick=True)["W3-adam-5"], steps=3)
ODD = [Contender(f"odd-{name}", name, "torch", "odd_contenders", name) for name in ("scaled", "absent")]


def test_contenders_are_compared_with_the_reference_and_with_each_other(tmp_path):
    names = ("plain", "gimli-reverse", "by-hand")
    contenders = [one for one in CONTENDERS if one.key in names] + ODD
    said = []
    measured = measure(TINY, contenders, Limits(repeats=2, time_limit=120), tmp_path / "logs", said.append)
    measured.save(tmp_path)
    (measured,) = load(tmp_path)
    assert {row.key: row.status for row in measured.rows} == {
        "plain": "ok",
        "gimli-reverse": "ok",
        "by-hand": "ok",
        "odd-scaled": "wrong",
        "odd-absent": "not there",
    }
    rows = {row.key: row for row in measured.rows}
    assert rows["odd-scaled"].error == pytest.approx(1e-3)
    assert max(rows[key].error or 0.0 for key in ("gimli-reverse", "by-hand")) < 1e-9
    assert [len(row.times) for row in measured.rows] == [2, 2, 2, 2, 0]
    live, growth, process = (rows["by-hand"].memory[name] or 0 for name in ("live", "growth", "process"))
    weights = 4 * sum(value.size for value in TINY.params().values())
    assert live > 3 * weights, "three steps keep at least their parameters"
    assert growth >= 0 and process > live
    assert fastest(measured) is rows["gimli-reverse"] and plain_of(measured, rows["gimli-reverse"]) is rows["plain"]
    text = table(measured)
    assert "WRONG (1e-03)" in text and "- absent (not there: this is for \\| others)" in text
    assert "by-hand: round 2 of 2" in said


def test_who_takes_too_long_is_out(tmp_path):
    by_hand = next(one for one in CONTENDERS if one.key == "by-hand")
    job = Job(by_hand, TINY, "cpu", 1, str(tmp_path / "log"))
    seat = Seat(job, tmp_path, time_limit=0.1, memory_limit=2**40)
    with pytest.raises(OutError, match="build took more than 0 s") as caught:
        seat.ask("build")
    assert caught.value.status == "too slow"


def test_who_takes_too_much_memory_is_out(tmp_path):
    by_hand = next(one for one in CONTENDERS if one.key == "by-hand")
    job = Job(by_hand, TINY, "cpu", 1, str(tmp_path / "log"))
    seat = Seat(job, tmp_path, time_limit=60, memory_limit=2**20)
    with pytest.raises(OutError, match="build took more than") as caught:
        seat.ask("build")
    assert caught.value.status == "too large"


def arrays(**values):
    return {name.replace("_", "."): np.asarray(value) for name, value in values.items()}


RIGHT = arrays(loss=1.0, params=[1.0, 2.0], hyper_lr=3.0)


@pytest.mark.parametrize(
    ("exact", "found", "status"),
    [
        (RIGHT, RIGHT, "ok"),
        (RIGHT | arrays(hyper_lr=3.00001), RIGHT, "wrong"),
        (RIGHT | arrays(params=[1.0, np.nan]), RIGHT, "nan"),
        (RIGHT, RIGHT | arrays(params=[1.0, 2.1]), "wrong"),
        (RIGHT, RIGHT | arrays(params=[1.0, np.nan]), "wrong"),
        (RIGHT, RIGHT | arrays(params=[1.0, 2.0001]), "ok"),
    ],
)
def test_values_and_every_gradient_count(exact, found, status):
    row = Row("key", "title", "torch", "plain")
    judge(row, exact, found, References(RIGHT, RIGHT, 1e-6))
    assert row.status == status


def test_gradients_that_a_contender_does_not_give_are_named():
    row, given = Row("key", "title", "torch", "plain"), arrays(loss=1.0, params=[1.0, 2.0])
    judge(row, given, given, References(RIGHT, RIGHT, 1e-6))
    assert (row.status, row.missing) == ("ok", ["hyper"])


def test_what_approximates_on_purpose_is_called_so():
    row = Row("key", "title", "gimli", "plain", is_exact=False)
    judge(row, RIGHT | arrays(params=[1.0, 0.0]), RIGHT, References(RIGHT, None, None))
    assert row.status == "approximate" and row.error == pytest.approx(2 / 5**0.5)


def test_an_error_in_one_hyperparameter_is_not_hidden_by_the_others():
    small = arrays(loss=1.0, params=[1e6, 2e6], hyper_eps=1e-9)
    assert relative_error(small | arrays(hyper_eps=2e-9), small) == pytest.approx(1)


def test_workloads_are_named_by_their_beginning():
    every = workloads()
    assert [one.key for one in chosen(["W3-sgd", "W7"], every)] == ["W3-sgd-5", "W3-sgd-20", "W3-sgd-100", "W7"]
    assert len(chosen([], every)) == len(every)
    with pytest.raises(SystemExit, match="no such workload: W9"):
        chosen(["W9", "W1"], every)


def test_contenders_bring_their_plain_trainings():
    keys = [one.key for one in roster.chosen(["jax", "gimli-inductor-mixed"])]
    assert keys[:3] == ["plain", "plain-compiled", "plain-jax"] and "gimli-inductor-mixed" in keys
    assert "higher" not in keys
    with pytest.raises(SystemExit, match="no such contender: tensorflow"):
        roster.chosen(["tensorflow"])


def test_quick_workloads_have_the_same_keys_and_say_so():
    assert list(workloads()) == list(workloads(quick=True))
    assert all(one.note for one in workloads(quick=True).values())
    assert not any(one.note for one in workloads().values())


def test_results_of_several_runs_come_together(tmp_path):
    from_here = {"note": "", "steps": 3, "threads": 1, "device": "cpu", "rounds": 1, "environment": {}, "rows": []}
    for key in ("W7", "W1-4", "W3-adam-5"):
        (tmp_path / f"{key}.cpu.json").write_text(json.dumps({"key": key, "title": key} | from_here))
    assert [one.key for one in load(tmp_path)] == ["W1-4", "W3-adam-5", "W7"]
