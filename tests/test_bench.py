"""The bench's own arithmetic: ratios, limits, and a CSV that says on what they were measured."""

from __future__ import annotations

import csv
import io
import math
import os
import platform
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastpost.bench import clocks, host_cost, registry, run, table
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
)
from fastpost.cli import bench as cli

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


def test_a_run_interleaves_writes_a_csv_and_reports_a_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    case = Case(
        "case",
        "1",
        "float32",
        [
            Contender("slow", lambda: [order.append("slow"), sum(range(200_000))], bytes=8),
            Contender("quick", lambda: order.append("quick"), before=lambda: order.append("before")),
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
    assert all(row["isa"] and row["torch"] and row["date"] for row in rows)
    assert float(rows[0]["median_ms"]) > float(rows[1]["median_ms"])
    assert "1 goals hit, 1 missed" in (tmp_path / "out.txt").read_text()


class _Scripted(HostClock):
    """Seconds as they are written beside each contender's name, whatever the work takes."""

    warm_up = 2

    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds

    def once(self, contender: Contender) -> tuple[float, float]:
        contender.run()
        return self.seconds[contender.name], 5e-6

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
    monkeypatch.setattr(run, "_output", lambda *command: "580.1\n580.1" if command[0] == "nvidia-smi" else "abc1234-dirty")


def test_a_run_on_a_gpu_goes_on_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pretended_gpu: None
) -> None:
    """Fractions of the copy, memory, launches and versions are in the CSV; failures and skips are told apart."""
    nothing = lambda: None  # noqa: E731

    def good(at: Target) -> Case:
        assert at.device.type == "cuda"
        assert at.scale == 1.0
        contenders = [
            Contender("copy", nothing, 8_000_000_000),
            Contender("work", nothing, 12_000_000_000, peak=True, launches=True),
        ]
        goals: list[Goal] = [
            Bandwidth("work", "copy", {"cuda": 0.75}),
            Floor("work", "copy", {"cuda": 1.15}, bytes=12_000_000_000),
            HostTime("work", limit={"cuda": 15}),
            PeakMemory("work", "", {"cuda": 1.0}, per=10_000_000),
            Goal("work, triton", "copy", {"cuda": 1.0}),  # of a backend that is not there
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
    monkeypatch.setattr(run, "DeviceClock", lambda device, wall: _Scripted({"copy": 2e-3, "work": 4e-3}))
    ticks = iter([0, 1, 2, 3, 4, 99])
    monkeypatch.setattr(run.time, "perf_counter", lambda: next(ticks, 99))
    output = tmp_path / "gpu.csv"
    with Console(file=(tmp_path / "out.txt").open("w"), width=160) as console:
        outcome = run.run([], 3, output, console, device="cuda", seconds=50)
    text = (tmp_path / "out.txt").read_text()
    assert outcome.failed == ["broken", "late"]
    assert outcome.skipped == ["needy", "refused"]
    assert (outcome.hit, outcome.missed) == (2, 2)
    assert "RuntimeError: out of luck [here]" in text
    assert "no such keyword" in text
    assert "needs 10 GB of device memory" in text
    rows = list(csv.DictReader(output.open()))
    assert [row["result"] for row in rows] == ["", "", "hit", "MISS", "hit", "MISS"]
    copy, work = rows[:2]
    assert (copy["gb_per_s"], work["gb_per_s"], work["fraction_of_copy"]) == ("4000.0", "3000.0", "0.75")
    assert (work["host_us"], work["peak_mb"], work["launches"], copy["launches"]) == ("5.0", "12.0", "3", "")
    assert rows[3]["ratio"] == "1.333"
    assert (rows[5]["ratio"], rows[5]["limit"]) == ("1.2", "<= 1 B/logit")
    for row in rows:
        assert (row["gpu"], row["driver"], row["commit"], row["isa"]) == ("Pretended", "580.1", "abc1234-dirty", "cuda")
        assert row["triton"]
        assert row["date"]


def test_the_device_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events around the work alone, after the cache was emptied; the host's clock where asked; peaks; launches."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            order.append("record")

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

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: order.append("wait"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(L2_cache_size=1 << 10))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: order.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 1700)
    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(clocks, "_FLUSH_BYTES", 4)
    work = Contender("w", lambda: order.append("run"), before=lambda: order.append("before"), peak=True, launches=True)
    seconds, host = DeviceClock(CPU, wall=False).once(work)
    assert seconds == 3e-3
    assert 0 < host < 1
    assert order == ["before", "wait", "record", "run", "record", "wait"]
    seconds, host = DeviceClock(CPU, wall=True).once(work)
    assert host <= seconds < 1
    result = Result()
    order.clear()
    DeviceClock(CPU, wall=False).extras(work, result)
    assert (result.peak, result.launches) == (1600, 2)
    assert order == ["before", "wait", "reset", "run", "wait", "before", "wait", "run", "wait"]


def test_a_round_of_short_calls_is_divided_by_them_and_other_processes_report(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    short = Contender("short", lambda: ran.append("run"), before=lambda: ran.append("before"), calls=5)
    ticks = iter([10.0, 11.0])
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: next(ticks))
    assert HostClock().once(short) == (0.2, 0.2)
    assert ran == ["before", *["run"] * 5]
    assert HostClock().once(Contender("elsewhere", lambda: 12.5, reports=True)) == (12.5, 12.5)


def test_the_beginning_of_names_stands_for_all_of_them() -> None:
    names = set(run.load(["host_cost"]))
    assert names == {f"host_cost_{what}" for what in ("params", "kl", "first_step", "small_tensors", "step", "import")}
    assert list(run.load(["noise", "host_cost_kl", "host_cost"]))[:2] == ["noise", "host_cost_kl"]
    with pytest.raises(ValueError, match="unknown bench 'host_co'"):
        run.load(["host_co"])


@pytest.mark.parametrize("name", sorted(set(run.load(["host_cost"])) - {"host_cost_import"}))
def test_host_costs_run_on_one_thread(name: str, tmp_path: Path) -> None:
    before = torch.get_num_threads()
    output = tmp_path / "host.csv"
    assert not run.run([name], 1, output, Console(file=io.StringIO())).failed
    assert torch.get_num_threads() == before
    with output.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["threads"] for row in rows} == {"1"}
    assert all(float(row["median_ms"]) > 0 for row in rows if row["contender"])
    assert {row["result"] for row in rows if row["goal"]} <= {"hit", "MISS", "info"}


