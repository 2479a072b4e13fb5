"""What `fastpost probe` has found: probe.csv after every row, tables with standard errors, and probe.png."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpost.cli.report import legend_below, replace_file, replace_text

CSV_NAME, PNG_NAME = "probe.csv", "probe.png"


@dataclass(frozen=True)
class Row:
    """One accuracy on a task's test rows.

    Attributes:
        method, seed: which run; "pretrained" for the encoder before any.
        stage: how many tasks of the chain were behind it. trained_on: the last of them.
        task: what was asked. kind: "probe" (linear, on the frozen encoder) or "head" (the fine-tuned classifier itself).
        accuracy, standard_error, train_accuracy, majority, train_size, test_size, converged: as in `ProbeResult`.
        seconds: wall time, of a head with its training.
    """

    method: str
    seed: int
    stage: int
    trained_on: str
    task: str
    kind: str
    accuracy: float
    standard_error: float
    train_accuracy: float
    majority: float
    train_size: int
    test_size: int
    converged: bool
    seconds: float


class Results:
    """Rows in a folder; probe.csv is written whole at every addition."""

    def __init__(self, folder: Path, chain: list[str], probes: list[str], methods: list[str]) -> None:
        self.folder, self.chain, self.probes, self.methods = folder, chain, probes, methods
        self.rows: list[Row] = []
        self.correct: dict[tuple[str, int, int, str], Tensor] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        return self.folder / CSV_NAME

    def add(self, row: Row, correct: Tensor | None = None) -> None:
        """Keeps a row, of a probe with which of the test rows were right."""
        self.rows.append(row)
        if correct is not None:
            self.correct[row.method, row.seed, row.stage, row.task] = correct
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=[f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        replace_text(self.path, text.getvalue())

    def of(self, kind: str, method: str, stage: int, task: str) -> list[Row]:
        return [r for r in self.rows if (r.kind, r.method, r.stage, r.task) == (kind, method, stage, task)]

    def probed(self, method: str, stage: int, task: str) -> list[Row]:
        """Stage 0 is the pretrained encoder, the same for every method."""
        return self.of("probe", method if stage else "pretrained", stage, task)

    def difference(self, method: str, task: str) -> tuple[float, float] | None:
        """After the whole chain, accuracy minus that of the first method, and its standard error.

        Both were asked the same rows, so the error is taken over the rows' differences (averaged over seeds first), which
        leaves out what the rows have in common. None where a run is missing.
        """
        stage, base = len(self.chain), self.methods[0]
        seeds = [r.seed for r in self.of("probe", method, stage, task)]
        pairs = [(self.correct.get((method, s, stage, task)), self.correct.get((base, s, stage, task))) for s in seeds]
        differences = [a.double() - b.double() for a, b in pairs if a is not None and b is not None]
        if not differences or method == base:
            return None
        rows = torch.stack(differences).mean(0)
        return float(rows.mean()), float(rows.std() / math.sqrt(len(rows)))


def mean_and_errors(rows: list[Row]) -> tuple[float, float, float]:
    """Mean accuracy, its standard error from the test rows, and the standard deviation over seeds (NaN for one).

    All seeds are scored on the same rows, so more seeds do not make the first error smaller.
    """
    values = [row.accuracy for row in rows]
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return mean, math.sqrt(mean * (1 - mean) / rows[0].test_size), spread


def _cell(rows: list[Row]) -> str:
    if not rows:
        return "-"
    mean, error, spread = mean_and_errors(rows)
    return f"{mean * 100:.1f} ± {error * 100:.1f}" + ("" if math.isnan(spread) else f" ({spread * 100:.1f})")


def table(results: Results) -> Any:
    """Probe accuracies: a line per probed task and method, a column per stage."""
    from rich.table import Table

    shown = Table(
        title="linear probes on the frozen encoder, test accuracy in %",
        caption="±: standard error from the test rows; in brackets: standard deviation over seeds",
    )
    for name in ("probed task", "majority", "method"):
        shown.add_column(name)
    stages = ["pretrained", *(f"{i}: after {name}" for i, name in enumerate(results.chain, start=1))]
    for name in (*stages, f"end, minus {results.methods[0]}"):
        shown.add_column(name, justify="right")
    for task in results.probes:
        for method in results.methods:
            cells = [results.probed(method, stage, task) for stage in range(len(stages))]
            paired = results.difference(method, task)
            last = "-" if paired is None else f"{paired[0] * 100:+.1f} ± {paired[1] * 100:.1f}"
            majority = next((f"{r.majority * 100:.1f}" for rows in cells for r in rows), "-")
            shown.add_row(task, majority, method, *map(_cell, cells), last, end_section=method == results.methods[-1])
    return shown


def heads(results: Results) -> Any:
    """What each stage's own classifier scores on its own task."""
    from rich.table import Table

    shown = Table(title="the fine-tuned classifiers themselves, test accuracy in %")
    shown.add_column("method")
    for i, name in enumerate(results.chain, start=1):
        shown.add_column(f"{i}: {name}", justify="right")
    for method in results.methods:
        shown.add_row(method, *(_cell(results.of("head", method, i, name)) for i, name in enumerate(results.chain, start=1)))
    return shown


def note(results: Results) -> str:
    """What the numbers can and cannot show."""
    seeds = len({row.seed for row in results.rows if row.kind == "head"})
    stuck = sum(not row.converged for row in results.rows)
    sizes = ", ".join(
        f"{task}: fitted to {rows[0].train_size}, scored on {rows[0].test_size}"
        for task in results.probes
        if (rows := results.probed("", 0, task))
    )
    text = (
        f"{sizes}; {seeds} seed(s). The errors hold the draw of the test rows; the draw of the training rows and, but for "
        "the spread shown, the seeds come on top. Hyper-parameters are defaults, searched for no method. Differences within "
        "two standard errors rank nothing."
    )
    return text + (f" {stuck} probe(s) stopped before the solver converged." if stuck else "")


def plot(results: Results) -> Path:
    """Draws probe.png, a panel per probed task: accuracy after each stage with the test rows' standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(results.probes)
    figure, axes = plt.subplots(1, count, figsize=(4.8 * count, 4.6), squeeze=False, layout="constrained")
    labels = ["pretrained", *(f"after\n{name}" for name in results.chain)]
    for axis, task in zip(axes[0], results.probes, strict=True):
        for index, method in enumerate(results.methods):
            at, means, errors = [], [], []
            for stage in range(len(labels)):
                rows = results.probed(method, stage, task)
                if rows:
                    mean, error, _ = mean_and_errors(rows)
                    at.append(stage + 0.06 * (index - (len(results.methods) - 1) / 2))
                    means.append(mean * 100)
                    errors.append(error * 100)
                    axis.plot([at[-1]] * len(rows), [r.accuracy * 100 for r in rows], ".", color=f"C{index}", markersize=4)
            axis.errorbar(at, means, yerr=errors, fmt="s-", color=f"C{index}", capsize=3, markersize=5, label=method)
        pretrained = results.probed("", 0, task)
        if pretrained:
            axis.axhline(pretrained[0].majority * 100, color="0.6", linestyle=":", label="most frequent label")
        axis.set_xticks(range(len(labels)), labels)
        axis.set_title(f"probe: {task}")
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("test accuracy, %")
    legend_below(axes[0][0])
    figure.suptitle(f"fastpost probe: {' → '.join(results.chain)} (bars: standard error; points: seeds)", fontsize=10)
    path = results.folder / PNG_NAME
    replace_file(path, lambda beside: figure.savefig(beside, dpi=130))
    plt.close(figure)
    return path
