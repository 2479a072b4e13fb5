"""How a contender is timed: the host's clock for the CPU, events on the stream for a GPU."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastpost.bench.registry import Case, Contender, Result

SLOW_ROUNDS = 3
_FLUSH_BYTES = 512 << 20


class HostClock:
    """Seconds on the host around the call."""

    warm_up = 1

    def once(self, contender: Contender) -> tuple[float, float]:
        """Seconds of one run, and host seconds until the call came back."""
        if contender.before is not None:
            contender.before()
        if contender.reports:
            seconds = float(contender.run())  # type: ignore[arg-type]
            return seconds, seconds
        start = time.perf_counter()
        for _ in range(contender.calls):
            contender.run()
        seconds = (time.perf_counter() - start) / contender.calls
        return seconds, seconds

    def extras(self, contender: Contender, result: Result) -> None:
        """What is measured once per contender, beside time: the pages that it makes resident at most, on Linux."""
        if not contender.peak:
            return
        gc.collect()
        if contender.before is not None:
            contender.before()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        except OSError:
            return
        before = _resident("VmRSS")
        contender.run()
        result.peak = _resident("VmHWM") - before


def _resident(field: str) -> int:
    """A line of the process's memory status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


class DeviceClock(HostClock):
    """Seconds on a CUDA device: between two events, with nothing of the inputs left in its cache.

    Emptying the cache keeps the device busy while the host queues the first launches, so that their latency is not part of
    the result. With `wall`, the host's clock from an idle device to an idle device instead: for work that the host bounds.
    """

    warm_up = 3

    def __init__(self, device: torch.device, wall: bool) -> None:
        self._device, self._wall = device, wall
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(_FLUSH_BYTES, 4 * cache), dtype=torch.int8, device=device)

    def once(self, contender: Contender) -> tuple[float, float]:
        if contender.before is not None:
            contender.before()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self._device)
        if not self._wall:
            self._flush.zero_()
        start.record()
        begun = time.perf_counter()
        contender.run()
        host = time.perf_counter() - begun
        end.record()
        torch.cuda.synchronize(self._device)
        wall = time.perf_counter() - begun
        return wall if self._wall else 1e-3 * start.elapsed_time(end), host

    def extras(self, contender: Contender, result: Result) -> None:
        if contender.peak:
            self._ready(contender)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            contender.run()
            torch.cuda.synchronize(self._device)
            result.peak = torch.cuda.max_memory_allocated(self._device) - before
        if contender.launches:
            self._ready(contender)
            try:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    contender.run()
                    torch.cuda.synchronize(self._device)
            except RuntimeError:  # no profiler here: the count stays unknown, and a goal on it is missed
                return
            on_device = [e for e in profile.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
            result.launches = len(on_device) or None  # a profiler that saw nothing has not counted nothing

    def _ready(self, contender: Contender) -> None:
        gc.collect()
        if contender.before is not None:
            contender.before()
        torch.cuda.synchronize(self._device)


def measure(
    case: Case,
    contenders: list[Contender],
    rounds: int,
    clock: HostClock,
    tick: Callable[[], object] | None = None,
    seconds: float = float("inf"),
) -> dict[str, Result]:
    """Runs every contender once in each round, after warm-up rounds that do not count.

    Args:
        case: for errors' sake.
        contenders: who runs, in this order.
        rounds: rounds that count; slow contenders sit out after the third.
        clock: HostClock or DeviceClock.
        tick: called after every round.
        seconds: begin no further round after this time, though never fewer than three.
    """
    results = {c.name: Result(c.bytes) for c in contenders}
    if len(results) < len(contenders):
        raise ValueError(f"{case.name}: two contenders bear the same name")
    begun = time.perf_counter()
    for round_ in range(-clock.warm_up, rounds):
        if round_ >= SLOW_ROUNDS and time.perf_counter() - begun > seconds:
            break
        for contender in contenders:
            if contender.slow and not -1 <= round_ < SLOW_ROUNDS:
                continue
            taken, host = clock.once(contender)
            if round_ >= 0:
                results[contender.name].seconds.append(taken)
                results[contender.name].host.append(host)
        if tick is not None:
            tick()
    for contender in contenders:
        clock.extras(contender, results[contender.name])
    return results
