"""Checkpoints of `fastpost train`: what is written into them in addition to transformers' files, whether one is whole, which
one a run resumes from, and what of it counts with other options."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch.nn.utils.parametrize import is_parametrized
from transformers import SchedulerType, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from fastpost.cli.models import quietly
from fastpost.cli.train_options import Run
from fastpost.integrations.mixin import innermost
from fastpost.integrations.options import PostTrainingOptions, part_of
from fastpost.integrations.transformers import PostTrainer
from fastpost.sam.options import STEPS_KEY

STATE = "trainer_state.json"
# What a checkpoint cannot do without, by beginnings of names: of one process or several, of FSDP and of DeepSpeed.
_NEEDED = {
    "weights": ("model.", "pytorch_model", "adapter_model.", "global_step"),
    "optimizer state": ("optimizer", "global_step"),
    "schedule": ("scheduler.pt", "global_step"),
    "generator states": ("rng_state",),
}
_ANEW = "To begin a new run with a checkpoint's weights, give its folder as --model, and another --output_dir"


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir() and path.name.partition("-")[2].isdecimal()]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def flaw_of(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be resumed, None for a whole one.

    The state is written last, and lists the files of its checkpoint with their sizes.
    """
    try:
        files = record_of(checkpoint).get("files", {})
    except OSError:
        return f"no {STATE}"
    except ValueError:
        return f"half of {STATE}"
    for name, size in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"no {name}"
        if path.stat().st_size != size:
            return f"{path.stat().st_size} of {size} bytes of {name}"
    there = [path.name for path in checkpoint.iterdir()]
    return next((f"no {what}" for what, names in _NEEDED.items() if not any(n.startswith(names) for n in there)), None)


def newest_whole(folder: Path) -> Path | None:
    return next((path for path in checkpoints_of(folder) if flaw_of(path) is None), None)


def record_of(checkpoint: Path) -> dict[str, Any]:
    """What `RunRecord` wrote: `made_by` and `files`; empty for a checkpoint of another program.

    Raises:
        OSError: no state. ValueError: half of one.
    """
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return dict(state.get("stateful_callbacks", {}).get(RunRecord.__name__, {}).get("attributes", {}))


