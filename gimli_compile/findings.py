"""What a recording finds out beside its operators: conditions, and numbers that became constants."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from gimli_compile.provenance import SourceLine


@dataclass(frozen=True)
class Guard:
    """A condition that held during capture: `node` is a 0-dim bool, `outcome` what it was."""

    node: fx.Node
    outcome: bool
    source: SourceLine | None


@dataclass(frozen=True)
class Baked:
    """What was said of a number that entered the program as a constant, and the line that made it one."""

    what: str
    source: SourceLine | None

    def __str__(self) -> str:
        return self.what if self.source is None else f"{self.what}\n  {self.source}"
