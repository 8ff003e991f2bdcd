"""Source lines: which line of whose code an operator came from."""

import functools
import inspect
import os
import sys
from typing import Any

import pytest
import torch
from recorded import record
from torch.optim.sgd import sgd
from torch.utils import _pytree as pytree

from gimli_compile.errors import CaptureError
from gimli_compile.provenance import SourceLine, current_source, user_source

X = torch.linspace(0.5, 2.0, 6, dtype=torch.float64).reshape(2, 3)


def here():
    """Returns the number of the line that calls this."""
    return sys._getframe(1).f_lineno


def sources(program):
    return [node.meta["source"] for node in program.graph.nodes if node.op == "call_function"]


def test_the_line_that_asks():
    source, line = current_source(), here()
    assert source is not None
    assert (source.line, source.function) == (line, "test_the_line_that_asks")
    assert source.code == "source, line = current_source(), here()"
    assert source.file.endswith("test_provenance.py")


def test_text_of_a_line():
    line = SourceLine("torch/optim/sgd.py", 343, "_single_tensor_sgd", "param.add_(grad, alpha=-lr)")
    assert str(line) == "torch/optim/sgd.py:343 in _single_tensor_sgd: param.add_(grad, alpha=-lr)"


def test_the_innermost_line_of_the_users_code():
    def inner():
        return current_source()

    items: list[Any] = [1, 2]
    found = inner(), functools.reduce(lambda _, item: current_source(), items)
    assert [line and line.function for line in found] == ["inner", "<lambda>"]


def test_lines_of_the_standard_library_and_of_torch_are_passed_over():
    found = []

    class Mapping(dict):
        def __missing__(self, key):
            found.append(sorted([2, 1], key=lambda item: found.append(current_source()) or item))

    Mapping()[1]
    assert [line.function for line in found[:2]] == ["<lambda>", "<lambda>"]
    line = pytree.tree_map(lambda leaf: current_source(), [1])[0]
    assert line.function == "<lambda>" and line.file.endswith("test_provenance.py")


def test_operators_know_their_lines():
    def function(x):
        y = torch.sin(x)
        return y.sum(0)

    found = sources(record(function, {"x": X}))
    first = inspect.getsourcelines(function)[1]
    assert [line.line - first for line in found] == [1, 2]
    assert [line.code for line in found] == ["y = torch.sin(x)", "return y.sum(0)"]


def test_library_lines_below_site_packages():
    def function(x):
        options = {
            "weight_decay": 0.1,
            "momentum": 0.0,
            "lr": 0.1,
            "dampening": 0.0,
            "nesterov": False,
            "maximize": False,
        }
        with torch.no_grad():
            sgd([x], [x * 2], [None], foreach=False, **options)

    own, *library = sources(record(function, {"x": X}))
    assert own.file.endswith("test_provenance.py") and own.code == "sgd([x], [x * 2], [None], foreach=False, **options)"
    assert {line.file for line in library} == {os.path.join("torch", "optim", "sgd.py")}
    assert [line.function for line in library] == ["_single_tensor_sgd"] * 2
    assert library[0].code == "grad = grad.add(param, alpha=weight_decay)"


def test_modules_of_torch_count_as_somebodys_code():
    module = torch.nn.Sigmoid()
    (line,) = sources(record(lambda x: module(x), {"x": X}))
    assert line.file == os.path.join("torch", "nn", "modules", "activation.py")
    assert line.function == "forward"


def test_errors_name_the_users_line_and_not_the_librarys():
    module = torch.nn.Sigmoid()
    module.register_forward_hook(lambda *args: found.append((current_source(), user_source())))
    found = []
    module(X)
    assert found[0][0].function == found[0][1].function == "<lambda>"

    def function(x):
        return float(x.sum()) + 1

    with pytest.raises(CaptureError, match=r"test_provenance\.py:\d+ in function: return float\(x\.sum\(\)\) \+ 1"):
        record(function, {"x": X})


def test_code_without_a_file_is_passed_over():
    namespace: dict[str, Any] = {"current_source": current_source}
    exec("def made():\n    return current_source()", namespace)
    assert namespace["made"]().function == "test_code_without_a_file_is_passed_over"


def load(path, code):
    """Writes a module and returns its function `step`, without importing it."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    namespace = {}
    exec(compile(code, str(path), "exec"), namespace)
    return namespace["step"]


def test_a_file_outside_of_every_path_is_known_by_its_name(tmp_path):
    step = load(tmp_path / "strange_optimizer.py", "def step(ask):\n    return ask()\n")
    assert str(step(current_source)) == "strange_optimizer.py:2 in step: return ask()"


def test_a_file_below_a_path_is_known_from_there(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    step = load(tmp_path / "my_optimizers" / "adan.py", "\n\ndef step(ask):\n    return ask()\n")
    assert str(step(current_source)) == f"{os.path.join('my_optimizers', 'adan.py')}:4 in step: return ask()"


def test_equal_code_of_two_files_is_told_apart(tmp_path):
    code = "\n\n\ndef step(ask):\n    return ask()    # {}\n"
    first = load(tmp_path / "first.py", code.format("in the first"))
    second = load(tmp_path / "second.py", code.format("in the second"))
    assert str(first(current_source)) == "first.py:5 in step: return ask()    # in the first"
    assert str(second(current_source)) == "second.py:5 in step: return ask()    # in the second"


def test_equal_lines_are_equal():
    first, second = (current_source() for _ in range(2))
    assert first == second and hash(first) == hash(second)
