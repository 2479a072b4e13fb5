"""What `fastpost train` has measured: metrics.csv, and the picture of it."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpost.bench.measure import Cost
from fastpost.cli.files import replace_text

CSV_NAME, PNG_NAME, HTML_NAME = "metrics.csv", "report.png", "report.html"
Row = dict[str, Any]

_FIRST = ("step", "epoch", "loss", "eval_loss", "eval_accuracy", "eval_f1", "eval_mcc", "eval_perplexity")
_LAST = ("grad_norm", "learning_rate")
_NOT_METRICS = ("total_flos", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


@dataclass
class Results:
    """A run, for the report.

    Attributes:
        method, command: as typed, without secrets.
        changed: options that differ from their defaults, without secrets.
        facts: what else was run on what, in pairs of words.
        metric: column of what is evaluated: "eval_accuracy", "eval_perplexity", "eval_loss", or "score" (GAP).
        unit: what a score is (GAP).
        baseline: accuracy of always saying the most frequent label; None where there are no labels.
        rows: of metrics.csv.
        costs: seconds per step of each side; empty where nothing was timed.
        untimed: why, where nothing was timed.
        loss_at: where the training loss was measured, if not at w: words to follow its name.
        seconds, steps: of the run itself, with loading data and evaluating; steps of this start only.
    """

    folder: Path
    method: str
    command: str
    changed: Mapping[str, Any]
    facts: list[tuple[str, str]]
    metric: str
    unit: str = ""
    baseline: float | None = None
    rows: list[Row] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)
    untimed: str = ""
    loss_at: str = ""
    seconds: float = math.nan
    steps: int = 0

    @property
    def evaluated(self) -> list[Row]:
        return [row for row in self.rows if self.metric in row]

    def last(self, column: str) -> float | None:
        """The newest value of a column."""
        return next((row[column] for row in reversed(self.rows) if row.get(column, "") != ""), None)

    def columns(self) -> list[str]:
        there = list(dict.fromkeys(name for row in self.rows for name in row))
        if self.metric == "score":
            return there
        ends = [name for name in _LAST if name in there]
        middle = sorted(name for name in there if name not in (*_FIRST, *ends))
        return [*(name for name in _FIRST if name in there), *middle, *ends]

    def write_csv(self) -> Path:
        """Replaces metrics.csv as a whole; `loss` and the like are empty where a row has none."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=self.columns(), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        path = self.folder / CSV_NAME
        replace_text(path, text.getvalue())
        return path


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"


def rows_of(
    log_history: Sequence[Mapping[str, Any]], perplexity: bool, parts: Collection[str] = ("sam", "r3f")
) -> list[Row]:
    """One row per step at which the Trainer logged or evaluated, from what it keeps of these.

    Args:
        parts: what this run does, "sam", "r3f"; lines of others, from before it was resumed, are left out.
    """
    others = tuple(f"{part}/" for part in ("sam", "r3f") if part not in parts)
    found: dict[int, Row] = {}
    for line in log_history:
        numbers = {k: v for k, v in line.items() if k not in _NOT_METRICS and not k.startswith(("train_", *others))}
        if set(numbers) <= {"step", "epoch"}:
            continue
        row = found.setdefault(numbers["step"], {})
        row.update(numbers)
        if perplexity and "eval_loss" in line:
            row["eval_perplexity"] = math.inf if line["eval_loss"] > 709 else math.exp(line["eval_loss"])
    return [found[step] for step in sorted(found)]


# -- the picture ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Look:
    """Colours on a light or a dark ground."""

    ground: str
    text: str
    faint: str
    lines: tuple[str, str, str]


LIGHT = Look("#ffffff", "#1f2430", "#c9ced8", ("#2f5fd0", "#d1660f", "#16803c"))
DARK = Look("#1b1f29", "#e4e7ee", "#4a5163", ("#86a8ff", "#ffab5e", "#6fd394"))


