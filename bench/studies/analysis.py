"""What the rows of the studies say: paired differences with their errors, and nothing that runs a model.

A difference is taken within pairs: the same seed, the same text, the same examples. Two things could have come out
otherwise: the runs (seeds, texts) and the examples. Its error is the larger of the two, and its interval spans both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from fastpost.bench.studies import methods, records
from fastpost.bench.studies.records import Row

DATA = Path(__file__).parent.parent / "data"
CONFIRMED, NOT_SEEN, OPPOSITE, NOT_RUN, NO_SIGNAL = "confirmed", "not seen", "opposite", "not run", "no signal"
CHOOSING = "choose_"  # what scores that choose are called by; none of them is reported


def files_of(study: str, folder: Path = DATA) -> list[Path]:
    """A study's CSV files: one, or one of each set-up, such as studies-glue-h200.csv next to studies-glue.csv."""
    return sorted(folder.glob(f"studies-{study}.csv")) + sorted(folder.glob(f"studies-{study}-*.csv"))


def rows_of(study: str, folder: Path = DATA) -> list[Row]:
    """The rows of a study's CSV files; none where it was not run.

    Raises:
        ValueError: two files hold reported runs of the same place.
    """
    rows: list[Row] = []
    for path in files_of(study, folder):
        more = records.read(path)
        both = {row["block"] for row in rows} & {row["block"] for row in more if row["block"].startswith("report/")}
        if both:
            raise ValueError(f"{path}: another file of {study} reports {', '.join(sorted(both))} as well; keep one of them")
        rows += more
    return rows


@dataclass(frozen=True)
class Estimate:
    """A mean difference over pairs of runs.

    Attributes:
        mean, error: and its standard error.
        low, high: a 95 % interval.
        runs: pairs.
        examples: that every run was scored on; 0 where a score is not a mean over examples.
    """

    mean: float
    error: float
    low: float
    high: float
    runs: int
    examples: int = 0

    def against(self, zero: float = 0.0) -> str:
        """What it says of the claim that it is above `zero`."""
        if self.low > zero:
            return CONFIRMED
        return OPPOSITE if self.high < zero else NOT_SEEN

    @property
    def n(self) -> str:
        return f"{self.runs} x {self.examples}" if self.examples else str(self.runs)


def estimate(differences: Sequence[Any]) -> Estimate | None:
    """Of differences per run and example (runs x examples), or per run; None for fewer than two runs.

    Over runs: Student's interval of their means. Over examples, of each one's mean over runs: the bootstrap's interval, and
    Student's, since the bootstrap's is too narrow where examples are few.
    """
    table = np.asarray(differences, dtype=np.float64)
    if len(table) < 2:
        return None
    per_run = table.mean(1) if table.ndim == 2 else table
    mean = float(per_run.mean())
    errors, bounds = [float(stats.sem(per_run))], []
    if errors[0] > 0:
        bounds.append(stats.ttest_1samp(per_run, 0.0).confidence_interval(0.95))
    if table.ndim == 2:
        per_example = table.mean(0)
        if np.ptp(per_example) > 0:
            drawn = stats.bootstrap((per_example,), np.mean, n_resamples=9999, method="percentile", rng=0)
            errors.append(float(drawn.standard_error))
            bounds += [drawn.confidence_interval, stats.ttest_1samp(per_example, 0.0).confidence_interval(0.95)]
    low, high = (min(b[0] for b in bounds), max(b[1] for b in bounds)) if bounds else (mean, mean)
    return Estimate(mean, max(errors), float(low), float(high), len(table), table.shape[1] if table.ndim == 2 else 0)


# -- glue -------------------------------------------------------------------------------------------------------------


def places(rows: list[Row]) -> list[str]:
    """Of a glue study: its tasks with their share of the training data, such as "rte/10"; in an order of their own.

    That of the rows is the order in which several processes finished.
    """
    found = {row["block"].partition("/")[2] for row in rows if row["block"].startswith("report/")}
    return sorted(found, key=lambda place: (place.partition("/")[0], float(place.partition("/")[2] or 0)))


