"""The bench's own arithmetic: ratios, limits, and a CSV that says on what they were measured."""

from __future__ import annotations

import csv
import importlib
import io
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fastpost import dispatch
from fastpost.backends import cuda
from fastpost.bench import clocks, divergence_cuda, goals, host_cost, machine, params_cuda, registry, run, table
from fastpost.bench.clocks import DeviceClock, HostClock, measure
from fastpost.bench.registry import (
    Bandwidth,
    Case,
    Contender,
    Floor,
    Goal,
    HostTime,
    Launches,
    PeakMemory,
    Result,
    Skipped,
    Target,
    peer,
)
from fastpost.cli import bench as cli
from fastpost.errors import BackendUnavailable

CPU = torch.device("cpu")


def test_goals_know_their_direction_and_their_platform() -> None:
    results = {"a": Result(seconds=[2.0]), "b": Result(seconds=[10.0])}
    faster = Goal("a", "b", {"avx512": 5.0, "avx2": 6.0}, faster=True)
    assert faster.measured(results) == 5.0
    assert faster.hit(5.0, "avx512") is True
    assert faster.hit(5.0, "avx2") is False
    assert faster.hit(5.0, "sse") is None
    cheaper = Goal("b", "a", {"avx512": 4.9})
    assert cheaper.measured(results) == 5.0
    assert cheaper.hit(5.0, "avx512") is False


def test_goals_beside_time() -> None:
    """Two copies move 8 bytes in 2 s and 6 in 1 s; the work moves 10 in 4 s, and its floor is 16 bytes."""
    results = {
        "copy": Result(8, [2.0]),
        "read": Result(6, [1.0]),
        "work": Result(10, [3.0, 4.0, 5.0], host=[2e-6, 1e-6, 3e-6], peak=40, launches=3),
        "published": Result(0, [40.0], peak=340),
    }
    assert Bandwidth("work", "copy", {}).measured(results) == 2.5 / 4
    assert Bandwidth("work", "copy", {}, other="read").measured(results) == 2.5 / 6
    assert Bandwidth("work", "copy", {"cuda": 0.6}).hit(0.625, "cuda") is True
    assert Floor("work", "copy", {"cuda": 1.15}, bytes=16).measured(results) == 1.0
    assert Floor("work", "copy", {"cuda": 1.15}, bytes=8).hit(2.0, "cuda") is False
    assert HostTime("work", limit={"cuda": 2}).measured(results) == pytest.approx(2.0)
    assert HostTime("work", limit={"cuda": 2}).hit(2.1, "cuda") is False
    assert PeakMemory("work", "", {"cuda": 4}, per=10).measured(results) == 4
    assert PeakMemory("work", "published", {"cuda": 30}, faster=True, per=10).measured(results) == 30
    assert PeakMemory("work", "published", {"cuda": 30}, faster=True, per=10).hit(30, "cuda") is True
    assert Launches("work", limit={"cuda": 3}).hit(Launches("work").measured(results), "cuda") is True
    unknown = PeakMemory("copy", "", {"cuda": 4}).measured(results)  # not measured is not reached
    assert math.isnan(unknown)
    assert PeakMemory("copy", "", {"cuda": 4}).hit(unknown, "cuda") is False


def test_what_the_host_bounds_has_no_bandwidth_and_makes_no_ratio() -> None:
    results = {"copy": Result(8, [2.0], timing=registry.KERNEL), "work": Result(8, [1.0], timing=registry.HOST_BOUND)}
    assert math.isnan(results["work"].rate)
    for goal in (
        Goal("work", "copy", {}),
        Goal("copy", "work", {}, faster=True),
        Bandwidth("work", "copy", {}),
        Bandwidth("copy", "copy", {}, other="work"),
        Floor("work", "copy", {}, bytes=8),
        Floor("copy", "work", {}, bytes=8),
    ):
        assert math.isnan(goal.measured(results)), goal
    results["work"].timing = registry.REPLAY
    assert Bandwidth("work", "copy", {}).measured(results) == 2.0
    assert Goal("work", "copy", {}).measured(results) == 0.5


