"""What `fastpost compare` has found: kept on disk after every run, shown as a table and as a plot."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

JSON_NAME, CSV_NAME, PNG_NAME = "results.json", "results.csv", "report.png"


@dataclass
class Run:
    """One method with one seed.

    Attributes:
        method, seed: which.
        metric: "accuracy" (share, of the test split) or "perplexity" (of the test text).
        value: of the state that was chosen on validation.
        validation: the same metric on validation.
        untouched: perplexity before the ascent (GAP).
        best_step: the step whose state was chosen.
        seconds: wall time of the run.
        details: what only some methods have (SAM's report, GAP's curve).
    """

    method: str
    seed: int
    metric: str
    value: float
    validation: float
    best_step: int
    seconds: float
    untouched: float | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class StepCost:
    """Medians of one method, both sides in turns in one process; seconds per step, MiB of resident memory at the peak."""

    published_s: float
    fastpost_s: float
    published_mib: float | None
    fastpost_mib: float | None

    @property
    def ratio(self) -> float:
        """How many times faster fastpost's step is."""
        return self.published_s / self.fastpost_s


class Results:
    """Runs and costs in a folder; every addition is written at once, whole files taking the place of whole files."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self.folder = folder
        self.about = about
        self.runs: list[Run] = []
        self.costs: dict[str, StepCost] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, run: Run) -> None:
        self.runs.append(run)
        self.save()

    def add_cost(self, method: str, cost: StepCost) -> None:
        self.costs[method] = cost
        self.save()

    def save(self) -> None:
        """Writes results.json and results.csv."""
        data = {
            "about": self.about,
            "runs": [asdict(run) for run in self.runs],
            "costs": {method: {**asdict(cost), "ratio": cost.ratio} for method, cost in self.costs.items()},
        }
        replace_text(self.folder / JSON_NAME, json.dumps(data, indent=1, allow_nan=True))
        text = io.StringIO()
        rows = [self._flat(run) for run in self.runs]
        writer = csv.DictWriter(text, fieldnames=list(_COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        replace_text(self.folder / CSV_NAME, text.getvalue())

    def _flat(self, run: Run) -> dict[str, Any]:
        row: dict[str, Any] = {name: getattr(run, name) for name in _COLUMNS if hasattr(run, name)}
        cost = self.costs.get(run.method)
        if cost is not None:
            row |= {**asdict(cost), "ratio": cost.ratio}
        report = run.details.get("perturbation")
        if report:
            row |= {name: report[name] for name in ("intended_norm", "stored_norm", "seen_norm", "seen_cosine")}
        return {name: "" if row.get(name) is None else row[name] for name in _COLUMNS}

    def methods(self) -> list[str]:
        """Every method with a run or a cost, in order of appearance."""
        return list(dict.fromkeys([run.method for run in self.runs] + list(self.costs)))

    def of(self, method: str) -> list[Run]:
        return [run for run in self.runs if run.method == method]


_COLUMNS = (
    "method", "seed", "metric", "value", "validation", "untouched", "best_step", "seconds", "published_s", "fastpost_s",
    "ratio", "published_mib", "fastpost_mib", "intended_norm", "stored_norm", "seen_norm", "seen_cosine",
)  # fmt: skip


def replace_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Lets `fill` write beside the file and moves that into place: a killed process or a full disk leaves the old one."""
    beside = path.with_suffix(".part" + path.suffix)
    try:
        fill(beside)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def check_folder(folder: Path) -> None:
    """Raises OSError where the folder can neither be used nor made; leaves nothing behind."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        path.rmdir()


def replace_text(path: Path, text: str) -> None:
    replace_file(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds (NaN for one)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def table(results: Results) -> Any:
    """The summary as a rich table."""
    from rich.table import Table

    shown = Table(title="fastpost compare", caption="±: standard deviation over seeds; step times: medians")
    headings = (
        "method",
        "test accuracy / perplexity",
        "step, published",
        "step, fastpost",
        "ratio",
        "peak memory (published)",
        "stored / seen",
    )
    for name in headings:
        shown.add_column(name, justify="left" if name == "method" else "right")
    for method in results.methods():
        runs, cost = results.of(method), results.costs.get(method)
        shown.add_row(method, _score(runs), *_cost_cells(method, cost), _survival(runs))
    return shown


def _score(runs: list[Run]) -> str:
    if not runs:
        return "-"
    mean, spread = mean_and_spread([run.value for run in runs])
    if runs[0].metric == "accuracy":
        return f"{mean:.1%}" + ("" if math.isnan(spread) else f" ± {spread * 100:.1f}")
    before = statistics.fmean([run.untouched or math.nan for run in runs])
    return f"{before:.2f} → {mean:.2f}" + ("" if math.isnan(spread) else f" ± {spread:.2f}")


def _cost_cells(method: str, cost: StepCost | None) -> tuple[str, str, str, str]:
    if cost is None:
        return "-", "-", "-", "-"
    memory = "-" if cost.fastpost_mib is None else f"{cost.fastpost_mib:.0f} MiB"
    if cost.published_mib is not None and method != "adamw":
        memory += f" ({cost.published_mib:.0f})"
    if method == "adamw":  # one and the same loop
        return f"{cost.published_s * 1e3:.0f} ms", "same", "-", memory
    return f"{cost.published_s * 1e3:.0f} ms", f"{cost.fastpost_s * 1e3:.0f} ms", f"{cost.ratio:.2f}x", memory


def _survival(runs: list[Run]) -> str:
    reports = [run.details["perturbation"] for run in runs if run.details.get("perturbation")]
    if reports and reports[-1]["intended_norm"]:
        last = reports[-1]
        return f"{last['stored_norm'] / last['intended_norm']:.2f} / {last['seen_norm'] / last['intended_norm']:.2f}"
    moved = [run.details["moved_fraction"] for run in runs if "moved_fraction" in run.details]
    return f"{moved[-1]:.0%} moved" if moved else "-"


def plot(results: Results) -> Path:
    """Draws report.png: test accuracy per method, step times of both sides, and GAP's curve. Returns its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    gap_runs = [run for run in results.of("gap") if run.details.get("validation_perplexity")]
    classifiers = [m for m in results.methods() if any(run.metric == "accuracy" for run in results.of(m))]
    panels = [bool(classifiers), bool(results.costs), bool(gap_runs)]
    count = max(sum(panels), 1)
    figure, axes = plt.subplots(1, count, figsize=(5.2 * count, 4.8), squeeze=False, layout="constrained")
    free = iter(axes[0])
    if classifiers:
        _plot_accuracy(next(free), results, classifiers)
    if results.costs:
        _plot_times(next(free), results)
    if gap_runs:
        _plot_gap(next(free), gap_runs)
    figure.suptitle(f"fastpost compare: {results.about.get('task', '')}, {results.about.get('model', '')}", fontsize=10)
    path = results.folder / PNG_NAME
    replace_file(path, lambda beside: figure.savefig(beside, dpi=130))
    plt.close(figure)
    return path


