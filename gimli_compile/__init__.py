"""A compiler for meta-learning: turns live models and optimizers into pure, differentiable programs."""

from gimli_compile.entry import functionalize
from gimli_compile.errors import (
    BakedValueWarning,
    CaptureError,
    CompileError,
    GimliError,
    InputError,
    ProgramError,
    RecaptureWarning,
)
from gimli_compile.functional import Functional
from gimli_compile.implicit_mode import Implicit
from gimli_compile.program import Program
from gimli_compile.state import Hyperparameters, OptState, TrainState

__version__ = "0.1.0"

__all__ = [
    "BakedValueWarning",
    "CaptureError",
    "CompileError",
    "Functional",
    "GimliError",
    "Hyperparameters",
    "Implicit",
    "InputError",
    "OptState",
    "Program",
    "ProgramError",
    "RecaptureWarning",
    "TrainState",
    "functionalize",
]
