"""What options of commands and studies have in common: fields with help, ranges of numbers, errors in one line."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastpost.integrations.masking import Mask

Options = TypeVar("Options")


def option(default: Any, text: str) -> Any:
    """A dataclass field with a default and a line of help."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Range:
    """Values that a number may have; all of them finite unless `infinite`.

    Attributes:
        least, most: bounds. above: `least` itself is none. below: `most` itself is none. also: values outside that mean
            something of their own.
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False
    infinite: bool = False
    also: tuple[float, ...] = ()

    def __contains__(self, value: float) -> bool:
        if value in self.also:
            return True
        if math.isnan(value) or (math.isinf(value) and not self.infinite):
            return False
        low = value > self.least if self.above else value >= self.least
        return low and (value < self.most if self.below else value <= self.most)

    def __str__(self) -> str:
        low = "" if math.isinf(self.least) else f"more than {self.least:g}" if self.above else f"at least {self.least:g}"
        high = "" if math.isinf(self.most) else f"less than {self.most:g}" if self.below else f"at most {self.most:g}"
        bounds = " and ".join(part for part in (low, high) if part) or "a finite number"
        return " or ".join([bounds, *(f"{value:g}" for value in self.also)])


def check(options: object, ranges: Mapping[str, Range], dashes: bool = True) -> None:
    """Raises ValueError for the first option that is given and outside of its range.

    Args:
        dashes: how the message writes the option, `--max-steps` or `--max_steps`.
    """
    for name, allowed in ranges.items():
        value = getattr(options, name)
        if value is not None and value not in allowed:
            shown = name.replace("_", "-") if dashes else name
            raise ValueError(f"--{shown} must be {allowed}, not {value}")


def is_settings(word: str) -> bool:
    """Whether a word of a command line names a file of settings."""
    return word.lower().endswith((".json", ".yaml", ".yml"))


def complain(program: str, error: BaseException | str, mask: Mask | None = None) -> None:
    """One line on stderr, without secrets; by default those of the environment."""
    mask = mask or Mask(os.environ)
    print(f"{program}: error: {mask.text(' '.join(str(error).split()))}", file=sys.stderr)