def test_a_run_interleaves_writes_a_csv_and_reports_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now = [10.0]

    def work(name: str, milliseconds: float) -> None:
        order.append(name)
        now[0] += milliseconds / 1e3

    monkeypatch.setattr(clocks.time, "perf_counter", lambda: now[0])
    case = Case(
        "case",
        "1",
        "float32",
        [
            Contender("slow", lambda: work("slow", 4), bytes=8),
            peer("quick", lambda: work("quick", 1), before=lambda: work("before", 7)),
        ],
        [
            Goal("quick", "slow", dict.fromkeys(("avx512", "avx2", "sse", "portable"), 1.0)),
            Goal("slow", "quick", dict.fromkeys(("avx512", "avx2", "sse", "portable"), 1.0)),
            Goal("slow", "quick", {}),
        ],
    )
    monkeypatch.setitem(registry.CASES, "tiny", lambda: case)
    with Console(file=(tmp_path / "out.txt").open("w"), width=120) as console:
        outcome = run.run(["tiny"], 3, tmp_path / "deep" / "bench.csv", console)
    assert (outcome.hit, outcome.missed, bool(outcome)) == (1, 1, False)
    assert order == ["slow", "before", "quick"] * 4
    rows = list(csv.DictReader((tmp_path / "deep" / "bench.csv").open()))
    assert [row["result"] for row in rows] == ["", "", "hit", "MISS", "info"]
    assert all(row["isa"] and row["torch"] and row["date"] and row["commit"] and row["cpu"] for row in rows)
    assert [row["backend"] for row in rows] == ["cpu", "torch", "cpu", "cpu", "cpu"]
    assert {row["timing"] for row in rows if row["contender"]} == {"host clock"}
    assert [float(row["median_ms"]) for row in rows[:2]] == pytest.approx([4, 1])
    assert [float(row["ratio"]) for row in rows[2:]] == pytest.approx([0.25, 4, 4])
    assert "1 goals hit, 1 missed" in (tmp_path / "out.txt").read_text()


class _Scripted(HostClock):
    """Seconds as they are written beside each contender's name, whatever the work takes."""

    warm_up = 2

    def __init__(self, seconds: dict[str, float], bound: str = "") -> None:
        self.seconds, self.bound = seconds, bound

    def once(self, contender: Contender) -> float:
        contender.run()
        return self.seconds[contender.name]

    def host(self, contender: Contender) -> list[float]:
        return [5e-6, 5e-6]

    def timing(self, contender: Contender) -> str:
        return registry.HOST_BOUND if contender.name == self.bound else registry.KERNEL

    def extras(self, contender: Contender, result: Result) -> None:
        result.peak = 12_000_000 if contender.peak else None
        result.launches = 3 if contender.launches else None


def test_on_the_cpu_every_case_has_a_process_and_an_allocator_of_its_own(tmp_path: Path) -> None:
    before = dict(os.environ)
    for heap in run.HEAPS:
        output = tmp_path / f"{heap}.csv"
        assert not run.run(["sam_tiny"], 1, output, Console(file=io.StringIO()), heap=heap).failed
        with output.open() as file:
            assert {row["heap"] for row in csv.DictReader(file)} == {heap}
    assert dict(os.environ) == before
    with pytest.raises(ValueError, match="sam_tin"):
        run.run(["sam_tin"], 1, None, heap="kept")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switches are glibc's")
def test_a_kept_heap_makes_no_fresh_pages() -> None:
    """Pages faulted in by a buffer of 64 MB where others as large were just freed; in huge pages of 2 MB they are few."""
    code = (
        "import resource, torch; torch.set_num_threads(1)\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(24): before = faults(); torch.ones(1 << 24)\n"  # alignment: a heap takes a few rounds to settle
        "print(faults() - before)"
    )

    def faults(heap: str) -> int:
        env = os.environ | run.HEAPS[heap]
        return int(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout)

    assert faults("kept") < 16 < faults("returned")


