"""A training run of `fastpost train`: PostTrainer on the data given, watched, stopped where it can be resumed, and timed."""

from __future__ import annotations

import math
import signal
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback

import fastpost
from fastpost.bench import step_times
from fastpost.cli import train_data, train_page, train_report, train_resume
from fastpost.cli.files import replace_text
from fastpost.cli.models import PACKAGED_MODEL, check_causal, loading, packaged_model, quietly
from fastpost.cli.train_checkpoints import RunRecord, RunTrainer, options_that_train
from fastpost.cli.train_options import PARTS, Run
from fastpost.errors import unknown
from fastpost.integrations.masking import is_secret
from fastpost.integrations.sharpness import SharpnessCallback


@dataclass
class Job:
    """All that is read and checked before anything is written.

    Attributes:
        majority: the label that is most frequent in training, and the accuracy of always saying it; None for text.
        fresh: weights that the checkpoint named by --model does not have.
        start: the checkpoint to resume from.
        made_by: what makes this run's checkpoints.
    """

    run: Run
    model: Any
    tokenizer: Any
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    labels: tuple[str, ...]
    told: str
    majority: tuple[str, float] | None
    fresh: list[str]
    start: train_resume.Start
    made_by: dict[str, Any]


def prepare(run: Run) -> Job:
    """Reads data and model.

    Raises:
        ValueError, FileNotFoundError: the first thing that is wrong.
    """
    start = train_resume.asked_for(run)
    data = train_data.read(run.data)
    if run.data.model is None and not data.labels:
        raise ValueError("the data have no labels, so --model has to be a causal language model, a folder or a hub name")
    if run.arguments.r3f_spectral is not None and not data.labels:
        raise ValueError(
            f"--method {run.method} normalises the head of a classifier (--r3f_spectral), and the data have no labels; "
            "--method r3f takes text"
        )
    transformers.set_seed(run.arguments.seed)  # a fresh head depends on it
    config, tokenizer, model, fresh = _load(run, data.labels)
    size = _length(run.data.max_length, config, tokenizer)
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
        encode, end = train_data.encoder(tokenizer), tokenizer.eos_token_id
        ids = train_data.streams(data, encode, end, size)
        train, validation = (
            train_data.blocks(part, size, which) for part, which in zip(ids, ("training", "validation"), strict=True)
        )
    asked = run.arguments.metric_for_best_model
    known = ("loss", *SCORES) if data.labels else ("loss",)
    if asked is not None and asked.removeprefix("eval_") not in known:
        raise unknown("metric_for_best_model", asked, known)
    told = data.told() + ("" if data.labels else f": {len(train)} and {len(validation)} blocks of {size} tokens")
    made_by = _made_by(run, data, size)
    start = train_resume.compared(start, made_by, run.data.resume_with_changes, model)
    majority = data.majority() if data.labels else None
    return Job(run, model, tokenizer, train, validation, data.labels, told, majority, fresh, start, made_by)


def _made_by(run: Run, data: train_data.Data, size: int) -> dict[str, Any]:
    """All that the weights of a checkpoint depend on, as JSON has it."""
    given = {"training data": data.train, "validation data": data.validation}
    return {
        "method": run.method,
        "model": run.data.model or PACKAGED_MODEL,
        "dtype": run.data.dtype,
        **{what: {"rows": len(rows), "digest": train_data.digest(rows)} for what, rows in given.items()},
        "labels": list(data.labels),
        "max_length": size,
        "processes": run.arguments.world_size,
        **options_that_train(run.arguments, PARTS[run.method]),
    }


