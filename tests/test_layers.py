"""Every layer and loss of `torch.nn`: values, second derivatives in both orders, and tasks, against the live loop."""

import pytest
from layer_cases import CASES
from layer_measurement import measure

# torch 2.13 warns of itself when forward mode is first used (torch/_decomp/decompositions_for_jvp.py).
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.refused])
def test_a_layer_is_differentiable_twice(name):
    measured = measure(CASES[name])
    assert not measured.refused, measured.refused
    assert not measured.beyond()
    assert len(measured.errors) == 4


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_a_layer_is_refused_at_capture(name):
    case = CASES[name]
    reason = measure(case).refused
    what, where, *rest = reason.split("\n")
    assert case.refused in what
    assert where.startswith("  layer_measurement.py:")
    assert len(rest) >= 2