def test_slow_contenders_sit_out_and_time_ends_a_case(monkeypatch: pytest.MonkeyPatch) -> None:
    count = {"quick": 0, "slow": 0}

    def counts(name: str) -> None:
        count[name] += 1

    contenders = [Contender("quick", lambda: counts("quick")), Contender("slow", lambda: counts("slow"), slow=True)]
    clock = _Scripted({"quick": 1.0, "slow": 2.0})
    results = measure(Case("c", "", "", contenders), contenders, 9, clock)
    assert (count["quick"], count["slow"]) == (11, 4)
    assert (len(results["quick"].seconds), len(results["slow"].seconds)) == (9, 3)
    results = measure(Case("c", "", "", contenders), contenders, 9, clock, seconds=0.0)
    assert len(results["quick"].seconds) == 3
    with pytest.raises(ValueError, match="same name"):
        measure(Case("c", "", "", []), [contenders[0]] * 2, 1, clock)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run asks of a GPU beside time: its name, its memory, its driver."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Pretended")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 10**10))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(machine, "printed_by", lambda *command: "580.1\n580.1" if command[0] == "nvidia-smi" else "abc1234")


def test_a_run_on_a_gpu_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretended_gpu: None
) -> None:
    """Fractions of the copy, memory, launches and versions are in the CSV; failures and skips are told apart."""
    nothing = lambda: None  # noqa: E731

    def good(at: Target) -> Case:
        assert at.device.type == "cuda"
        assert at.scale == 1.0
        contenders = [
            peer("copy", nothing, 8_000_000_000),
            Contender("work", nothing, 12_000_000_000, peak=True, launches=True),
            Contender("slow host", nothing, 12_000_000_000, backend="triton"),
        ]
        goals: list[Goal] = [
            Bandwidth("work", "copy", {"cuda": 0.75}),
            Floor("work", "copy", {"cuda": 1.15}, bytes=12_000_000_000),
            HostTime("work", limit={"cuda": 15}),
            PeakMemory("work", "", {"cuda": 1.0}, per=10_000_000),
            Goal("work, triton", "copy", {"cuda": 1.0}),  # of a backend that is not there
            Goal("copy", "a library's", {"cuda": 1.0}),  # nor this
            Bandwidth("slow host", "copy", {"cuda": 0.5}),
        ]
        return Case("good", "3", "bfloat16", lambda: contenders, goals)

    def needy(at: Target) -> Case:
        return Case("needy", "1", "float32", lambda: pytest.fail("built without memory"), memory=10**10)

    def refused(at: Target) -> Case:
        raise Skipped("no such keyword")

    def broken(at: Target) -> Case:
        raise RuntimeError("out of luck [here]")

    monkeypatch.setattr(registry, "CUDA_CASES", {})
    monkeypatch.setattr(
        run, "CUDA_CASES", {"broken": broken, "needy": needy, "refused": refused, "good": good, "late": good}
    )
    clock = _Scripted({"copy": 2e-3, "work": 4e-3, "slow host": 4e-3}, bound="slow host")
    monkeypatch.setattr(run, "DeviceClock", lambda device, wall: clock)
    monkeypatch.setattr(dispatch, "backends", lambda: {"cuda": dispatch.BackendStatus(True, "Pretended")})
    ticks = iter([0, 1, 2, 3, 4, 99])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(ticks, 99))
    output = tmp_path / "gpu.csv"
    with Console(file=(tmp_path / "out.txt").open("w"), width=160) as console:
        outcome = run.run([], 3, output, console, device="cuda", seconds=50)
    text = (tmp_path / "out.txt").read_text()
    assert outcome.failed == ["broken", "late"]
    assert outcome.skipped == ["needy", "refused"]
    assert (outcome.hit, outcome.missed, outcome.not_measured) == (2, 2, 1)
    assert "Bound by the host, so without a kernel's time: slow host (good, bfloat16)." in text
    assert re.search(r"slow host +│ +- │[^│]+│ +5.0 │ +│ host-bound: 4 ms with the host", text)
    assert "RuntimeError: out of luck [here]" in text
    assert "no such keyword" in text
    assert "needs 10 GB of device memory" in text
    rows = list(csv.DictReader(output.open()))
    assert [row["result"] for row in rows] == ["", "", "", "hit", "MISS", "hit", "MISS", "not measured"]
    copy, work, bound = rows[:3]
    assert (bound["gb_per_s"], bound["kernel_ms"], bound["median_ms"], bound["timing"]) == ("", "", "4.0", "host-bound")
    assert (work["kernel_ms"], work["median_ms"], work["timing"]) == ("4.0", "", "kernel")
    assert [row["backend"] for row in rows] == ["torch", "cuda", "triton", *["cuda"] * 5]
    assert rows[7]["ratio"] == ""
    assert (copy["gb_per_s"], work["gb_per_s"], work["fraction_of_copy"]) == ("4000.0", "3000.0", "0.75")
    assert (work["host_us"], work["peak_mb"], work["launches"], copy["launches"]) == ("5.0", "12.0", "3", "")
    assert rows[4]["ratio"] == "1.333"
    assert (rows[6]["ratio"], rows[6]["limit"]) == ("1.2", "<= 1 B/logit")
    for row in rows:
        assert (row["gpu"], row["driver"], row["commit"], row["isa"]) == ("Pretended", "580.1", "abc1234-dirty", "cuda")
        assert row["triton"]
        assert row["date"]


