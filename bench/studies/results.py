"""What the demo, compare, probe and gap-sweep share: results on disk, a table to show, one function that draws."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpost.cli.files import replace_file, replace_text

Row = dict[str, Any]


class Results:
    """Rows of results in a folder. Every addition replaces NAME.csv and NAME.json as a whole, so a kill loses no row.

    Args:
        folder: is made.
        name: of the files.
        columns: of the CSV file; what else a row holds (lists, say) is in the JSON file alone.
        about: what made the rows: options, versions, sizes.
    """

    def __init__(self, folder: Path, name: str, columns: Sequence[str], about: Row | None = None) -> None:
        self.folder, self.columns, self.about = folder, tuple(columns), about or {}
        self.csv, self.json, self.png = (folder / f"{name}.{ending}" for ending in ("csv", "json", "png"))
        self.rows: list[Row] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        self.save()

    def save(self) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: "" if value is None else value for name, value in row.items()} for row in self.rows)
        replace_text(self.csv, text.getvalue())
        replace_text(self.json, json.dumps({"about": self.about, "rows": self.rows}, indent=1))

    def where(self, **equal: Any) -> list[Row]:
        """The rows that hold these values, in their order."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in equal.items())]

    def values(self, column: str, **equal: Any) -> list[Any]:
        return [row[column] for row in self.where(**equal)]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (NaN for one value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def share_error(share: float, size: int) -> float:
    """The standard error of a share of `size` examples."""
    return math.sqrt(share * (1 - share) / size)


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", left: int = 1) -> Any:
    """A rich table; all columns but the first `left` are aligned to the right."""
    from rich.table import Table

    shown = Table(title=title, caption=caption or None)
    for k, name in enumerate(heads):
        shown.add_column(name, justify="left" if k < left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


# -- drawing ----------------------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """Something to draw.

    Attributes:
        y, x: values; x is 0, 1, ... by default.
        label: for the legend; "" for none.
        colour: number of a colour, or a name.
        line: style of the line between points, "" for none. marker: of the points, "" for none.
        error: half the height of error bars.
        is_bar: bars of this width in place of points.
        look: further options of matplotlib's.
    """

    y: Sequence[float]
    x: Sequence[float] | None = None
    label: str = ""
    colour: int | str = 0
    line: str = "-"
    marker: str = ""
    error: Sequence[float] | None = None
    is_bar: float = 0.0
    look: dict[str, Any] = field(default_factory=dict)


@dataclass
class Panel:
    """One pair of axes.

    Attributes:
        ticks: names along x, at 0, 1, ...
        notes: (x, y, text) to write above a point.
        level: a horizontal line, with its name.
        steps: ticks of x at whole numbers only.
        is_log: y is logarithmic.
    """

    title: str
    series: Sequence[Series]
    x: str = ""
    y: str = ""
    ticks: Sequence[str] = ()
    notes: Sequence[tuple[float, float, str]] = ()
    level: tuple[float, str] | None = None
    steps: bool = False
    is_log: bool = False


def plot(path: Path, panels: Sequence[Panel], title: str = "", width: float = 4.9, across: int = 4) -> Path:
    """Draws the panels side by side, `across` of them in a row at most; legends lie below, where they cover nothing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = max(min(len(panels), across), 1)
    rows = max(-(-len(panels) // columns), 1)
    size = (width * columns, 4.7 * rows)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        _draw(axis, panel)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda temporary: figure.savefig(temporary, dpi=130))
    pyplot.close(figure)
    return path


def _draw(axis: Any, panel: Panel) -> None:
    from matplotlib.ticker import MaxNLocator

    for one in panel.series:
        colour = f"C{one.colour}" if isinstance(one.colour, int) else one.colour
        x = list(range(len(one.y))) if one.x is None else one.x
        if one.is_bar:
            axis.bar(x, one.y, one.is_bar, color=colour, label=one.label or None, yerr=one.error, capsize=3, **one.look)
        else:
            style = {"color": colour, "linestyle": one.line or "none", "marker": one.marker, "label": one.label or None}
            axis.errorbar(x, one.y, yerr=one.error, capsize=3, **{**style, **one.look})
    if panel.level is not None:
        axis.axhline(panel.level[0], color="0.6", linestyle=":", label=panel.level[1] or None)
    if panel.is_log:
        axis.set_yscale("log")
    for x, y, text in panel.notes:
        axis.annotate(text, (x, y), ha="center", va="bottom", fontsize=8, xytext=(0, 2), textcoords="offset points")
    if panel.ticks:
        axis.set_xticks(range(len(panel.ticks)), panel.ticks)
        axis.set_xlim(-0.6, len(panel.ticks) - 0.4)
    elif panel.steps:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not panel.is_log:
        axis.ticklabel_format(axis="y", useOffset=False)
    axis.set_title(panel.title)
    axis.set_xlabel(panel.x)
    axis.set_ylabel(panel.y)
    axis.grid(axis="y", alpha=0.3)
    axis.margins(y=0.12)
    labels = axis.get_legend_handles_labels()[1]
    if labels:
        lower = -0.15 if panel.x or any("\n" in tick for tick in panel.ticks) else -0.1
        axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, lower), ncols=1 + (len(labels) > 2))


def distinct(number: int, count: int, widest: float = 3.8, dashes: bool = True) -> dict[str, Any]:
    """How to draw one of several curves that may coincide: the first are wide, the last narrow and on top."""
    wide = 1.4 if count == 1 else widest - (widest - 1) * number / (count - 1)
    line = ("-", "--", "-.", ":")[number % 4] if dashes else "-"
    return {"linewidth": wide, "linestyle": line, "zorder": 2 + number, "alpha": 0.8 if dashes else 0.6}


# -- a program's console ----------------------------------------------------------------------------------------------------


def console(width: int = 120) -> Any:
    """A rich console; in a file or a log as wide as tables want."""
    from rich.console import Console

    found = Console()
    return found if found.is_terminal else Console(width=width)


class Bars:
    """Progress bars of a program: one for the work in hand, and where `total` is given one for all of it."""

    def __init__(self, console: Any, total: int | None = None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console)
        self._current = self._progress.add_task("", total=1)
        self._all = None if total is None else self._progress.add_task("all", total=total)

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()

    def start(self, what: str, total: int) -> None:
        self._progress.reset(self._current, description=what, total=total)

    def advance(self, done: int, *_: object) -> None:
        self._progress.update(self._current, completed=done)

    def finish(self) -> None:
        """One more part of all is done."""
        if self._all is not None:
            self._progress.advance(self._all)

    def say(self, text: str) -> None:
        self._progress.console.print(text, markup=False)
