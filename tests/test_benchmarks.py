"""The benchmarks measure what they say: the contenders agree, and a wrong one is marked."""

from benchmarks import __main__ as bench
from benchmarks.contenders import by_hand


def test_contenders_agree():
    rows = bench.measure(bench.mlp_task(3, "adam"), repeats=1)
    assert [row[0] for row in rows] == list(bench.CONTENDERS)
    assert all("WRONG" not in row[4] for row in rows)
    assert [row[4] == "-" for row in rows] == [True, False, False, False]


def test_a_wrong_contender_is_marked(monkeypatch):
    def scaled(task, dtype):
        run = by_hand(task, dtype)
        return lambda: tuple(1.001 * grad for grad in run())

    monkeypatch.setitem(bench.CONTENDERS, "scaled", scaled)
    rows = bench.measure(bench.mlp_task(2, "sgd"), repeats=1)
    assert rows[-1][4].startswith("WRONG (1e-03")


def test_tables_are_written_between_the_marks(tmp_path):
    path = tmp_path / "performance.md"
    path.write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n")
    bench._replace_measured(path, bench.table([["a"] * len(bench.HEADER)]))
    text = path.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n") and "| a | a |" in text
