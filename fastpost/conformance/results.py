"""What a run of the suite found, as a table or as JSON."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch

STATUSES = ("pass", "fail", "error", "not applicable")
_COLOURS = {"pass": "green", "fail": "red", "error": "red", "not applicable": "yellow"}


@dataclass(frozen=True)
class Result:
    """One property of one optimizer.

    Attributes:
        property: its name.
        status: "pass"; "fail": it was measured not to hold; "error": the optimizer (or a process) broke off; "not
            applicable": it means nothing for this optimizer, or was left out.
        detail: what was measured, the error's message, or the reason.
        promise: the property in one line.
    """

    property: str
    status: str
    detail: str
    promise: str


def summary(results: Sequence[Result]) -> str:
    """How many results there are of each status."""
    counts = {status: sum(r.status == status for r in results) for status in STATUSES}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)


def to_json(name: str, results: Sequence[Result]) -> str:
    """The results with the versions they were found with."""
    head = {"optimizer": name, "torch": torch.__version__, "python": platform.python_version()}
    return json.dumps({**head, "results": [asdict(r) for r in results]}, indent=1)


def print_table(name: str, results: Sequence[Result]) -> None:
    """Prints one line per property; plain text where rich is not installed."""
    title = f"SAM conformance of {name} (torch {torch.__version__})"
    try:
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table
    except ModuleNotFoundError:
        lines = [f"{r.property:24} {r.status:15} {r.detail or r.promise}" for r in results]
        print("\n".join([title, *lines, summary(results)]), file=sys.stdout)
        return
    table = Table(title=title, caption=summary(results))
    table.add_column("property", no_wrap=True)
    table.add_column("status", no_wrap=True)
    table.add_column("promise, or what was found instead")
    for r in results:
        table.add_row(r.property, f"[{_COLOURS[r.status]}]{r.status}[/]", escape(r.detail or r.promise))
    Console().print(table)