class _Device:
    """A CUDA device that only pretends: what is asked of it, in order, and whether the host is late.

    `late`: for each timed run, whether its first event has fired when the call returns.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, late: Callable[[float], bool]) -> None:
        self.order: list[str] = []
        self.waits: list[float] = []
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.order.append("record")

            def query(self) -> bool:
                device.order.append("asked")
                return late(device.waits[-1] if device.waits else 0.0)

            def elapsed_time(self, end: Event) -> float:
                return 3.0

        class Profile:
            def __init__(self, activities: list[object]) -> None:
                assert activities == [torch.profiler.ProfilerActivity.CUDA]

            def __enter__(self) -> Profile:
                return self

            def __exit__(self, *exc: object) -> None: ...

            def events(self) -> list[object]:
                kinds = torch.autograd.DeviceType
                return [types.SimpleNamespace(device_type=kind) for kind in (kinds.CPU, kinds.CUDA, kinds.CUDA)]

        def sleep(cycles: int) -> None:
            self.order.append("sleep")
            self.waits.append(cycles / (10_000_000 / 3e-3))  # as calibrated: ten million cycles in elapsed_time

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.order.append("wait"))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=1 << 10))
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.order.append("reset"))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1700)
        monkeypatch.setattr(torch.profiler, "profile", Profile)
        monkeypatch.setattr(clocks, "_FLUSH_BYTES", 4)

    def clock(self, wall: bool = False) -> DeviceClock:
        made = DeviceClock(CPU, wall)
        self.order.clear()
        self.waits.clear()
        return made


def test_the_device_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events around the work alone, queued while the device was busy; the host by itself; peaks; launches."""
    device = _Device(monkeypatch, late=lambda waited: False)
    order = device.order
    work = Contender("w", lambda: order.append("run"), before=lambda: order.append("before"), peak=True, launches=True)
    clock = device.clock()
    host = clock.host(work)
    assert order == [*["before", "wait", "run"] * len(host), "wait"]
    assert len(host) >= 3
    order.clear()
    assert clock.once(work) == 3e-3
    assert order == ["before", "wait", "sleep", "record", "run", "asked", "record", "wait"]
    assert device.waits == [pytest.approx(max(2 * statistics.median(host), 5e-5), rel=1e-3)]
    assert clock.timing(work) == registry.KERNEL
    wall = device.clock(wall=True)
    assert wall.once(work) > 0
    assert order == ["before", "wait", "run", "wait"]
    assert wall.timing(work) == registry.WALL
    result = Result()
    order.clear()
    clock.extras(work, result)
    assert (result.peak, result.launches) == (1600, 2)
    assert order == ["before", "wait", "reset", "run", "wait", "before", "wait", "run", "wait"]


