"""Lets a program's values go as soon as they were used for the last time."""

from __future__ import annotations

import ast
from types import CodeType


def compile_releasing(source: str, filename: str) -> CodeType:
    """Compiles the source of one straight-line function; each name that it assigns is forgotten after its last use.

    A function keeps its local variables until it returns: every value of a program would live to its end.
    """
    module = ast.parse(source, filename)
    function = module.body[0]
    assert isinstance(function, ast.FunctionDef)
    last: dict[str, ast.stmt] = {}
    for statement in function.body:
        last.update((node.id, statement) for node in ast.walk(statement) if isinstance(node, ast.Name))
    assigned = [target.id for statement in function.body for target in _targets(statement)]
    ending: dict[ast.stmt, list[str]] = {}
    for name in dict.fromkeys(assigned):
        ending.setdefault(last[name], []).append(name)
    function.body = [part for statement in function.body for part in _with_release(statement, ending)]
    ast.fix_missing_locations(module)
    return compile(module, filename, "exec")


def _targets(statement: ast.stmt) -> list[ast.Name]:
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    return [target for target in targets if isinstance(target, ast.Name)]


def _with_release(statement: ast.stmt, ending: dict[ast.stmt, list[str]]) -> list[ast.stmt]:
    names = ending.get(statement, [])
    if not names or isinstance(statement, ast.Return):
        return [statement]
    release = ast.Delete([ast.Name(name, ast.Del()) for name in names])
    return [statement, ast.copy_location(release, statement)]
