"""Pictures of commands and studies: legends cover nothing, steps are whole numbers, curves that coincide can be seen."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot

from fastpost.bench.studies import compare, gap_sweep, probe, results
from fastpost.cli import train_report


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The figures that were drawn, laid out."""
    found: list[Any] = []

    def keep(figure: Any) -> None:
        figure.canvas.draw()
        found.append(figure)

    close = pyplot.close
    monkeypatch.setattr(pyplot, "close", keep)
    yield found
    for figure in found:
        close(figure)


def compared(folder: Path, curves: list[list[float]]) -> results.Results:
    made = results.Results(folder, "compare", compare.COLUMNS, {"task": "rte", "model": "m", "test_examples": 48})
    for number, method in enumerate(("adamw", "sam", "asam", "r3f", "r4f")):
        for seed in (0, 1):
            made.add(kind="run", method=method, seed=seed, metric="accuracy", value=0.5 + 0.03 * number + 0.1 * seed)
        for side, seconds in (("published", 0.1), ("fastpost", 0.08)):
            made.add(kind="step", method=method, side=side, seconds=seconds, peak_mib=100)
    for seed, curve in enumerate(curves):
        made.add(
            kind="run", method="gap", seed=seed, metric="perplexity", value=50, best_step=1, validation_perplexity=curve
        )
    return made


def whole(ticks: Any) -> bool:
    return all(float(tick).is_integer() for tick in ticks)


def test_compare(tmp_path, figures) -> None:
    compare.plot(compared(tmp_path, [[50, 49.9, 50.3], [50, 49.9, 50.3], [50, 50.1, 50.2]]))
    (figure,) = figures
    accuracy, times, gap = figure.axes
    for axis in (accuracy, times, gap):
        legend = axis.get_legend().get_window_extent()
        assert not legend.overlaps(axis.get_window_extent())
        assert figure.bbox.contains(*legend.min)
        assert figure.bbox.contains(*legend.max)
        assert all(not legend.overlaps(label.get_window_extent()) for label in axis.get_xticklabels())
    assert whole(gap.get_xticks())
    one, other, _ = (line for line in gap.lines if len(line.get_xdata()) > 1)
    assert one.get_linewidth() > other.get_linewidth() + 1  # the second lies on the first
    assert one.get_zorder() < other.get_zorder()
    assert one.get_linestyle() != other.get_linestyle()


def test_a_single_step_of_gap_has_no_half_steps(tmp_path, figures) -> None:
    compare.plot(compared(tmp_path, [[50, 49.9]]))
    assert whole(figures[0].axes[2].get_xticks())


@pytest.mark.parametrize("steps", [2, 3, 16])
def test_gap_sweep(tmp_path, figures, steps) -> None:
    rows = [
        {"seed": 0, "text": f"{name}/{k}", "step": step, "drift": 0.1 * step, "score": -1.0 - step}
        for name in ("code", "prose")
        for k in range(2)
        for step in range(steps)
    ]
    gap_sweep.plot(rows, "nats per token", tmp_path / "x.png")
    (figure,) = figures
    by_step, by_drift = figure.axes
    assert whole(by_step.get_xticks())
    assert not by_step.get_legend().get_window_extent().overlaps(by_step.get_window_extent())
    label = by_step.yaxis.label.get_window_extent()
    assert figure.bbox.contains(*label.min)
    assert figure.bbox.contains(*label.max)
    widths = {line.get_color(): line.get_linewidth() for line in by_drift.lines if len(line.get_xdata()) == steps}
    assert widths["C0"] > widths["C1"] + 1


def test_probe(tmp_path, figures) -> None:
    made = results.Results(tmp_path, "probe", probe.COLUMNS)
    for task in ("cola", "rte"):
        for method, stage in (("pretrained", 0), ("adamw", 1), ("adamw", 2), ("r3f", 1), ("r3f", 2)):
            made.add(method=method, seed=0, stage=stage, task=task, kind="probe", accuracy=0.6, majority=0.5, test_size=100)
    probe.plot(probe.Found(made, ["cola", "rte"], ["cola", "rte"], ["adamw", "r3f"]))
    for axis in figures[0].axes:
        legend = axis.get_legend()
        assert legend is None or not legend.get_window_extent().overlaps(axis.get_window_extent())
    assert figures[0].axes[0].get_legend() is not None


def test_train_shows_f1_and_the_baseline_beside_accuracy(tmp_path, figures) -> None:
    made = train_report.Results(tmp_path, "sam", "c", {}, [], "eval_accuracy", baseline=0.4)
    for step in (1, 2, 3):
        made.rows.append(
            {"step": step, "loss": 1.0, "eval_loss": 1.0, "eval_accuracy": 0.5, "eval_f1": 0.5, "eval_mcc": 0.0}
        )
    train_report.draw(made)
    accuracy, f1, baseline = figures[0].axes[1].lines
    assert accuracy.get_linestyle() != f1.get_linestyle()
    assert list(baseline.get_ydata()) == [0.4, 0.4]
    labels = [text.get_text() for text in figures[0].axes[1].get_legend().get_texts()]
    assert labels == ["accuracy", "F1", "most frequent label, accuracy"]
    assert all(whole(axis.get_xticks()) for axis in figures[0].axes[:2])


def test_sharpness_has_a_band_where_it_has_an_error(tmp_path, figures) -> None:
    """A measurement on one batch has none, as in a run that goes on with other data."""
    made = train_report.Results(tmp_path, "sam", "c", {}, [], "eval_loss")
    for step, error in ((1, {}), (2, {"sharpness/own_rise_se": 0.25}), (3, {"sharpness/own_rise_se": 0.5})):
        made.rows.append({"step": step, "sharpness/own_rise": 1.0, **error})
    train_report.draw(made)
    (band,) = figures[0].axes[0].collections
    assert {tuple(point) for path in band.get_paths() for point in path.vertices} == {
        (2, 0.75),
        (2, 1.25),
        (3, 0.5),
        (3, 1.5),
    }


def test_a_cell_of_the_page() -> None:
    values = (None, "", 0.123456, 12, True, float("inf"), "sam")
    assert [train_report.shown(value) for value in values] == ["", "", "0.1235", "12", "True", "inf", "sam"]
