"""The command `gimli-compile coverage`."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from gimli_compile.coverage.measurement import Status
from gimli_compile.coverage.progress import followed
from gimli_compile.coverage.survey import items_of, survey
from gimli_compile.coverage.tables import FORMATS, summary
from gimli_compile.errors import InputError

_DESCRIPTION = """\
Tries every optimizer class of a package: values of the captured program over several steps, and its derivatives in
every number that the optimizer has, against the live eager code and finite differences of it, in float64. Exits with 1
if a class is silently wrong (values or derivatives differ and nothing says so), with 2 if the arguments do not fit."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command and its options."""
    parser = commands.add_parser("coverage", help="measures the optimizers of a package", description=_DESCRIPTION)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", default=["torch.optim"], help="default: torch.optim")
    parser.add_argument("--format", choices=tuple(FORMATS), default="text")
    parser.add_argument("--output", type=Path, metavar="FILE", help="writes the table there, not to standard output")
    parser.add_argument("--recipes", type=Path, metavar="FILE", help="a Python file with RECIPES, for special classes")
    parser.add_argument("--select", nargs="+", metavar="NAME", default=[], help="measures only classes of these names")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes; default: 1")
    parser.add_argument("--time-limit", type=float, default=300, metavar="SECONDS", help="a class; default: 300")
    parser.set_defaults(run=run)


def _command(options: argparse.Namespace) -> str:
    """Returns the command that makes the same table."""
    words = ["gimli-compile", "coverage", *options.packages]
    words += ["--recipes", str(options.recipes)] if options.recipes is not None else []
    words += ["--select", *options.select] if options.select else []
    return shlex.join([*words, "--format", options.format])


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    try:
        items = items_of(options.packages, options.select)
        if not items:
            raise InputError(f"no class is named {', '.join(options.select)}")
        found = list(followed(survey(items, options.recipes, options.jobs, options.time_limit), len(items)))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    order = {name: place for place, (_, name) in enumerate(items)}
    found.sort(key=lambda measurement: order[measurement.name])
    text = FORMATS[options.format](found, _command(options))
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text)
        print(summary(found), file=sys.stderr)
    return int(any(measurement.status is Status.WRONG for measurement in found))