def legend_below(axis: Any) -> None:
    """A legend under the axis' label, where it covers nothing; the figure's layout has to be "constrained"."""
    columns = 1 + (len(axis.get_legend_handles_labels()[1]) > 2)
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns)


def distinct(number: int, count: int, widest: float = 3.8, dashes: bool = True) -> dict[str, Any]:
    """How to draw one of several curves that may coincide: the first are wide, the last narrow and on top."""
    wide = 1.4 if count == 1 else widest - (widest - 1) * number / (count - 1)
    line = ("-", "--", "-.", ":")[number % 4] if dashes else "-"
    return {"linewidth": wide, "linestyle": line, "zorder": 2 + number, "alpha": 0.8 if dashes else 0.6}


def whole_steps(axis: Any) -> None:
    """Ticks at whole numbers only, also where there are few steps."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _plot_accuracy(axis: Any, results: Results, methods: list[str]) -> None:
    tested = results.about.get("test_examples") or 0
    lowest = 1.0
    for x, method in enumerate(methods):
        values = [run.value for run in results.of(method)]
        mean, _ = mean_and_spread(values)
        error = math.sqrt(mean * (1 - mean) / tested) if tested else 0.0
        lowest = min(lowest, mean - error, *values)
        axis.errorbar(x, mean * 100, yerr=error * 100, fmt="s", color="C0", capsize=4, markersize=7)
        axis.plot([x + 0.18] * len(values), [v * 100 for v in values], "o", color="C1", markersize=4)
    axis.plot([], [], "s", color="C0", label="mean, with the test set's standard error")
    axis.plot([], [], "o", color="C1", label="single seeds")
    axis.set_xticks(range(len(methods)), methods)
    axis.set_xlim(-0.6, len(methods) - 0.4)
    axis.set_ylabel("test accuracy, %")
    axis.set_title("after fine-tuning")
    axis.grid(axis="y", alpha=0.3)
    legend_below(axis)


def _plot_times(axis: Any, results: Results) -> None:
    methods = list(results.costs)
    for x, method in enumerate(methods):
        cost = results.costs[method]
        axis.bar(x - 0.2, cost.published_s * 1e3, 0.38, color="0.65", label="published, plain PyTorch" if x == 0 else None)
        axis.bar(x + 0.2, cost.fastpost_s * 1e3, 0.38, color="C2", label="fastpost" if x == 0 else None)
        if method != "adamw":
            top = max(cost.published_s, cost.fastpost_s) * 1e3
            axis.annotate(f"{cost.ratio:.2f}x", (x, top), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(methods)), methods)
    axis.set_ylabel("ms per step (median)")
    axis.set_title("time of a training step")
    times = [t for cost in results.costs.values() for t in (cost.published_s, cost.fastpost_s)]
    if max(times) > 8 * min(times):
        axis.set_yscale("log")  # GAP's small language model beside the encoder
    axis.margins(y=0.1)
    legend_below(axis)


def _plot_gap(axis: Any, runs: list[Run]) -> None:
    for index, run in enumerate(runs):
        curve, look = run.details["validation_perplexity"], distinct(index, len(runs))
        axis.plot(range(len(curve)), curve, marker=".", color=f"C{index}", label=f"text of seed {run.seed}", **look)
        size = 6 + look["linewidth"]
        axis.plot([run.best_step], [curve[run.best_step]], "o", color=f"C{index}", markersize=size, fillstyle="none")
    axis.set_xlabel("steps uphill")
    axis.set_ylabel("validation perplexity")
    axis.set_title("GAP (circle: the state that was kept)")
    axis.ticklabel_format(axis="y", useOffset=False)
    whole_steps(axis)
    axis.grid(alpha=0.3)
    legend_below(axis)
