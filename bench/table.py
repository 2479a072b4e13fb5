"""What a run found: rows, a table for each case, a line for each goal, and a CSV that says on what and when."""

from __future__ import annotations

import csv
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastpost.bench.registry import Case, Result

COLUMNS = [
    "case", "shape", "dtype", "contender", "median_ms", "p20_ms", "p80_ms", "gb_per_s", "goal", "ratio", "limit", "result",
    "isa", "threads", "cpu", "torch", "fastpost", "date", "fraction_of_copy", "host_us", "peak_mb", "launches", "gpu",
    "driver", "triton", "commit", "heap",
]  # fmt: skip


def rows(case: Case, results: dict[str, Result], where: dict[str, object]) -> list[dict[str, object]]:
    """One row per contender, then one per goal."""
    platform_ = str(where["isa"])
    common = {"case": case.name, "shape": case.shape, "dtype": case.dtype, **where}
    copy = results.get("copy")
    written: list[dict[str, object]] = []
    for name, result in results.items():
        fifths = statistics.quantiles(result.seconds, n=5) if len(result.seconds) > 1 else [result.median] * 4
        written.append(
            {
                **common,
                "contender": name,
                "median_ms": round(1e3 * result.median, 6),
                "p20_ms": round(1e3 * fifths[0], 6),
                "p80_ms": round(1e3 * fifths[-1], 6),
                "gb_per_s": round(result.rate / 1e9, 2) if result.bytes else "",
                "fraction_of_copy": round(result.rate / copy.rate, 3) if copy and copy.bytes and result.bytes else "",
                "host_us": round(1e6 * result.host_median, 1) if platform_ == "cuda" else "",
                "peak_mb": "" if result.peak is None else round(result.peak / 1e6, 3),
                "launches": "" if result.launches is None else result.launches,
            }
        )
    for goal in case.goals:
        if goal.contender not in results:  # a backend that this machine lacks
            continue
        value = goal.measured(results)
        hit = goal.hit(value, platform_)
        bound = f"{'>=' if goal.faster else '<='} {goal.limit[platform_]:g}{goal.unit}" if platform_ in goal.limit else ""
        written.append(
            {
                **common,
                "goal": goal.describe(),
                "ratio": round(value, 3),
                "limit": bound,
                "result": {True: "hit", False: "MISS", None: "info"}[hit],
            }
        )
    return written


def write(output: Path, written: list[dict[str, object]]) -> None:
    """The CSV of what was measured so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(written)


def show(console: Console, new: list[dict[str, object]]) -> None:
    first = new[0]
    table = Table(title=f"{first['case']}: {first['shape']}, {first['dtype']}", title_justify="left", min_width=100)
    for column, justify in (("", "left"), ("median ms", "right"), ("p20 ... p80", "right"), ("GB/s", "right"), ("", "left")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    for row in new:
        if "contender" in row:
            spread = f"{row['p20_ms']:.3g} ... {row['p80_ms']:.3g}"
            extra = [f"{row[key]} {unit}" for key, unit in (("peak_mb", "MB"), ("launches", "launches")) if row[key] != ""]
            table.add_row(str(row["contender"]), f"{row['median_ms']:.4g}", spread, str(row["gb_per_s"]), ", ".join(extra))
    table.add_section()
    for row in new:
        if "goal" in row:
            style = {"hit": "green", "MISS": "bold red", "info": ""}[str(row["result"])]
            table.add_row(str(row["goal"]), f"{row['ratio']:.4g}", str(row["limit"]), "", str(row["result"]), style=style)
    console.print(table)


def summary(console: Console, written: list[dict[str, object]]) -> None:
    """Every goal on one line."""
    for row in written:
        if "goal" in row and row["result"] != "info":
            line = (
                f"{row['result']:<4}  {row['ratio']:>9.4g}  {row['limit']:<12} {row['case']}, {row['dtype']}: {row['goal']}"
            )
            console.print(
                line, style="bold red" if row["result"] == "MISS" else "", highlight=False, soft_wrap=True, markup=False
            )
