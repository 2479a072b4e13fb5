"""The CSV file of a study: rows that survive a kill at any moment, each of them once, from any number of processes.

A row is one line, handed to the system in one write and flushed to disk before the study goes on. A process that was
killed while it wrote leaves at most half a line at the end; the next one that writes drops it and makes that row again.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastpost.bench.studies.locks import Locks

# `setup` is what all rows of a file share, `hyper` what tells runs of one method apart, `scores` numbers, `examples` a score
# per example where there is one; all four are JSON. `seconds` and `cpu_seconds` are of the run's training alone.
COLUMNS = (
    "study", "block", "method", "seed", "hyper", "scores", "steps", "seconds", "cpu_seconds", "machine", "device", "threads",
    "commit", "versions", "date", "setup", "examples",
)  # fmt: skip
_JSON = ("hyper", "scores", "versions", "setup", "examples")
csv.field_size_limit(1 << 30)  # what can be written has to be read again; Python's default is 128 KiB
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
    content = path.read_bytes()
    head = _head(path, content)
    return _parsed(path, content[head : content.rfind(b"\n") + 1], set(), 2)


def jobs_of(row: Mapping[str, Any]) -> int:
    """How many processes, at the least, worked on the study while a row was made. Times of more than one are no measure."""
    return int(row["versions"].get("jobs", 1))


def _head(path: Path, content: bytes) -> int:
    """The length of a file's first line."""
    end = content.find(b"\n") + 1
    if tuple(next(csv.reader([content[:end].decode(errors="replace")]), ())) != COLUMNS:
        raise ValueError(f"{path} is not a study's table: its first line does not hold the columns {', '.join(COLUMNS)}")
    return end


def _parsed(path: Path, content: bytes, seen: set[Key], first: int) -> list[Row]:
    """The rows of whole lines, the first of which is the file's line `first`; their keys go into `seen`."""
    rows: list[Row] = []
    for number, cells in enumerate(csv.reader(io.StringIO(content.decode(), newline="")), start=first):
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
    """A study's file, open for appending. Several processes may have it open with the same set-up.

    Args:
        path: the file; made with its folders where it is missing.
        study: the study's name.
        setup: what all of its rows share. Rows of another set-up must not be mixed with them.
        surroundings: machine, device, threads, commit, versions and date of this process, for every new row.

    Attributes:
        rows: those in the file, as far as this process has read.
        made: how many of them this process wrote.

    Raises:
        ValueError: another process works on the file with another set-up, it is no study's, or its rows have another set-up.
    """

    def __init__(self, path: Path, study: str, setup: Mapping[str, Any], surroundings: Mapping[str, Any]) -> None:
        self.path, self.study, self.setup, self.surroundings = path, study, dict(setup), dict(surroundings)
        self.rows: list[Row] = []
        self.made = 0
        self._keys: set[Key] = set()
        self._end = 0  # of what was read
        self._had_company = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._locks = Locks(self._file)
            with self._locks.appending():
                self._open()
        except BaseException:
            os.close(self._file)
            raise

    def _open(self) -> None:
        if not self._locks.enter(packed([self.study, self.setup])):
            raise ValueError(
                f"{self.path} is being written by another process with another set-up; wait for it, or give another --output"
            )
        content = self._unread()
        if b"\n" in content or not _line(COLUMNS).startswith(content):
            self._end = _head(self.path, content)
            self.refresh()
            self._drop_half_a_line()
            return
        self._drop_half_a_line()
        self._write(_line(COLUMNS))
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, has to survive
        finally:
            os.close(folder)

    def _unread(self) -> bytes:
        """What stands behind the part that was read."""
        parts: list[bytes] = []
        at = self._end
        while part := os.pread(self._file, 1 << 24, at):
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def refresh(self) -> None:
        """Reads the rows that other processes have written since.

        Raises:
            ValueError: they are none of this study, or of another set-up.
        """
        content = self._unread()
        content = content[: content.rfind(b"\n") + 1]
        if not content:
            return
        rows = _parsed(self.path, content, self._keys, len(self.rows) + 2)
        for row in rows:
            if row["study"] != self.study or packed(row["setup"]) != packed(self.setup):
                changed = sorted(k for k in {*row["setup"], *self.setup} if row["setup"].get(k) != self.setup.get(k))
                what = ", ".join(changed) if row["study"] == self.study else f"they are of the study {row['study']}"
                raise ValueError(
                    f"{self.path} holds rows of another set-up ({what}); give another --output, or the options of those rows"
                )
        self.rows += rows
        self._end += len(content)

    def _drop_half_a_line(self) -> None:
        """Only for who appends, and has read all whole lines: nobody else is writing."""
        if os.fstat(self._file).st_size > self._end:
            os.ftruncate(self._file, self._end)
            os.fsync(self._file)

    def _write(self, line: bytes) -> None:
        written = os.write(self._file, line)
        if written != len(line):  # a full disk: half a line, which the next run would drop as well
            os.ftruncate(self._file, self._end)
            raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written; is the disk full?")
        os.fsync(self._file)
        self._end += len(line)

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Holds the work of this name; gives False where another process does. The rows are then read anew.

        The claim ends with the process, should that die.
        """
        if not self._locks.claim(name):
            yield False
            return
        try:
            self.refresh()
            self._had_company = self._locks.others()
            yield True
        finally:
            self._locks.release(name)

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
        """Writes a finished run; nothing where it is there already, as after a kill in the middle of a block.

        The row says in `versions` how many jobs there were, where this process was not alone.
        """
        row: Row = {
            "study": self.study,
            "block": block,
            "method": method,
            "seed": seed,
            "hyper": dict(hyper),
            "scores": dict(scores),
            "steps": steps,
            "seconds": round(seconds, 4),
            "cpu_seconds": round(cpu_seconds, 4),
            **self.surroundings,
            "setup": self.setup,
            "examples": examples,
        }
        self._had_company = self._had_company or self._locks.others()
        if self._had_company:
            row["versions"] = {**row["versions"], "jobs": max(jobs_of(row), 2)}
        line = _line(packed(row[name]) if name in _JSON else row[name] for name in COLUMNS)
        with self._locks.appending():
            self.refresh()
            if key_of(row) in self._keys:
                return
            self._drop_half_a_line()
            self._write(line)
        self.rows.append(row)
        self._keys.add(key_of(row))
        self.made += 1

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
