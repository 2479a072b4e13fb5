"""A training run of `fastpost train`: PostTrainer on the data given, watched, and stopped where it can be resumed."""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

import fastpost
from fastpost.cli import train_checkpoints, train_data, train_report
from fastpost.cli.files import replace_text
from fastpost.cli.models import PACKAGED_MODEL, check_causal, encoder, load, packaged_model
from fastpost.cli.train_options import Run
from fastpost.errors import unknown
from fastpost.integrations.masking import is_secret
from fastpost.integrations.options import METHODS as PARTS
from fastpost.integrations.sharpness import SharpnessCallback

SCORES = ("accuracy", "f1", "mcc")


@dataclass
class Job:
    """All that is read and checked before anything is written.

    Attributes:
        summary: of the data, in words.
        majority: the label that is most frequent in training, and the accuracy of always saying it; None for text.
        fresh: weights that the checkpoint named by --model does not have.
        start: the checkpoint to resume from.
        made_by: what makes this run's checkpoints, in words.
    """

    run: Run
    model: Any
    tokenizer: Any
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    labels: tuple[str, ...]
    summary: str
    majority: tuple[str, float] | None
    fresh: list[str]
    start: train_checkpoints.Start
    made_by: dict[str, str]


def prepare(run: Run) -> Job:
    """Reads data and model.

    Raises:
        ValueError, FileNotFoundError: the first thing that is wrong.
    """
    start = train_checkpoints.asked_for(run)
    data = train_data.read(run.data)
    if run.data.model is None and not data.labels:
        raise ValueError("the data have no labels, so --model has to be a causal language model, a folder or a hub name")
    if run.arguments.r3f_spectral is not None and not data.labels:
        raise ValueError(
            f"--method {run.method} normalises the head of a classifier (--r3f_spectral), and the data have no labels; "
            "--method r3f takes text"
        )
    if data.labels and not run.arguments.eval_do_concat_batches:
        raise ValueError(
            "--eval_do_concat_batches: a classifier is scored on all batches of an evaluation together; leave it out"
        )
    asked, known = run.arguments.metric_for_best_model, ("loss", *SCORES) if data.labels else ("loss",)
    if asked is not None and asked.removeprefix("eval_") not in known:
        raise unknown("metric_for_best_model", asked, known)
    transformers.set_seed(run.arguments.seed)  # a fresh head depends on it
    path = str(packaged_model()) if run.data.model is None else run.data.model
    tokenizer, model, fresh = load(path, data.labels, run.data.dtype)
    model.train()
    most = min(getattr(model.config, "max_position_embeddings", None) or 1 << 30, tokenizer.model_max_length)
    size = run.data.max_length or min(128, most)
    if size > most:
        raise ValueError(f"--max_length {size}: the model takes {most} tokens")
    if data.labels:
        if tokenizer.pad_token is None:
            if tokenizer.eos_token is None:
                raise ValueError(f"--model {run.data.model}: its tokenizer can neither pad nor end a text")
            tokenizer.pad_token = tokenizer.eos_token
            model.config.pad_token_id = tokenizer.pad_token_id
        train, validation = (
            train_data.classified(rows, tokenizer, model.config.label2id, size) for rows in (data.train, data.validation)
        )
    else:
        try:
            check_causal(model)
        except ValueError as error:
            raise ValueError(f"the data have no labels, and {error}; --label_column names a column of labels") from None
        run.arguments.prediction_loss_only = True  # logits over a vocabulary would fill the memory
        ids = train_data.streams(data, encoder(tokenizer), tokenizer.eos_token_id, size)
        train, validation = (
            train_data.blocks(part, size, which) for part, which in zip(ids, ("training", "validation"), strict=True)
        )
    batch = run.arguments.train_batch_size * run.arguments.world_size  # the first is of all GPUs of a process
    if run.arguments.dataloader_drop_last and len(train) < batch:
        raise ValueError(
            f"--dataloader_drop_last: the {len(train)} training examples make no whole batch of {batch}; leave it out, or "
            "take a smaller --per_device_train_batch_size"
        )
    blocks = "" if data.labels else f": {len(train)} and {len(validation)} blocks of {size} tokens"
    given = {"training data": data.train, "validation data": data.validation}
    made_by = {
        "method": run.method,
        "model": run.data.model or PACKAGED_MODEL,
        "dtype": run.data.dtype,
        **{what: f"{len(rows)} rows (digest {train_data.digest(rows)})" for what, rows in given.items()},
        "labels": ", ".join(data.labels),
        "number of labels": str(len(data.labels)),
        "max_length": str(size),
        "processes": str(run.arguments.world_size),
        **train_checkpoints.options_that_train(run.arguments, PARTS[run.method]),
    }
    start = train_checkpoints.compared(start, made_by, run, model)
    majority = data.majority() if data.labels else None
    return Job(
        run, model, tokenizer, train, validation, data.labels, data.summary() + blocks, majority, fresh, start, made_by
    )