def test_a_host_that_is_late_gets_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the work is queued before any of it begins; inputs are put back for every try."""
    device = _Device(monkeypatch, late=lambda waited: waited < 3e-4)
    ran: list[str] = []
    work = Contender("w", lambda: ran.append("run"), before=lambda: ran.append("before"))
    clock = device.clock()
    clock.once(work)
    assert device.waits == pytest.approx([5e-5, 1e-4, 2e-4, 4e-4], rel=1e-3)
    assert ran == ["before", "run"] * 4
    clock.once(work)  # what was learned is kept
    assert device.waits[4:] == pytest.approx([4e-4], rel=1e-3)
    assert clock.timing(work) == registry.KERNEL


def test_what_is_late_however_early_it_begins_is_host_bound_or_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device(monkeypatch, late=lambda waited: "replayed" not in ran)
    ran: list[str] = []
    clock = device.clock()
    monkeypatch.setattr(clock, "_captured", lambda run: lambda: ran.append("replayed"))
    stubborn = Contender("stubborn", lambda: ran.append("run"))
    assert clock.once(stubborn) == 3e-3
    assert clock.timing(stubborn) == registry.HOST_BOUND
    assert max(device.waits) <= 0.25
    tries = len(device.waits)
    clock.once(stubborn)  # nobody waits for it again
    assert len(device.waits) == tries
    long = Contender("long", lambda: ran.append("long"), graph=True)
    assert clock.once(long) == 3e-3
    assert clock.timing(long) == registry.REPLAY
    assert ran[-2:] == ["long", "replayed"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_missing_core_is_not_timed_by_what_stands_in_for_it(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = dispatch.BackendStatus(False, "the compiler said: no such thing.")
    reference = dispatch.BackendStatus(True, "")
    status = {"cpu": missing, "cuda": missing, "triton": missing, "reference": reference}
    monkeypatch.setattr(dispatch, "backends", lambda: status)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run, "run", lambda *args, **kwargs: pytest.fail("it was timed"))
    for environment in ("", device):
        monkeypatch.setenv("FASTPOST_BACKEND", environment)
        with pytest.raises(SystemExit) as error:
            cli.main(["host_time" if device == "cuda" else "noise", "--device", device])
        assert error.value.code == 2
        assert "the compiler said: no such thing. " in (said := capsys.readouterr().err)
        assert "`--backend reference`" in said
    monkeypatch.undo()
    monkeypatch.setattr(dispatch, "backends", lambda: status)
    with pytest.raises(BackendUnavailable, match="no such thing"):
        run.run(["sam_tiny"], 1, tmp_path / "x.csv", Console(file=io.StringIO()))


@pytest.mark.parametrize(("named", "environment"), [("reference", ""), (None, "reference")])
def test_the_reference_is_timed_where_it_is_named(
    named: str | None, environment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows say so, goals are not its, and no call is the compiled core's, nor the other way round."""
    monkeypatch.setenv("FASTPOST_BACKEND", environment)
    monkeypatch.setattr(dispatch, "_forced", None)
    served: list[str] = []
    for name in ("cpu", "reference"):
        module = importlib.import_module(f"fastpost.backends.{name}")
        plain = module.sam_perturb_

        def watched(*args: object, name: str = name, plain: Callable[..., object] = plain) -> object:
            served.append(name)
            return plain(*args)

        monkeypatch.setattr(module, "sam_perturb_", watched)
    dispatch._select.cache_clear()
    output = tmp_path / "reference.csv"
    try:
        assert run.run(["host_cost_params"], 1, output, Console(file=io.StringIO()), backend=named).hit == 0
    finally:
        dispatch._select.cache_clear()
    assert set(served) == {"reference"}
    rows = table.read(output)
    assert {row["backend"] for row in rows} == {"torch", "reference"}
    assert {row["result"] for row in rows if row["goal"]} == {"info"}
    assert {row["isa"] for row in rows} == {"reference"}


def test_tables_are_read_back_and_other_files_refused(tmp_path: Path) -> None:
    data = sorted((Path(run.__file__).parent / "data").glob("*.csv"))
    tables = [path for path in data if path.name.startswith(("cpu-", "nvidia-"))]
    assert len(tables) >= 2
    for path in tables:
        rows = table.read(path)
        assert all(list(row) == table.COLUMNS for row in rows)
        assert sum(bool(row["contender"]) for row in rows) >= 4
    (other,) = [path for path in data if path.name == "gap-opt.csv"]
    with pytest.raises(ValueError, match="is not a table of `fastpost bench`"):
        table.read(other)


def test_the_processor_s_time_is_taken_where_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks, waiting = iter([1.0, 1.25]), Contender("x", lambda: None)
    monkeypatch.setattr(clocks.time, "process_time", lambda: next(ticks))
    assert HostClock(processor=True).once(waiting) == 0.25
    assert [HostClock(which).timing(waiting) for which in (True, False)] == ["processor clock", "host clock"]


