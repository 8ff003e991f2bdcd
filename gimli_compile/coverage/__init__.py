"""Measures what works: every optimizer of a package, its program against the live eager code."""

from gimli_compile.coverage.live import default_loss
from gimli_compile.coverage.measurement import Measurement, Status, measure
from gimli_compile.coverage.recipe import Recipe
from gimli_compile.coverage.verdict import Derivative, Verdict

__all__ = ["Derivative", "Measurement", "Recipe", "Status", "Verdict", "default_loss", "measure"]