def pairs(rows: list[Row], place: str, method: str, other: str = methods.PLAIN) -> list[tuple[Row, Row]]:
    """A method's reported runs, each with the other's of the same seed."""
    of = {m: {r["seed"]: r for r in rows if r["block"] == f"report/{place}" and r["method"] == m} for m in (method, other)}
    return [(of[method][seed], of[other][seed]) for seed in sorted(of[method].keys() & of[other].keys())]


def gain(rows: list[Row], place: str, method: str, other: str = methods.PLAIN) -> Estimate | None:
    """By how much a method's score exceeds the other's, in points."""
    return estimate([_points(place, a, b) for a, b in pairs(rows, place, method, other)])


def gain_where_few(rows: list[Row], task: str, method: str, few: int = 5, most: int = 100) -> Estimate | None:
    """By how much the gain with `few` percent of the training data exceeds that with `most`, in points, by the same seed."""
    gains: list[dict[int, Any]] = []
    for share in (few, most):
        place = f"{task}/{share}"
        gains.append({a["seed"]: _points(place, a, b) for a, b in pairs(rows, place, method)})
    small, large = gains
    return estimate([np.subtract(small[seed], large[seed]) for seed in sorted(small.keys() & large.keys())])


def _points(place: str, a: Row, b: Row) -> Any:
    """By how much a run exceeds another: of each example, or of all where a score has no share in single examples."""
    if place.startswith("cola"):  # a correlation
        return 100 * (a["scores"]["score"] - b["scores"]["score"])
    return 100 * np.subtract(_right(a), _right(b))


def _right(row: Row) -> list[int]:
    labels, predictions = row["examples"]["labels"], row["examples"]["predictions"]
    return [int(a == b) for a, b in zip(labels, predictions, strict=True)]


def price(rows: list[Row], method: str) -> Estimate | None:
    """A step's time over that of AdamW's, in the same place and by the same seed; of rows that one process made alone."""
    alone = [row for row in rows if records.jobs_of(row) == 1]
    return estimate([_time(a) / _time(b) for place in places(alone) for a, b in pairs(alone, place, method)])


def _time(row: Row) -> float:
    """Of a step: this process's time on processors, which neighbours disturb less; on a GPU the clock's."""
    return row["cpu_seconds" if row["device"] == "cpu" else "seconds"] / row["steps"]


def mean_score(rows: list[Row], place: str, method: str) -> Estimate | None:
    """A method's own score, in points."""
    found = [r for r in rows if r["block"] == f"report/{place}" and r["method"] == method]
    return estimate([100 * r["scores"]["score"] for r in found])


# -- gap --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Climb:
    """A text that was climbed on: its states' rows by number, those of the controls, and what became of the run.

    State 0 is the untouched model.
    """

    text: str
    states: dict[int, Row]
    controls: dict[str, dict[int, Row]]
    last: Row

    @property
    def corpus(self) -> str:
        return self.text.partition("/")[0]

    def kept(self, score: str) -> int:
        """The first state that is best on the examples that choose."""
        return max(self.states, key=lambda k: (self.states[k]["scores"][CHOOSING + score], -k))

    def change(self, score: str, state: int | None = None, control: str | None = None) -> list[float]:
        """Per example: a state's score less the untouched model's, or less a control's at the same state.

        Args:
            state: which; by default the one that is kept for this score.
        """
        state = self.kept(score) if state is None else state
        other = self.states[0] if control is None else self.controls[control][state]
        return np.subtract(self.states[state]["examples"][score], other["examples"][score]).tolist()


def climbs(rows: list[Row]) -> list[Climb]:
    """The texts whose ascent was finished."""
    untouched = next((row for row in rows if row["block"] == "untouched"), None)
    found = []
    for last in (row for row in rows if row["method"] == "negative" and "last" in row["hyper"]):
        of_text = [row for row in rows if row["block"] == last["block"] and "state" in row["hyper"]]
        by_method: dict[str, dict[int, Row]] = {}
        for row in of_text:
            by_method.setdefault(row["method"], {})[row["hyper"]["state"]] = row
        states = {0: untouched, **by_method.pop("negative")}
        found.append(Climb(last["block"], states, by_method, last))
    return found


