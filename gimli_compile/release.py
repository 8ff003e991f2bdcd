"""Lets a program's values go as soon as they were used for the last time."""

from __future__ import annotations

import re
from types import CodeType

_NAMES = re.compile(r"(?<![\w.])[^\W\d]\w*(?![\w=])")  # of values: neither attributes nor keywords
_ASSIGNMENT = re.compile(r"    (\w+) = ")


def compile_releasing(source: str, filename: str) -> CodeType:
    """Compiles the source of one straight-line function; each name that it assigns is forgotten after its last use.

    A function keeps its local variables until it returns: every value of a program would live to its end. The function
    has one assignment a line, and ends with its only `return`. Lines keep their numbers, which errors show.

        a = sin(x)                       a = sin(x)
        b = cos(a)        becomes        b = cos(a)
        c = tan(b)                       del a; c = tan(b)
        return (c,)                      del b; return (c,)
    """
    lines = source.split("\n")
    end = next(index for index, line in enumerate(lines) if line.startswith("    return"))
    assignments = {index: found[1] for index in range(end) if (found := _ASSIGNMENT.match(lines[index]))}
    assigned = set(assignments.values())
    later = set(_NAMES.findall("\n".join(lines[end:])))
    following = end
    for index in reversed(assignments):
        ending = [
            name for name in dict.fromkeys(_NAMES.findall(lines[index])) if name in assigned and name not in later
        ]
        if ending:
            lines[following] = f"    del {', '.join(ending)}; {lines[following].lstrip()}"
        later.update(ending)
        following = index
    return compile("\n".join(lines), filename, "exec")
