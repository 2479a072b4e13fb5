"""Several processes of one command, which share its work out among themselves."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

SECONDS_TO_END = 10.0  # that a process is given before it is killed


def run(command: Sequence[str], jobs: int) -> int:
    """Starts a command `jobs` times and waits for all.

    A signal that ends this process ends the others first; what they print passes through.

    Returns:
        0 where all of them return 0, else what the first returns that does not; 128 + the signal that ended it.
    """
    processes: list[subprocess.Popen[bytes]] = []
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        for _ in range(jobs):
            processes.append(subprocess.Popen(command))
        codes = [process.wait() for process in processes]
    finally:
        _end(processes)
        signal.signal(signal.SIGTERM, before)
    failed = [code for code in codes if code != 0]
    if not failed:
        return 0
    print(f"studies: {len(failed)} of {jobs} processes failed; the same command makes what is missing", file=sys.stderr)
    return failed[0] if failed[0] > 0 else 128 - failed[0]


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.terminate()
    for process in processes:
        try:
            process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def end_with(parent: int) -> None:
    """Lets the kernel end this process when its parent is gone, even by SIGKILL.

    Args:
        parent: the process id that the parent had; it may be gone already.
    """
    set_signal_of_parents_death = 1  # PR_SET_PDEATHSIG
    ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGTERM)
    if os.getppid() != parent:
        raise SystemExit(128 + signal.SIGTERM)
