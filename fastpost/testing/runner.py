"""Runs checks so that none can hang the suite: in a thread, or in processes that are ended."""

from __future__ import annotations

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

from fastpost.testing.adapter import Adapter
from fastpost.testing.registry import Property, judge, properties

Verdict = tuple[str, str]
STARTUP = 120.0  # seconds that importing torch and the optimizer's library may take in a fresh process
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
        with _Workers(adapter, remaining) as workers:
            while remaining:
                prop = remaining.pop(0)
                verdict, usable = workers.verdict(limit)
                yield prop.name, verdict
                if not usable:
                    break


class _Workers:
    """One process per rank, which report on the same checks in the same order."""

    def __init__(self, adapter: Adapter, chosen: Sequence[Property]) -> None:
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
                target=_work, args=(adapter, names, rank, size, self._scratch.name, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._connections.append(mine)
            self._processes.append(process)
        self._started = False

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        self._scratch.cleanup()

    def verdict(self, limit: float) -> tuple[Verdict, bool]:
        """What the ranks say together about the next check, and whether they can take another one."""
        until = time.monotonic() + limit + (0.0 if self._started else STARTUP)
        self._started = True
        said: dict[Connection, Verdict] = {}
        while len(said) < len(self._connections):
            silent = [c for c in self._connections if c not in said]
            ready = wait(silent, max(0.0, until - time.monotonic()))
            if not ready:
                return self._worst([*said.values(), _late(limit)] if not said else list(said.values())), False
            for connection in ready:
                assert isinstance(connection, Connection)
                try:
                    said[connection] = connection.recv()
                except EOFError:
                    self._processes[self._connections.index(connection)].join(GRACE)
                    code = self._processes[self._connections.index(connection)].exitcode
                    return ("error", f"the process ended with exit code {code}"), False
                if said[connection][0] != "pass":
                    until = min(until, time.monotonic() + GRACE)
        return self._worst(list(said.values())), True

    @staticmethod
    def _worst(verdicts: Sequence[Verdict]) -> Verdict:
        """A measured failure tells more than the error it leaves on the other ranks."""
        for status in ("fail", "error", "not applicable"):
            for verdict in verdicts:
                if verdict[0] == status:
                    return verdict
        return verdicts[0]


def _work(adapter: Adapter, names: list[str], rank: int, size: int, folder: str, answers: Connection) -> None:
    import torch

    from fastpost.testing.sharding import World

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # looking up the host's own name may take long, or fail
    for index, name in enumerate(names):
        prop = properties()[name]
        world = World(rank, size, Path(folder) / str(index), 30.0)
        answers.send(_quietly(prop, adapter, *([world] if size > 1 else [])))


def _quietly(prop: Property, *args: object) -> Verdict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return judge(prop.check, *args)


def _late(limit: float) -> Verdict:
    return "error", f"no answer within {limit:g} s"
