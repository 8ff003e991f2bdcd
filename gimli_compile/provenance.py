"""Source lines: which line of the user's or a third party's code an operator came from."""

from __future__ import annotations

import functools
import linecache
import os
import sys
import sysconfig
from dataclasses import dataclass
from types import CodeType, FrameType

import torch

_OWN = (
    *(os.path.realpath(os.path.join(os.path.dirname(__file__), folder)) + os.sep for folder in (".", "passes")),
    os.path.dirname(os.path.abspath(__file__)) + os.sep,
)
_TORCH = os.path.dirname(torch.__file__) + os.sep
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_SITE = tuple({sysconfig.get_path("purelib") + os.sep, sysconfig.get_path("platlib") + os.sep})
_THIRD_PARTY_IN_TORCH = (_TORCH + os.path.join("optim", ""), _TORCH + os.path.join("nn", "modules", ""))
_PLUMBING = (_TORCH + os.path.join("optim", "optimizer.py"), _TORCH + os.path.join("nn", "modules", "module.py"))


@dataclass(frozen=True)
class SourceLine:
    """One line of source: `file:line in function: code`, the file relative to where it was imported from."""

    file: str
    line: int
    function: str
    code: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}: {self.code}"


def current_source(*, outside_torch: bool = False) -> SourceLine | None:
    """Returns the innermost line on the stack that belongs to neither gimli_compile nor torch's plumbing.

    Lines of `torch.optim` and of the modules of `torch.nn` count as somebody's code, unless `outside_torch`.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        kind = _classify(frame.f_code.co_filename)
        if kind == "user" or (kind == "library" and not outside_torch):
            return _line_of(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)
        frame = frame.f_back
    return None


def user_source() -> SourceLine | None:
    """Returns the line to name in an error: the user's own if there is one, else the library's that it called."""
    return current_source(outside_torch=True) or current_source()


def raised_at(error: BaseException) -> SourceLine | None:
    """Returns the innermost of the lines that an error came through which is somebody's code, as `current_source`."""
    trace, found = error.__traceback__, None
    while trace is not None:
        code = trace.tb_frame.f_code
        if _classify(code.co_filename) != "plumbing":
            found = _line_of(code.co_filename, trace.tb_lineno, code.co_name)
        trace = trace.tb_next
    return found


def source_of(code: CodeType, line: int) -> SourceLine:
    """Returns a line of some code."""
    return _line_of(code.co_filename, line, code.co_name)


def called_by_torch() -> bool:
    """Tells whether the code that is running belongs to torch itself, such as a check of its arguments."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith((*_OWN, "<")):
            return filename.startswith(_TORCH) and not filename.startswith(_THIRD_PARTY_IN_TORCH)
        frame = frame.f_back
    return False


@functools.cache
def _classify(filename: str) -> str:
    if filename.startswith(_OWN) or filename.startswith("<") or filename in _PLUMBING:
        return "plumbing"
    if filename.startswith(_THIRD_PARTY_IN_TORCH):
        return "library"
    if filename.startswith(_SITE) and not filename.startswith(_TORCH):
        return "user"
    return "plumbing" if filename.startswith((_TORCH, _STDLIB)) else "user"


@functools.lru_cache(maxsize=65536)
def _line_of(filename: str, line: int, function: str) -> SourceLine:
    text = linecache.getline(filename, line).strip()
    return SourceLine(_shorten(filename), line, function, text)


@functools.cache
def _shorten(filename: str) -> str:
    roots = sorted((os.path.join(root, "") for root in (*_SITE, *sys.path) if root), key=len, reverse=True)
    for root in roots:
        if filename.startswith(root):
            return filename[len(root) :]
    return os.path.basename(filename)
