"""Runs cases: interleaved, medians, ratios within one run; a table, and a CSV that says on what and when."""

from __future__ import annotations

import csv
import datetime
import gc
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fastpost
from fastpost.backends import native
from fastpost.bench.registry import CASES, Case
from fastpost.errors import unknown

COLUMNS = [
    "case", "shape", "dtype", "contender", "median_ms", "p20_ms", "p80_ms", "gb_per_s", "goal", "ratio", "limit", "result",
    "isa", "threads", "cpu", "torch", "fastpost", "date",
]  # fmt: skip


def load(names: Sequence[str]) -> dict[str, object]:
    """The builders asked for, or all."""
    from fastpost.bench import divergence, noise, params  # noqa: F401  (importing registers their cases)

    for name in names:
        if name not in CASES:
            raise unknown("bench", name, CASES)
    return {name: CASES[name] for name in names or CASES}


def measure(case: Case, repeats: int, tick: object = None) -> dict[str, list[float]]:
    """Seconds of every contender, one run of each in turn, after a warm-up round."""
    times: dict[str, list[float]] = {c.name: [] for c in case.contenders}
    for round_ in range(repeats + 1):
        for contender in case.contenders:
            if contender.before is not None:
                contender.before()
            start = time.perf_counter()
            contender.run()
            seconds = time.perf_counter() - start
            if round_:
                times[contender.name].append(seconds)
        if callable(tick):
            tick()
    return times


def rows(case: Case, times: dict[str, list[float]], isa: str) -> list[dict[str, object]]:
    """One row per contender, then one per goal."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    machine = {
        "isa": isa,
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "fastpost": fastpost.__version__,
        "date": datetime.date.today().isoformat(),
    }
    common = {"case": case.name, "shape": case.shape, "dtype": case.dtype, **machine}
    result: list[dict[str, object]] = []
    for c in case.contenders:
        deciles = statistics.quantiles(times[c.name], n=5) if len(times[c.name]) > 1 else [medians[c.name]] * 4
        result.append(
            {
                **common,
                "contender": c.name,
                "median_ms": round(1e3 * medians[c.name], 4),
                "p20_ms": round(1e3 * deciles[0], 4),
                "p80_ms": round(1e3 * deciles[-1], 4),
                "gb_per_s": round(c.bytes / medians[c.name] / 1e9, 2) if c.bytes else "",
            }
        )
    for goal in case.goals:
        value = goal.measured(medians)
        hit = goal.hit(value, isa)
        result.append(
            {
                **common,
                "goal": f"{goal.contender} {'faster than' if goal.faster else 'over'} {goal.baseline}",
                "ratio": round(value, 3),
                "limit": f"{'>=' if goal.faster else '<='} {goal.limit[isa]:g}" if isa in goal.limit else "",
                "result": {True: "hit", False: "MISS", None: "info"}[hit],
            }
        )
    return result


def run(names: Sequence[str], repeats: int, output: Path | None, console: Console | None = None) -> bool:
    """Measures the cases, prints a table each and writes the CSV after every case. Returns whether every goal was hit."""
    console = console or Console()
    isa = native.core().cpu.isa()
    written: list[dict[str, object]] = []
    console.print(
        f"fastpost {fastpost.__version__}, torch {torch.__version__}, {isa}, {torch.get_num_threads()} threads. Ratios hold "
        "within this run; milliseconds are this machine's."
    )
    for name, build in load(names).items():
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(name, total=repeats + 1)
            case: Case = build()  # type: ignore[operator]
            new = rows(case, measure(case, repeats, lambda task=task: progress.advance(task)), isa)
        written += new
        _print(console, case, new)
        del case
        gc.collect()
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            with output.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(written)
    missed = [row for row in written if row.get("result") == "MISS"]
    reached = [row for row in written if row.get("result") == "hit"]
    console.print(f"{len(reached)} goals hit, {len(missed)} missed.")
    return not missed


def _print(console: Console, case: Case, new: list[dict[str, object]]) -> None:
    table = Table(title=f"{case.name}: {case.shape}, {case.dtype}", title_justify="left", min_width=100)
    for column, justify in (("", "left"), ("median ms", "right"), ("p20 ... p80", "right"), ("GB/s", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in new:
        if "contender" in row:
            spread = f"{row['p20_ms']:.3g} ... {row['p80_ms']:.3g}"
            table.add_row(str(row["contender"]), f"{row['median_ms']:.4g}", spread, str(row["gb_per_s"]), "")
    table.add_section()
    for row in new:
        if "goal" in row:
            style = {"hit": "green", "MISS": "bold red", "info": ""}[str(row["result"])]
            table.add_row(str(row["goal"]), f"{row['ratio']:.3g}x", str(row["limit"]), "", str(row["result"]), style=style)
    console.print(table)
