"""Measures what works: every optimizer of a package, its program against the live eager code."""

from gimli_compile.coverage.measurement import Measurement, measure
from gimli_compile.coverage.recipe import Recipe
from gimli_compile.coverage.verdict import Derivative, Verdict

__all__ = ["Derivative", "Measurement", "Recipe", "Verdict", "measure"]