def test_a_first_use_is_timed_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < host_cost.first_use("first use of symmetric_kl") < 60
    monkeypatch.setitem(host_cost.FIRST_USES, "broken", ("", "raise ValueError('on purpose')"))
    with pytest.raises(RuntimeError, match="broken failed: ValueError: on purpose"):
        host_cost.first_use("broken")


def _cuda_cases() -> list[str]:
    return list(run.load([], "cuda"))


@pytest.mark.parametrize("name", _cuda_cases())
def test_cases_for_gpus_run_small_on_the_cpu(name: str) -> None:
    """Every contender of every case does its work, before and after; every goal finds its contenders."""
    case = run.load([name], "cuda")[name](Target(CPU, 2e-4))
    try:
        results = measure(case, case.build(), 1, HostClock())
    except Skipped as reason:
        pytest.skip(str(reason))
    rows = table.rows(case, results, {"isa": "cuda"})
    goals = [row for row in rows if "goal" in row]
    assert len(goals) == len(case.goals)
    assert all(result.seconds for result in results.values())
    assert case.bytes > 0 or case.name.startswith("host time")


def test_unknown_case_and_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sam_gpt3"])
    assert "Did you mean 'sam_gpt2'" in capsys.readouterr().err
    assert cli.main(["--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert {"sam_gpt2", "noise", "negate"} <= set(listed)
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
