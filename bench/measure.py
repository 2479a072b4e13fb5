"""Time and peak memory of a training step in several ways to make it, side by side."""

from __future__ import annotations

import contextlib
import ctypes
import ctypes.util
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Step = Callable[[], object]
WARMUP = 2


@dataclass
class Cost:
    """Median seconds per step, and MiB that building and stepping took at their peak (None: unknown).

    On a GPU memory is what torch has allocated there, elsewhere the process' resident memory.
    """

    seconds: float
    peak_mib: float | None


def costs(
    sides: Mapping[str, Callable[[], Step]],
    rounds: int,
    progress: Callable[[int, int], object] = lambda done, total: None,
    *,
    device: str | torch.device = "cpu",
    steps_per_call: int = 1,
    warmup: int = WARMUP,
) -> dict[str, Cost]:
    """Builds each side, warms it up while watching memory, then runs one step of each in turn, `rounds` times.

    Turns take out what else happens on the machine; the order flips every round.

    Args:
        sides: name -> function that builds the model, optimizer and so on and returns the step.
        rounds: timed steps of each side. warmup: steps before, not timed.
        progress: called with (steps done, steps in all).
        device: that the steps run on; a GPU is waited for.
        steps_per_call: that a call of a step stands for.
    """
    device = torch.device(device)
    done, total = 0, len(sides) * (rounds + warmup)
    steps: dict[str, Step] = {}
    peaks: dict[str, float | None] = {}

    def run(name: str) -> float:
        nonlocal done
        start = time.perf_counter()
        steps[name]()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        done += 1
        progress(done, total)
        return seconds

    for name, make in sides.items():
        before = _reset_peak(device)
        steps[name] = make()
        for _ in range(warmup):
            run(name)
        after = _peak(device)
        peaks[name] = None if before is None or after is None else max(after - before, 0.0)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            times[name].append(run(name) / steps_per_call)
    return {name: Cost(statistics.median(times[name]), peaks[name]) for name in sides}


def _reset_peak(device: torch.device) -> float | None:
    """Begins to watch the peak anew; what is held now, in MiB."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / 2**20
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not glibc: freed memory may hide a part of what follows
        ctypes.CDLL(ctypes.util.find_library("c")).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None  # no Linux, or not allowed here
    return _status("VmRSS")


def _peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else _status("VmHWM")


def _status(field: str) -> float | None:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
    return None
