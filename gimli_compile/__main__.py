"""The commands: `gimli-compile`, or `python -m gimli_compile`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from gimli_compile.coverage.command import add_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the arguments name, those of the process by default; returns the exit status."""
    parser = argparse.ArgumentParser(prog="gimli-compile", description="A compiler for meta-learning.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_command(commands)
    options = parser.parse_args(arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