def draw(results: Results, look: Look = LIGHT) -> bytes:
    """The report's picture as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = _panels(results)
    across = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    down = -(-len(panels) // across)
    style: Any = {
        "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False, "axes.edgecolor": look.faint, "axes.labelcolor": look.text, "text.color": look.text,
        "xtick.color": look.text, "ytick.color": look.text, "figure.facecolor": look.ground, "axes.facecolor": look.ground,
        "grid.color": look.faint, "grid.alpha": 0.5, "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.8,
    }  # fmt: skip
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(down, across, figsize=(4.1 * across, 3.0 * down), layout="constrained", squeeze=False)
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.12, h_pad=0.12)
        for axis, panel in zip(axes.flat, panels, strict=False):
            panel(axis, results, look)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        pyplot.close(figure)
    return picture.getvalue()


def data_uri(picture: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(picture).decode()


Panel = Callable[[Any, Results, Look], None]


def _panels(results: Results) -> list[Panel]:
    there = set(results.columns())
    found: list[Panel] = [_loss]
    if results.metric in there:
        found.append(_metric)
    if "drift" in there:
        found.append(_drift)
    if "sam/seen_over_intended" in there:
        found.append(_seen)
    if "r3f/symm_kl" in there:
        found.append(_kl)
    if "sharpness/own_rise" in there:
        found.append(_sharpness)
    if results.costs:
        found.append(_times)
    return found


def _line(axis: Any, results: Results, column: str, label: str, colour: str, marker: str = "", style: str = "-") -> None:
    points = [(row["step"], row[column]) for row in results.rows if row.get(column, "") != ""]
    alone = "o" if len(points) < 3 else marker
    if points:
        axis.plot(*zip(*points, strict=True), style, color=colour, label=label, marker=alone, markersize=4, clip_on=False)
        axis.set_xlim(0, max(row["step"] for row in results.rows) * 1.03 or 1)


def _finish(axis: Any, title: str, y: str, x: str = "step") -> None:
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(axis="y")
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.margins(y=0.15)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend()


def _loss(axis: Any, results: Results, look: Look) -> None:
    if results.metric == "score":
        _line(axis, results, "loss", "the text", look.lines[0], ".")
        _finish(axis, "loss of the text, uphill", "nats per token")
        return
    _line(axis, results, "loss", f"training{results.loss_at}", look.lines[0])
    _line(axis, results, "eval_loss", "evaluation", look.lines[1], "o")
    _finish(axis, "loss", "loss")


def _metric(axis: Any, results: Results, look: Look) -> None:
    name = results.metric.removeprefix("eval_")
    _line(axis, results, results.metric, name, look.lines[1], "o")
    if results.metric == "score":
        kept = next(row for row in results.rows if row["kept"])
        axis.plot(
            [kept["step"]], [kept["score"]], "o", color=look.lines[2], markersize=10, fillstyle="none", mew=2, clip_on=False
        )
        _finish(axis, "score on what chooses (circle: kept)", f"minus {results.unit}" if "nats" in results.unit else "score")
        return
    if name != "accuracy":
        _finish(axis, f"evaluation {name}", name)
        return
    _line(axis, results, "eval_f1", "F1", look.lines[0], ".", "--")
    if results.baseline is not None:
        axis.axhline(results.baseline, color=look.text, linewidth=1, linestyle=":", label="most frequent label, accuracy")
    _finish(axis, "evaluation", "share")
    axis.set_ylim(-0.02, 1.02)


def _drift(axis: Any, results: Results, look: Look) -> None:
    _line(axis, results, "drift", "drift", look.lines[0], ".")
    _finish(axis, "drift of the weights", "2-norm of the change")


def _seen(axis: Any, results: Results, look: Look) -> None:
    axis.axhline(1.0, color=look.faint, linewidth=1, linestyle="--")
    _line(axis, results, "sam/seen_over_intended", "norm, applied / intended", look.lines[0])
    _line(axis, results, "sam/seen_cosine", "cosine", look.lines[1], style="--")
    _finish(axis, "SAM: what the forward pass sees of e", "1 = all of it")
    axis.set_ylim(-0.02, max(1.25, axis.get_ylim()[1]))
    axis.legend(loc="lower right")


def _kl(axis: Any, results: Results, look: Look) -> None:
    _line(axis, results, "r3f/symm_kl", "symmetric KL", look.lines[2])
    _finish(axis, "R3F: divergence under noise", "symmetric KL, nats")
    axis.set_ylim(bottom=0)
    if axis.get_ylim()[1] < 1e-2:
        axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _sharpness(axis: Any, results: Results, look: Look) -> None:
    kinds = (("own", "a batch's own gradient"), ("full", "the gradient of all"))
    for (kind, label), colour in zip(kinds, look.lines, strict=False):
        column = f"sharpness/{kind}_rise"
        _line(axis, results, column, label, colour, ".")
        rows = [row for row in results.rows if row.get(column, "") != ""]
        low, high = ([row[column] + sign * row[f"{column}_se"] for row in rows] for sign in (-1, 1))
        axis.fill_between([row["step"] for row in rows], low, high, color=colour, alpha=0.25, linewidth=0)
    _finish(axis, "rise of the loss at w + e (± standard error)", "loss")


def _times(axis: Any, results: Results, look: Look) -> None:
    names = list(results.costs)
    values = [results.costs[name].seconds * 1e3 for name in names]
    colours = [look.faint, look.lines[1], look.lines[0]]
    bars = axis.barh(range(len(names)), values, color=colours[: len(names)], height=0.6)
    axis.bar_label(bars, [milliseconds(v / 1e3) for v in values], padding=4, fontsize=9)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, max(values) * 1.25)
    axis.set_title("time of a step (median)")
    axis.set_xlabel("ms")
