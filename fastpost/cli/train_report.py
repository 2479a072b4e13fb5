"""What `fastpost train` has measured: metrics.csv, the picture of it, and one page that needs nothing beside itself."""

from __future__ import annotations

import base64
import csv
import html
import io
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

import matplotlib  # here, so that a run without it ends before it begins

from fastpost.cli.files import replace_file, replace_text

CSV_NAME, PNG_NAME, HTML_NAME = "metrics.csv", "report.png", "report.html"
MOST_ROWS = 16  # of metrics.csv on the page
Row = dict[str, Any]
Tile = tuple[str, str, str]  # what, value, aside

_FIRST = ("step", "epoch", "loss", "eval_loss", "eval_accuracy", "eval_f1", "eval_mcc", "eval_perplexity")
_LAST = ("grad_norm", "learning_rate")
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
    baseline: float | None = None
    rows: list[Row] = field(default_factory=list)
    loss_at: str = ""
    seconds: float = math.nan
    steps: int = 0

    def take(self, log_history: Sequence[Mapping[str, Any]], parts: Collection[str]) -> None:
        """One row per step at which the Trainer logged or evaluated, from what it keeps of these.

        Args:
            parts: what this run does, "sam", "r3f"; lines of others, from before it was resumed, are left out.
        """
        others = tuple(f"{part}/" for part in ("sam", "r3f", "anchor") if part not in parts)
        found: dict[int, Row] = {}
        for line in log_history:
            self.seconds = line.get("train_runtime", self.seconds)
            numbers = {k: v for k, v in line.items() if k not in _NOT_METRICS and not k.startswith(("train_", *others))}
            if set(numbers) <= {"step", "epoch"}:
                continue
            row = found.setdefault(numbers["step"], {})
            row.update(numbers)
            if self.metric == "eval_perplexity" and "eval_loss" in line:
                row["eval_perplexity"] = math.inf if line["eval_loss"] > 709 else math.exp(line["eval_loss"])
        self.rows = [found[step] for step in sorted(found)]

    @property
    def evaluated(self) -> list[Row]:
        return [row for row in self.rows if self.metric in row]

    def points(self, column: str) -> list[tuple[int, Any]]:
        """Steps and values of a column."""
        return [(row["step"], row[column]) for row in self.rows if row.get(column, "") != ""]

    def last(self, column: str) -> str:
        """The newest value of a column, as the page writes it; "" for none."""
        return shown(next((value for _, value in reversed(self.points(column))), None))

    def columns(self) -> list[str]:
        there = list(dict.fromkeys(name for row in self.rows for name in row))
        if self.metric == "score":
            return there
        middle = sorted(name for name in there if name not in (*_FIRST, *_LAST))
        return [name for name in (*_FIRST, *middle, *_LAST) if name in there]

    def write_csv(self) -> None:
        """Replaces metrics.csv as a whole; `loss` and the like are empty where a row has none."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=self.columns(), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(self.rows)
        replace_text(self.folder / CSV_NAME, text.getvalue())


def shown(value: Any) -> str:
    """A number as the page writes it: four digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def tiles_of(results: Results) -> list[Tile]:
    """The few numbers to see first."""
    found = _tiles_of_gap(results) if results.metric == "score" else _tiles_of_training(results)
    last = results.last
    if value := last("sam/seen_over_intended"):
        aside = f"cosine {last('sam/seen_cosine')}, {last('sam/skipped_steps')} steps skipped"
        found.append(("SAM, applied / intended", value, aside))
    if value := last("r3f/symm_kl"):
        found.append(("R3F, symmetric KL", value, f"task loss {last('r3f/task_loss')}"))
    if value := last("anchor/kl"):
        found.append(("anchor, divergence", value, f"task loss {last('anchor/task_loss')}"))
    if results.steps and math.isfinite(results.seconds):
        a_step = results.seconds / results.steps
        told = f"{a_step:.3g} s" if a_step >= 1 else f"{a_step * 1e3:.3g} ms"
        found.append(("time of a step", told, "with loading data and evaluating"))
    return found


