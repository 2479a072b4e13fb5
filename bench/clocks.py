"""How a contender is timed: the host's clock for the CPU; for a GPU the device's time and the host's, each by itself."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastpost.bench.registry import CLOCK, HOST_BOUND, KERNEL, PROCESSOR, REPLAY, WALL, Case, Contender, Result, Work

SLOW_ROUNDS = 3
_FLUSH_BYTES = 512 << 20
_HOST_CALLS, _HOST_SECONDS = 20, 0.2  # of the loop that times the host
_LEAST_LEAD, _MOST_LEAD = 5e-5, 0.25  # seconds that the device is kept waiting while the host queues the work


class HostClock:
    """Seconds on the host around the call.

    Args:
        processor: count the processor's time in this process instead, in all of its threads.
    """

    warm_up = 1
    _processor = False

    def __init__(self, processor: bool = False) -> None:
        self._processor = processor

    def _now(self) -> float:
        return time.process_time() if self._processor else time.perf_counter()

    def once(self, contender: Contender) -> float:
        """Seconds of one run."""
        if contender.before is not None:
            contender.before()
        if contender.reports:
            return float(contender.run())  # type: ignore[arg-type]
        start = self._now()
        for _ in range(contender.calls):
            contender.run()
        return (self._now() - start) / contender.calls

    def warm(self, contender: Contender) -> None:
        self.once(contender)

    def host(self, contender: Contender) -> list[float]:
        """Host seconds until the call comes back, where they are not what `once` measures."""
        return []

    def timing(self, contender: Contender) -> str:
        """What `once` has measured."""
        return PROCESSOR if self._processor else CLOCK

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

    Launches are asynchronous, so two events measure the device only if all work between them was queued before the first one
    fired; otherwise they measure the host. The device is therefore kept busy with nothing for twice the time that the host
    needs, and the first event is asked, when the call has returned, whether it has fired. If it has, the device waits
    longer; if that does not help, a captured graph is replayed where the contender allows it; else it is host-bound.

    With `wall`, the host's clock from an idle device to an idle device instead: for work that is the host's.
    """

    warm_up = 3

    def __init__(self, device: torch.device, wall: bool) -> None:
        self._device, self._wall = device, wall
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(max(_FLUSH_BYTES, 4 * cache), dtype=torch.int8, device=device)
        self._cycles = self._cycles_per_second()
        self._lead: dict[str, float] = {}  # seconds, by contender
        self._how: dict[str, str] = {}
        self._graph: dict[str, Work] = {}

    def once(self, contender: Contender) -> float:
        if self._wall:
            self._ready(contender)
            begun = time.perf_counter()
            contender.run()
            torch.cuda.synchronize(self._device)
            return time.perf_counter() - begun
        name = contender.name
        self._how.setdefault(name, KERNEL)
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._ready(contender)
            self._flush.zero_()
            if self._how[name] != HOST_BOUND:
                torch.cuda._sleep(int(self._lead.get(name, _LEAST_LEAD) * self._cycles))
            start.record()
            self._graph.get(name, contender.run)()
            late = start.query()
            end.record()
            torch.cuda.synchronize(self._device)
            if not late or self._how[name] == HOST_BOUND:
                return 1e-3 * start.elapsed_time(end)
            self._give_the_host_more_time(contender)

    def _give_the_host_more_time(self, contender: Contender) -> None:
        """After a run that the device had begun before the host had queued all of it."""
        name = contender.name
        lead = 2 * self._lead.get(name, _LEAST_LEAD)
        if lead <= _MOST_LEAD:
            self._lead[name] = lead
        elif contender.graph and name not in self._graph:
            self._graph[name] = self._captured(contender.run)
            self._how[name], self._lead[name] = REPLAY, _LEAST_LEAD
        else:
            self._how[name] = HOST_BOUND

    def warm(self, contender: Contender) -> None:
        self._ready(contender)
        contender.run()
        torch.cuda.synchronize(self._device)

    def host(self, contender: Contender) -> list[float]:
        """From calls that find the device idle; what the device then does is not waited for."""
        seconds: list[float] = []
        begun = time.perf_counter()
        while len(seconds) < 3 or (len(seconds) < _HOST_CALLS and time.perf_counter() - begun < _HOST_SECONDS):
            self._ready(contender)
            start = time.perf_counter()
            contender.run()
            seconds.append(time.perf_counter() - start)
        torch.cuda.synchronize(self._device)
        self._lead[contender.name] = min(max(2 * statistics.median(seconds), _LEAST_LEAD), _MOST_LEAD)
        return seconds

    def timing(self, contender: Contender) -> str:
        return WALL if self._wall else self._how[contender.name]

    def _cycles_per_second(self) -> float:
        """Of the counter by which the device waits."""
        cycles = 10_000_000
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(cycles)  # loads the kernel
        torch.cuda.synchronize(self._device)
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize(self._device)
        return cycles / (1e-3 * start.elapsed_time(end))

    def _captured(self, run: Work) -> Work:
        """Replays the work from a graph."""
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def extras(self, contender: Contender, result: Result) -> None:
        if contender.peak:
            gc.collect()
            self._ready(contender)
            torch.cuda.reset_peak_memory_stats(self._device)
            before = torch.cuda.memory_allocated(self._device)
            contender.run()
            torch.cuda.synchronize(self._device)
            result.peak = torch.cuda.max_memory_allocated(self._device) - before
        if contender.launches:
            gc.collect()
            self._ready(contender)
            try:
                with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                    contender.run()
                    torch.cuda.synchronize(self._device)
            except RuntimeError:  # no profiler here: the count stays unknown, and a goal on it is not reached
                return
            on_device = [e for e in profile.events() or [] if e.device_type == torch.autograd.DeviceType.CUDA]
            result.launches = len(on_device) or None  # a profiler that saw nothing has not counted nothing

    def _ready(self, contender: Contender) -> None:
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
    backend: str = "",
) -> dict[str, Result]:
    """Runs every contender once in each round, after warm-up rounds that do not count.

    Args:
        case: for errors' sake.
        contenders: who runs, in this order.
        rounds: rounds that count; slow contenders sit out after the third.
        clock: HostClock or DeviceClock.
        tick: called after every round.
        seconds: begin no further round after this time, though never fewer than three.
        backend: what serves the contenders that name none.
    """
    results = {c.name: Result(c.bytes, backend=c.backend or backend, missing=c.missing) for c in contenders}
    if len(results) < len(contenders):
        raise ValueError(f"{case.name}: two contenders bear the same name")
    contenders = [c for c in contenders if not c.missing]
    begun = time.perf_counter()
    for round_ in range(-clock.warm_up, rounds):
        if round_ >= SLOW_ROUNDS and time.perf_counter() - begun > seconds:
            break
        for contender in contenders:
            if contender.slow and not -1 <= round_ < SLOW_ROUNDS:
                continue
            if round_ < 0:
                clock.warm(contender)
            else:
                result = results[contender.name]
                if round_ == 0:
                    result.host = clock.host(contender)
                result.seconds.append(clock.once(contender))
        if tick is not None:
            tick()
    for contender in contenders:
        results[contender.name].timing = clock.timing(contender)
        clock.extras(contender, results[contender.name])
    return results
