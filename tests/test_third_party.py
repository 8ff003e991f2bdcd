"""A corpus that nobody here wrote: every optimizer of pytorch_optimizer that runs over a list of parameters."""

import inspect
import warnings
from dataclasses import replace
from typing import Any

import pytest
import pytorch_optimizer
import torch
from eager_reference import Case, eager_params, gradient_errors, worst_value_error

import gimli_compile as gimli

CLASSES: dict[str, Any] = {
    kind.__name__: kind
    for kind in vars(pytorch_optimizer).values()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer)
}
# Eager itself does not run these from a list of parameters of one, two and three dimensions and a plain `step()`.
OTHERWISE = set(
    """
    AdaGO AdaHessian AdaLOMO AdaMuon AdamMini AliG BSAM DeMo DistributedMuon FAdam FriendlySAM GSAM
    LBFGS LOMO LoRARite LookSAM Lookahead Magma Muon MuonClip NorMuon OrthoGrad PCGrad Ranger21 SAM
    SafeFP16Optimizer ScheduleFreeWrapper SophiaH SpectralSphere TRAC WSAM
    """.split()
)
# They orthogonalize in bfloat16, on whose grid the last bit of a float64 can make one step of difference.
COARSE = {"SCION": 2.0**-8, "SCIONLight": 2.0**-8}


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def case_of(name):
    """Returns eight steps, so that periodic branches are crossed."""
    return Case(lambda params: CLASSES[name](params), steps=8)


@pytest.mark.parametrize("name", sorted(set(CLASSES) - OTHERWISE))
def test_values_equal_eager(name):
    case = case_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constants are reported by a warning; the libraries have some of their own
        assert worst_value_error(case) < COARSE.get(name, 1e-12)


# Optimizers that work on what masks select: of small weights, of spikes, at random.
SELECTING = {
    "SPAM": [{}, {"density": 0.5, "threshold": 1, "grad_accu_steps": 2, "weight_decay": 0.1}],
    "StableSPAM": [{}],
    "SaRA": [
        {"threshold": 0.7, "ams_bound": True},
        {"threshold": 1.5, "lr": 0.3, "progressive_iter": 3, "foreach": False},
        {"threshold": 1.5, "lr": 0.3, "progressive_iter": 3, "foreach": True},
    ],
}
SELECTIONS = [
    pytest.param(name, options, id=f"{name}-{index}")
    for name in SELECTING
    for index, options in enumerate(SELECTING[name])
]


@pytest.mark.parametrize(("name", "options"), SELECTIONS)
def test_optimizers_that_select_by_masks(name, options):
    case = Case(lambda params: CLASSES[name](params, **options), steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert worst_value_error(case) < 1e-12
        errors = gradient_errors(replace(case, steps=4), state_too=name != "SPAM")  # SPAM cannot load its own state
    assert max(errors.values()) < 1e-6, errors


def test_a_selection_by_a_drawn_mask_is_refused():
    case = Case(lambda params: CLASSES["SPAM"](params, density=0.5, update_proj_gap=4), steps=8)
    with pytest.raises(gimli.CaptureError, match=r"`SPAM.step` depends on a random draw[\s\S]*torch\.where"):
        worst_value_error(case)


@pytest.mark.parametrize("name", sorted(OTHERWISE))
def test_what_is_left_out_does_not_run_in_eager(name):
    """Keeps the list above honest."""
    with warnings.catch_warnings(), pytest.raises(Exception, match=r"\S"):
        warnings.simplefilter("ignore")
        eager_params(case_of(name))