# -- the run ----------------------------------------------------------------------------------------------------------------


def assemble(job: Job) -> Any:
    """The trainer, with a Watch as its `watch`.

    Raises:
        ValueError, TypeError, RuntimeError, ImportError: what the trainer refuses; the folder that it made is gone again.
    """
    run, arguments = job.run, job.run.arguments
    watch = Watch(run, _results(job))
    collate: Any = transformers.default_data_collator
    if job.labels:
        collate = transformers.DataCollatorWithPadding(job.tokenizer)
    callbacks: list[TrainerCallback] = [watch]
    if every := run.data.sharpness_steps:  # on the first batches of the training data, in eval mode, whatever the method
        size = arguments.per_device_train_batch_size
        starts = range(0, min(8 * size, len(job.train)), size)
        callbacks.append(SharpnessCallback([collate(job.train[k : k + size]) for k in starts], every))
    try:
        trainer = train_checkpoints.RunTrainer(
            job.model,
            arguments,
            data_collator=collate,
            train_dataset=job.train,
            eval_dataset=job.validation,
            processing_class=job.tokenizer,
            compute_metrics=scores if job.labels else None,
            callbacks=callbacks,
            record=train_checkpoints.RunRecord(job.made_by),
            changed=job.start.changes,
            is_last=lambda: watch.asked,
        )
        if job.labels:  # the Trainer takes their loss for one that is divided by a step's labels, and would add n of them up
            trainer.model_accepts_loss_kwargs = False
        trainer.rehearse()
    except Exception:
        watch.leave_no_folder()
        raise
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    if sys.stderr.isatty() and not arguments.disable_tqdm:
        trainer.add_callback(Bar())
    trainer.watch = watch
    return trainer


def carry_out(job: Job, trainer: Any) -> train_report.Results:
    """Trains, saves, and writes the report.

    Raises:
        KeyboardInterrupt: Ctrl-C; a checkpoint of the last whole step is there, where one process trains.
        Exception: also what the trainer refuses as it begins, when nothing is written yet (`Watch.refused`).
    """
    run, arguments, watch = job.run, job.run.arguments, trainer.watch
    results: train_report.Results = watch.results
    first, checkpoint = trainer.is_world_process_zero(), job.start.checkpoint
    if first:
        for what, value in results.facts:
            if what in ("model", "data", "a step", "baseline"):
                print(f"{what}: {value}")
        if job.fresh and checkpoint is None:
            print(f"not in the checkpoint, made anew: {', '.join(job.fresh)}")
        for note in (*job.start.notes, *job.start.changes.values()):
            print(f"resuming from {checkpoint}: {note}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "resuming from a checkpoint that was made differently")  # said above, in full
            if checkpoint is None or not trainer.was_at_its_end(checkpoint):
                trainer.train(resume_from_checkpoint=checkpoint)
            elif first:
                keep_options(run)
    except Exception:
        watch.refused = watch.began_at is None
        if watch.refused:
            watch.leave_no_folder()
        raise
    finally:
        watch.release()
        if first:
            watch.write(trainer.state)
    state = trainer.state  # the same in every process
    if watch.asked and state.global_step < state.max_steps:
        raise KeyboardInterrupt
    if not any("eval_loss" in line and line["step"] == state.global_step for line in state.log_history):
        trainer.evaluate()
    if trainer.r4f is not None:
        trainer.r4f.merge()
        trainer.r4f = None
    trainer.save_model()
    if state.best_model_checkpoint and arguments.load_best_model_at_end:
        results.facts.append(("saved model", f"the best, of {Path(state.best_model_checkpoint).name}"))
    if first:
        watch.write(state)
        train_report.write(results)
    return results


class Bar(ProgressCallback):
    """The Trainer's bar, with the loss at its end in place of a line for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        bar: Any = self.training_bar
        if bar is not None and "loss" in (logs or {}):
            bar.set_postfix_str(f"loss {logs['loss']:.4g}")


class Watch(TrainerCallback):
    """Keeps run.yaml and metrics.csv, and lets Ctrl-C end a run at a step's end, with a checkpoint.

    A second Ctrl-C ends it at once. With several processes the first does: they could not agree on a step without waiting
    for each other at all of them.
    """

    def __init__(self, run: Run, results: train_report.Results) -> None:
        self.run, self.results = run, results
        self.made_folder = not run.folder.exists()
        self.asked = self.refused = False
        self.began_at: int | None = None  # None: no step is made, the checkpoint is the end
        self.saved_at: int | None = None
        self._before: Any = None

    def write(self, state: Any) -> None:
        self.results.take(state.log_history)
        self.results.steps = 0 if self.began_at is None else state.global_step - self.began_at
        if self.results.rows:
            self.results.write_csv()

    def leave_no_folder(self) -> None:
        """The trainer makes its folder before it has checked everything."""
        if self.made_folder:
            with contextlib.suppress(OSError):  # something is in it, or another process was faster
                self.run.folder.rmdir()

    def release(self) -> None:
        """Gives Ctrl-C back to whoever had it."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _interrupt(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        tqdm.write("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began_at = state.global_step
        if state.is_world_process_zero:
            keep_options(self.run)
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer comes here after the last step that was made, too; an evaluation at a true end is saved with it."""
        if self.asked and state.global_step < state.max_steps:
            control.should_training_stop = True
            control.should_evaluate = control.should_evaluate and float(state.epoch).is_integer()
            control.should_save = control.should_evaluate or self.saved_at != state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.saved_at = state.global_step
        if state.is_world_process_zero:
            self.write(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write(state)
            row = self.results.rows[-1]
            columns = ("eval_loss", "eval_perplexity", *(f"eval_{name}" for name in SCORES))
            told = ", ".join(f"{name.removeprefix('eval_')} {row[name]:.4g}" for name in columns if name in row)
            tqdm.write(f"step {state.global_step}: evaluation {told}")


def scores(predicted: Any) -> dict[str, float]:
    """Accuracy, F1 and Matthews' correlation of an evaluation.

    F1 is, as GLUE has it, that of the second of two labels; of more labels the unweighted mean of theirs. Both are 0 where
    they are not defined.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    said, labels = logits.argmax(-1), predicted.label_ids
    classes = logits.shape[-1]
    which: Any = {"pos_label": 1} if classes == 2 else {"average": "macro", "labels": range(classes)}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "A single label was found")
        return {
            "accuracy": float(accuracy_score(labels, said)),
            "f1": float(f1_score(labels, said, zero_division=0, **which)),
            "mcc": float(matthews_corrcoef(labels, said)),
        }