class RunRecord(TrainerCallback, ExportableState):
    """Writes into the state of each checkpoint what made it, and its files with their sizes."""

    def __init__(self, made_by: Mapping[str, str] | None = None) -> None:
        self.made_by = dict(made_by or {})
        self.saving: Path | None = None

    def state(self) -> dict[str, Any]:
        paths = [] if self.saving is None else sorted(path for path in self.saving.rglob("*") if path.is_file())
        files = {path.relative_to(str(self.saving)).as_posix(): path.stat().st_size for path in paths if path.name != STATE}
        return {"args": {}, "attributes": {"made_by": self.made_by, "files": files}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.stateful_callbacks[type(self).__name__] = self.state()  # the Trainer saves none that it did not load


class RunTrainer(PostTrainer):
    """PostTrainer for a run that may be killed at any moment.

    A checkpoint never holds files of two runs: what is left of an incomplete one is removed before it is written again.

    Args:
        record: of this run.
        changed: options that differ from those of the checkpoint to resume from; the values of this run count.
        is_last: says whether the step being made is the last one, whose checkpoint `save_strategy="best"` may not leave out.
    """

    def __init__(
        self, *args: Any, record: RunRecord, changed: Collection[str] = (), is_last: Callable[[], bool] = bool, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.record, self.changed, self.is_last = record, changed, is_last
        self.add_callback(record)

    def rehearse(self) -> None:
        """Builds optimizer and schedule as the run will, for what they refuse; the optimizer is kept, and not stepped.

        Raises:
            ValueError: also for a schedule or an optimizer that cannot be resumed with changed options.
        """
        later = self.is_deepspeed_enabled or (self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1)
        if not later:
            self.create_optimizer()
        alone = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=self.args.learning_rate)
        schedule = self.create_scheduler(num_training_steps=max(self.args.max_steps, 1), optimizer=alone)
        if self.changed and not isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            name = SchedulerType(self.args.lr_scheduler_type).value
            raise ValueError(f"--resume_with_changes: {name} follows losses, which a new one has not seen")
        if self.changed and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError("--resume_with_changes: a sharded optimizer cannot be resumed with changes")
        self.lr_scheduler, self._created_lr_scheduler = None, False

    def was_at_its_end(self, checkpoint: str) -> bool:
        """Whether a checkpoint is of the run's last step, after which the Trainer would make another; it is loaded then."""
        state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        if self.args.auto_find_batch_size and state.train_batch_size is not None:
            self._train_batch_size = state.train_batch_size  # by which the Trainer would go on
        steps = max(-(-len(self.get_train_dataloader()) // self.args.gradient_accumulation_steps), 1)
        asked = self.args.max_steps if self.args.max_steps > 0 else math.ceil(self.args.num_train_epochs * steps)
        if state.global_step < asked:
            return False
        self._load_from_checkpoint(checkpoint)
        state.is_local_process_zero, state.is_world_process_zero = self.is_local_process_zero(), self.is_world_process_zero()
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._load_best_model()
        return True

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Of every row: `dataloader_drop_last` is for training."""
        drops, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = drops

    def _determine_best_metric(self, metrics: Any, trial: Any) -> bool:
        is_best: bool = super()._determine_best_metric(metrics, trial)
        return is_best or self.is_last()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)
        self.accelerator.wait_for_everyone()
        for record in self.callback_handler.callbacks:  # transformers may have put another in the place of ours
            if isinstance(record, RunRecord):
                record.made_by, record.saving = self.record.made_by, folder
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()  # the state, which says that all is there, is written next

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """With R4F the weights that the head computes with are there too, under their plain names, for `from_pretrained`."""
        if self.r4f is not None:
            model: Any = self.model
            layers = {name: module for name, module in model.named_modules() if is_parametrized(module)}
            plain = {f"{at}.{name}": getattr(m, name).detach() for at, m in layers.items() for name in m.parametrizations}
            state_dict = {**model.state_dict(), **plain}
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with quietly():  # about R4F's plain weights, which the model has under another name
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with quietly():
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's own; with changed options, moments and counters are the checkpoint's, the rest is this run's."""
        if checkpoint is None or not self.changed:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        step = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))["global_step"]
        optimizer = innermost(self.optimizer)
        schedule: Any = self.lr_scheduler
        asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        if not {"optim", "optim_args", "optim_target_modules"} & set(self.changed):
            optimizer.load_state_dict(torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True))
            for group, mine in zip(optimizer.param_groups, asked, strict=True):
                group.update({key: value for key, value in mine.items() if key != STEPS_KEY or key not in group})
        schedule.last_epoch, schedule._step_count = step, step + 1
        rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule._last_lr = rates


# -- what made a checkpoint -------------------------------------------------------------------------------------------------

_WORDS = """output_dir resume_from_checkpoint disable_tqdm report_to run_name project per_device_eval_batch_size debug
    prediction_loss_only include_for_metrics batch_eval_metrics load_best_model_at_end metric_for_best_model
    greater_is_better push_to_hub do_train do_eval do_predict skip_memory_metrics torch_empty_cache_steps
    enable_jit_checkpoint local_rank ignore_data_skip restore_callback_states_from_checkpoint
    include_num_input_tokens_seen label_names length_column_name ddp_timeout ddp_backend method"""
_HARMLESS = frozenset(_WORDS.split())
_HARMLESS_BEGINNINGS = ("logging_", "log_", "save_", "eval_", "hub_", "trackio_", "dataloader_")


def options_that_train(arguments: Any, parts: Collection[str]) -> dict[str, str]:
    """Those of a trainer's arguments that change what it trains, in words.

    Args:
        parts: "sam", "r3f" or both: methods whose options count.
    """
    others = [f.name for f in fields(PostTrainingOptions) if part_of(f.name) not in parts]
    return {
        name: str(value)
        for name, value in json.loads(json.dumps(arguments.to_dict(), default=str)).items()
        if name not in (*_HARMLESS, *others)
        and (not name.startswith(_HARMLESS_BEGINNINGS) or name == "dataloader_drop_last")
    }