def test_a_round_of_short_calls_is_divided_by_them_and_other_processes_report(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    short = Contender("short", lambda: ran.append("run"), before=lambda: ran.append("before"), calls=5)
    ticks = iter([10.0, 11.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(ticks))
    assert HostClock().once(short) == 0.2
    assert ran == ["before", *["run"] * 5]
    assert HostClock().once(Contender("elsewhere", lambda: 12.5, reports=True)) == 12.5


def test_the_beginning_of_names_stands_for_all_of_them() -> None:
    names = set(run.load(["host_cost"]))
    cases = ("params", "kl", "first_step", "small_tensors", "step", "gap_fresh", "gap_kept", "import")
    assert names == {f"host_cost_{what}" for what in cases}
    assert list(run.load(["noise", "host_cost_kl", "host_cost"]))[:2] == ["noise", "host_cost_kl"]
    with pytest.raises(ValueError, match="unknown bench 'host_co'"):
        run.load(["host_co"])


@pytest.mark.parametrize("name", ["params", "kl", "first_step", "small_tensors", "step"])
def test_host_costs_run_on_one_thread(name: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    output = tmp_path / "host.csv"
    assert not run.run([f"host_cost_{name}"], 1, output, Console(file=io.StringIO())).failed
    assert torch.get_num_threads() == before
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["threads"] for row in rows} == {"1"}
    assert all(float(row["median_ms"]) > 0 for row in rows if row["contender"])
    assert {row["result"] for row in rows if row["goal"]} <= {"hit", "MISS", "info"}
    assert {row["backend"] for row in rows} == {"torch", "cpu"}


def test_a_case_about_a_heap_has_that_heap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    heaps = []

    def alone(heap: str, name: str, rounds: int, where: dict[str, object], processor: bool) -> list[dict[str, object]]:
        heaps.append((name, heap, where["heap"]))
        raise registry.Skipped("asked for its heap only")

    monkeypatch.setattr(run, "_in_a_process", alone)
    names = ["host_cost_gap_fresh", "host_cost_gap_kept", "host_cost_kl"]
    for heap in ("returned", "kept"):
        run.run(names, 1, tmp_path / "host.csv", Console(file=io.StringIO()), heap=heap)
    own = [("host_cost_gap_fresh", "returned", "returned"), ("host_cost_gap_kept", "kept", "kept")]
    assert heaps == [*own, ("host_cost_kl", "returned", "returned"), *own, ("host_cost_kl", "kept", "kept")]


def test_a_first_use_is_timed_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host_cost.first_use("first use of symmetric_kl") > 0
    monkeypatch.setitem(host_cost.FIRST_USES, "broken", ("", "raise ValueError('on purpose')"))
    with pytest.raises(RuntimeError, match="broken failed: ValueError: on purpose"):
        host_cost.first_use("broken")


def _cuda_cases() -> list[str]:
    return list(run.load([], "cuda"))


@pytest.mark.parametrize("name", _cuda_cases())
def test_cases_for_gpus_run_small_on_the_cpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every contender of every case does its work, before and after; every goal finds its contenders.

    On a GPU the bench forces the CUDA core, which then has to have every operation that is not Triton's.
    """
    in_triton, wanted, select = [False], set(), dispatch._select

    def on_triton(work: Callable[[], object]) -> Callable[[], object]:
        def marked() -> None:
            in_triton[0] = True
            work()
            in_triton[0] = False

        return marked

    def recorded(op: str, *of: Any) -> Callable[..., Any]:
        if not in_triton[0]:
            wanted.add(op)
        return select(op, *of)

    monkeypatch.setattr(params_cuda, "has_triton", lambda at: True)
    monkeypatch.setattr(params_cuda, "on_triton", on_triton)
    monkeypatch.setattr(dispatch, "_select", recorded)
    case = run.load([name], "cuda")[name](Target(CPU, 2e-4))
    try:
        results = measure(case, case.build(), 1, HostClock())
    except Skipped as reason:
        pytest.skip(str(reason))
    rows = table.rows(case, results, {"isa": "cuda"})
    measured = [row for row in rows if "goal" in row]
    here = [goal for goal in case.goals if goal.contender in results and (not goal.baseline or goal.baseline in results)]
    assert len(measured) == len(here)
    assert here
    assert {op for op in wanted if not hasattr(cuda, op)} == set()
    assert all(result.seconds or result.missing for result in results.values())
    assert case.bytes > 0 or case.name.startswith("host time")


@pytest.mark.parametrize("cols", [50257, 128256])
def test_rows_of_distillation_are_timed_as_the_library_lays_them_out(cols: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks: list[Any] = []
    monkeypatch.setattr(divergence_cuda, "select", lambda *_: tasks.append)
    for name in (f"distillation_rows_{cols}_js", "top_k_rows_bfloat16"):
        case = run.load([name], "cuda")[name](Target(CPU, 2.1e-3))
        for contender in case.build():
            contender.run()
        for task in tasks:
            logits = [t for t in task if isinstance(t, Tensor) and t.ndim == 2 and t.shape[1] == task[0].shape[1]]
            assert all(t.stride() == (-(-t.shape[1] // 64) * 64, 1) for t in logits)
            assert task[0].shape[1] % 64
    assert len(tasks) == 3


def test_unknown_case_and_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sam_gpt3"])
    assert "Did you mean 'sam_gpt2'" in capsys.readouterr().err
    assert cli.main(["--list"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert {"sam_gpt2", "noise", "negate", "scaling_tensors_10"} <= set(listed)
    assert listed["noise"].startswith("x + eps z for a batch of embeddings")
    assert listed["scaling_tensors_10"].startswith("Small tensors")
    with pytest.raises(SystemExit):
        cli.main(["noise", "--repeats", "0"])
    with pytest.raises(SystemExit):
        cli.main(["--device", "tpu"])
    assert "cpu, cuda or cuda:N, not tpu" in capsys.readouterr().err


def test_the_list_for_gpus_needs_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--list", "--device", "cuda"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("sam_llama_bfloat16")]
    assert "290 tensors" in line
    assert "13.637 GB" in line
    assert lines[-1].startswith(f"{len(_cuda_cases())} cases, about ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test finds missing")
def test_without_a_gpu_the_cli_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--device", "cuda"])
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_exit_status(monkeypatch: pytest.MonkeyPatch) -> None:
    for outcome, strict, expected in (
        (run.Outcome(hit=1), True, 0),
        (run.Outcome(missed=1), False, 0),
        (run.Outcome(missed=1), True, 1),
        (run.Outcome(failed=["x"]), False, 1),
    ):
        monkeypatch.setattr(run, "run", lambda *args, outcome=outcome, **kwargs: outcome)
        assert cli.main(["noise", *(["--strict"] if strict else [])]) == expected


def test_every_goal_has_a_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a file: met, missed, host-bound. A goal that no file holds, or another backend's, is not measured."""
    case = run.load(["sam_small"], "cuda")["sam_small"](Target(torch.device("cuda")))
    fast, faster = case.goals
    common = {"case": case.name, "shape": case.shape, "dtype": case.dtype, "isa": "cuda", "limit": ">= 1", "result": "MISS"}
    file = tmp_path / "run.csv"
    table.write(file, [
        {**common, "goal": fast.describe(), "ratio": fast.limit["cuda"] - 1},
        {**common, "goal": faster.describe(), "ratio": faster.limit["cuda"] + 1},
    ])  # fmt: skip
    found = {work: rest for work, *rest in goals.verdicts([file])}
    of = f"{case.name}, {case.shape}, {case.dtype}: "
    assert found[of + fast.describe()] == [">= 10", "9", "MISSED"]
    assert found[of + faster.describe()] == [">= 30", "31", "met"]
    others = [rest for work, rest in found.items() if not work.startswith(of)]
    assert len(others) > 60
    assert all(rest[1:] == ["-", "not measured"] for rest in others)
    table.write(file, [{**common, "isa": "triton", "goal": fast.describe(), "ratio": 99}])
    assert goals.main([str(file), str(tmp_path / "none.csv")]) == 0
    assert f"0 met, 0 missed, {len(found)} not measured." in capsys.readouterr().out


def test_what_matters_most_is_run_first() -> None:
    names = list(run.load([], "cuda"))
    assert names[0] == "host_time"
    assert names[1].startswith("kl_train")
    assert sorted(names) == sorted(registry.CUDA_CASES)
    assert all(any(name.startswith(first) for name in names) for first in run.FIRST)
