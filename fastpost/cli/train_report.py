"""What `fastpost train` has measured: metrics.csv, the picture of it, and one page that needs nothing beside itself."""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib  # here, so that a run without it ends before it begins

from fastpost.cli.files import replace_file, replace_text

CSV_NAME, PNG_NAME, HTML_NAME = "metrics.csv", "report.png", "report.html"
MOST_ROWS = 16  # of metrics.csv on the page
Row = dict[str, Any]
Tile = tuple[str, str, str]  # what, value, aside

_FIRST = ("step", "epoch", "loss", "eval_loss", "eval_accuracy", "eval_f1", "eval_mcc", "eval_perplexity")
_NOT_METRICS = ("total_flos", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")
_NOT_SHOWN = ("epoch", "learning_rate", "tokens", "kept", "stop_reason")


@dataclass
class Results:
    """A run, for the report.

    Attributes:
        method, command: as typed, without secrets.
        changed: options that differ from their defaults, without secrets.
        facts: what else was run on what, in pairs of words.
        metric: column of what is evaluated: "eval_accuracy", "eval_perplexity", "eval_loss", or "score" (GAP).
        unit: what a score is (GAP).
        parts: what the run does, "sam", "r3f", "anchor". A resumed run may have rows of a part that it no longer does.
        baseline: accuracy of always saying the most frequent label; None where there are no labels.
        rows: of metrics.csv.
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
    parts: Collection[str] = ()
    baseline: float | None = None
    rows: list[Row] = field(default_factory=list)
    loss_at: str = ""
    seconds: float = math.nan
    steps: int = 0

    def take(self, log_history: Sequence[Mapping[str, Any]]) -> None:
        """One row per step at which the Trainer logged or evaluated, from what it keeps of these."""
        found: dict[int, Row] = {}
        for line in log_history:
            self.seconds = line.get("train_runtime", self.seconds)
            numbers = {k: v for k, v in line.items() if k not in _NOT_METRICS and not k.startswith("train_")}
            if set(numbers) <= {"step", "epoch"}:
                continue
            row = found.setdefault(numbers["step"], {})
            row.update(numbers)
            if self.metric == "eval_perplexity" and "eval_loss" in line:
                row["eval_perplexity"] = math.inf if line["eval_loss"] > 709 else math.exp(line["eval_loss"])
        # The names in order: a resumed run reads its lines from a state that is written so.
        self.rows = [dict(sorted(found[step].items())) for step in sorted(found)]

    def points(self, column: str) -> list[tuple[int, Any]]:
        """Steps and values of a column."""
        return [(row["step"], row[column]) for row in self.rows if row.get(column, "") != ""]

    def last(self, column: str) -> str:
        """The newest value of a column, as the page writes it; "" for none."""
        return shown(next((value for _, value in reversed(self.points(column))), ""))

    def kept(self) -> Row:
        """The state that GAP kept."""
        return next(row for row in self.rows if row["kept"])

    def columns(self) -> list[str]:
        there = list(dict.fromkeys(name for row in self.rows for name in row))
        return [name for name in _FIRST if name in there] + [name for name in there if name not in _FIRST]

    def write_csv(self) -> None:
        """Replaces metrics.csv as a whole; `loss` and the like are empty where a row has none."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=self.columns(), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        replace_text(self.folder / CSV_NAME, text.getvalue())


def shown(value: Any) -> str:
    """A number as the page writes it: four digits; "" for None."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def tiles_of(results: Results) -> list[Tile]:
    """The few numbers to see first."""
    found = _tiles_of_gap(results) if results.metric == "score" else _tiles_of_training(results)
    if results.steps and math.isfinite(results.seconds):
        a_step = results.seconds / results.steps
        told = f"{a_step:.3g} s" if a_step >= 1 else f"{a_step * 1e3:.3g} ms"
        found.append(("time of a step", told, "with loading data and evaluating"))
    return found


def _tiles_of_training(results: Results) -> list[Tile]:
    last = results.last
    best = (max if results.metric == "eval_accuracy" else min)(
        results.points(results.metric), key=lambda p: p[1], default=None
    )
    evaluated = "" if best is None else f"best {shown(best[1])} at step {best[0]}"
    if results.baseline is not None:
        evaluated += f"; always the most frequent label {shown(results.baseline)}"
    losses = results.points("loss")
    tiles = [
        (f"evaluation {results.metric.removeprefix('eval_')}, last", last(results.metric), evaluated),
        ("evaluation F1, last", last("eval_f1"), f"Matthews' correlation {last('eval_mcc')}"),
        (f"training loss{results.loss_at}, last logged", last("loss"), f"first {shown(losses[0][1])}" if losses else ""),
    ]
    of_parts = {
        "sam": (
            "SAM, applied / intended",
            last("sam/seen_over_intended"),
            f"cosine {last('sam/seen_cosine')}, {last('sam/skipped_steps')} steps skipped",
        ),
        "r3f": ("R3F, symmetric KL", last("r3f/symm_kl"), f"task loss {last('r3f/task_loss')}"),
        "anchor": ("anchor, divergence", last("anchor/kl"), f"task loss {last('anchor/task_loss')}"),
    }
    tiles += [tile for part, tile in of_parts.items() if part in results.parts]
    return [tile for tile in tiles if tile[1]]


def _tiles_of_gap(results: Results) -> list[Tile]:
    kept, last = results.kept(), results.rows[-1]["step"]
    sign = -1 if "nats" in results.unit else 1  # nats per token are scored as their negative
    scores = " → ".join(shown(sign * kept[name]) for name in ("test_untouched", "test_kept"))
    moved = f"the first step moved {kept['moved_fraction']:.0%} of the weights" if last else "no step was made"
    return [
        (f"{results.unit} on what reports", scores, "untouched → kept"),
        ("state that was kept", f"{kept['step']} of {last}", f"stopped by {kept['stop_reason']}"),
        ("drift of that state", shown(kept["drift"]), moved),
    ]


# -- the picture ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """A part of the picture, drawn where one of its columns is there.

    Attributes:
        up: what the axis upwards is, low its least value, high its greatest or more; None: by the values.
        columns: with their names.
    """

    title: str
    up: str
    columns: Mapping[str, str]
    low: float | None = None
    high: float | None = None


PANELS = (
    Panel("loss", "loss", {"loss": "training", "eval_loss": "evaluation"}),
    Panel("evaluation", "share", {"eval_accuracy": "accuracy", "eval_f1": "F1"}, -0.02, 1.02),
    Panel("evaluation perplexity", "perplexity", {"eval_perplexity": "perplexity"}),
    Panel("score on what chooses (circle: kept)", "score", {"score": "score"}),
    Panel("drift of the weights", "2-norm of the change", {"drift": "drift"}),
    Panel(
        "SAM: what the forward pass sees of e",
        "1 = all of it",
        {"sam/seen_over_intended": "norm, applied / intended", "sam/seen_cosine": "cosine"},
        -0.02,
        1.25,
    ),
    Panel("R3F: divergence under noise", "symmetric KL, nats", {"r3f/symm_kl": "symmetric KL"}, 0),
    Panel("anchor: divergence from the reference", "nats", {"anchor/kl": "divergence"}, 0),
    Panel(
        "rise of the loss at w + e (± standard error)",
        "loss",
        {"sharpness/own_rise": "a batch's own gradient", "sharpness/full_rise": "the gradient of all"},
    ),
)
_TEXT, _COLOURS = "#1f2430", ("#2f5fd0", "#d1660f", "#16803c")
_STYLE: dict[Any, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.fontsize": 8,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.grid.axis": "y", "axes.ymargin": 0.15,
    "axes.formatter.useoffset": False, "grid.alpha": 0.5, "text.color": _TEXT, "legend.frameon": False,
}  # fmt: skip


def draw(results: Results) -> bytes:
    """The report's picture as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    there = set(results.columns())
    panels = [panel for panel in PANELS if there & set(panel.columns)]
    across = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    down = -(-len(panels) // across)
    with pyplot.rc_context(_STYLE):
        size = (4.1 * across, 3.0 * down)
        figure, axes = pyplot.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.12, h_pad=0.12)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, results, panel)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        pyplot.close(figure)
    return picture.getvalue()


