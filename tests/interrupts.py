"""Interrupts at a chosen line: what Ctrl-C, a SIGTERM with a handler and other asynchronous exceptions come down to."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from zlib import crc32

import fastpost

PACKAGE = str(Path(fastpost.__file__).parent)


def _traced(work: Callable[[], object], at_line: Callable[[FrameType], None]) -> None:
    """Runs `work` and calls `at_line` before each line of it that lies inside of fastpost."""

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            at_line(frame)
        return trace

    before = sys.gettrace()
    gc.disable()  # an exception in the finalizer of something else would be lost
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()


def lines(work: Callable[[], object]) -> dict[int, int]:
    """Runs `work` and returns which of the lines that it executes to interrupt, counted from 0, in their order.

    Every line, where it is executed for the first and for the last time; in between are loops over parameters. Each comes
    with a number that a line has wherever it is executed, and wherever the package is installed.
    """
    first: dict[tuple[CodeType, int], int] = {}
    last: dict[tuple[CodeType, int], int] = {}
    count = 0

    def at_line(frame: FrameType) -> None:
        nonlocal count
        line = frame.f_code, frame.f_lineno
        first.setdefault(line, count)
        last[line] = count
        count += 1

    _traced(work, at_line)
    places = {at: line for found in (first, last) for line, at in found.items()}
    return {at: crc32(f"{places[at][0].co_filename[len(PACKAGE) :]}:{places[at][1]}".encode()) for at in sorted(places)}


def interrupted(work: Callable[[], object], at: int) -> bool:
    """Runs `work` and raises KeyboardInterrupt before the at-th line (from 0) that it executes inside of fastpost.

    Returns:
        Whether there was such a line; if not, the work is done.
    """
    left = at

    def at_line(frame: FrameType) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise KeyboardInterrupt("planted")

    try:
        _traced(work, at_line)
    except KeyboardInterrupt as error:
        if str(error) != "planted":
            raise
        return True
    return False
