"""What the commands' options have in common: fields with help, parsing with a config file and near misses named."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

from fastpost.errors import unknown

Options = TypeVar("Options")


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default and a line of help."""
    return field(default=default, metadata={"help": text})


def parsed(cls: type[Options], command: str, description: str, argv: Sequence[str]) -> Options:
    """Options from the command line, over those of a JSON or YAML file where the first argument is one.

    Raises:
        ValueError: an option or key that does not exist, or a value out of range.
        FileNotFoundError: no such file.
    """
    from transformers import HfArgumentParser

    argv = list(argv)
    make: Any = HfArgumentParser
    parser = make(cls, prog=f"fastpost {command}", description=description)
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # a dataclass, which TypeVar cannot say
    if argv and argv[0].endswith((".json", ".yaml", ".yml")):
        parser.set_defaults(**_read_config(Path(argv.pop(0)), names))
    options, rest = parser.parse_known_args(argv)
    if rest:
        first = rest[0].split("=")[0]
        raise unknown("option", first, [f"--{name.replace('_', '-')}" for name in names])
    return cls(**vars(options))


def check_least(options: object, least: Mapping[str, float]) -> None:
    """Raises ValueError for the first option below its least value, or not finite."""
    for name, bound in least.items():
        value = getattr(options, name)
        if not (math.isfinite(value) and value >= bound):
            raise ValueError(f"--{name.replace('_', '-')} must be at least {bound}, not {value}")


def names_of(text: str, option: str, valid: Sequence[str]) -> list[str]:
    """The names of a comma-separated option, each once.

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
    """Comma-separated seeds, each once.

    Raises:
        ValueError: no seed, or one that is not a whole number from 0 to 2^32 - 1.
    """
    try:
        seeds = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0 or max(seeds) >= 1 << 32:
        raise ValueError(f"--seeds wants whole numbers >= 0 and < 2^32 with commas between, not {text!r}")
    return list(dict.fromkeys(seeds))


def _read_config(path: Path, names: Sequence[str]) -> dict[str, str]:
    from fastpost.integrations.transformers import settings_of

    data = settings_of(path, names)
    # As text, which argparse then reads as if it came from the command line.
    joined = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in data.items()}
    return {key: str(value) for key, value in joined.items() if value is not None}