# -- resuming ---------------------------------------------------------------------------------------------------------------


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
        if run.data.resume_with_changes:
            raise ValueError(
                "--resume_with_changes needs a checkpoint to resume from; give --resume_from_checkpoint True as well"
            )
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
        whole = newest_whole(run.folder)
        newer = there if whole is None else there[: there.index(whole)]
        notes = tuple(f"{path.name} is incomplete ({flaw_of(path)})" for path in newer)
        if whole is not None:
            return Start(str(whole), notes)
        raise ValueError(
            f"--resume_from_checkpoint True: no checkpoint in {run.folder} is whole; {'; '.join(notes)}. {_ANEW}"
        )
    if not Path(asked).is_dir():
        raise FileNotFoundError(f"--resume_from_checkpoint: there is no folder {asked}")
    flaw = flaw_of(Path(asked))
    if flaw is not None:
        raise ValueError(f"--resume_from_checkpoint: {asked} is incomplete: {flaw}. {_ANEW}")
    return Start(asked)


def compared(start: Start, made_by: Mapping[str, str], run: Run, model: Any) -> Start:
    """The start with what differs from the run that made its checkpoint; what one of the two does not have is passed over.

    Args:
        made_by: of this run, as `RunRecord` keeps it.
        model: that is trained, whose weights have to have the checkpoint's shapes.

    Raises:
        ValueError: something differs, and the user has not asked for it or it cannot be.
    """
    if start.checkpoint is None:
        return start
    then = record_of(Path(start.checkpoint)).get("made_by", {})
    changes = {k: f"{k}: {then[k]} then, {made_by[k]} now" for k in then if made_by.get(k, then[k]) != then[k]}
    if "number of labels" in changes:
        raise ValueError(f"{start.checkpoint} cannot be resumed: {changes['labels']}. {_ANEW}")
    if not then and not run.data.resume_with_changes:
        raise ValueError(
            f"{start.checkpoint} does not say what made it, so whether this run fits cannot be checked; "
            "--resume_with_changes True resumes without that check"
        )
    if changes and not run.data.resume_with_changes:
        raise ValueError(
            f"{start.checkpoint} was made by another run ({'; '.join(changes.values())}); --resume_with_changes True "
            "resumes with the new ones, and another --output_dir begins a new run"
        )
    changes = changes if then else {"unknown": "what made the checkpoint is not known"}
    if changes and (why := _misfit(Path(start.checkpoint), model, run.arguments.r3f_spectral is not None)):
        raise ValueError(f"{start.checkpoint} cannot be resumed: {why}. {_ANEW}")
    return replace(start, changes=changes)


def _misfit(checkpoint: Path, model: torch.nn.Module, is_normalised: bool) -> str | None:
    """Why a model cannot take a checkpoint's weights; None where all fit.

    Args:
        is_normalised: the model will have R4F's head, which is trained by other weights than it computes with.
    """
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            plain = [name for name in names if ".parametrizations." not in name]
            other = next((name for name in plain if file.get_slice(name).get_shape() != shapes.get(name)), None)
        if other is not None:
            return f"the model has no weight {other} of the same shape"
        if is_normalised and plain == names:
            return "it has no weights of R4F's head"
    return None


def tell_how(run: Run) -> None:
    """Names the command that resumes from the newest checkpoint, if there is one."""
    last, command = newest_whole(run.folder), run.command
    if last is None:
        there = ", ".join(path.name for path in checkpoints_of(run.folder))
        print(
            "interrupted before the first whole checkpoint; nothing can be resumed. To begin again"
            + (f", without {there} in the way:" if there else ":")
        )
    else:
        print(f"interrupted; to resume from {last}, run this:")
        resume = " --resume_from_checkpoint True"  # after whatever the command said of it before
        command = command.removesuffix(resume) + resume
    print(command)
