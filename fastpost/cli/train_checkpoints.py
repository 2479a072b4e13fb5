"""Checkpoints of `fastpost train`: what is written into them in addition to transformers' files, whether one is whole, and
what of it counts where a run is resumed with other options."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import SchedulerType, TrainerCallback
from transformers.trainer_callback import ExportableState

from fastpost.cli.models import quietly
from fastpost.integrations.mixin import innermost
from fastpost.integrations.options import PostTrainingOptions, part_of
from fastpost.integrations.transformers import PostTrainer
from fastpost.sam.options import STEPS_KEY

STATE, R4F_NAME = "trainer_state.json", "r4f.safetensors"
# What a checkpoint cannot do without, by beginnings of names: of one process or several, of FSDP and of DeepSpeed.
_WEIGHTS = ("model.", "pytorch_model", "adapter_model.", "global_step")
_OPTIMIZER = ("optimizer", "global_step")
_SCHEDULE = ("scheduler.pt", "global_step")
_GENERATORS = ("rng_state",)
_NEEDED = {"weights": _WEIGHTS, "optimizer state": _OPTIMIZER, "schedule": _SCHEDULE, "generator states": _GENERATORS}


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in a run's folder, whole or not, the newest first."""
    if not folder.is_dir():
        return []
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.iterdir() if path.is_dir()]
    return [path for _, path in sorted(((int(m[1]), path) for m, path in found if m), reverse=True)]


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


def record_of(checkpoint: Path) -> dict[str, Any]:
    """What `RunRecord` wrote: `made_by` and `files`; empty for a checkpoint of another program.

    Raises:
        OSError: no state. ValueError: half of one.
    """
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    kept = state.get("stateful_callbacks", {}).get(RunRecord.__name__, {})
    return dict(kept.get("attributes", {}))


class RunRecord(TrainerCallback, ExportableState):
    """Writes into the state of each checkpoint what made it, and its files with their sizes."""

    def __init__(self) -> None:
        self.made_by: dict[str, Any] = {}
        self.saving: Path | None = None

    def state(self) -> dict[str, Any]:
        files = {}
        if self.saving is not None:
            paths = sorted(path for path in self.saving.rglob("*") if path.is_file() and path.name != STATE)
            files = {path.relative_to(self.saving).as_posix(): path.stat().st_size for path in paths}
        return {"args": {}, "attributes": {"made_by": self.made_by, "files": files}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.stateful_callbacks[type(self).__name__] = self.state()  # the Trainer saves none that it did not load


class RunTrainer(PostTrainer):
    """PostTrainer for a run that may be killed at any moment.

    A checkpoint never holds files of two runs: what is left of an incomplete one is removed before it is written again.
    With R4F it holds the weights that the layer computes with, under their plain names, for `from_pretrained`; and those
    that the optimizer trains in a file of their own.

    Args:
        record: of this run.
        changed: options that differ from those of the checkpoint to resume from; the values of this run count.
    """

    def __init__(self, *args: Any, record: RunRecord, changed: Collection[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.record, self.changed = record, changed
        self.add_callback(record)

    @property
    def _module(self) -> torch.nn.Module:
        module: Any = self.model
        return cast(torch.nn.Module, module)

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

    # -- saving -------------------------------------------------------------------------------------------------------------

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
        if self.r4f is None:
            super()._save(output_dir, state_dict)
            return
        super()._save(output_dir, plain_state(self._module))
        if output_dir not in (None, self.args.output_dir):
            save_file(self._trained_weights(), Path(str(output_dir)) / R4F_NAME)

    def _trained_weights(self) -> dict[str, torch.Tensor]:
        ends = ".parametrizations.weight.original"
        return {name: p.detach().contiguous() for name, p in self._module.state_dict().items() if name.endswith(ends)}

    # -- loading ------------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self._head(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._head(str(self.state.best_model_checkpoint)):
            super()._load_best_model()

    @contextmanager
    def _head(self, checkpoint: str) -> Iterator[None]:
        """Loads the head's trained weights after the others, about which transformers would warn."""
        if self.r4f is None:
            yield
            return
        with quietly():
            yield
        self._module.load_state_dict(load_file(Path(checkpoint) / R4F_NAME), strict=False)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's own; with changed options, moments and counters are the checkpoint's, the rest is this run's."""
        if checkpoint is None or not self.changed:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        step = json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))["global_step"]
        optimizer, schedule = innermost(self.optimizer), self.lr_scheduler
        asked = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        if not {"optim", "optim_args", "optim_target_modules"} & set(self.changed):
            optimizer.load_state_dict(torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True))
            for group, mine in zip(optimizer.param_groups, asked, strict=True):
                group.update({key: value for key, value in mine.items() if key != STEPS_KEY or key not in group})
        advance(schedule, optimizer, step)


