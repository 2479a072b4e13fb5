"""The form of a bench: contenders that do the same work, and the bounds on what they take that are goals."""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

Work = Callable[[], object]

# How a contender was timed. What a GPU does and what the host does before it are two numbers, and look like two.
CLOCK = "host clock"  # on the CPU, around the call
PROCESSOR = "processor clock"  # the processor's time in all threads of the process, for a machine that others use as well
KERNEL = "kernel"  # on the device alone: all of the work was queued before any of it began
REPLAY = "kernel, replayed"  # the same from a captured graph, for more launches than a queue holds
WALL = "wall"  # from an idle device to an idle device, host included, because the case asks for that
HOST_BOUND = "host-bound"  # the device waited for the host at least once, however early the host began


class Skipped(Exception):
    """Raised by a builder whose case cannot be run here; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    Attributes:
        name: as it appears in the table; the one called "copy" sets the scale of the case's bandwidths.
        run: does the work once.
        bytes: the fewest bytes that this way must move, 0 where that is not the point; shown as GB/s.
        before: untimed, ahead of every run (puts inputs back).
        backend: what serves it: "" for the backend that the run is about, another one by name, or a peer's library.
        slow: three rounds suffice.
        calls: how often it runs in a round, whose time is divided by it: for calls of microseconds.
        reports: run() returns the seconds it took, measured where they passed, in another process.
        peak: whether to measure how much memory it allocates at most (GPUs, and Linux by the resident pages).
        launches: whether to count what it launches on the device (GPU only).
        graph: whether a captured graph of it does the same work again; needed where it has more launches than fit a queue.
        missing: why it cannot run here, such as a library that does not import: its row says so, and holds no time.
    """

    name: str
    run: Work
    bytes: int = 0
    before: Work | None = None
    backend: str = ""
    slow: bool = False
    calls: int = 1
    reports: bool = False
    peak: bool = False
    launches: bool = False
    graph: bool = False
    missing: str = ""

    @classmethod
    def absent(cls, name: str, by: str, why: str) -> Contender:
        """One that cannot run here, by the library `by`."""
        return cls(name, lambda: None, backend=by, missing=why)


def imported(module: str) -> str:
    """Imports a peer's library. Why it cannot be imported; "" where it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # whatever it raises while it is imported: the row tells
        return f"{module} does not import: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def peer(name: str, run: Work, bytes: int = 0, before: Work | None = None, *, by: str = "torch", **how: Any) -> Contender:
    """A contender that is not fastpost's; `by` names the library."""
    return Contender(name, run, bytes, before, by, **how)


@dataclass
class Result:
    """What a run found out about one contender.

    Attributes:
        bytes: as the contender says.
        seconds: of each round, as `timing` says.
        host: host seconds until the call came back, from calls of their own; empty where `seconds` are that.
        timing: CLOCK, PROCESSOR, KERNEL, REPLAY, WALL or HOST_BOUND.
        backend: what served it.
        peak, launches: bytes allocated at most and number of launches, where asked for.
        missing: why it was not run; there are no seconds then.
    """

    bytes: int = 0
    seconds: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    timing: str = CLOCK
    backend: str = ""
    peak: int | None = None
    launches: int | None = None
    missing: str = ""

    @property
    def host_bound(self) -> bool:
        return self.timing == HOST_BOUND

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else float("nan")

    @property
    def host_median(self) -> float:
        return statistics.median(self.host) if self.host else self.median

    @property
    def rate(self) -> float:
        """Bytes per second; NaN where the host decided how long it took."""
        return float("nan") if self.host_bound else self.bytes / self.median


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio of two contenders in one run.

    It is the median of the rounds' ratios, so that a machine whose speed drifts from round to round does not decide, and the
    ratio of medians where one of them sat rounds out. It is NaN, not measured, where one of the two is host-bound.

    Attributes:
        contender, baseline: names of the two.
        limit: the bound, by platform ("avx512", "avx2", "cuda"); platforms without one are only reported.
        faster: True: baseline / contender must be at least the limit; False: contender / baseline at most.
    """

    contender: str
    baseline: str
    limit: dict[str, float]
    faster: bool = False

    unit = ""

    def measured(self, results: Mapping[str, Result]) -> float:
        ours, theirs = results[self.contender], results[self.baseline]
        if ours.host_bound or theirs.host_bound or ours.missing or theirs.missing:
            return float("nan")
        if len(ours.seconds) == len(theirs.seconds):
            ratio = statistics.median(a / b for a, b in zip(ours.seconds, theirs.seconds, strict=True))
        else:
            ratio = ours.median / theirs.median
        return 1 / ratio if self.faster else ratio

    def hit(self, value: float, platform: str) -> bool | None:
        """Whether the goal is reached; None where there is none on this platform. What was not measured is not reached."""
        if platform not in self.limit:
            return None
        return value >= self.limit[platform] if self.faster else value <= self.limit[platform]

    def describe(self) -> str:
        return f"{self.contender} {'faster than' if self.faster else 'over'} {self.baseline}"


@dataclass(frozen=True)
class Bandwidth(Goal):
    """At least this share of the bytes per second of the baseline, or of `other` where that is faster."""

    faster: bool = True
    other: str = ""

    def measured(self, results: Mapping[str, Result]) -> float:
        rates = [results[name].rate for name in (self.baseline, self.other) if name]
        return results[self.contender].rate / max(rates) if all(rate == rate for rate in rates) else float("nan")

    def describe(self) -> str:
        return f"bandwidth of {self.contender}, share of {' or '.join(filter(None, (self.baseline, self.other)))}"


@dataclass(frozen=True)
class Floor(Goal):
    """At most this multiple of the time in which the baseline's bandwidth moves `bytes`."""

    bytes: int = 0

    def measured(self, results: Mapping[str, Result]) -> float:
        ours = results[self.contender]
        return float("nan") if ours.host_bound else ours.median / (self.bytes / results[self.baseline].rate)

    def describe(self) -> str:
        return f"{self.contender} over the floor of {self.bytes / 1e9:.3g} GB at the rate of {self.baseline}"