def _draw_panel(axis: Any, results: Results, panel: Panel) -> None:
    for (column, name), colour, line in zip(panel.columns.items(), _COLOURS, ("-", "--"), strict=False):
        points, label = results.points(column), name + (results.loss_at if column == "loss" else "")
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 3 else "." if len(points) < 30 and column != "loss" else ""
        axis.plot(steps, values, line, color=colour, label=label, marker=marker, clip_on=False)
        if errors := dict(results.points(f"{column}_se")):  # a value may be without one
            low, high = ([v + sign * errors.get(step, math.nan) for step, v in points] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
    if "eval_accuracy" in panel.columns and results.baseline is not None:
        axis.axhline(results.baseline, color=_TEXT, linewidth=1, linestyle=":", label="most frequent label, accuracy")
    if "score" in panel.columns:
        kept = results.kept()
        axis.plot(kept["step"], kept["score"], "o", color=_COLOURS[2], markersize=10, fillstyle="none", clip_on=False)
    is_in_nats = panel.up == "score" and "nats" in results.unit
    axis.set(title=panel.title, xlabel="step", ylabel=f"minus {results.unit}" if is_in_nats else panel.up)
    axis.set_xlim(0, max(row["step"] for row in results.rows) * 1.03 or 1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(panel.low, None if panel.high is None else max(panel.high, axis.get_ylim()[1]))
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend()


# -- the page ---------------------------------------------------------------------------------------------------------------


def write(results: Results) -> None:
    """Writes metrics.csv, report.png and report.html."""
    results.write_csv()
    picture = draw(results)
    replace_file(results.folder / PNG_NAME, lambda beside: beside.write_bytes(picture))
    replace_text(results.folder / HTML_NAME, build(results, picture))


def build(results: Results, picture: bytes) -> str:
    """The page, on a light and on a dark ground."""
    picked = [row for row in results.rows if results.metric in row] or results.rows
    if len(picked) > MOST_ROWS:
        every = (len(picked) - 1) / (MOST_ROWS - 1)
        picked = [picked[round(k * every)] for k in range(MOST_ROWS)]
    if results.rows and results.rows[-1] not in picked:
        picked = [*picked, results.rows[-1]]
    heads = [n for n in results.columns() if n not in _NOT_SHOWN and any(row.get(n, "") != "" for row in picked)]
    page = jinja2.Template((Path(__file__).parent / "train_report.html").read_text(encoding="utf-8"), autoescape=True)
    filled: str = page.render(
        results=results,
        tiles=tiles_of(results),
        picture=base64.b64encode(picture).decode(),
        heads=heads,
        metrics=[[shown(row.get(name, "")) for name in heads] for row in picked],
        options=[(f"--{name}", shown(value)) for name, value in results.changed.items()],
    )
    return filled
