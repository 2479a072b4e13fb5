"""Resuming `fastpost train`: which checkpoint, whether it fits, whether any step is left, what to type."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import TrainerState

from fastpost.cli.train_checkpoints import checkpoints_of, differences, flaw_of, misfit_of, record_of
from fastpost.cli.train_options import Run


@dataclass(frozen=True)
class Start:
    """Where a run begins.

    Attributes:
        checkpoint: to resume from; None: at the beginning.
        notes: newer checkpoints that are incomplete.
        changes: what differs from the run that made it, in words, by name.
    """

    checkpoint: str | None = None
    notes: tuple[str, ...] = ()
    changes: Mapping[str, str] = field(default_factory=dict)


def asked_for(run: Run) -> Start:
    """The checkpoint to resume from: the one named, or the newest whole one.

    Raises:
        ValueError, FileNotFoundError: there is none, it is incomplete, or one of another run is in the way.
    """
    asked = str(run.arguments.resume_from_checkpoint)
    there = checkpoints_of(run.folder)
    if asked.lower() in ("none", "false"):
        if there:
            flaw, whole = flaw_of(there[0]), newest_whole(run.folder)
            how = "" if flaw is None else f", which is incomplete ({flaw})"
            how += f"; --resume_from_checkpoint True resumes from {whole.name}" if whole else ""
            raise ValueError(
                f"{run.folder} holds {there[0].name} of an earlier run{how}; for another run give another --output_dir"
            )
        return Start()
    if asked.lower() == "true":
        if not there:
            raise ValueError(f"--resume_from_checkpoint True: there is no checkpoint in {run.folder}")
        notes: list[str] = []
        for path in there:
            flaw = flaw_of(path)
            if flaw is None:
                return Start(str(path), tuple(notes))
            notes.append(f"{path.name} is incomplete ({flaw})")
        raise ValueError(
            f"--resume_from_checkpoint True: no checkpoint in {run.folder} is whole; {'; '.join(notes)}. {_ANEW}"
        )
    path = Path(asked)
    if not path.is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint: there is no folder {asked}")
    flaw = flaw_of(path)
    if flaw is not None:
        raise ValueError(f"--resume_from_checkpoint: {asked} is incomplete: {flaw}. {_ANEW}")
    return Start(asked)


_ANEW = "To begin a new run with a checkpoint's weights, give its folder as --model, and another --output_dir"


def newest_whole(folder: Path) -> Path | None:
    return next((path for path in checkpoints_of(folder) if flaw_of(path) is None), None)


def compared(start: Start, made_by: Mapping[str, Any], allowed: bool, model: Any) -> Start:
    """The start with what differs from the run that made its checkpoint.

    Args:
        made_by: of this run, as `RunRecord` keeps it.
        allowed: whether the user asked to resume with changes.
        model: that is trained, whose weights have to have the checkpoint's shapes.

    Raises:
        ValueError: something differs, and is not allowed to or cannot.
    """
    if start.checkpoint is None:
        return start
    then = record_of(Path(start.checkpoint)).get("made_by", {})
    if not then:
        if not allowed:
            raise ValueError(
                f"{start.checkpoint} does not say what made it, so whether this run fits cannot be checked; "
                "--resume_with_changes True resumes without that check"
            )
        changes = {"unknown": "what made the checkpoint is not known"}
    else:
        changes = differences(then, made_by)
    if then and len(then["labels"]) != len(made_by["labels"]):
        raise ValueError(f"{start.checkpoint} cannot be resumed: {changes['labels']}. {_ANEW}")
    if changes and not allowed:
        raise ValueError(
            f"{start.checkpoint} was made by another run ({'; '.join(changes.values())}); --resume_with_changes True "
            "resumes with the new ones, and another --output_dir begins a new run"
        )
    if changes and (name := misfit_of(Path(start.checkpoint), model)):
        raise ValueError(f"{start.checkpoint} cannot be resumed: the model has no weight {name} of the same shape. {_ANEW}")
    return replace(start, changes=changes)


def was_at_its_end(trainer: Any, checkpoint: str) -> bool:
    """Whether a checkpoint is of the run's last step, after which the Trainer would make another; it is loaded then."""
    arguments = trainer.args
    state = TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json"))
    batches = len(trainer.get_train_dataloader())
    steps = max(-(-batches // arguments.gradient_accumulation_steps), 1)
    asked = arguments.max_steps if arguments.max_steps > 0 else math.ceil(arguments.num_train_epochs * steps)
    if state.global_step < asked:
        return False
    trainer._load_from_checkpoint(checkpoint)
    state.is_local_process_zero, state.is_world_process_zero = (
        trainer.is_local_process_zero(),
        trainer.is_world_process_zero(),
    )
    trainer.state = state
    if arguments.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    trainer.watch.began_at = state.global_step
    return True


def tell_how(run: Run, console: Any) -> None:
    """Names the command that resumes from the newest checkpoint, if there is one."""
    last = newest_whole(run.folder)
    if last is None:
        there = ", ".join(path.name for path in checkpoints_of(run.folder))
        console.print(
            "interrupted before the first whole checkpoint; nothing can be resumed. To begin again"
            + (f", without {there} in the way:" if there else ":")
        )
        command = run.command
    else:
        console.print(f"interrupted; to resume from {last}, run this:", soft_wrap=True)
        command = f"{without_resuming(run.command)} --resume_from_checkpoint True"
    console.print(command, soft_wrap=True, highlight=False, markup=False)


def without_resuming(command: str) -> str:
    kept, drop = [], False
    for word in shlex.split(command):
        name = re.sub("-", "_", word.partition("=")[0].lstrip("-"))
        if drop:
            drop = False
        elif word.startswith("--") and name == "resume_from_checkpoint":
            drop = "=" not in word
        else:
            kept.append(word)
    return shlex.join(kept)