def _tiles_of_training(results: Results) -> list[Tile]:
    found: list[Tile] = []
    name, pick = results.metric.removeprefix("eval_"), max if results.metric == "eval_accuracy" else min
    if results.evaluated:
        best = pick(results.evaluated, key=lambda row: row[results.metric])
        aside = f"best {shown(best[results.metric])} at step {best['step']}"
        if results.baseline is not None:
            aside += f"; always the most frequent label {shown(results.baseline)}"
        found.append((f"evaluation {name}, last", results.last(results.metric), aside))
    if value := results.last("eval_f1"):
        found.append(("evaluation F1, last", value, f"Matthews' correlation {results.last('eval_mcc')}"))
    if losses := results.points("loss"):
        aside = f"first {shown(losses[0][1])}"
        found.append((f"training loss{results.loss_at}, last logged", results.last("loss"), aside))
    return found


def _tiles_of_gap(results: Results) -> list[Tile]:
    kept, last = next(row for row in results.rows if row["kept"]), results.rows[-1]["step"]
    sign = -1 if "nats" in results.unit else 1  # nats per token are scored as their negative
    scores = " → ".join(shown(sign * kept[name]) for name in ("test_untouched", "test_kept"))
    moved = f"the first step moved {kept['moved_fraction']:.0%} of the weights" if last else "no step was made"
    return [
        (f"{results.unit} on what reports", scores, "untouched → kept"),
        ("state that was kept", f"{kept['step']} of {last}", f"stopped by {kept['stop_reason']}"),
        ("drift of that state", shown(kept["drift"]), moved),
    ]


# -- the picture ------------------------------------------------------------------------------------------------------------

_TEXT, _FAINT, _COLOURS = "#1f2430", "#c9ced8", ("#2f5fd0", "#d1660f", "#16803c")
# Title, what is up, and columns with their names; drawn where one of the columns is there.
PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("loss", "loss", {"loss": "training", "eval_loss": "evaluation"}),
    ("evaluation", "share", {"eval_accuracy": "accuracy", "eval_f1": "F1"}),
    ("evaluation perplexity", "perplexity", {"eval_perplexity": "perplexity"}),
    ("score on what chooses (circle: kept)", "score", {"score": "score"}),
    ("drift of the weights", "2-norm of the change", {"drift": "drift"}),
    (
        "SAM: what the forward pass sees of e",
        "1 = all of it",
        {"sam/seen_over_intended": "norm, applied / intended", "sam/seen_cosine": "cosine"},
    ),
    ("R3F: divergence under noise", "symmetric KL, nats", {"r3f/symm_kl": "symmetric KL"}),
    ("anchor: divergence from the reference", "nats", {"anchor/kl": "divergence"}),
    (
        "rise of the loss at w + e (± standard error)",
        "loss",
        {"sharpness/own_rise": "a batch's own gradient", "sharpness/full_rise": "the gradient of all"},
    ),
)


