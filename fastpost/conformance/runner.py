"""Runs checks so that none can hang the suite: in a thread, or in processes that are ended."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from fastpost.conformance.adapter import Adapter
from fastpost.conformance.registry import Property, judge, properties

Verdict = tuple[str, str]
STARTUP = 120.0  # seconds that importing torch and the optimizer's library may take in a fresh process
_ENDED = "the process ended"
GRACE = 5.0  # seconds that the other ranks have, once one has failed


def why_not_elsewhere(adapter: Adapter) -> str | None:
    """Why this adapter cannot be built in another process; None if it can."""
    try:
        pickle.dumps(adapter)
    except Exception as error:
        return f"it cannot be sent to another process ({type(error).__name__}); use a class or a function of a module"
    return None


def in_this_process(adapter: Adapter, chosen: Sequence[Property], limit: float) -> Iterator[tuple[str, Verdict]]:
    """Each check in a thread; one that exceeds the limit is left behind."""
    for prop in chosen:
        verdicts: list[Verdict] = []

        def run(prop: Property = prop, verdicts: list[Verdict] = verdicts) -> None:
            verdicts.append(_quietly(prop, adapter))

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(limit)
        yield prop.name, verdicts[0] if verdicts else _late(limit)


def in_processes(adapter: Adapter, chosen: Sequence[Property], limit: float) -> Iterator[tuple[str, Verdict]]:
    """The checks, all of which take the same number of processes, one after the other in processes started for them.

    When a rank is late or is left alone by another, the processes are ended and new ones take the remaining checks.
    """
    remaining = list(chosen)
    while remaining:
        with _Workers(adapter, remaining, limit) as workers:
            while remaining:
                prop = remaining.pop(0)
                verdict, usable = workers.verdict()
                yield prop.name, verdict
                if not usable:
                    break


class _Workers:
    """One process per rank, which report on the same checks in the same order."""

    def __init__(self, adapter: Adapter, chosen: Sequence[Property], limit: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._scratch = tempfile.TemporaryDirectory(prefix="sam-conformance-")
        size = chosen[0].processes
        names = [prop.name for prop in chosen]
        for index in range(len(names)):
            (Path(self._scratch.name) / str(index)).mkdir()
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(size):
            mine, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(adapter, names, rank, size, self._scratch.name, limit, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(mine)
            self._processes.append(process)
        self._started = False
        self._limit = limit

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        self._scratch.cleanup()

    def verdict(self) -> tuple[Verdict, bool]:
        """What the ranks say together about the next check, and whether they can take another one."""
        if not self._started:
            self._started = True
            said = self._collect(STARTUP)
            if len(said) < len(self._connections) or any(status != "ready" for status, _ in said.values()):
                return self._worst([v for v in said.values() if v[0] != "ready"] or [_late(STARTUP, " to start")]), False
        said = self._collect(self._limit)
        verdict, everyone = self._worst([*said.values()] or [("pass", "")]), len(said) == len(self._connections)
        if verdict[0] == "pass" and not everyone:
            return _late(self._limit, self._whereabouts()), False
        return verdict, everyone and not self._ended(said)

    def _collect(self, seconds: float) -> dict[Connection, Verdict]:
        """What each rank says next, if it does so in time; once one has failed, the others have less."""
        until = time.monotonic() + seconds
        said: dict[Connection, Verdict] = {}
        while len(said) < len(self._connections):
            silent = [c for c in self._connections if c not in said]
            ready = wait(silent, max(0.0, until - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    said[connection] = connection.recv()
                except EOFError:
                    process = self._processes[self._connections.index(connection)]
                    process.join(GRACE)
                    said[connection] = "error", f"{_ENDED} with exit code {process.exitcode}"
                if said[connection][0] not in ("pass", "ready"):
                    until = min(until, time.monotonic() + GRACE)
        return said

    @staticmethod
    def _ended(said: dict[Connection, Verdict]) -> bool:
        return any(detail.startswith(_ENDED) for _, detail in said.values())

    def _whereabouts(self) -> str:
        """The innermost line of Python that a late rank was executing shortly before its time was up."""
        for rank in range(len(self._connections)):
            stack = (Path(self._scratch.name) / f"rank{rank}").read_text()
            if lines := stack.partition("most recent call first")[2].splitlines()[1:]:
                return f" ({lines[0].strip()})"
        return ""

    @staticmethod
    def _worst(verdicts: Sequence[Verdict]) -> Verdict:
        """A measured failure tells more than the error it leaves on the other ranks."""
        for status in ("fail", "error", "not applicable"):
            for verdict in verdicts:
                if verdict[0] == status:
                    return verdict
        return verdicts[0]


def _work(adapter: Adapter, names: list[str], rank: int, size: int, folder: str, limit: float, answers: Connection) -> None:
    import torch

    from fastpost.conformance.sharding import World

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # looking up the host's own name may take long, or fail
    known = properties()  # imports what all of them need
    answers.send(("ready", ""))
    with open(Path(folder) / f"rank{rank}", "w") as stack:
        for index, name in enumerate(names):
            prop = known[name]
            world = World(rank, size, Path(folder) / str(index), max(1.0, limit / 2))
            stack.seek(0)
            stack.truncate()
            faulthandler.dump_traceback_later(0.9 * limit, file=stack)
            verdict = _quietly(prop, adapter, *([world] if size > 1 else []))
            faulthandler.cancel_dump_traceback_later()
            answers.send(verdict)


def _quietly(prop: Property, *args: object) -> Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return judge(prop.check, *args)


def _late(limit: float, where: str = "") -> Verdict:
    return "error", f"no answer within {limit:g} s{where}"
