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

WAIT_SECONDS = 0.2  # between two looks for a block, while other processes work on all that are ready
PACKAGES = ("fastpost", "torch", "transformers", "numpy", "scipy", "scikit-learn")


@dataclass
class Block:
    """A part of a study that one process runs.

    Attributes:
        name: what the line of progress says, and what a process claims it by: no other block's.
        done: whether all of its rows are there; asked only once the block is ready.
        run: makes the rows that are missing.
        ready: whether the rows that it needs from other blocks are there; once they are, they stay.
    """

    name: str
    done: Callable[[], bool]
    run: Callable[[], None]
    ready: Callable[[], bool] = lambda: True


@dataclass
class Study:
    """A study as its module describes it.

    Attributes:
        name, about: for the command line.
        options: adds the study's own options to a parser.
        prepare: reads data and models, and refuses what cannot work, before anything is written. From options to (set-up,
            function from the open records to blocks in order; a block may need what those before it have found).
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
    if options.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, not {options.jobs}")
    torch.set_num_threads(options.threads)
    setup, blocks_of = study.prepare(options)
    records = Records(options.output, study.name, setup, surroundings(options))
    try:
        _work(study.name, list(blocks_of(records)), records)
    finally:
        records.close()
    return records.made


def _work(name: str, left: list[Block], records: Records) -> None:
    """Runs blocks until all are done, by this process or by others."""
    while left:
        records.refresh()
        left = [block for block in left if not (block.ready() and block.done())]
        done, is_waiting = None, False
        for block in left:
            if not block.ready():
                continue
            with records.claimed(block.name) as is_mine:
                if is_mine:
                    if not block.done():  # by who had it claimed until now
                        _run(name, block, records)
                    done = block
                    break
            is_waiting = True
        if done is not None:
            left = [block for block in left if block is not done]
        elif is_waiting:
            time.sleep(WAIT_SECONDS)
        elif left:
            raise RuntimeError(f"studies: {left[0].name} waits for rows that no block makes")


def _run(name: str, block: Block, records: Records) -> None:
    began, rows = time.perf_counter(), records.made
    block.run()
    if not block.done():
        raise RuntimeError(f"studies: {block.name} has run, but not all of its rows are there")
    made, seconds = records.made - rows, time.perf_counter() - began
    print(f"{name}: {block.name}: {made} row(s), {seconds:.0f} s\n", end="", flush=True)  # one write, whole among others'


def surroundings(options: argparse.Namespace) -> dict[str, Any]:
    """Where and with what a row is made."""
    versions: dict[str, Any] = {"python": platform.python_version()}
    if options.jobs > 1:
        versions["jobs"] = options.jobs
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "machine": _machine(options.device),
        "device": options.device,
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
        """Takes the time of a whole pass: on a GPU it waits for the device, once before and once after."""
        self._wait()
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self._wait()
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - cpu

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

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