def changed(found: list[Climb], score: str, state: int | None = None, control: str | None = None) -> Estimate | None:
    """Mean of `Climb.change` over texts; of those that have the control at that state."""
    usable = [climb for climb in found if control is None or state in climb.controls.get(control, {})]
    return estimate([climb.change(score, state, control) for climb in usable])


def f1_change(found: list[Climb]) -> Estimate | None:
    """F1 of generated answers in the state that the choosing dialogues kept, less the untouched model's."""
    return estimate([np.subtract(c.last["examples"]["f1"], c.states[0]["examples"]["f1"]).tolist() for c in found])


def between(found: list[Climb], one: str, other: str, score: str, state: int | None = None) -> Estimate | None:
    """How much more texts of one corpus change a score than those of another do: the means of two independent samples.

    Args:
        state: at which; by default each text's that is kept for this score.
    """
    a, b = ([float(np.mean(c.change(score, state))) for c in found if c.corpus == corpus] for corpus in (one, other))
    if min(len(a), len(b)) < 2:
        return None
    difference = float(np.mean(a) - np.mean(b))
    if np.ptp(a) == 0 and np.ptp(b) == 0:
        return Estimate(difference, 0.0, difference, difference, len(a) + len(b))
    tested = stats.ttest_ind(a, b, equal_var=False)
    low, high = tested.confidence_interval(0.95)
    error = math.hypot(float(stats.sem(a)), float(stats.sem(b)))
    return Estimate(difference, error, float(low), float(high), len(a) + len(b))


# -- the other studies ------------------------------------------------------------------------------------------------


def lower_loss(rows: list[Row], split: str, method: str, other: str = methods.PLAIN) -> Estimate | None:
    """Of an `lm` study: by how much a method's loss lies below the other's, nats per token over windows."""
    found = [
        np.subtract(b["examples"][split], a["examples"][split]).tolist()
        for a, b in pairs(rows, "dialogues", method, other)
        if split in a["examples"]
    ]
    return estimate(found)


def retained(rows: list[Row], score: str, bits: int, method: str = "sam", other: str = methods.PLAIN) -> Estimate | None:
    """Of a `forgetting` study: by how much a method's zero-shot score after fine-tuning exceeds the other's."""
    of = {
        m: {r["seed"]: r for r in rows if r["method"] == m and r["block"] == "tuned" and r["hyper"]["bits"] == bits}
        for m in (method, other)
    }
    seeds = sorted(of[method].keys() & of[other].keys())
    return estimate([np.subtract(of[method][s]["examples"][score], of[other][s]["examples"][score]).tolist() for s in seeds])


def probed(rows: list[Row], task: str, method: str, other: str = methods.PLAIN) -> Estimate | None:
    """Of a `collapse` study: by how many points a probe of a task, after the whole chain, exceeds the other's."""
    probes = _probes(rows, task)
    last = max((row["hyper"]["stage"] for row in probes), default=0)
    of = {
        m: {r["seed"]: r["examples"] for r in probes if r["method"] == m and r["hyper"]["stage"] == last}
        for m in (method, other)
    }
    seeds = sorted(of[method].keys() & of[other].keys())
    return estimate([[100.0 * (int(a) - int(b)) for a, b in zip(of[method][s], of[other][s], strict=True)] for s in seeds])


def probed_tasks(rows: list[Row]) -> list[str]:
    """The tasks of a `collapse` study, in the chain's order."""
    probes = [row for row in rows if row["hyper"]["kind"] == "probe"]
    return probes[0]["setup"]["tasks"].split(",") if probes else []


def sees_nothing(rows: list[Row], task: str) -> bool:
    """Whether a probe of the untouched encoder is no better than naming the most frequent label: nothing can get lost."""
    scores = [row["scores"] for row in _probes(rows, task) if row["hyper"]["stage"] == 0]
    return all(score["accuracy"] <= score["majority"] for score in scores)


def _probes(rows: list[Row], task: str) -> list[Row]:
    return [row for row in rows if row["hyper"]["kind"] == "probe" and row["hyper"]["task"] == task and row["examples"]]
