"""Runs cases: interleaved, so that medians of one run make ratios; on the CPU and on GPUs."""

from __future__ import annotations

import datetime
import gc
import importlib
import importlib.util
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

import fastpost
from fastpost import dispatch
from fastpost.backends import native
from fastpost.bench import machine
from fastpost.bench.clocks import DeviceClock, HostClock, measure
from fastpost.bench.registry import CASES, CUDA_CASES, HEAP_OF, Case, PeakMemory, Skipped, Target
from fastpost.bench.table import HIT, MISS, NOT_MEASURED, bound_by_the_host, rows, show, summary, write
from fastpost.errors import unknown

# Where cases are registered, each family in a module for the CPU and one for GPUs, in the order they are run.
FAMILIES = (
    "sam",
    "sam_variants",
    "peers",
    "params",
    "noise",
    "r3f",
    "divergence",
    "linear",
    "gap",
    "trainer",
    "anchor",
    "host_cost",
    "steps",
    "scaling",
)
# On GPUs time may run out, so what matters most comes first. Host time before all: a profiler that has counted launches
# leaves something behind in every later call.
FIRST = (
    "host_time", "kl_train", "kl_forward", "linear_r3f", "sam_llama", "perturb_flat", "steps", "restore_adamw", "add_noise",
    "sam_small", "distillation_rows", "top_k_rows", "shard_rows", "linear_distillation_cuda", "linear_top_k_cuda",
    "stash_ulp", "masters", "kl_compiled",
)  # fmt: skip
# What glibc does with large buffers that are freed: give them back, so that the next one faults its pages in anew (its
# default, in a young process), or keep them, as the grown heap of a long training run mostly does.
HEAPS = {"returned": {}, "kept": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}}
SECONDS_PER_CASE = 6.0  # on a GPU; rounds beyond it are not begun


@dataclass
class Outcome:
    """How a run ended: how many goals were hit, missed and not measured, which cases were skipped and which failed."""

    hit: int = 0
    missed: int = 0
    not_measured: int = 0
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not (self.missed or self.not_measured or self.failed)


def load(names: Sequence[str], device: str = "cpu") -> dict[str, Callable[..., Case]]:
    """The builders asked for, or all, of the cases for the CPU or for accelerators.

    Args:
        names: of cases, or what the names of several begin with: "host_cost" stands for every "host_cost_...".
        device: "cpu", or anything else for the cases of accelerators.

    Raises:
        ValueError: a name that no case bears or begins with.
    """
    for family in FAMILIES:
        for suffix in ("", "_cuda"):
            if importlib.util.find_spec(f"fastpost.bench.{family}{suffix}"):
                importlib.import_module(f"fastpost.bench.{family}{suffix}")
    known: dict[str, Callable[..., Case]] = dict(CASES if device == "cpu" else sorted(CUDA_CASES.items(), key=_place))
    chosen: dict[str, Callable[..., Case]] = {}
    for name in names:
        meant = [name] if name in known else [k for k in known if k.startswith(f"{name}_")]
        if not meant:
            raise unknown("bench", name, known)
        chosen |= {k: known[k] for k in meant}
    return chosen or known


def _place(case: tuple[str, object]) -> int:
    return next((i for i, name in enumerate(FIRST) if case[0].startswith(name)), len(FIRST))


def default_backend(device: str) -> str:
    """What a run is about unless it is told otherwise: FASTPOST_BACKEND, or the compiled core for the device."""
    return os.environ.get("FASTPOST_BACKEND") or ("cuda" if torch.device(device).type == "cuda" else "cpu")


def surroundings(device: torch.device, backend: str) -> dict[str, object]:
    """The columns that say what a run was about, and on what it was made."""
    found: dict[str, object] = {
        "backend": backend,
        # Goals are the compiled core's, by instruction set; another backend has none.
        "isa": native.core().cpu.isa() if backend == "cpu" else backend,
        "threads": torch.get_num_threads(),
        "cpu": machine.cpu(),
        "torch": torch.__version__,
        "fastpost": fastpost.__version__,
        "date": datetime.date.today().isoformat(),
        "commit": machine.commit(),
    }
    if device.type == "cuda":
        import triton

        found["gpu"] = torch.cuda.get_device_name(device)
        found["driver"] = machine.printed_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split(
            "\n"
        )[0]
        found["triton"] = triton.__version__
    return found


def run(
    names: Sequence[str],
    rounds: int,
    output: Path | None,
    console: Console | None = None,
    *,
    device: str = "cpu",
    seconds: float = float("inf"),
    heap: str | None = None,
    processor: bool = False,
    backend: str | None = None,
) -> Outcome:
    """Measures the cases, prints a table each and writes the CSV after every case.

    Args:
        names: cases; none stands for all of the device.
        rounds: how often each contender runs.
        output: the CSV.
        console: where tables go.
        device: "cpu", or a CUDA device; there a case that fails is reported and the others go on.
        seconds: begin no further case after this time.
        heap: on the CPU, a key of HEAPS: every case runs in a process of its own, whose allocator does that, so that no case
            depends on what ran before it. None: in this process, as it is.
        processor: on the CPU, time is the processor's, so that others who use the machine count less.
        backend: what serves fastpost's calls, all of them: one that it cannot serve fails. None: `default_backend`.

    Raises:
        BackendUnavailable: this machine lacks the backend; the message says why.
    """
    console = console or Console()
    place = torch.device(device)
    backend = backend or default_backend(device)
    with dispatch.use_backend(backend):
        return _run(names, rounds, output, console, place, seconds, heap, backend, processor)


