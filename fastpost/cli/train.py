"""`fastpost train`: one model by one method on one data set; the model, its metrics and a page about the run in a folder."""

from __future__ import annotations

import importlib.metadata
import os
import sys
import time
from collections.abc import Sequence

from fastpost.cli.options import complain
from fastpost.integrations.masking import Mask

# What is raised for what was asked for, as long as nothing is written; of transformers too.
_REFUSALS = (ValueError, TypeError, OSError, RuntimeError, ImportError)


def main(argv: Sequence[str]) -> int:
    """Runs the command; 0 when done, 2 where something is wrong with what was asked for, 130 when interrupted."""
    began = time.perf_counter()
    mask = Mask(os.environ)
    try:  # a missing framework says how to install it
        from fastpost.cli import train_checkpoints, train_gap, train_options, train_report, train_run

        run = train_options.parse(argv, mask)
        if run.method == "gap":
            ascent = train_gap.prepare(run)
        else:
            job = train_run.prepare(run)
            trainer = train_run.assemble(job)
    except _REFUSALS as error:
        if isinstance(error, ModuleNotFoundError) and not isinstance(error, importlib.metadata.PackageNotFoundError):
            raise  # the command line's own list says what to install
        if not _is_refusal(error):
            mask.exception(error)
            raise
        complain("fastpost train", error, mask)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    is_first = run.arguments is None or run.arguments.process_index == 0  # of several processes one speaks
    try:
        results = train_gap.carry_out(run, ascent) if run.method == "gap" else train_run.carry_out(job, trainer)
    except KeyboardInterrupt:
        if run.method != "gap" and is_first:
            train_checkpoints.tell_how(run)
        elif is_first:
            print(f"interrupted; GAP puts the weights back, and nothing was written. To begin again:\n{run.command}")
        return 130
    except Exception as error:
        refused = run.method != "gap" and trainer.watch.refused and _is_refusal(error)
        if not refused and not _is_users(error, gap=run.method == "gap"):
            mask.exception(error)
            raise
        told = f"a checkpoint cannot be written; is the disk full? {error}" if _is_of_torch_save(error) else error
        complain("fastpost train", told, mask)
        return 2
    if is_first:
        for what, value, aside in train_report.tiles_of(results):
            print(f"  {what}: {value} ({aside})")
        print(f"{time.perf_counter() - began:.0f} s in all; see {results.folder / train_report.HTML_NAME}")
    return 0


def _is_users(error: Exception, gap: bool) -> bool:
    """A disk that is full or cannot be written; a score or a text that GAP refuses. Anything else wants its traceback."""
    from safetensors import SafetensorError

    is_of_disk = isinstance(error, (OSError, SafetensorError)) or _is_of_torch_save(error)
    return is_of_disk or (gap and isinstance(error, ValueError))


def _is_refusal(error: Exception) -> bool:
    """Not of a device that is full: the traceback says what took its memory."""
    import torch

    return isinstance(error, _REFUSALS) and not isinstance(error, torch.OutOfMemoryError)


def _is_of_torch_save(error: Exception) -> bool:
    """What `torch.save` makes of a full disk."""
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ("PytorchStreamWriter", "iostream error", "unexpected pos")
    )
