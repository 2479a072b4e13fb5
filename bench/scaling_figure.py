"""The figure of docs/benchmarks.md: every curve of `bench/scaling.py`, from the CSV of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastpost.bench import scaling, table

DATA = Path(__file__).parent / "data"
FILE = "cpu-scaling.csv"
FLOOR = "as many bytes, copied by torch"
# Of each curve: what its sizes count, what its time is divided by, and how many of that make one unit of the axis.
AXES: dict[str, tuple[str, str, float]] = {
    "scaling_parameters": ("parameters", "ns per parameter", 1e6),
    "scaling_tensors": ("tensors of 1 KB", "µs per tensor", 1e3),
    "scaling_vocabulary": ("classes", "ns per logit of a stream", 1e6),
    "scaling_threads": ("threads", "ms", 1.0),
    "scaling_processes": ("processes", "ms per step", 1.0),
}
Points = dict[str, dict[int, float]]


def curves(folder: Path = DATA) -> dict[str, Points]:
    """Of each curve that was measured: by contender, its time in the axis' unit at each size; floors among them."""
    path = folder / FILE
    rows = [row for row in table.read(path) if row["contender"]] if path.exists() else []
    found: dict[str, Points] = {}
    for name, title in scaling.CURVES.items():
        points: Points = {}
        for row in (row for row in rows if row["case"] == title and row["median_ms"]):
            size = int(row["shape"].replace(",", ""))
            unit = AXES[name][2] / per(name, size)
            time = float(row["median_ms"])
            if row["contender"] != scaling.COPY:
                points.setdefault(row["contender"], {})[size] = time * unit
            if row["contender"] == scaling.OURS:
                points.setdefault(FLOOR, {})[size] = time * float(row["fraction_of_copy"]) * unit
        if points:
            found[name] = points
    return found


def per(name: str, size: int) -> int:
    """What the time at a size is divided by."""
    return {"scaling_vocabulary": scaling.PAIRS // size * size, "scaling_threads": 1, "scaling_processes": 1}.get(name, size)


def draw(folder: Path = DATA) -> Any:
    """One panel for each curve; both axes logarithmic where sizes span orders of magnitude."""
    from matplotlib import pyplot

    found = curves(folder)
    figure, axes = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.6), layout="constrained", squeeze=False)
    for axis, (name, points) in zip(axes[0], found.items(), strict=True):
        for contender, times in points.items():
            line = {"color": "grey", "linestyle": "--"} if contender == FLOOR else {"marker": "o", "markersize": 3}
            axis.plot(*zip(*sorted(times.items()), strict=True), label=contender, linewidth=1.2, **line)
        sizes, unit, _ = AXES[name]
        if name in ("scaling_threads", "scaling_processes"):
            axis.set_xticks(sorted({size for times in points.values() for size in times}))
            axis.set_ylim(bottom=0)
        else:
            axis.set_xscale("log")
            axis.set_yscale("log")
        axis.set_xlabel(sizes)
        axis.set_ylabel(unit)
        axis.set_title(scaling.CURVES[name].rpartition(", by")[0], fontsize="small")
        axis.legend(fontsize="x-small")
    return figure


FIGURES = {"scaling": (draw, curves)}
