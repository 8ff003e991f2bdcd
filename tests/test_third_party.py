"""A corpus that nobody here wrote: every optimizer of pytorch_optimizer that runs over a list of parameters."""

import inspect
import warnings
from typing import Any

import pytest
import pytorch_optimizer
import torch
from eager_reference import Case, eager_params, functional_params, worst_value_error

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
# They gather the elements of a mask that follows from values: the shapes of a program cannot depend on those.
REFUSED = ("SPAM", "SaRA", "StableSPAM")

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


@pytest.mark.parametrize("name", sorted(set(CLASSES) - set(REFUSED) - OTHERWISE))
def test_values_equal_eager(name):
    case = case_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constants are reported by a warning; the libraries have some of their own
        assert worst_value_error(case) < COARSE.get(name, 1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_shapes_that_depend_on_values_are_refused(name):
    case = case_of(name)
    with pytest.raises(gimli.CaptureError, match=r"shape depends on tensor values\n  pytorch_optimizer/optimizer/"):
        functional_params(case)


@pytest.mark.parametrize("name", sorted(OTHERWISE))
def test_what_is_left_out_does_not_run_in_eager(name):
    """Keeps the list above honest."""
    with warnings.catch_warnings(), pytest.raises(Exception, match=r"\S"):
        warnings.simplefilter("ignore")
        eager_params(case_of(name))
