"""The CSV file of a study: rows that survive a kill at any moment, each of them once.

A row is one line, handed to the system in one write and flushed to disk before the study goes on. A run that was killed
while it wrote leaves at most half a line at the end; the next run drops it and makes that row again.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# `setup` is what all rows of a file share, `hyper` what tells runs of one method apart, `scores` numbers, `examples` a score
# per example where there is one; all four are JSON. `seconds` and `cpu_seconds` are of the run's training alone.
COLUMNS = (
    "study", "block", "method", "seed", "hyper", "scores", "steps", "seconds", "cpu_seconds", "machine", "device", "threads",
    "commit", "versions", "date", "setup", "examples",
)  # fmt: skip
_JSON = ("hyper", "scores", "versions", "setup", "examples")
# What makes a row that row. Two runs with the same key are the same run.
Key = tuple[str, str, str, int, str]
Row = dict[str, Any]


def packed(value: Any) -> str:
    """JSON with sorted keys, so that equal settings are equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=True)


def key_of(row: Mapping[str, Any]) -> Key:
    return row["study"], row["block"], row["method"], int(row["seed"]), packed(row["hyper"])


def read(path: Path) -> list[Row]:
    """The finished rows of a file, JSON columns read; what stands behind the last line's end is passed over.

    Raises:
        ValueError: not a study's file, a line that is none of its rows, or a row that is there twice.
    """
    text = path.read_bytes().decode()
    return _parsed(path, text[: text.rfind("\n") + 1])


def _parsed(path: Path, text: str) -> list[Row]:
    lines = csv.reader(io.StringIO(text, newline=""))
    if tuple(next(lines, ())) != COLUMNS:
        raise ValueError(f"{path} is not a study's table: its first line does not hold the columns {', '.join(COLUMNS)}")
    rows: list[Row] = []
    seen: set[Key] = set()
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(COLUMNS):
            raise ValueError(f"{path}, line {number}: {len(cells)} cells where {len(COLUMNS)} are expected")
        row: Row = dict(zip(COLUMNS, cells, strict=True))
        try:
            for name in _JSON:
                row[name] = json.loads(row[name])
            row.update(seed=int(row["seed"]), steps=int(row["steps"]), threads=int(row["threads"]))
            row.update(seconds=float(row["seconds"]), cpu_seconds=float(row["cpu_seconds"]))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if key_of(row) in seen:
            raise ValueError(f"{path}, line {number}: the same run is there twice; remove one of the lines")
        seen.add(key_of(row))
        rows.append(row)
    return rows


class Records:
    """A study's file, open for appending by one process.

    Args:
        path: the file; made with its folders where it is missing.
        study: the study's name.
        setup: what all of its rows share. Rows of another set-up must not be mixed with them.
        surroundings: machine, device, threads, commit, versions and date of this process, for every new row.

    Raises:
        ValueError: another process writes the file, it is no study's, or its rows have another set-up.
    """

    def __init__(self, path: Path, study: str, setup: Mapping[str, Any], surroundings: Mapping[str, Any]) -> None:
        self.path, self.study, self.setup, self.surroundings = path, study, dict(setup), dict(surroundings)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self.rows = self._resumed()
        except BaseException:
            os.close(self._file)
            raise
        self._keys = {key_of(row) for row in self.rows}

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"{self.path} is being written by another process; wait for it, or give another --output"
            ) from None

    def _resumed(self) -> list[Row]:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.ftruncate(self._file, len(whole))
            os.fsync(self._file)
        if not whole:
            self._write(_line(COLUMNS))
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name, too, has to survive
            finally:
                os.close(folder)
            return []
        rows = _parsed(self.path, whole.decode())
        for row in rows:
            if row["study"] != self.study or packed(row["setup"]) != packed(self.setup):
                changed = sorted(k for k in {*row["setup"], *self.setup} if row["setup"].get(k) != self.setup.get(k))
                what = ", ".join(changed) if row["study"] == self.study else f"they are of the study {row['study']}"
                raise ValueError(
                    f"{self.path} holds rows of another set-up ({what}); give another --output, or the options of those rows"
                )
        return rows

    def _write(self, line: bytes) -> None:
        written = os.write(self._file, line)
        if written != len(line):  # a full disk: half a line, which the next run would drop as well
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")
        os.fsync(self._file)

    def has(self, block: str, method: str, seed: int, hyper: Mapping[str, Any]) -> bool:
        return (self.study, block, method, seed, packed(hyper)) in self._keys

    def add(
        self,
        block: str,
        method: str,
        seed: int,
        hyper: Mapping[str, Any],
        scores: Mapping[str, float],
        *,
        steps: int = 0,
        seconds: float = 0.0,
        cpu_seconds: float = 0.0,
        examples: Any = None,
    ) -> None:
        """Writes a finished run; nothing where it is there already, as after a kill in the middle of a block."""
        row: Row = {
            "study": self.study,
            "block": block,
            "method": method,
            "seed": seed,
            "hyper": dict(hyper),
            "scores": dict(scores),
            "steps": steps,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            **self.surroundings,
            "setup": self.setup,
            "examples": examples,
        }
        if key_of(row) in self._keys:
            return
        self._write(_line(packed(row[name]) if name in _JSON else row[name] for name in COLUMNS))
        self.rows.append(row)
        self._keys.add(key_of(row))

    def of(self, block: str) -> Iterator[Row]:
        return (row for row in self.rows if row["block"] == block)

    def close(self) -> None:
        os.close(self._file)


def _line(cells: Any) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerow(cells)
    line = text.getvalue().encode()
    if line.count(b"\n") != 1:
        raise ValueError(f"a study's cell holds a line break: {line[:200]!r}")
    return line
