"""Step time and peak memory of two ways to do the same, side by side."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Step = Callable[[], object]


@dataclass
class Cost:
    """Median seconds per step, and MiB of resident memory that building and stepping took at their peak (None: unknown)."""

    seconds: float
    peak_mib: float | None


def interleaved(sides: dict[str, Callable[[], Step]], rounds: int, warmup: int = 2) -> Iterator[tuple[str, Cost | None]]:
    """Builds each side, warms it up while watching memory, then runs one step of each in turn, `rounds` times.

    Turns take out what else happens on the machine; the order flips every round.

    Args:
        sides: name -> function that builds the model, optimizer and so on and returns the step.
        rounds: timed steps of each side.
        warmup: steps before, not timed.

    Yields:
        (name, None) after each step, for progress, and in the end (name, Cost) for each side.
    """
    steps: dict[str, Step] = {}
    peaks: dict[str, float | None] = {}
    for name, make in sides.items():
        before = _reset_peak()
        steps[name] = make()
        for _ in range(warmup):
            steps[name]()
            yield name, None
        after = _status("VmHWM")
        peaks[name] = None if before is None or after is None else max(after - before, 0.0)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
            yield name, None
    for name in sides:
        yield name, Cost(statistics.median(times[name]), peaks[name])


def _reset_peak() -> float | None:
    """Hands freed memory back to the system, sets the kernel's high-water mark to now and returns it in MiB."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc: freed memory may hide a part of what follows
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None  # no Linux, or not allowed here
    return _status("VmRSS")


def _status(field: str) -> float | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return None
