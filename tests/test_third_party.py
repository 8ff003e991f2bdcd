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
    case = Case(lambda params: CLASSES[name](params), steps=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            eager_params(case)
        except Exception as error:
            pytest.skip(f"eager itself does not run from a list of parameters and a plain step: {error}")
    return case


@pytest.mark.parametrize("name", sorted(set(CLASSES) - set(REFUSED)))
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