# -- what is said of it -----------------------------------------------------------------------------------------------------


def results_of(
    run: Run, model: Any, summary: str, device: str, metric: str, unit: str = "", facts: Collection[tuple[str, str]] = ()
) -> train_report.Results:
    """The report before the run.

    Args:
        summary: of the data. facts: further ones, after model and data.
    """
    size, dtype = sum(p.numel() for p in model.parameters()), next(model.parameters()).dtype
    versions = f"fastpost {fastpost.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    which = f"{size / 1e6:.3g}M parameters in {str(dtype).removeprefix('torch.')}"
    told = [
        ("model", f"{run.data.model or PACKAGED_MODEL}, {which}"),
        ("data", f"{run.data.train_file or run.data.dataset}: {summary}"),
        *facts,
        ("on", f"{device}, {torch.get_num_threads()} threads"),
        ("versions", f"{versions}, Python {sys.version.split()[0]}"),
    ]
    return train_report.Results(run.folder, run.method, run.command, run.mask.value(run.changed), told, metric, unit)


def _results(job: Job) -> train_report.Results:
    a = job.run.arguments
    each = f"{a.train_batch_size} x {a.gradient_accumulation_steps} x {a.world_size}"
    facts = [("a step", f"{each} examples (batch x accumulation x processes), learning rate {a.learning_rate:g}")]
    if job.majority is not None:
        label, share = job.majority
        facts.append(("baseline", f"always {label!r}, the most frequent label of training: accuracy {share:.4g}"))
        names = sorted(job.labels, key=job.model.config.label2id.get)
        facts.append(("F1", f"of the label {names[1]!r}" if len(names) == 2 else f"unweighted mean of {len(names)} labels"))
    metric = "eval_accuracy" if job.labels else "eval_loss" if a.label_smoothing_factor else "eval_perplexity"
    results = results_of(job.run, job.model, job.summary, str(a.device), metric, facts=facts)
    results.parts = PARTS[job.run.method]
    results.baseline = None if job.majority is None else job.majority[1]
    if job.start.checkpoint is not None:
        results.facts.append(("resumed from", job.start.checkpoint))
        results.facts += [("changed on resuming", told) for told in job.start.changes.values()]
    window = a.gradient_accumulation_steps
    if "sam" in PARTS[job.run.method] and math.ceil(a.sam_ascent_fraction * window) < window:
        results.loss_at = ", past the ascent at w + e"
    return results


def keep_options(run: Run) -> None:
    """run.yaml: `fastpost train run.yaml` is this run again. Secrets are left out."""
    import yaml  # type: ignore[import-untyped]

    plain = {name: getattr(value, "value", value) for name, value in run.changed.items()}
    for name in ("resume_from_checkpoint", "resume_with_changes"):
        plain.pop(name, None)
    left_out = [name for name in plain if is_secret(name)]
    kept = run.mask.value({name: value for name, value in plain.items() if name not in left_out})
    run.folder.mkdir(parents=True, exist_ok=True)
    told = "".join(f"# {name} is left out: secrets are not written\n" for name in left_out)
    replace_text(run.folder / "run.yaml", told + yaml.safe_dump(kept, sort_keys=False))