def _run(
    names: Sequence[str], rounds: int, output: Path | None, console: Console, place: torch.device, seconds: float,
    heap: str | None, backend: str, processor: bool,
) -> Outcome:  # fmt: skip
    if place.index is not None:
        torch.cuda.set_device(place)  # events and streams are the current device's
    where = surroundings(place, backend) | ({} if heap is None else {"heap": heap})
    outcome, written, begun = Outcome(), [], time.perf_counter()
    console.print(
        f"fastpost {fastpost.__version__} ({where['commit']}), backend {backend}, torch {torch.__version__}, "
        f"{where.get('gpu') or where['isa']}, {torch.get_num_threads()} threads.\n"
        "Ratios hold within this run; milliseconds are this machine's."
    )
    for name, build in load(names, place.type).items():
        if time.perf_counter() - begun > seconds:
            outcome.failed.append(name)
            console.print(f"[bold red]{name}: not run, the time limit of {seconds:g} s is over[/]")
            continue
        try:
            if heap is None:
                new = _one(name, build, rounds, place, where, console, processor)
            else:
                own = HEAP_OF.get(name, heap)
                new = _in_a_process(own, name, rounds, where | {"heap": own}, processor)
        except Skipped as reason:
            outcome.skipped.append(name)
            console.print(f"{name}: skipped: {escape(str(reason))}\n")
            continue
        except Exception as error:
            if place.type == "cpu":
                raise
            outcome.failed.append(name)
            console.print(f"[bold red]{name}: failed:[/] {type(error).__name__}: {escape(str(error))}\n", highlight=False)
            continue
        finally:
            gc.collect()
            if place.type == "cuda":
                torch.cuda.empty_cache()
        written += new
        show(console, new)
        if output is not None:
            write(output, written)
    results = [row.get("result") for row in written]
    outcome.hit, outcome.missed, outcome.not_measured = (results.count(what) for what in (HIT, MISS, NOT_MEASURED))
    if place.type != "cpu":
        summary(console, written)
    console.print(f"{outcome.hit} goals hit, {outcome.missed} missed, {outcome.not_measured} not measured.")
    bound = [f"{row['contender']} ({row['case']}, {row['dtype']})" for row in bound_by_the_host(written)]
    if bound:
        console.print(f"Bound by the host, so without a kernel's time: {'; '.join(bound)}.", markup=False)
    for what, cases in (("skipped", outcome.skipped), ("failed", outcome.failed)):
        if cases:
            console.print(f"Cases {what}: {', '.join(cases)}.")
    return outcome


def _one(
    name: str,
    build: Callable[..., Case],
    rounds: int,
    place: torch.device,
    where: dict[str, object],
    console: Console,
    processor: bool = False,
) -> list[dict[str, object]]:
    """Builds and measures one case; its inputs are gone when this returns."""
    before = torch.get_num_threads()
    if place.type == "cpu":
        case, clock = build(), HostClock(processor)
        limit = float("inf")
        if case.threads:
            torch.set_num_threads(case.threads)
            where = where | {"threads": case.threads}
        if where.get("heap") == "kept":
            case = _without_memory(case)
    else:
        case = build(Target(place))
        free, _ = torch.cuda.mem_get_info(place)
        if case.memory > 0.9 * free:
            raise Skipped(f"needs {case.memory / 1e9:.0f} GB of device memory, of which {free / 1e9:.0f} are free")
        clock, limit = DeviceClock(place, case.wall), SECONDS_PER_CASE
    try:
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(name, total=rounds + clock.warm_up)
            results = measure(
                case, case.build(), rounds, clock, lambda: progress.advance(task), limit, str(where["backend"])
            )
    finally:
        torch.set_num_threads(before)
    return rows(case, results, where)


def _without_memory(case: Case) -> Case:
    """The case less what is read off resident pages, which say nothing where freed ones stay."""
    contenders = [replace(c, peak=False) for c in case.build()]
    return replace(case, contenders=contenders, goals=[g for g in case.goals if not isinstance(g, PeakMemory)])


def _in_a_process(
    heap: str, name: str, rounds: int, where: dict[str, object], processor: bool
) -> list[dict[str, object]]:  # fmt: skip
    before = {key: os.environ.get(key) for key in HEAPS[heap]}
    os.environ.update(HEAPS[heap])  # the allocator reads them when the process starts
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            return process.submit(_alone, name, rounds, where, processor).result()
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _alone(name: str, rounds: int, where: dict[str, object], processor: bool) -> list[dict[str, object]]:
    (build,) = load([name]).values()
    with dispatch.use_backend(str(where["backend"])):
        return _one(name, build, rounds, torch.device("cpu"), where, Console(), processor)


def described(cases: Mapping[str, Callable[..., Case]]) -> list[str]:
    """One line per case of the CPU: its name, and what its builder says of it."""
    width = max(map(len, cases))
    return [f"{name:<{width}}  {summary_of(build)}" for name, build in cases.items()]


def summary_of(build: Callable[..., Case]) -> str:
    """The first line of a builder's docstring."""
    return (getattr(build, "func", build).__doc__ or "").strip().partition("\n")[0]


def listing(names: Sequence[str], rounds: int, device: str) -> list[str]:
    """One line per case for accelerators: name, shape, dtype, bytes of one call, estimated seconds. Allocates nothing."""
    lines, total = [], 0.0
    for name, build in load(names, "cuda").items():
        case = build(Target(torch.device(device)))
        total += case.estimate(rounds)
        lines.append(
            f"{name:<34} {case.shape:<44} {case.dtype:<9} {case.bytes / 1e9:8.3f} GB  ~{case.estimate(rounds):4.1f} s"
        )
    return [*lines, f"{len(lines)} cases, about {total:.0f} s at 3.5 TB/s"]
