"""Table and plot of `fastpost gap-sweep`."""

from __future__ import annotations

import csv
import math
import statistics
from pathlib import Path
from typing import Any

from fastpost.cli.report import distinct, legend_below, replace_file, whole_steps
from fastpost.gap.many import COLUMNS, Row


def write(rows: list[Row], path: Path) -> None:
    """All seeds' rows as one CSV, `seed` before the columns of `fastpost.gap.sweep`."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ("seed", *COLUMNS))
        writer.writeheader()
        writer.writerows(rows)


def groups(rows: list[Row]) -> dict[str, list[list[Row]]]:
    """Runs by the file of their text, each in the order of its states."""
    runs: dict[tuple[int, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row["seed"], row["text"]), []).append(row)
    found: dict[str, list[list[Row]]] = {}
    for (_, name), states in runs.items():
        found.setdefault(name.rsplit("/", 1)[0], []).append(states)
    return found


def show(console: Any, rows: list[Row], unit: str, errors: list[float]) -> None:
    """Gains on the data that chose and on the data that did not.

    Args:
        unit: what a score is.
        errors: of each seed's untouched model, the standard error of its score on the data that did not choose.
    """
    from rich.table import Table

    table = Table(title=f"{unit} gained by the kept state: mean over runs ± its standard error")
    table.add_column("texts", overflow="fold")
    for column in ("runs", "step", "on what chose", "on other data", "gained"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, runs in groups(rows).items():
        kept = [next(state for state in run if state["kept"]) for run in runs]
        chosen = [k["score"] - run[0]["score"] for k, run in zip(kept, runs, strict=True)]
        reported = [k["test_kept"] - k["test_untouched"] for k in kept]
        steps = [k["step"] for k in kept]
        table.add_row(
            name,
            str(len(runs)),
            f"{statistics.median(steps):g}",
            _mean(chosen),
            _mean(reported),
            str(sum(r > 0 for r in reported)),
        )
    console.print(table)
    console.print("step: median of those kept; gained: runs that did on the other data")
    told = ", ".join(f"{error:.4f}" for error in errors)
    console.print(f"The untouched model's own score on that other data has a standard error of {told}.")


def _mean(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:+.4f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return f"{mean:+.4f} ±{spread:.4f}"


def plot(rows: list[Row], unit: str, output: Path) -> None:
    """Score gained against step and against drift, one line per run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5.0), layout="constrained", sharey=True)
    by_file = groups(rows)
    for number, (name, runs) in enumerate(by_file.items()):
        look = distinct(number, len(by_file), widest=2.6, dashes=False)  # there are many of each
        for k, run in enumerate(runs):
            gained = [state["score"] - run[0]["score"] for state in run]
            for axis, key in zip(axes, ("step", "drift"), strict=True):
                label = name if k == 0 else None
                axis.plot([state[key] for state in run], gained, marker=".", color=f"C{number}", label=label, **look)
    for axis, label in zip(axes, ("step", "drift: 2-norm of the weights' change"), strict=True):
        axis.axhline(0, color="0.6", linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(f"{unit} gained on the data that chooses")
    whole_steps(axes[0])
    legend_below(axes[0])
    output.parent.mkdir(parents=True, exist_ok=True)
    replace_file(output, lambda beside: figure.savefig(beside, dpi=130))
    pyplot.close(figure)
