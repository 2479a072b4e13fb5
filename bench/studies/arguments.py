"""Options of studies: parsed with a file of options, near misses named; lists of names and of seeds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from fastpost.cli.options import Options, is_settings
from fastpost.errors import unknown


def parsed(cls: type[Options], program: str, description: str, argv: Sequence[str], lists: Sequence[str] = ()) -> Options:
    """Options from the command line, over those of a JSON or YAML file where the first argument is one.

    Args:
        program: as errors and the help name it. lists: options that take several values, as in `joined`.

    Raises:
        ValueError: an option or key that does not exist, or a value out of range.
        FileNotFoundError: no such file.
    """
    from transformers import HfArgumentParser

    argv = joined(argv, lists)
    make: Any = HfArgumentParser
    parser = make(cls, prog=program, description=description, exit_on_error=False)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # a dataclass, which TypeVar cannot say
    if argv and is_settings(argv[0]):
        parser.set_defaults(**_read_config(Path(argv.pop(0)), names))
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    if rest:
        first = rest[0].split("=")[0]
        raise unknown("option", first, [f"--{name.replace('_', '-')}" for name in names])
    return cls(**vars(options))


def names_of(text: str, option: str, valid: Sequence[str]) -> list[str]:
    """The names in the value of a list option, each once.

    Raises:
        ValueError: a name that is not valid, or none at all.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in valid:
            raise unknown(option.removesuffix("s"), name, valid)
    if not names:
        raise ValueError(f"--{option} names none; valid: {', '.join(valid)}")
    return names


def seeds_of(text: str) -> list[int]:
    """The seeds in the value of a list option, each once.

    Raises:
        ValueError: no seed, or one that is not a whole number from 0 to 2^32 - 1.
    """
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 1 << 32:
        raise ValueError(f"--seeds wants whole numbers >= 0 and < 2^32, with commas or spaces between, not {text!r}")
    return list(dict.fromkeys(seeds))


def joined(words: Sequence[str], lists: Sequence[str]) -> list[str]:
    """A command line in which the values of list options, given with spaces or commas between, are one word with commas.

    Args:
        lists: names of the options, with underscores.
    """
    found: list[str] = []
    at = 0
    while at < len(words):
        found.append(words[at])
        at += 1
        if not (found[-1].startswith("--") and found[-1][2:].replace("-", "_") in lists and at < len(words)):
            continue
        end = at + 1
        while end < len(words) and not words[end].startswith("-"):
            end += 1
        found.append(",".join(word.strip(",") for word in words[at:end]) or words[at])
        at = end
    return found


def _read_config(path: Path, names: Sequence[str]) -> dict[str, str]:
    from fastpost.integrations.transformers import settings_of

    data = settings_of(path, names)
    # As text, which argparse then reads as if it came from the command line.
    joined = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in data.items()}
    return {key: str(value) for key, value in joined.items() if value is not None}
