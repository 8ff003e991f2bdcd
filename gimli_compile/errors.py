"""The errors and warnings that users meet, and the one shape of their messages."""

from __future__ import annotations


class GimliError(Exception):
    """An error of gimli_compile: what went wrong, where, why, and what to do."""


class CaptureError(GimliError):
    """The user's code cannot be captured as a graph; the message names their line."""


class InputError(GimliError, ValueError):
    """An argument of a public function does not fit; the message names its path."""


class ProgramError(GimliError):
    """A graph breaks an invariant of `verify`: a fault of a pass, not of the user."""


class CompileError(GimliError):
    """A program cannot be compiled, or what was compiled from it computes something else."""


class BakedValueWarning(UserWarning):
    """A number, or a value that a step found by search, is a constant: its derivative is not in the program."""


class RecaptureWarning(UserWarning):
    """Code is captured again and again, since values that it reads besides its arguments change."""


def compose_message(what: str, where: object = None, why: str = "", cure: str = "") -> str:
    """Returns the text of an error: what, then the user's line, then why it cannot work, then the cure."""
    lines = [what]
    if where is not None:
        lines.append(f"  {where}")
    if why:
        lines.append(why)
    if cure:
        lines.append(cure)
    return "\n".join(lines)
