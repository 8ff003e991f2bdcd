"""A corpus that nobody here wrote: every optimizer of pytorch_optimizer that runs over a list of parameters."""

import inspect
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import pytorch_optimizer
import torch
from eager_reference import Case, eager_params, gradient_errors, worst_value_error
from trials import same_facts
from two_sided import Widened, complaint_of_state, complaints, live, write

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

# They take roots, norms or averages in float32, or products in bfloat16, whatever dtype the parameters have; FlashAdamW
# keeps its state in eight bits with scales of sixteen. Differences of steps rounded so say nothing about derivatives:
# their code runs with float64 in place of every narrow dtype, which leaves all its operators as they are.
NARROW = set(
    """
    AdaFactor AdaGC Alice ASGD Conda DASH FlashAdamW Kron LaProp QHAdam SCION SCIONLight SPlus SimplifiedAdEMAMix
    """.split()
)
# The live step jumps at these values, to both sides: it has no derivative.
JUMPS = {("Adan", "defaults.max_grad_norm")}
# The eigenvectors of a multiple eigenvalue are arbitrary, and so is a step that takes elements of them: gradients of full
# rank have none.
FULL_RANK = {"Alice": ((2, 3), (3, 3)), "SOAP": ((2, 3), (3, 3)), "SPlus": ((2, 3), (3, 3))}
SHORT_QUEUE = {"AdaShift": {"keep_num": 2}}  # it takes no step before its queue of gradients is full
# Its first step takes the sign of what rounding makes of `p - p`.
LATER = {"FOCUS": 2}
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
RUNNING = sorted(set(CLASSES) - OTHERWISE - set(SELECTING))


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def case_of(name):
    """Returns eight steps, so that periodic branches are crossed."""
    return Case(lambda params: CLASSES[name](params), steps=8)


def smooth_case_of(name, *, steps, warm=0):
    """Returns a case whose derivatives are to be taken."""
    case = Case(lambda params: CLASSES[name](params, **SHORT_QUEUE.get(name, {})), steps=steps)
    case = replace(case, warm=warm or LATER.get(name, 0))
    return replace(case, shapes=FULL_RANK[name]) if name in FULL_RANK else case


# The operators of classes that torch cannot differentiate before some version (2.11 has no formula for this one).
_KNOWN = torch.ones(1, requires_grad=True).aminmax()[0].grad_fn
LACKING = {"ROSE": "aminmax"} if _KNOWN is None or _KNOWN.name().endswith("NotImplemented") else {}


def refused(name):
    """Expects the operator to be named that torch lacks a derivative of, if there is one."""
    if name not in LACKING:
        return nullcontext()
    return pytest.raises(gimli.CaptureError, match=rf"`aten\.{LACKING[name]}\.default` has no derivative")


@contextmanager
def differentiating(name):
    """Gives the code of a class the precision that differences need."""
    with warnings.catch_warnings(), Widened() if name in NARROW else nullcontext():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", sorted(set(CLASSES) - OTHERWISE))
def test_values_equal_eager(name):
    case = case_of(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constants are reported by a warning; the libraries have some of their own
        assert worst_value_error(case) < COARSE.get(name, 1e-12)


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize("name", sorted(CLASSES))
def test_trials_without_memory_find_the_same(name, warm, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case_of(name).start()
            replace(case_of(name), warm=warm).start()
        except Exception:
            assert name in OTHERWISE
            return
        same_facts(monkeypatch, replace(case_of(name), warm=warm).start)


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


def test_a_selection_by_a_drawn_mask():
    """How many elements a drawn mask selects is a condition of the program: another number is captured anew."""
    case = Case(lambda params: CLASSES["SPAM"](params, density=0.5, update_proj_gap=4), steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert worst_value_error(case) < 1e-12


@pytest.mark.parametrize("name", RUNNING)
def test_derivatives_equal_differences(name):
    """In every float hyperparameter, the parameters and the gradients, from a fresh state; kinks from both sides."""
    with differentiating(name), refused(name):
        found = complaints(smooth_case_of(name, steps=4))
        assert {path: text for path, text in found.items() if (name, path) not in JUMPS} == {}


@pytest.mark.parametrize("name", RUNNING)
def test_derivatives_in_the_state_equal_differences(name):
    with differentiating(name):
        assert complaint_of_state(smooth_case_of(name, steps=3, warm=3)) is None


@pytest.mark.parametrize(("name", "path"), sorted(JUMPS))
def test_the_live_step_jumps(name, path):
    """Keeps the list above honest."""
    case = smooth_case_of(name, steps=4)
    beside = live(case, lambda _, optimizer: write(optimizer, path, 1e-9))
    assert abs(beside - live(case)) > 1e-5


@pytest.mark.parametrize("name", sorted(OTHERWISE))
def test_what_is_left_out_does_not_run_in_eager(name):
    """Keeps the list above honest."""
    with warnings.catch_warnings(), pytest.raises(Exception, match=r"\S"):
        warnings.simplefilter("ignore")
        eager_params(case_of(name))
