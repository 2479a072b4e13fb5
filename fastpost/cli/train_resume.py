"""`fastpost train`, stopped and going on: which checkpoint, whether anything is left to do, and the command to type."""

from __future__ import annotations

import math
import re
import shlex
from pathlib import Path
from typing import Any

from transformers import TrainerState, trainer_utils

from fastpost.cli.train_options import Run


def asked_for(run: Run) -> str | None:
    """The checkpoint to go on from, None for none.

    Raises:
        ValueError, FileNotFoundError: there is none, or one of another run is in the way.
    """
    asked = run.arguments.resume_from_checkpoint
    last = last_checkpoint(run)
    if asked is None or str(asked).lower() == "false":
        if last is not None:
            raise ValueError(
                f"{run.folder} holds {Path(last).name} of an earlier run: --resume_from_checkpoint True goes on from it; "
                "for another run give another --output_dir"
            )
        return None
    if str(asked).lower() == "true":
        if last is None:
            raise ValueError(f"--resume_from_checkpoint True: there is no checkpoint in {run.folder}")
        return str(last)
    if not (Path(asked) / "trainer_state.json").is_file():
        raise FileNotFoundError(f"--resume_from_checkpoint: {asked} is no checkpoint (a folder with trainer_state.json)")
    return str(asked)


def last_checkpoint(run: Run) -> str | None:
    """The newest in the run's folder."""
    find: Any = trainer_utils.get_last_checkpoint
    found: str | None = find(str(run.folder)) if run.folder.is_dir() else None
    return found


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
    trainer.state = state
    if arguments.load_best_model_at_end and state.best_model_checkpoint is not None:
        trainer._load_best_model()
    trainer.watch.began_at = state.global_step
    return True


def tell_how(run: Run, console: Any) -> None:
    """Names the command that goes on from the newest checkpoint, if there is one."""
    last = last_checkpoint(run)
    if last is None:
        console.print("interrupted before the first checkpoint; nothing can be resumed. To begin again:")
        command = run.command
    else:
        console.print(f"interrupted; {last} goes on by the same command with --resume_from_checkpoint True:", soft_wrap=True)
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
