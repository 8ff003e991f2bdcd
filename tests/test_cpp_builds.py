"""Machine code that is made while Python goes on, and what is taken for granted of the compiler that makes it."""

import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch._inductor.codecache import CppWrapperCodeCache
from torch._inductor.cpu_vec_isa import VecISA

from gimli_compile.compiled import lean
from gimli_compile.compiled.backends import compile_with_inductor, entry_of
from gimli_compile.compiled.cpp_builds import Pending
from gimli_compile.compiled.halves import trace

ASKED = "-mavx2", "-mavx512f"
PROGRAM = """
import torch
from gimli_compile.compiled.backends import compile_with_inductor
from gimli_compile.compiled.halves import trace

x = torch.linspace(-1, 1, 1000)
program = compile_with_inductor(trace(lambda x: [x.sin() * 2 + x.exp()], [x]))
torch.testing.assert_close(program([x.clone()])[0], x.sin() * 2 + x.exp())
again = compile_with_inductor(trace(lambda x: [x.cos() * 2 + x.exp()], [x]))
torch.testing.assert_close(again([x.clone()])[0], x.cos() * 2 + x.exp())
"""


def test_the_first_call_waits():
    done = threading.Event()

    def wait():
        assert done.wait(60)
        return lambda *handles: sum(handles)

    pending = Pending(wait, again=wait)
    found = []
    caller = threading.Thread(target=lambda: found.append(pending(1, 2)))
    caller.start()
    time.sleep(0.05)
    assert found == []
    done.set()
    caller.join(60)
    assert found == [3] and pending(4, 5) == 9


def test_a_build_that_fails_is_made_again():
    calls = []

    def fail():
        calls.append("first")
        raise RuntimeError("unknown option")

    def again():
        calls.append("again")
        return lambda handle: handle + 1

    pending = Pending(fail, again)
    assert pending(1) == 2 and pending(2) == 3
    assert calls == ["first", "again"]


def test_a_build_that_fails_with_no_other_is_told():
    def fail():
        raise RuntimeError("out of disk")

    with pytest.raises(RuntimeError, match="out of disk"):
        Pending(fail, lambda: None)(1)


def built(number):
    """Compiles and runs what no cache has."""
    program = compile_with_inductor(trace(lambda x: [x * number + 1], [torch.ones(3)]))
    return program([torch.ones(3)])[0].tolist()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_builds_with_threads_of_its_own():
    number = time.time_ns() % 2**20
    assert built(number) == [number + 1.0] * 3
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=lambda: queue.put(built(number + 1)))
    child.start()
    try:
        assert queue.get(timeout=120) == [number + 2.0] * 3
    finally:
        child.kill()
        child.join()


def test_what_calls_many_kernels_is_not_optimized(monkeypatch):
    """It took the C++ compiler three quarters of its time for a network of 39 convolutions."""
    texts = []
    build = CppWrapperCodeCache.load_pybinding_async

    def load(*args, **options):
        texts.append(options["main_code"])
        return build(*args, **options)

    def chain(x, *weights):
        for weight in weights:
            x = torch.relu(torch.conv2d(x, weight, padding=1))
        return [x]

    x, weight = torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3) / 4
    monkeypatch.setattr(CppWrapperCodeCache, "load_pybinding_async", load)
    for count, is_long in ((2, False), (180, True)):
        inputs = [x, *[weight] * count]
        program = compile_with_inductor(trace(chain, inputs))
        torch.testing.assert_close(program([value.clone() for value in inputs])[0], chain(*inputs)[0])
        begin, end = (texts[-1].index(part) for part in ("inductor_entry_impl(", "} // inductor_entry_impl"))
        assert (end - begin > 100_000) == is_long
        assert ('optimize("O0")' in texts[-1]) == is_long
        assert "optimize" not in texts[-1][begin:]


def test_a_long_lean_program_is_not_optimized_where_it_calls_kernels(monkeypatch):
    """It took the C++ compiler nine tenths of its time for a transformer of 8 blocks."""
    texts = []
    build = lean._LeanCode.build

    def record(text, submit=None):
        texts.append(text)
        return build(text, submit)

    def chain(x, *weights):
        for weight in weights:
            x = torch.tanh(x @ weight)
        return [x]

    x, weight = torch.randn(3, 4), torch.randn(4, 4)
    monkeypatch.setattr(lean._LeanCode, "build", record)
    for count, is_long in ((2, False), (200, True)):
        inputs = [x, *[weight] * count]
        program = compile_with_inductor(trace(chain, inputs))
        torch.testing.assert_close(program([value.clone() for value in inputs])[0], chain(*inputs)[0])
        assert entry_of(program)
        (text,) = (text for text in texts if "gimli_program(" in text and "PYBIND11_MODULE" not in text)
        begin, end = text.index("gimli_program("), text.index("} // inductor_entry_impl")
        assert (end - begin > 100_000) == is_long
        assert ('optimize("O0")' in text[:begin].rpartition("}")[2]) == is_long
        assert text.count("optimize(") == is_long
        texts.clear()


def test_inductor_is_left_as_it_was():
    loaded, checked = CppWrapperCodeCache.load_pybinding, VecISA.check_build
    x = torch.ones(3)
    program = compile_with_inductor(trace(lambda x: [x * 3 + 1], [x]))
    assert CppWrapperCodeCache.load_pybinding == loaded and VecISA.check_build is checked
    assert "load_pybinding" not in vars(CppWrapperCodeCache)
    assert torch.equal(program([x])[0], torch.full((3,), 4.0))


def compiler(folder, refused):
    """Writes a compiler that does not know some options, and notes those that it was asked for."""
    path = folder / "g++"
    tests = "\n".join(f'  *" {option} "*) echo "{option}" >> {folder}/refused; exit 1;;' for option in refused)
    path.write_text(f'#!/bin/sh\ncase " $* " in\n{tests}\nesac\nexec {shutil.which("g++")} "$@"\n')
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def run_with(path, folder):
    """Runs the program with a compiler and an empty cache."""
    environment = {**os.environ, "CXX": str(path), "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, "-c", PROGRAM]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_compiler_that_does_not_know_the_instructions_of_the_cpu(tmp_path):
    """It is asked what it knows after all."""
    done = run_with(compiler(tmp_path, ASKED), tmp_path)
    assert done.returncode == 0, done.stderr
    if torch.cpu._is_avx2_supported():
        assert set((tmp_path / "refused").read_text().split()) <= set(ASKED)


def test_what_no_compiler_takes_is_told(tmp_path):
    done = run_with(compiler(tmp_path, ["-shared"]), tmp_path)
    assert done.returncode == 1
    assert "CppCompileError" in done.stderr and "-shared" in (tmp_path / "refused").read_text()
