"""SAM, R3F and an anchor in transformers' Trainer (transformers 5).

    from fastpost.integrations.transformers import PostTrainingArguments as TrainingArguments, SAMTrainer as Trainer

    trainer = Trainer(model, TrainingArguments("out", sam_rho=0.05), train_dataset=data)
    trainer.train()

Subclasses of Trainer take the mixin: `class MyTrainer(SAMTrainerMixin, Seq2SeqTrainer)`.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

try:
    from transformers import HfArgumentParser, Seq2SeqTrainingArguments, Trainer, TrainingArguments
except ImportError as error:
    raise ImportError(
        f"fastpost.integrations.transformers needs transformers 5 and accelerate ({error}): "
        "pip install 'fastpost[transformers]'"
    ) from error

from fastpost.errors import no_file, not_utf8, unknown
from fastpost.integrations.anchor_trainer import AnchorTrainerMixin
from fastpost.integrations.guards import DriftGuard, LossGuard
from fastpost.integrations.options import PostTrainingOptions
from fastpost.integrations.r3f_trainer import R3FTrainerMixin
from fastpost.integrations.sam_trainer import SAMTrainerMixin
from fastpost.integrations.sharpness import SharpnessCallback

__all__ = [
    "AnchorTrainer",
    "AnchorTrainerMixin",
    "DriftGuard",
    "LossGuard",
    "PostTrainer",
    "PostTrainingArguments",
    "PostTrainingOptions",
    "R3FTrainer",
    "R3FTrainerMixin",
    "SAMTrainer",
    "SAMTrainerMixin",
    "Seq2SeqPostTrainingArguments",
    "SharpnessCallback",
    "parse_arguments",
]


@dataclass(repr=False)
class PostTrainingArguments(PostTrainingOptions, TrainingArguments):
    """TrainingArguments with the fields of `PostTrainingOptions`; HfArgumentParser reads them as any others.

    Raises:
        ValueError: an option that does not exist or is out of range.
    """


@dataclass(repr=False)
class Seq2SeqPostTrainingArguments(PostTrainingOptions, Seq2SeqTrainingArguments):
    """The same for Seq2SeqTrainer."""


class SAMTrainer(SAMTrainerMixin, Trainer):
    """transformers' Trainer with SAM; see `SAMTrainerMixin`."""


class R3FTrainer(R3FTrainerMixin, Trainer):
    """transformers' Trainer with R3F; see `R3FTrainerMixin`."""


class AnchorTrainer(AnchorTrainerMixin, Trainer):
    """transformers' Trainer with an anchor; see `AnchorTrainerMixin`."""


class PostTrainer(SAMTrainerMixin, R3FTrainerMixin, AnchorTrainerMixin, Trainer):
    """A Trainer that goes by `args.method`: "sam", "sam_lm", "asam", "r3f", "r4f", "sam+r3f", "sam+r4f", "tram", "anchor",
    "sam+anchor", "r3f+anchor", "sam+r3f+anchor", or "none".

    Under "sam+r3f" both of SAM's passes take R3F's loss, with the same noise (as with dropout_rng="same" the same masks).
    Under "sam+anchor" both take the anchor's, whose reference is not perturbed. Under "r3f+anchor" R3F's divergence is added
    to the anchor's loss, of logits.

    Raises:
        ValueError: `args.method` is None.
    """

    _goes_by_method = True


def parse_arguments(classes: Any = PostTrainingArguments, argv: Sequence[str] | None = None) -> Any:
    """Arguments from a command line, over those of a YAML or JSON file where its first word is one.

    Args:
        classes: a dataclass, or several, as for HfArgumentParser.
        argv: the words; None: the process's own.

    Returns:
        An instance of each class: one, or a tuple.

    Raises:
        ValueError: an option or a key that does not exist, naming the nearest that does; a value out of range.
    """
    several = tuple(classes) if isinstance(classes, (tuple, list)) else (classes,)
    make: Any = HfArgumentParser
    parser = make(several)
    names = [f.name for c in several for f in fields(c) if f.init]
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].lower().endswith((".json", ".yaml", ".yml")):
        give_defaults(parser, settings_of(Path(words.pop(0)), names))
    *parsed, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    if rest:
        raise unknown("option", rest[0].split("=")[0], [f"--{name}" for name in names])
    return parsed[0] if len(several) == 1 else tuple(parsed)


def give_defaults(parser: Any, settings: Mapping[str, Any]) -> None:
    """Makes a file's settings the parser's defaults, which what is typed overrides.

    Values are read as if they had been typed. Mappings and lists stay what they are where the option's type has such.

    Raises:
        ValueError: a value that the option does not have, a list or a mapping among them.
    """
    hints = {name: hint for c in parser.dataclass_types for name, hint in get_type_hints(c).items()}
    for action in parser._actions:
        value = settings.get(action.dest)
        if value is None or not action.option_strings or action.nargs == 0:  # 0: the --no_ form of a switch
            continue
        try:
            if action.nargs in ("+", "*"):
                words = value if isinstance(value, list) else [value]
                if any(isinstance(word, (Mapping, list)) for word in words):
                    raise ValueError(f"{action.dest} takes words, not a mapping or lists")
                value = [_as_typed(parser, action, word) for word in words]
            elif isinstance(value, (Mapping, list)):
                kind = dict if isinstance(value, Mapping) else list
                if kind not in _kinds(hints[action.dest]):
                    what = "a mapping" if kind is dict else "a list"
                    raise ValueError(f"{action.dest} takes one value, not {what}")
            else:
                value = _as_typed(parser, action, value)
        except argparse.ArgumentError as error:
            raise ValueError(f"{action.dest}: {error.message}") from None
        action.required = False
        parser.set_defaults(**{action.dest: value})


def _kinds(hint: Any) -> set[Any]:
    """The classes that a type consists of, without what is in their brackets."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return {get_origin(part) or part for part in parts}


def _as_typed(parser: Any, action: argparse.Action, value: Any) -> Any:
    if value is False and action.choices is not None and "no" in action.choices:
        value = "no"  # which YAML takes for a truth value
    found = parser._get_value(action, str(value))
    parser._check_value(action, found)
    return found


def settings_of(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Keys and values of a JSON or YAML file.

    Raises:
        FileNotFoundError: no such file. ValueError: neither JSON nor YAML, no mapping, or a key that is none of `names`.
    """
    if not path.is_file():
        raise no_file(path)
    import yaml  # type: ignore[import-untyped]

    try:
        text = path.read_text(encoding="utf-8-sig")
        settings = json.loads(text) if path.suffix.lower() == ".json" else yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:  # without the lines that it shows, which may hold a secret
        at = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        told = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(f"{path}: {told}{at}") from None
    except UnicodeDecodeError as error:
        raise not_utf8(path, error) from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from None
    if settings is None:
        raise ValueError(f"{path} holds no settings; write one a line, such as seed: 1")
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(settings).__name__}")
    for key in settings:
        if key not in names:
            raise unknown(f"setting in {path}", str(key), names)
    return settings
