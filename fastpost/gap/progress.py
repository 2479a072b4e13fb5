"""Progress of a run, for people and for callers."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any


class Reporter:
    """Called after every step with (step, summary); shows it as `progress` asks. A context manager.

    Args:
        progress: False shows nothing; True a bar by `rich`, or a line per step on stderr where that is not installed; a
            function is called with (step, n_steps).
        n_steps: the number of steps that make a full bar.

    Attributes:
        shows: whether `summary()`, a few words about the state, is asked for.
    """

    def __init__(self, progress: bool | Callable[[int, int], object], n_steps: int) -> None:
        self._progress = progress
        self.shows = bool(progress) and not callable(progress)
        self._n_steps = n_steps
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Reporter:
        if self._progress is True:
            with contextlib.suppress(ImportError):
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

                columns = (TextColumn("GAP"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
                self._bar = Progress(*columns)
                self._bar.start()
                self._task = self._bar.add_task("", total=self._n_steps)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, step: int, summary: Callable[[], str]) -> None:
        if callable(self._progress):
            self._progress(step, self._n_steps)
        elif self._bar is not None:
            self._bar.update(self._task, completed=step, description=summary())
        elif self._progress:
            print(f"GAP {step}/{self._n_steps} {summary()}", file=sys.stderr)