def advance(schedule: Any, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Sets a fresh LambdaLR to the rates that it gives after `step` steps."""
    schedule.last_epoch, schedule._step_count = step, step + 1
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def misfit_of(checkpoint: Path, model: torch.nn.Module) -> str | None:
    """A weight of a checkpoint that a model does not have in that shape; None where all fit."""
    shapes = {name: list(value.shape) for name, value in plain_state(model).items()}
    for path in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no mapping
                if file.get_slice(name).get_shape() != shapes.get(name):
                    return str(name)
    return None


def plain_state(model: torch.nn.Module) -> dict[str, Any]:
    """A model's state under its names without parametrisations, with the weights that its layers compute with."""
    modules = dict(model.named_modules())
    found: dict[str, Any] = {}
    for name, value in model.state_dict().items():
        layer, mark, rest = name.rpartition(".parametrizations.")
        if not mark:
            found[name] = value
        else:
            weight = rest.partition(".")[0]
            found[f"{layer}.{weight}"] = getattr(modules[layer], weight).detach()
    return found


# -- what made a checkpoint -------------------------------------------------------------------------------------------------

_WORDS = """output_dir resume_from_checkpoint disable_tqdm report_to run_name project per_device_eval_batch_size debug
    prediction_loss_only include_for_metrics batch_eval_metrics load_best_model_at_end metric_for_best_model
    greater_is_better push_to_hub do_train do_eval do_predict skip_memory_metrics torch_empty_cache_steps
    enable_jit_checkpoint local_rank ignore_data_skip restore_callback_states_from_checkpoint
    include_num_input_tokens_seen label_names length_column_name ddp_timeout ddp_backend method"""
_HARMLESS = frozenset(_WORDS.split())
_HARMLESS_BEGINNINGS = ("logging_", "log_", "save_", "eval_", "hub_", "trackio_", "dataloader_")


def options_that_train(arguments: Any, parts: Collection[str]) -> dict[str, Any]:
    """Those of a trainer's arguments that change what it trains, as JSON has them.

    Args:
        parts: "sam", "r3f" or both: methods whose options count.
    """
    others = [f.name for f in dataclasses.fields(PostTrainingOptions) if part_of(f.name) not in parts]
    plain = json.loads(json.dumps(arguments.to_dict(), default=str))
    return {
        name: value
        for name, value in plain.items()
        if name not in (*_HARMLESS, *others)
        and (not name.startswith(_HARMLESS_BEGINNINGS) or name == "dataloader_drop_last")
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Where what made a checkpoint and what resumes it differ: in words, by name. What one of them does not have (an option
    of another method) is passed over."""
    found = {}
    for name in then:
        before, after = then[name], now.get(name)
        if before == after or name not in now:
            continue
        if isinstance(before, dict) and isinstance(after, dict) and "digest" in after:
            told = f"{before['rows']} rows then, {after['rows']} now" if before["rows"] != after["rows"] else "other rows"
            found[name] = f"{name}: {told}"
        elif isinstance(before, list) and isinstance(after, list):
            found[name] = f"{name}: {_listed(before)} then, {_listed(after)} now"
        else:
            found[name] = f"{name}: {before} then, {after} now"
    return found


def _listed(names: list[Any]) -> str:
    shown = ", ".join(map(str, names[:6])) or "none"
    return shown + (f" and {len(names) - 6} more" if len(names) > 6 else "")
