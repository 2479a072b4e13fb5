"""The form of a bench: contenders that do the same work, and the ratios between them that are goals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Work = Callable[[], object]


@dataclass(frozen=True)
class Contender:
    """One way of doing the work.

    Attributes:
        name: as it appears in the table.
        run: does the work once.
        bytes: the fewest bytes that this way must move, 0 where that is not the point; shown as GB/s.
        before: untimed, ahead of every run (puts inputs back).
    """

    name: str
    run: Work
    bytes: int = 0
    before: Work | None = None


@dataclass(frozen=True)
class Goal:
    """A bound on the ratio of two contenders' medians in one run.

    Attributes:
        contender, baseline: names of the two.
        limit: the bound, by instruction set ("avx512", "avx2"); instruction sets without one are only reported.
        faster: True: baseline / contender must be at least the limit; False: contender / baseline at most.
    """

    contender: str
    baseline: str
    limit: dict[str, float]
    faster: bool = False

    def measured(self, medians: dict[str, float]) -> float:
        a, b = medians[self.contender], medians[self.baseline]
        return b / a if self.faster else a / b

    def hit(self, value: float, isa: str) -> bool | None:
        if isa not in self.limit:
            return None
        return value >= self.limit[isa] if self.faster else value <= self.limit[isa]


@dataclass(frozen=True)
class Case:
    """One line of work: its size in words, who competes, and what must come out."""

    name: str
    shape: str
    dtype: str
    contenders: list[Contender]
    goals: list[Goal] = field(default_factory=list)


# Builders by name, in the order they are run; each allocates its inputs only when called.
CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    """Registers a builder under its own name."""
    CASES[build.__name__] = build
    return build