def _load(run: Run, labels: tuple[str, ...]) -> tuple[Any, Any, Any, list[str]]:
    """Config, tokenizer, model in training mode, and the names of weights that were made anew."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    path = str(packaged_model()) if run.data.model is None else run.data.model
    auto: Any = AutoModelForSequenceClassification if labels else AutoModelForCausalLM
    load: Any = AutoTokenizer.from_pretrained
    with loading(path), quietly():
        config: Any = AutoConfig.from_pretrained(path)
        tokenizer = load(path)
        if labels and set(getattr(config, "label2id", None) or ()) != set(labels):  # else the model keeps its own order
            config.num_labels = len(labels)
            config.id2label = dict(enumerate(labels))
            config.label2id = {name: k for k, name in enumerate(labels)}
        if not labels and not getattr(config, "pad_token_id", None) and getattr(config, "is_encoder_decoder", False):
            raise ValueError("an encoder-decoder does not continue text; give a causal language model")
        model, info = auto.from_pretrained(path, config=config, dtype=run.data.dtype, output_loading_info=True)
    return config, tokenizer, model.train(), sorted(info["missing_keys"])


def _length(asked: int | None, config: Any, tokenizer: Any) -> int:
    most = min(getattr(config, "max_position_embeddings", None) or 1 << 30, tokenizer.model_max_length)
    if asked is not None and asked > most:
        raise ValueError(f"--max_length {asked}: the model takes {most} tokens")
    return asked or min(128, most)


# -- the run ----------------------------------------------------------------------------------------------------------------


def assemble(job: Job, console: Any) -> Any:
    """The trainer, with a Watch as its `watch`.

    Raises:
        ValueError, TypeError, RuntimeError, ImportError: what the trainer refuses; the folder that it made is gone again.
    """
    from transformers import DataCollatorWithPadding, default_data_collator
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    run, arguments = job.run, job.run.arguments
    results = _results(job)
    watch = Watch(results, console, perplexity=results.metric == "eval_perplexity")
    watch.quiet = bool(arguments.disable_tqdm)
    there = run.folder.exists()
    collate: Any = DataCollatorWithPadding(job.tokenizer) if job.labels else default_data_collator
    try:
        record = RunRecord()
        record.made_by = job.made_by
        trainer = RunTrainer(
            job.model,
            arguments,
            data_collator=collate,
            train_dataset=job.train,
            eval_dataset=job.validation,
            processing_class=job.tokenizer,
            compute_metrics=scores if job.labels else None,
            callbacks=[watch, *_sharpness(job, collate)],
            record=record,
            changed=job.start.changes,
        )
        trainer.rehearse()
    except Exception:
        if not there and run.folder.is_dir() and not any(run.folder.iterdir()):
            run.folder.rmdir()
        raise
    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)
    trainer.watch = watch
    return trainer


def carry_out(job: Job, trainer: Any, console: Any) -> train_report.Results:
    """Trains, saves, times, and writes the report.

    Raises:
        KeyboardInterrupt: Ctrl-C; a checkpoint of the last whole step is there, where one process trains.
    """
    run, arguments, watch = job.run, job.run.arguments, trainer.watch
    results: train_report.Results = watch.results
    for what, value in results.facts:
        if what in ("model", "data", "a step", "baseline"):
            console.print(f"{what}: {value}", highlight=False, markup=False, soft_wrap=True)
    if job.fresh:
        console.print(f"not in the checkpoint, made anew: {', '.join(job.fresh)}", highlight=False, markup=False)
    for note in (*job.start.notes, *job.start.changes.values()):
        console.print(f"resuming from {job.start.checkpoint}: {note}", highlight=False, markup=False, soft_wrap=True)
    first = trainer.is_world_process_zero()
    if first:
        keep_options(run)
    checkpoint = job.start.checkpoint
    try:
        with watch, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "resuming from a checkpoint that was made differently")  # said above, in full
            if checkpoint is None or not train_resume.was_at_its_end(trainer, checkpoint):
                trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        if first:
            watch.write(trainer.state)
    if watch.asked and trainer.state.global_step < trainer.state.max_steps:
        raise KeyboardInterrupt
    state = trainer.state  # the same in every process
    if not any("eval_loss" in line and line["step"] == state.global_step for line in state.log_history):
        trainer.evaluate()
    trainer.save_model()
    if trainer.state.best_model_checkpoint and arguments.load_best_model_at_end:
        results.facts.append(("saved model", f"the best, of {Path(trainer.state.best_model_checkpoint).name}"))
    if first:
        watch.write(trainer.state)
        _time(job, trainer, results, watch)
        train_page.write(results)
    return results


def _sharpness(job: Job, collate: Any) -> list[SharpnessCallback]:
    """What --sharpness_steps asks for: the first batches of the training data, in eval mode, whatever the method."""
    every, size = job.run.data.sharpness_steps, job.run.arguments.per_device_train_batch_size
    if not every:
        return []
    rows = job.train[: 8 * size]
    return [SharpnessCallback([collate(rows[k : k + size]) for k in range(0, len(rows), size)], every)]


class Watch(TrainerCallback):
    """Shows progress, keeps metrics.csv, and lets Ctrl-C end a run at a step's end, with a checkpoint.

    A second Ctrl-C ends it at once. With several processes the first does: they could not agree on a step without waiting
    for each other at all of them.
    """

    def __init__(self, results: train_report.Results, console: Any, perplexity: bool) -> None:
        self.results, self.console, self.perplexity = results, console, perplexity
        self.asked = False
        self.quiet = False
        self._progress: Any = None
        self._bar: Any = None
        self._before: Any = None
        self.began_at = 0

    def write(self, state: Any) -> None:
        self.results.rows = train_report.rows_of(state.log_history, self.perplexity, PARTS[self.results.method])
        self.results.steps = state.global_step - self.began_at
        runtime = next((line["train_runtime"] for line in reversed(state.log_history) if "train_runtime" in line), None)
        if runtime is not None:
            self.results.seconds = runtime
        if self.results.rows:
            self.results.write_csv()

    def __enter__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(
            *columns,
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal or self.quiet,
        )
        self._progress.start()

    def __exit__(self, *exc: object) -> None:
        self._progress.stop()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def bar(self, what: str, total: int) -> Any:
        """A function of (done, total)."""
        task = self._progress.add_task(what, total=total)
        return lambda done, total: self._progress.update(task, completed=done, total=total)

    def _interrupt(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.console.print("stopping after this step, with a checkpoint; Ctrl-C again stops at once")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began_at = state.global_step
        self._bar = self.bar("training", state.max_steps)
        if args.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar(state.global_step, state.max_steps)
        if self.asked and state.global_step < state.max_steps:
            control.should_log = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked and state.global_step < state.max_steps:  # the epoch did not end, and the checkpoint is there
            control.should_log = control.should_save = control.should_evaluate = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self._progress is not None and "loss" in (logs or {}):
            self._progress.update(self._progress.task_ids[0], description=f"training, loss {logs['loss']:.4g}")

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.write(state)
            row = self.results.rows[-1]
            score = row.get(self.results.metric, float("nan"))
            name = self.results.metric.removeprefix("eval_")
            told = f"step {state.global_step}: evaluation loss {row['eval_loss']:.4g}, {name} {score:.4g}"
            told += "".join(f", {column} {row[f'eval_{column}']:.4g}" for column in ("f1", "mcc") if f"eval_{column}" in row)
            self.console.print(told, highlight=False)


SCORES = ("accuracy", "f1", "mcc")
# Values that the published loops of `step_times` have.
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "sam_variant": (None,),
    "sam_perturb": ("stored",),
    "sam_masters": (False,),
    "r3f_relative": (None,),
    "r3f_spectral": (None, "last"),
    "r3f_spectral_mode": ("exact",),
}


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
    return {
        "accuracy": float(accuracy_score(labels, said)),
        "f1": float(f1_score(labels, said, zero_division=0, **which)),
        "mcc": float(matthews_corrcoef(labels, said)),
    }


def _results(job: Job) -> train_report.Results:
    run, a = job.run, job.run.arguments
    size = sum(p.numel() for p in job.model.parameters())
    dtype = str(next(job.model.parameters()).dtype).removeprefix("torch.")
    name = PACKAGED_MODEL if run.data.model is None else run.data.model
    each = f"{a.per_device_train_batch_size} x {a.gradient_accumulation_steps} x {a.world_size}"
    facts = [
        ("model", f"{name}, {size / 1e6:.3g}M parameters in {dtype}"),
        ("data", f"{run.data.train_file or run.data.dataset}: {job.told}"),
        ("a step", f"{each} examples (batch x accumulation x processes), learning rate {a.learning_rate:g}"),
    ]
    if job.majority is not None:
        label, share = job.majority
        facts.append(("baseline", f"always {label!r}, the most frequent label of training: accuracy {share:.4g}"))
        names = sorted(job.labels, key=job.model.config.label2id.get)
        facts.append(("F1", f"of the label {names[1]!r}" if len(names) == 2 else f"unweighted mean of {len(names)} labels"))
    facts += machine(str(a.device))
    if job.start.checkpoint is not None:
        facts.append(("resumed from", job.start.checkpoint))
        facts += [("changed on resuming", told) for told in job.start.changes.values()]
    metric = "eval_accuracy" if job.labels else "eval_perplexity"
    if not job.labels and a.label_smoothing_factor:
        metric = "eval_loss"  # of which no perplexity follows
    results = train_report.Results(run.folder, run.method, run.command, run.shown, facts, metric)
    results.baseline = None if job.majority is None else job.majority[1]
    window = a.gradient_accumulation_steps
    if "sam" in PARTS[run.method] and math.ceil(a.sam_ascent_fraction * window) < window:
        results.loss_at = ", past the ascent at w + e"
    return results


def machine(device: str) -> list[tuple[str, str]]:
    """Versions and device, for the report."""
    versions = f"fastpost {fastpost.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return [
        ("on", f"{device}, {torch.get_num_threads()} threads"),
        ("versions", f"{versions}, Python {sys.version.split()[0]}"),
    ]


def keep_options(run: Run) -> None:
    """run.yaml: `fastpost train run.yaml` is this run again. Secrets are left out."""
    import yaml  # type: ignore[import-untyped]

    plain = {name: getattr(value, "value", value) for name, value in run.changed.items()}
    plain.pop("resume_from_checkpoint", None)
    left_out = [name for name in plain if is_secret(name)]
    kept = run.mask.value({name: value for name, value in plain.items() if name not in left_out})
    run.folder.mkdir(parents=True, exist_ok=True)
    told = "".join(f"# {name} is left out: secrets are not written\n" for name in left_out)
    replace_text(run.folder / "run.yaml", told + yaml.safe_dump(kept, sort_keys=False))


def _time(job: Job, trainer: Any, results: train_report.Results, watch: Watch) -> None:
    """Times this method's step beside others, where that can be done; else `untimed` says why not."""
    arguments, rounds = job.run.arguments, job.run.data.timing_rounds
    if not rounds:
        return
    if arguments.world_size > 1:
        results.untimed = "not timed: several processes trained"
    elif arguments.fp16:
        results.untimed = "not timed: float16 takes a loss scaler, which the published loops have none of"
    elif "sam" in PARTS[job.run.method] and arguments.sam_interval > 1:
        results.untimed = "not timed: with --sam_interval steps differ from each other"
    elif other := next((name for name, usual in PUBLISHED.items() if getattr(arguments, name) not in usual), None):
        results.untimed = f"not timed: the published loop has no --{other} {getattr(arguments, other)}"
    elif arguments.label_smoothing_factor:
        results.untimed = "not timed: the loops beside it do not smooth labels (--label_smoothing_factor)"
    if results.untimed:
        return
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if trainer.r4f is not None:
        trainer.r4f.merge()
    model.zero_grad(set_to_none=True)
    size = arguments.per_device_train_batch_size
    parts = [job.train[k * size : (k + 1) * size] for k in range(arguments.gradient_accumulation_steps)]
    window = [{k: v.to(arguments.device) for k, v in trainer.data_collator(part).items()} for part in parts if part]
    try:
        with watch:
            told = watch.bar("timing a step", 0)
            results.costs = step_times.time_training(job.run.method, model, window, arguments, rounds, told)
    except KeyboardInterrupt:
        results.untimed = "not timed: interrupted"
    except Exception as error:  # the model is trained and saved; what could not be timed is told, and the report written
        results.untimed = f"not timed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