@dataclass(frozen=True)
class HostTime(Goal):
    """At most so many microseconds of host time until the call comes back. There is no baseline."""

    baseline: str = ""
    limit: dict[str, float] = field(default_factory=dict)

    unit = " us"

    def measured(self, results: Mapping[str, Result]) -> float:
        return 1e6 * results[self.contender].host_median

    def describe(self) -> str:
        return f"host time of {self.contender}"


@dataclass(frozen=True)
class PeakMemory(Goal):
    """Bytes allocated at most, per `per` (logits, or 10^6 for MB): alone at most the limit; with `faster` so much below
    the baseline's."""

    per: int = 1

    @property
    def unit(self) -> str:  # type: ignore[override]
        return " MB" if self.per == 10**6 else " B/logit"

    def measured(self, results: Mapping[str, Result]) -> float:
        peaks = [results[name].peak for name in (self.contender, self.baseline) if name]
        if None in peaks:
            return float("nan")
        return (peaks[1] - peaks[0] if self.faster else peaks[0]) / self.per  # type: ignore[operator]

    def describe(self) -> str:
        return f"peak memory of {self.contender}{f', below {self.baseline}' if self.faster else ''}"


@dataclass(frozen=True)
class PeakShare(PeakMemory):
    """Bytes allocated at most, as a share of the baseline's."""

    unit = ""  # type: ignore[assignment]

    def measured(self, results: Mapping[str, Result]) -> float:
        ours, theirs = (results[name].peak for name in (self.contender, self.baseline))
        return float("nan") if ours is None or theirs is None else ours / theirs

    def describe(self) -> str:
        return f"peak memory of {self.contender} over {self.baseline}"


@dataclass(frozen=True)
class Launches(Goal):
    """At most so many launches on the device. There is no baseline."""

    baseline: str = ""
    limit: dict[str, float] = field(default_factory=dict)

    def measured(self, results: Mapping[str, Result]) -> float:
        launches = results[self.contender].launches
        return float("nan") if launches is None else launches

    def describe(self) -> str:
        return f"launches of {self.contender}"


@dataclass(frozen=True)
class Case:
    """One line of work: its size in words, who competes, and what must come out.

    Attributes:
        contenders: the ways, or a function that allocates their inputs and returns them (so that a listing needs no memory).
        bytes: the fewest bytes that fastpost's call must move.
        work: how often those bytes one round of all contenders moves, roughly; for the estimate of a listing.
        memory: bytes of device memory needed, roughly.
        wall: time from an idle device until it is idle again, host included, instead of time on the device.
        seconds: added to the estimate (compilation).
        threads: on the CPU, how many threads torch and fastpost use; 0: as the process has them.
    """

    name: str
    shape: str
    dtype: str
    contenders: list[Contender] | Callable[[], list[Contender]]
    goals: list[Goal] = field(default_factory=list)
    bytes: int = 0
    work: float = 6.0
    memory: int = 0
    wall: bool = False
    seconds: float = 0.0
    threads: int = 0

    def build(self) -> list[Contender]:
        return self.contenders() if callable(self.contenders) else self.contenders

    def estimate(self, rounds: int) -> float:
        """Seconds on a device that moves 3.5 TB/s, set-up included."""
        return 1.0 + self.seconds + (rounds + 3) * (self.bytes * self.work / 3.5e12 + 1e-3)


@dataclass(frozen=True)
class Target:
    """Where a case for accelerators is built; `scale` shrinks it, so that tests can build it on the CPU."""

    device: torch.device
    scale: float = 1.0

    def size(self, n: int, at_least: int = 1) -> int:
        return max(at_least, int(n * self.scale))

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=self.device).mul_(std)

    def compiled(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """torch.compile's form; elsewhere than on a GPU its tracing alone."""
        return torch.compile(function, backend="inductor" if self.device.type == "cuda" else "eager")  # type: ignore[no-any-return]


# Builders by name, in the order they are run; each allocates its inputs only when called.
CASES: dict[str, Callable[[], Case]] = {}
# The same for accelerators; their inputs are allocated by Case.build().
CUDA_CASES: dict[str, Callable[[Target], Case]] = {}
HEAP_OF: dict[str, str] = {}  # of the CPU's cases that are about one heap: which, by name


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    """Registers a builder for the CPU under its own name."""
    CASES[build.__name__] = build
    return build


def at_heap(heap: str) -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """For a case that is about what the allocator does: a key of `run.HEAPS`, whatever the run is told."""

    def register(build: Callable[[], Case]) -> Callable[[], Case]:
        HEAP_OF[build.__name__] = heap
        return build

    return register


def cuda_case(**variants: object) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Registers build(target, value) for accelerators, once per keyword, as `<its name>_<keyword>`."""

    def register(build: Callable[..., Case]) -> Callable[..., Case]:
        if not variants:
            CUDA_CASES[build.__name__] = build
        for suffix, value in variants.items():
            CUDA_CASES[f"{build.__name__}_{suffix}"] = partial(_call, build, value)
        return build

    return register


def _call(build: Callable[..., Case], value: object, at: Target) -> Case:
    return build(at, value)
