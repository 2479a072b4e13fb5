"""What all studies share: options, surroundings of a row, and the rule that nothing is reported on what was chosen on."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastpost.bench import machine
from fastpost.bench.studies.records import Records

PACKAGES = ("fastpost", "torch", "transformers", "numpy", "scipy", "scikit-learn")


@dataclass
class Block:
    """A part of a study that runs as one.

    Attributes:
        name: what the line of progress says.
        done: whether all of its rows are there.
        run: makes the rows that are missing.
    """

    name: str
    done: Callable[[], bool]
    run: Callable[[], None]


@dataclass
class Study:
    """A study as its module describes it.

    Attributes:
        name, about: for the command line.
        options: adds the study's own options to a parser.
        prepare: reads data and models, and refuses what cannot work, before anything is written. From options to (set-up,
            function from the open records to blocks in order; a block may look at what those before it have found).
    """

    name: str
    about: str
    options: Callable[[argparse.ArgumentParser], None]
    prepare: Callable[[argparse.Namespace], tuple[dict[str, Any], Callable[[Records], Iterable[Block]]]]


def run(study: Study, options: argparse.Namespace) -> int:
    """Runs what is missing; the number of rows that were made.

    Raises:
        ValueError, FileNotFoundError: what cannot be run, before anything is written.
    """
    if options.device != "cpu" and not options.device.startswith("cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, not {options.device}")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"--device {options.device}: torch sees no CUDA device")
    if options.threads < 1:
        raise ValueError(f"--threads must be at least 1, not {options.threads}")
    torch.set_num_threads(options.threads)
    setup, blocks_of = study.prepare(options)
    records = Records(options.output, study.name, setup, surroundings(options.device))
    before = len(records.rows)
    try:
        for block in blocks_of(records):
            if not block.done():
                began, rows = time.perf_counter(), len(records.rows)
                block.run()
                made = len(records.rows) - rows
                print(f"{study.name}: {block.name}: {made} row(s), {time.perf_counter() - began:.0f} s", flush=True)
    finally:
        records.close()
    return len(records.rows) - before


def surroundings(device: str) -> dict[str, Any]:
    """Where and with what a row is made."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": _machine(device),
        "device": device,
        "threads": torch.get_num_threads(),
        "commit": machine.commit(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{machine.cpu()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"


def check_apart(chosen_on: Collection[str], reported_on: Collection[str], what: str) -> None:
    """Refuses to report on data that settings were chosen on: such a score is too high.

    Args:
        chosen_on, reported_on: the examples of both, as text.
        what: the data, for the message.

    Raises:
        ValueError: an example is in both.
    """
    both = set(chosen_on) & set(reported_on)
    if both:
        raise ValueError(
            f"{what}: {len(both)} of the {len(set(reported_on))} examples to report on are among those that settings are "
            f"chosen on, such as {next(iter(sorted(both)))[:60]!r}. Take data apart: choose on a split of the training data"
        )


def digest(parts: Iterable[str]) -> str:
    """Of texts in their order, for the set-up: other data are another study."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part.encode() + b"\0")
    return whole.hexdigest()[:16]


@dataclass
class Timer:
    """Seconds of the clock and of this process's processors, over all passes through `running`."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    device: str = field(default="cpu", repr=False)

    @contextmanager
    def running(self) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu

    def spent(self) -> Mapping[str, float]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}


def data_folder(options: argparse.Namespace, part: str) -> Path:
    """`--data`'s subfolder.

    Raises:
        ValueError: no --data. FileNotFoundError: no such folder.
    """
    if options.data is None:
        raise ValueError(f"--data is needed: a folder that holds {part}/ (docs/studies.md says where its files come from)")
    folder = Path(options.data) / part
    if not folder.is_dir():
        raise FileNotFoundError(
            f"--data {options.data}: there is no folder {part} in it (docs/studies.md says what belongs there)"
        )
    return folder
