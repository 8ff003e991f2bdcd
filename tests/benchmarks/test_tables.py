"""What was measured becomes tables and plots, and nothing else in the document changes."""

from pathlib import Path

import pytest

from benchmarks import __main__ as bench
from benchmarks.results import Measured, Row, load
from benchmarks.tables import BEGIN, END, fastest, replace_measured, summary, table


def row(key, family, median, status="ok", **values):
    given = {
        "baseline": "plain",
        "times": [median],
        "status": status,
        "error": 1e-15,
        "rounding": 1e-6,
        "natural": 1e-6,
    }
    return Row(key, f"the {key}", family, **(given | values))


@pytest.fixture
def measured():
    rows = [
        row("plain", "plain", 1.0, error=None, rounding=None),
        row("slow", "gimli", 4.0, memory={"live": 2_500_000, "growth": 5_000_000, "process": 10**9}),
        row("partial", "gimli", 1.5, missing=["hyper"]),
        row("fast", "gimli", 2.0, memory={"live": 3_000_000}),
        row("peer", "jax", 1.0, status="nan", error=float("nan")),
        row("other", "jax", 3.0, baseline="plain-jax"),
        Row("gone", "the gone", "library", "plain", status="too slow", text="build took more than 300 s"),
    ]
    environment = {"torch": "2", "processor": "a processor", "cores": "2"}
    return Measured("W5-mlp-50", "a long unroll", "quick: smaller", 50, 2, "cpu", 3, environment, rows)


def test_the_fastest_is_right_and_gives_all_gradients(measured):
    best = [fastest(measured, family) for family in ("gimli", "jax", "library")]
    assert best == [measured.row("fast"), measured.row("other"), None]


def test_a_table_has_ratios_marks_and_the_absent(measured):
    lines = {
        line.split(" | ")[0].strip("| "): line for line in table(measured).splitlines() if line.startswith("| the")
    }
    assert "| 4 | 2.00 | 4.00 | - | 2.5 | 5 | 1000 | 1e-15 | 1e-06 (1e-06) |" in lines["the slow"]
    assert "the partial (without gradients in hyperparameters)" in lines
    assert "NaN (nan)" in lines["the peer"]
    assert "- the gone (too slow: build took more than 300 s)" in table(measured)
    assert "**quick: smaller**" in table(measured)


def test_the_summary_compares_with_the_best_right_peer(measured):
    assert "| W5-mlp-50 | the fast | 2 | 2.00 | - | - | 1.50 (the other) | 3 | - |" in summary([measured])


def test_results_survive_their_file(measured, tmp_path):
    measured.save(tmp_path)
    (loaded,) = load(tmp_path)
    assert repr(loaded) == repr(measured)


def test_a_document_is_written_between_its_marks(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    replace_measured(path, "new")
    assert path.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"


@pytest.mark.parametrize("before", [f"{BEGIN}{END}", "words\n", None])
def test_rendering_measures_nothing(measured, tmp_path, before):
    """A document that was not there yet ended in an error, after all was measured."""
    measured.save(tmp_path / "results")
    document = tmp_path / "made" / "performance.md" if before is None else tmp_path / "performance.md"
    if before is not None:
        document.write_text(before)
    bench.main(["--render", "--results", str(tmp_path / "results"), "--output", str(document)])
    text = document.read_text()
    assert "(performance_time.png)" in text and "(performance_memory.png)" in text and table(measured) in text
    assert (document.parent / "performance_time.png").stat().st_size > 10_000
    assert (document.parent / "performance_memory.png").stat().st_size > 10_000


def test_rendering_nothing_says_so(tmp_path):
    with pytest.raises(SystemExit, match="nothing was measured"):
        bench.main(["--render", "--results", str(tmp_path), "--output", str(tmp_path / "performance.md")])


def test_the_document_has_the_tables_of_what_was_measured():
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    every = load(bench.MEASURED)
    assert len(every) > 20 and summary(every) in text
    for measured in every:
        assert table(measured) in text, measured.key


def test_small_versions_do_not_replace_what_was_measured():
    assert bench.parse_arguments(["--quick"]).results == bench.OUTPUT
    assert bench.parse_arguments([]).results == bench.MEASURED
