"""`fastpost train`: one model by one method on one data set; the model, its metrics and a page about the run in a folder."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from fastpost.cli.methods import HELP
from fastpost.cli.options import complain
from fastpost.integrations.masking import Mask


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0 when done, 2 where something is wrong with what was asked for, 130 when interrupted."""
    if {"-h", "--help"} & set(argv):
        print(HELP, end="")
        return 0
    from rich.console import Console

    began = time.perf_counter()
    mask = Mask(os.environ)
    try:  # a missing framework says how to install it
        from fastpost.cli import train_gap, train_options

        run = train_options.parse(argv, mask)
        console = Console()
        if not console.is_terminal:
            console = Console(width=120, quiet=run.arguments is not None and run.arguments.process_index > 0)
        if run.method == "gap":
            ascent = train_gap.prepare(run)
        else:
            from fastpost.cli import train_resume, train_run

            job = train_run.prepare(run)
            trainer = train_run.assemble(job, console)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:  # what transformers refuses, too
        if isinstance(error, ModuleNotFoundError) and not isinstance(error, importlib.metadata.PackageNotFoundError):
            raise  # the command line's own list says what to install
        complain("fastpost train", error, mask)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    try:
        if run.method == "gap":
            results = train_gap.carry_out(run, ascent, console)
        else:
            results = train_run.carry_out(job, trainer, console)
    except KeyboardInterrupt:
        if run.method == "gap":
            console.print("interrupted; GAP puts the weights back, and nothing was written. To begin again:")
            console.print(run.command, soft_wrap=True, highlight=False, markup=False)
        else:
            train_resume.tell_how(run, console)
        return 130
    except Exception as error:
        if not _of_the_asker(error, gap=run.method == "gap"):
            mask.exception(error)
            raise
        complain("fastpost train", error, mask)
        return 2
    _conclude(results, console, time.perf_counter() - began)
    return 0


def _of_the_asker(error: Exception, gap: bool) -> bool:
    """A disk that is full or cannot be written; a score or a text that GAP refuses. Anything else wants its traceback."""
    from safetensors import SafetensorError

    return isinstance(error, (OSError, SafetensorError)) or (gap and isinstance(error, ValueError))


def _conclude(results: Any, console: Any, seconds: float) -> None:
    from fastpost.cli.train_page import tiles_of
    from fastpost.cli.train_report import HTML_NAME

    for what, value, aside in tiles_of(results):
        console.print(f"  {what}: [bold]{value}[/bold] ({aside})", highlight=False)
    if results.untimed:
        console.print(f"  step times: {results.untimed}", highlight=False, markup=False)
    told = f"{seconds:.0f} s in all; see {results.folder / HTML_NAME}"
    console.print(told, soft_wrap=True, highlight=False, markup=False)
