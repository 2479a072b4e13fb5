"""What a run found: rows, a table for each case, a line for each goal, and a CSV that says on what and when."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastpost.bench.registry import HOST_BOUND, KERNEL, REPLAY, Case, Goal, Result

# kernel_ms is the device's time alone, host_us the host's until the call came back; median_ms is what the host's clock says
# from the call to its end. p20_ms and p80_ms belong to the one of kernel_ms and median_ms that is there; `timing` names it.
# `noisy` says that they lie far apart, so that the median is worth little. A contender that could not run has no times, and
# `result` says why.
COLUMNS = [
    "case", "shape", "dtype", "contender", "backend", "timing", "median_ms", "kernel_ms", "p20_ms", "p80_ms", "host_us",
    "gb_per_s", "fraction_of_copy", "goal", "ratio", "limit", "result", "isa", "threads", "cpu", "torch", "fastpost", "date",
    "peak_mb", "launches", "gpu", "driver", "triton", "commit", "heap", "noisy",
]  # fmt: skip
NOISY = 0.15  # of the median, between the 20th and the 80th percentile of the rounds
HIT, MISS, INFO, NOT_MEASURED = "hit", "MISS", "info", "not measured"

Row = dict[str, object]


def rows(case: Case, results: dict[str, Result], where: Row) -> list[Row]:
    """One row per contender, then one per goal."""
    platform_ = str(where["isa"])
    common = {"case": case.name, "shape": case.shape, "dtype": case.dtype, "backend": where.get("backend", ""), **where}
    copy = results.get("copy")
    written: list[Row] = []
    for name, result in results.items():
        if result.missing:
            why = f"{NOT_MEASURED}: {result.missing}"
            written.append({**common, "contender": name, "backend": result.backend, "result": why})
            continue
        fifths = statistics.quantiles(result.seconds, n=5) if len(result.seconds) > 1 else [result.median] * 4
        kernel = result.timing in (KERNEL, REPLAY)
        written.append(
            {
                **common,
                "contender": name,
                "backend": result.backend,
                "timing": result.timing,
                "kernel_ms" if kernel else "median_ms": round(1e3 * result.median, 6),
                "p20_ms": round(1e3 * fifths[0], 6),
                "p80_ms": round(1e3 * fifths[-1], 6),
                "host_us": round(1e6 * result.host_median, 1) if result.host else "",
                "gb_per_s": _number(result.rate / 1e9, 2) if result.bytes else "",
                "fraction_of_copy": _number(result.rate / copy.rate, 3) if copy and copy.bytes and result.bytes else "",
                "peak_mb": "" if result.peak is None else round(result.peak / 1e6, 3),
                "launches": "" if result.launches is None else result.launches,
                "noisy": "noisy" if fifths[-1] - fifths[0] > NOISY * result.median else "",
            }
        )
    for goal in case.goals:
        if goal.contender not in results or (goal.baseline and goal.baseline not in results):
            continue  # of a backend or a library that this machine lacks
        value = goal.measured(results)
        hit = goal.hit(value, platform_)
        bound = limit_of(goal, platform_)
        written.append(
            {
                **common,
                "goal": goal.describe(),
                "ratio": _number(value, 3),
                "limit": bound,
                "result": NOT_MEASURED if bound and math.isnan(value) else {True: HIT, False: MISS, None: INFO}[hit],
            }
        )
    return written


def limit_of(goal: Goal, platform_: str) -> str:
    """A goal's bound in words; nothing where it has none on this platform."""
    return f"{'>=' if goal.faster else '<='} {goal.limit[platform_]:g}{goal.unit}" if platform_ in goal.limit else ""


def _number(value: float, digits: int) -> float | str:
    """For a cell; nothing for what was not measured."""
    return "" if math.isnan(value) else round(value, digits)


def write(output: Path, written: list[Row]) -> None:
    """The CSV of what was measured so far."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(written)


def read(source: Path) -> list[dict[str, str]]:
    """The rows of a CSV that `write` wrote, every column there.

    Raises:
        ValueError: a column that no run of the bench has, or none of those that all have.
    """
    with source.open(newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        strange = sorted(set(columns) - set(COLUMNS))
        if strange or not {"case", "contender", "goal"} <= set(columns):
            raise ValueError(f"{source} is not a table of `fastpost bench`: {', '.join(strange) or 'no case in it'}")
        return [{column: row.get(column) or "" for column in COLUMNS} for row in reader]


def show(console: Console, new: list[Row]) -> None:
    """The case's table: how long each contender took, then what became of each goal."""
    first = new[0]
    device = any("kernel_ms" in row for row in new)
    table = Table(title=f"{first['case']}: {first['shape']}, {first['dtype']}", title_justify="left", min_width=100)
    times = ("kernel ms", "p20 ... p80", "host us") if device else ("median ms", "p20 ... p80")
    for column in ("", *times, "GB/s", ""):
        table.add_column(column, justify="right" if column else "left")
    for row in new:
        if "contender" not in row:
            continue
        if "p20_ms" not in row:
            table.add_row(str(row["contender"]), "-", *[""] * len(times), str(row["result"]))
            continue
        spread = f"{row['p20_ms']:.3g} ... {row['p80_ms']:.3g}"
        notes = [
            f"{row[key]} {unit}"
            for key, unit in (("peak_mb", "MB"), ("launches", "launches"), ("noisy", ""))
            if row[key] != ""
        ]
        cells = [f"{row.get('kernel_ms', row.get('median_ms')):.4g}", spread]
        if device:
            if "kernel_ms" not in row:  # no kernel's time: it must not stand where one is expected
                cells[0], notes = "-", [f"{row['timing']}: {row['median_ms']:.4g} ms with the host", *notes]
            cells.append(str(row["host_us"]))
        table.add_row(str(row["contender"]), *cells, str(row["gb_per_s"]), ", ".join(notes))
    table.add_section()
    for row in new:
        if "goal" in row:
            style = {HIT: "green", MISS: "bold red", NOT_MEASURED: "yellow", INFO: ""}[str(row["result"])]
            value = "-" if row["ratio"] == "" else f"{row['ratio']:.4g}"
            table.add_row(
                str(row["goal"]), value, str(row["limit"]), *[""] * (len(times) - 1), str(row["result"]), style=style
            )
    console.print(table)


def bound_by_the_host(written: list[Row]) -> list[Row]:
    """The rows whose time is the host's, not a kernel's."""
    return [row for row in written if row.get("timing") == HOST_BOUND]


def summary(console: Console, written: list[Row]) -> None:
    """Every goal on one line."""
    for row in written:
        if "goal" in row and row["result"] != INFO:
            value = "-" if row["ratio"] == "" else f"{row['ratio']:.4g}"
            line = f"{row['result']:<4}  {value:>9}  {row['limit']:<12} {row['case']}, {row['dtype']}: {row['goal']}"
            console.print(
                line, style="bold red" if row["result"] == MISS else "", highlight=False, soft_wrap=True, markup=False
            )
