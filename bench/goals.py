"""Every goal of the cases for GPUs, with what a run measured and the verdict: `python -m fastpost.bench.goals FILE.csv ...`.

A goal that no file holds a number for is not measured: it is never left out, and never taken as met.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from fastpost.bench.registry import Target
from fastpost.bench.run import load
from fastpost.bench.table import NOT_MEASURED, limit_of, read

PLATFORM = "cuda"  # goals are the compiled core's


def verdicts(files: Sequence[Path]) -> list[tuple[str, str, str, str]]:
    """(work and goal, bound, measured, verdict), in the order of the cases; later files count where several hold a goal."""
    rows = [row for file in files for row in read(file) if row["goal"] and row["isa"] == PLATFORM]
    found = {(row["case"], row["shape"], row["dtype"], row["goal"]): row for row in rows}
    lines = []
    for build in load([], "cuda").values():
        case = build(Target(torch.device("cuda")))
        for goal in case.goals:
            bound = limit_of(goal, PLATFORM)
            if not bound:
                continue
            row = found.get((case.name, case.shape, case.dtype, goal.describe()), {"ratio": "", "result": ""})
            # Judged by today's bound, which may be stricter than the one of the run.
            value = float(row["ratio"]) if row["ratio"] else None
            verdict = NOT_MEASURED if value is None else "met" if goal.hit(value, PLATFORM) else "MISSED"
            work = f"{case.name}, {case.shape}, {case.dtype}: {goal.describe()}"
            lines.append((work, bound, "-" if value is None else f"{value:.4g}", verdict))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m fastpost.bench.goals", description=__doc__)
    parser.add_argument("files", nargs="*", type=Path, help="CSV files of `fastpost bench --device cuda`")
    lines = verdicts([file for file in parser.parse_args(argv).files if file.exists()])
    print(f"{'verdict':<13} {'measured':>9}  {'goal':<12} work")
    for work, bound, measured, verdict in lines:
        print(f"{verdict:<13} {measured:>9}  {bound:<12} {work}")
    counts = {what: sum(line[3] == what for line in lines) for what in ("met", "MISSED", NOT_MEASURED)}
    print(", ".join(f"{count} {what.lower()}" for what, count in counts.items()) + ".")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
