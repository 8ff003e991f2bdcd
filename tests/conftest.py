"""What all tests share: seeds, the choice of GPU tests, and the contract of a pass."""

import importlib.util
import random

import numpy as np
import pytest
import torch
from recorded import assert_same, call, derivatives, sample

from gimli_compile.checker import verify

# Models of other libraries are an extra of their own (`make models`): they are large, and the test set-up is not.
collect_ignore = [] if importlib.util.find_spec("transformers") else ["models"]


def pytest_collection_modifyitems(config, items):
    """Deselects the tests that need an accelerator on a machine without one."""
    if torch.accelerator.is_available():
        return
    without = [item for item in items if item.get_closest_marker("gpu") is not None]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(autouse=True)
def seeded():
    """Gives every test the same random numbers."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def check_pass():
    """Applies a pass to a program, checks its contract, and returns the new program.

    The argument stays as it is, text and meta; `verify` holds before and after; a second application changes nothing;
    the values are equal at zero tolerance, the first and second derivatives up to rounding (unless the pass promises
    other derivatives: `same_derivatives=False`). `at` gives values, by path, of some inputs.
    """

    def check(transform, program, *, at=None, same_derivatives=True):
        verify(program)
        code, meta = program.code, [dict(node.meta) for node in program.graph.nodes]
        made = transform(program)
        verify(made)
        assert program.copy().code == code
        assert [dict(node.meta) for node in program.graph.nodes] == meta
        values = {**sample(program), **(at or {})}
        with torch.no_grad():
            assert_same(call(made, values), call(program, values))
        if same_derivatives:
            expected = derivatives(lambda leaves: call(program, leaves), values)
            assert_same(derivatives(lambda leaves: call(made, leaves), values), expected, tolerance=1e-12)
        again = transform(made)
        verify(again)
        assert again.code == made.code
        return made

    return check
