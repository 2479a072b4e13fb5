"""Methods compared at equal steps, each with settings chosen apart from what is reported.

At every place (a task and its share, a corpus) the learning rate is chosen for AdamW, and then a strength for each
other method, by the score of runs that report nothing. Then every method is run by every seed with what was chosen for
it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from fastpost.bench.studies.arguments import names_of, seeds_of
from fastpost.bench.studies.methods import PLAIN
from fastpost.bench.studies.records import Records
from fastpost.bench.studies.study import Block

CHOOSING_SEED = 1000  # the first of the seeds that choose; none of them reports


def add_options(parser: argparse.ArgumentParser, methods: Iterable[str], rates: str, seeds: str) -> None:
    parser.add_argument("--methods", default=",".join(methods), help="comma-separated; default all")
    parser.add_argument("--seeds", default=seeds, help="that report")
    parser.add_argument("--choosing-seeds", type=int, default=1, help="runs per candidate")
    parser.add_argument("--learning-rates", default=rates, help="candidates, chosen from for AdamW")
    parser.add_argument("--strengths", type=int, default=3, help="candidates of every other method, its first so many")


class Comparison:
    """The blocks of such a study; `train` is a subclass's.

    Args:
        options: with those of `add_options`.
        strengths: each method's candidates.
        places: names that are parts of the blocks' names.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self, options: argparse.Namespace, strengths: Mapping[str, Sequence[dict[str, float]]], places: Sequence[str]
    ) -> None:
        self.options, self.strengths, self.places = options, strengths, places
        if not 1 <= options.strengths <= 3:
            raise ValueError(f"--strengths must be 1, 2 or 3, not {options.strengths}")
        self.methods = names_of(options.methods, "methods", list(strengths))
        self.rates = [float(part) for part in options.learning_rates.split(",")]
        self.seeds = seeds_of(options.seeds)
        self.choosing = range(CHOOSING_SEED, CHOOSING_SEED + options.choosing_seeds)
        if set(self.seeds) & set(self.choosing):
            raise ValueError(f"--seeds {options.seeds}: {CHOOSING_SEED} and above choose; seeds that choose do not report")
        self.records: Any = None
        self._chosen: dict[tuple[str, str], dict[str, Any]] = {}

    def setup(self) -> dict[str, Any]:
        """What the choice depends on, for the rows' set-up."""
        o = self.options
        return {"learning_rates": o.learning_rates, "strengths": o.strengths, "choosing_seeds": o.choosing_seeds}

    def train(self, where: str, place: str, method: str, seed: int, hyper: dict[str, Any], reports: bool) -> None:
        """Makes one run and its row, of block `where`; its `score` is what choosing goes by, higher is better."""
        raise NotImplementedError

    def blocks(self, records: Records) -> Iterable[Block]:
        self.records = records
        for place in self.places:
            for method in dict.fromkeys((PLAIN, *self.methods)):
                for seed in self.choosing:
                    for number in range(self.count(method)):
                        yield self.choose(place, method, seed, number)
        for seed in self.seeds:  # outermost, so that half a study compares all methods
            for place in self.places:
                for method in self.methods:
                    yield self.report(place, method, seed)

    def choose(self, place: str, method: str, seed: int, number: int) -> Block:
        """One run of a method's candidate `number`; it needs AdamW's choice of the learning rate."""
        return self._block(
            f"choose/{place}",
            f"{method}/{seed}/{number}",
            method,
            seed,
            lambda: self.candidates(place, method)[number],
            lambda: method == PLAIN or self.is_chosen(place, PLAIN),
        )

    def report(self, place: str, method: str, seed: int) -> Block:
        """One run of what was chosen for a method; it needs all runs that choose."""
        return self._block(
            f"report/{place}",
            f"{method}/{seed}",
            method,
            seed,
            lambda: self.chosen(place, method),
            lambda: self.is_chosen(place, method),
        )

    def _block(
        self, where: str, name: str, method: str, seed: int, hyper: Callable[[], dict[str, Any]], ready: Callable[[], bool]
    ) -> Block:
        _, _, place = where.partition("/")
        reports = where.startswith("report/")
        return Block(
            f"{where}/{name}",
            lambda: self.records.has(where, method, seed, hyper()),
            lambda: self.train(where, place, method, seed, hyper(), reports),
            ready,
        )

    def count(self, method: str) -> int:
        """How many candidates a method has."""
        return len(self.rates) if method == PLAIN else len(self._strengths(method))

    def candidates(self, place: str, method: str) -> list[dict[str, Any]]:
        """What a method's settings are chosen from; for others than AdamW once its learning rate is chosen."""
        if method == PLAIN:
            return [{"lr": rate} for rate in self.rates]
        rate = self.chosen(place, PLAIN)["lr"]
        return [{"lr": rate, **strength} for strength in self._strengths(method)]

    def _strengths(self, method: str) -> Sequence[dict[str, float]]:
        return self.strengths[method][: self.options.strengths]

    def is_chosen(self, place: str, method: str) -> bool:
        """Whether all runs are there that a method's settings are chosen by, and AdamW's before them."""
        if (place, method) in self._chosen:
            return True
        if method != PLAIN and not self.is_chosen(place, PLAIN):
            return False
        return all(
            self.records.has(f"choose/{place}", method, seed, hyper)
            for hyper in self.candidates(place, method)
            for seed in self.choosing
        )

    def chosen(self, place: str, method: str) -> dict[str, Any]:
        """The candidate with the best mean score on the data that chooses; the first of equals.

        It is only asked once `is_chosen` holds, and remembered.
        """
        if (place, method) not in self._chosen:
            rows = [row for row in self.records.of(f"choose/{place}") if row["method"] == method]

            def mean(hyper: dict[str, Any]) -> float:
                # By seed, not in the file's order, which is that in which processes finished: sums must not depend on it.
                of = {row["seed"]: row["scores"]["score"] for row in rows if row["hyper"] == hyper}
                found = [of[seed] for seed in self.choosing]
                return sum(found) / len(found)

            self._chosen[place, method] = max(self.candidates(place, method), key=mean)
        return self._chosen[place, method]