def draw(results: Results) -> bytes:
    """The report's picture as a PNG."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    there = set(results.columns())
    panels = [panel for panel in PANELS if there & set(panel[2])]
    across = 2 if len(panels) in (2, 4) else min(len(panels), 3)
    style: Any = {
        "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left",
        "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": _FAINT, "axes.labelcolor": _TEXT,
        "text.color": _TEXT, "xtick.color": _TEXT, "ytick.color": _TEXT, "grid.color": _FAINT, "grid.alpha": 0.5,
        "legend.frameon": False, "legend.fontsize": 8, "lines.linewidth": 1.8, "lines.markersize": 4,
    }  # fmt: skip
    with pyplot.rc_context(style):
        size = (4.1 * across, 3.0 * -(-len(panels) // across))
        figure, axes = pyplot.subplots(-(-len(panels) // across), across, figsize=size, layout="constrained", squeeze=False)
        layout: Any = figure.get_layout_engine()
        layout.set(w_pad=0.12, h_pad=0.12)
        for axis, panel in zip(axes.flat, panels, strict=False):
            _draw_panel(axis, results, *panel)
        for axis in axes.flat[len(panels) :]:
            axis.axis("off")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=150)
        pyplot.close(figure)
    return picture.getvalue()


def _draw_panel(axis: Any, results: Results, title: str, what: str, columns: Mapping[str, str]) -> None:
    for (column, name), colour, line in zip(columns.items(), _COLOURS, ("-", "--"), strict=False):
        points, label = results.points(column), name + (results.loss_at if column == "loss" else "")
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        marker = "o" if len(points) < 3 else "." if len(points) < 30 and column != "loss" else ""
        axis.plot(steps, values, line, color=colour, label=label, marker=marker, clip_on=False)
        if errors := [error for _, error in results.points(f"{column}_se")]:
            low, high = ([v + sign * e for v, e in zip(values, errors, strict=True)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
    if "eval_accuracy" in columns and results.baseline is not None:
        axis.axhline(results.baseline, color=_TEXT, linewidth=1, linestyle=":", label="most frequent label, accuracy")
    if "sam/seen_over_intended" in columns:
        axis.axhline(1.0, color=_FAINT, linewidth=1, linestyle="--", zorder=0)
    if "score" in columns:
        kept = next(row for row in results.rows if row["kept"])
        circle = {"color": _COLOURS[2], "markersize": 10, "fillstyle": "none", "markeredgewidth": 2}
        axis.plot([kept["step"]], [kept["score"]], "o", clip_on=False, **circle)
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.set_ylabel(f"minus {results.unit}" if what == "score" and "nats" in results.unit else what)
    axis.grid(axis="y")
    axis.ticklabel_format(axis="y", useOffset=False)
    axis.margins(y=0.15)
    axis.set_xlim(0, max(row["step"] for row in results.rows) * 1.03 or 1)
    axis.xaxis.get_major_locator().set_params(integer=True)
    if "eval_accuracy" in columns:
        axis.set_ylim(-0.02, 1.02)
    if "sam/seen_over_intended" in columns:
        axis.set_ylim(-0.02, max(1.25, axis.get_ylim()[1]))
    if "nats" in what and "score" not in columns:  # divergences
        axis.set_ylim(bottom=0)
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
    picked = results.evaluated or results.rows
    if len(picked) > MOST_ROWS:
        every = (len(picked) - 1) / (MOST_ROWS - 1)
        picked = [picked[round(k * every)] for k in range(MOST_ROWS)]
    if results.rows and results.rows[-1] not in picked:
        picked = [*picked, results.rows[-1]]
    heads = [n for n in results.columns() if n not in _NOT_SHOWN and any(row.get(n, "") != "" for row in picked)]
    tiles = (
        f'<div class="tile"><div class="what">{html.escape(what)}</div><div class="value">{html.escape(value)}</div>'
        f'<div class="aside">{html.escape(aside)}</div></div>'
        for what, value, aside in tiles_of(results)
    )
    return Template((Path(__file__).parent / "train_report.html").read_text(encoding="utf-8")).substitute(
        method=html.escape(results.method),
        lead=html.escape(" · ".join(value for _, value in results.facts[:2])),
        tiles="".join(tiles),
        picture="data:image/png;base64," + base64.b64encode(picture).decode(),
        metrics=_table("metrics", ([shown(row.get(name)) for name in heads] for row in picked), heads),
        shown=len(picked),
        rows=len(results.rows),
        options=_table("options", ((f"--{name}", shown(value)) for name, value in results.changed.items())),
        facts=_table("facts", results.facts),
        command=html.escape(results.command),
    )


def _table(name: str, rows: Iterable[Sequence[str]], heads: Sequence[str] = ()) -> str:
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    broken = (html.escape(cell).replace("/", "/<wbr>").replace("_", "_<wbr>") for cell in heads)
    head = "<thead><tr>" + "".join(f"<th>{cell}</th>" for cell in broken) + "</tr></thead>" if heads else ""
    return f'<table id="{name}"{"" if heads else " class=words"}>{head}<tbody>{body}</tbody></table>'
