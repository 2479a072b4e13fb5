"""The figures of docs/studies.md, from the same CSV files as its tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastpost.bench.studies import analysis, methods
from fastpost.bench.studies.verdicts import LANGUAGE_NAMES, NAMES, SPLITS, place_name

Figures = dict[str, tuple[Callable[[Path], Any], Callable[..., Any]]]
# Without what would differ from one drawing to the next.
METADATA = {"Software": None, "Creation Time": None}


def draw(target: Path, folder: Path = analysis.DATA, which: Figures | None = None) -> list[Path]:
    """Writes the figures whose data are there into a folder; their paths. By default those of the studies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for name, (make, is_drawn) in (which or FIGURES).items():
        if is_drawn(folder):
            figure = make(folder)
            figure.savefig(target / f"{name}.png", dpi=110, metadata=METADATA)
            pyplot.close(figure)
            paths.append(target / f"{name}.png")
    return paths


def climbed(folder: Path = analysis.DATA) -> list[analysis.Climb]:
    return analysis.climbs(analysis.rows_of("gap", folder))


def gap(folder: Path) -> Any:
    """Both scores against the state: every text's ascent, and the means of the controls."""
    from matplotlib import pyplot

    found = climbed(folder)
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    corpora = list(dict.fromkeys(climb.corpus for climb in found))
    for axis, (score, title) in zip(
        axes, (("dialogue", "dialogues, nats per token"), ("pubmed", "PubMedQA, nats")), strict=True
    ):
        for climb in found:
            states = sorted(climb.states)
            values = [float(np.mean(climb.change(score, state))) for state in states]
            colour = f"C{corpora.index(climb.corpus)}"
            label = climb.corpus if climb is next(c for c in found if c.corpus == climb.corpus) else None
            axis.plot(states, values, color=colour, linewidth=1, label=label)
        for control, marker in (("random", "x"), ("mle", "^")):
            points: dict[int, list[float]] = {}
            for climb in found:
                for state, row in climb.controls.get(control, {}).items():
                    change = np.subtract(row["examples"][score], climb.states[0]["examples"][score])
                    points.setdefault(state, []).append(float(change.mean()))
            if points:
                label = {"random": "random direction", "mle": "downhill"}[control]
                axis.plot(
                    *zip(*((k, np.mean(v)) for k, v in sorted(points.items())), strict=True), f"k{marker}", label=label
                )
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set_title(title)
        axis.set_xlabel("steps")
    axes[0].set_ylabel("change against the untouched model")
    axes[1].legend(fontsize="small")
    return figure


def gains(folder: Path = analysis.DATA) -> dict[str, dict[str, analysis.Estimate]]:
    """Of each place, by method, the difference to AdamW where it is known."""
    rows = analysis.rows_of("glue", folder)
    others = [method for method in NAMES if method != methods.PLAIN]
    found = {
        place: {m: e for m in others if (e := analysis.gain(rows, place, m)) is not None} for place in analysis.places(rows)
    }
    return {place: by_method for place, by_method in found.items() if by_method}


def intervals(axis: Any, found: dict[str, analysis.Estimate], title: str, unit: str) -> None:
    """A line and a point for each name, from the top down."""
    for y, e in enumerate(reversed(found.values())):
        axis.plot([e.low, e.high], [y, y], color="C0", linewidth=1)
        axis.plot(e.mean, y, "o", color="C0")
    axis.set_yticks(range(len(found)), list(reversed(found)))
    axis.axvline(0, color="grey", linewidth=0.5)
    axis.set_title(title, fontsize="small")
    axis.set_xlabel(unit, fontsize="small")


def glue(folder: Path) -> Any:
    """Every method's difference to AdamW, with its interval, per task."""
    from matplotlib import pyplot

    found = gains(folder)
    figure, axes = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 3.2), layout="constrained", squeeze=False)
    for axis, (place, of) in zip(axes[0], found.items(), strict=True):
        intervals(axis, {NAMES[method]: e for method, e in of.items()}, place_name(place), "points more than AdamW")
    return figure


def losses(folder: Path = analysis.DATA) -> dict[str, dict[str, analysis.Estimate]]:
    """Of the `lm` study: per text, by how much the loss of each method that keeps float32 weights exceeds AdamW's."""
    rows = analysis.rows_of("lm", folder)
    kept = [m for m in LANGUAGE_NAMES if m != methods.PLAIN and ("bf16" not in m or m.endswith("masters"))]
    found = {
        text: {m: e for m in kept if (e := analysis.lower_loss(rows, split, methods.PLAIN, m)) is not None}
        for split, text in SPLITS.items()
    }
    return {text: by_method for text, by_method in found.items() if by_method}


def language_models(folder: Path) -> Any:
    """Every method's loss less AdamW's, with its interval, per text."""
    from matplotlib import pyplot

    found = losses(folder)
    figure, axes = pyplot.subplots(1, len(found), figsize=(10.5, 2.8), layout="constrained", squeeze=False, sharey=True)
    for axis, (text, of) in zip(axes[0], found.items(), strict=True):
        named = {LANGUAGE_NAMES[method].replace(", bfloat16 weights, ", ", bfloat16,\n"): e for method, e in of.items()}
        intervals(axis, named, text, "loss less AdamW's, nats per token")
    return figure


# How each figure is drawn, and whether there is anything to draw.
FIGURES: Figures = {
    "studies-gap": (gap, climbed),
    "studies-glue": (glue, gains),
    "studies-lm": (language_models, losses),
}
