"""The bench's own arithmetic: ratios, limits, and a CSV that says on what they were measured."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from rich.console import Console

from fastpost.bench import registry, run
from fastpost.bench.registry import Case, Contender, Goal
from fastpost.cli import bench as cli


def test_goals_know_their_direction_and_their_instruction_set() -> None:
    medians = {"a": 2.0, "b": 10.0}
    faster = Goal("a", "b", {"avx512": 5.0, "avx2": 6.0}, faster=True)
    assert faster.measured(medians) == 5.0
    assert faster.hit(5.0, "avx512") is True
    assert faster.hit(5.0, "avx2") is False
    assert faster.hit(5.0, "sse") is None
    cheaper = Goal("b", "a", {"avx512": 4.9})
    assert cheaper.measured(medians) == 5.0
    assert cheaper.hit(5.0, "avx512") is False


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
        assert run.run(["tiny"], 3, tmp_path / "deep" / "bench.csv", console) is False
    assert order == ["slow", "before", "quick"] * 4
    rows = list(csv.DictReader((tmp_path / "deep" / "bench.csv").open()))
    assert [row["result"] for row in rows] == ["", "", "hit", "MISS", "info"]
    assert all(row["isa"] and row["torch"] and row["date"] for row in rows)
    assert float(rows[0]["median_ms"]) > float(rows[1]["median_ms"])
    assert "1 goals hit, 1 missed" in (tmp_path / "out.txt").read_text()


def test_unknown_case_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["sam_gpt3"])
    assert "Did you mean 'sam_gpt2'" in capsys.readouterr().err
    assert cli.main(["--list"]) == 0
    listed = capsys.readouterr().out.split()
    assert {"sam_gpt2", "noise", "negate"} <= set(listed)
    with pytest.raises(SystemExit):
        cli.main(["noise", "--repeats", "0"])
