"""Secrets: which options hold one, and values and text without them."""

from __future__ import annotations

import copy
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

MASK = "***"
_SECRET = re.compile(r".*(token|secret|password|passwd|passphrase|credentials?|apikey)|key|pwd|authorization|accesskey")
# A name that ends so says where a secret is, or something about it.
_ABOUT = {"path", "file", "dir", "column", "name", "type", "length", "size", "index", "count", "ids"}
_SPECIAL = {"pad", "eos", "bos", "unk", "sep", "cls", "mask", "image", "audio", "video"}  # tokens of a vocabulary
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_SHORT = 8  # shorter secrets are replaced in a text only where they stand as words of their own
_PLACE = re.compile("<[A-Z_]+>")  # what transformers writes in place of a token
_PLAIN = {"true", "false", "none", "null", "yes", "no"}

_PATTERNS = (
    (re.compile(r"(?<=://)[^/\s@'\"]+@"), f"{MASK}@"),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/-]{8,}=*"), rf"\1 {MASK}"),
    (
        re.compile(
            r"\b(hf_\w{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,}"
            r"|eyJ[\w-]+\.[\w-]+\.[\w-]+)"
        ),
        MASK,
    ),
)
# name=value, 'name': 'value' and name:value. A name, a colon and a space is a sentence as often as a setting.
_NAMED = re.compile(r"([A-Za-z][\w-]*)(=[\"']?|[\"']\s*[:=]\s*[\"']?|:(?=[^\s/]))([^\s,;&\"'}\])]+)")

_CREDENTIALS = re.compile(r"://[^/\s@'\":]*:([^/\s@'\"]+)@")


def is_secret(name: str) -> bool:
    """Whether an option, a key or a variable of this name holds a secret: `hub_token`, `apiKey`, `WANDB_API_KEY`."""
    words = [word.lower() for word in _WORDS.findall(name)]
    if not words or words[-1] in _ABOUT or _SPECIAL & set(words):
        return False
    return any(_SECRET.fullmatch(word) for word in words)


def _held(value: Any) -> bool:
    """Whether a value can be a secret at all. A file or folder that is there says where one is, at most."""
    if isinstance(value, str):
        return (
            value not in ("", MASK) and not _PLACE.fullmatch(value) and not (os.path.isabs(value) and os.path.exists(value))
        )
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class Mask:
    """Takes secrets out of values and texts: those under the name of a secret, credentials in URLs, tokens of well-known
    forms, and, wherever they occur, the values that it has seen under such a name.

    Args:
        sources: options, settings or environments whose secrets are to be found in any text.
    """

    def __init__(self, *sources: Mapping[str, Any]) -> None:
        self._seen: set[str] = set()
        for source in sources:
            self.add(source)

    def add(self, source: Mapping[str, Any]) -> None:
        """Remembers the secrets of a mapping, at any depth."""
        self._seen.update(_secrets(source))

    def add_words(self, words: Sequence[str]) -> None:
        """Remembers the secrets of a command line: what follows an option that holds one, or stands within a word."""
        for name, value in _options(words):
            self.add({name: value})

    def text(self, text: str) -> str:
        """The text with a mask in place of each secret."""
        for secret in sorted(self._seen, key=len, reverse=True):
            if len(secret) >= _SHORT:
                text = text.replace(secret, MASK)
            else:
                text = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", MASK, text)
        for pattern, put in _PATTERNS:
            text = pattern.sub(put, text)
        return _NAMED.sub(lambda m: m[1] + m[2] + MASK if is_secret(m[1]) else m[0], text)

    def value(self, value: Any, name: str = "") -> Any:
        """A copy of a value with masks in it; mappings, lists and tuples at any depth. Other objects stay what they are."""
        if is_secret(name) and _held(value):
            return MASK
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.value(inner, str(key)) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.value(inner, name) for inner in value]
        return value

    def exception(self, error: BaseException | None) -> None:
        """Masks the messages of an exception and of those it came from, in place."""
        while error is not None:
            error.args = tuple(self.text(part) if isinstance(part, str) else part for part in error.args)
            error = error.__cause__ or error.__context__

    def command(self, words: Sequence[str]) -> str:
        """A command line to show."""
        shown = []
        hidden = False
        for word in words:
            name, equals, _ = word.partition("=")
            if hidden and not word.startswith("--"):
                shown.append(MASK)
            elif equals and word.startswith("--") and is_secret(name):
                shown.append(f"{name}={MASK}")
            else:
                shown.append(self.text(word))
            hidden = word.startswith("--") and not equals and is_secret(name)
        return shlex.join(shown)


def masked_in(value: Any) -> bool:
    """Whether a value holds a mask, at any depth: something of which only the masked copy is left."""
    if isinstance(value, Mapping):
        return any(masked_in(inner) for inner in value.values())
    if isinstance(value, (list, tuple)):
        return any(masked_in(inner) for inner in value)
    marks = (f"://{MASK}@", f"={MASK}", f'"{MASK}"')
    return isinstance(value, str) and (value == MASK or any(mark in value for mark in marks))


def _secrets(value: Any, name: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _secrets(inner, str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _secrets(inner, name)
    elif is_secret(name) and _held(value):
        found = str(value)
        if len(found) > 2 and found.lower() not in _PLAIN:
            yield found
    elif isinstance(value, str):
        for within in _NAMED.finditer(value):  # "name=value,..." and mappings written as JSON
            yield from _secrets(within[3], within[1]) if is_secret(within[1]) else ()
        for within in _CREDENTIALS.finditer(value):
            yield from _secrets(within[1], "password")


def _options(words: Iterable[str]) -> Iterator[tuple[str, str]]:
    last = ""
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--"):
            if equals:
                yield name, value
            last = "" if equals else name
        else:
            if last:
                yield last, word
            last = ""


class WithoutSecrets:
    """Base of dataclasses of arguments: pickles, `to_dict` and what is printed hold no secret; copies in memory do.
    Declare them with `@dataclass(repr=False)`.

    Trainers pickle their arguments into each checkpoint (`training_args.bin`) and upload that file with the model.
    """

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        mask = Mask(os.environ, state)
        for name, value in state.items():
            if is_secret(name) and _held(value):
                state[name] = None  # as if it had not been given: a mask would be taken for the secret
            elif isinstance(value, (str, dict, list)):
                state[name] = mask.value(value, name)
        return state

    def __copy__(self) -> Any:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = object.__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __repr__(self) -> str:
        mask = Mask(os.environ, self.__dict__)
        shown = (f"{f.name}={mask.value(getattr(self, f.name), f.name)!r}" for f in fields(self) if f.repr)  # type: ignore[arg-type]
        return f"{type(self).__qualname__}({', '.join(shown)})"

    def __str__(self) -> str:
        return Mask(os.environ, self.__dict__).text(super().__str__())

    def to_dict(self) -> dict[str, Any]:
        """As the arguments' own, with masks at any depth."""
        found: dict[str, Any] = super().to_dict()  # type: ignore[misc]  # of the arguments that these are mixed into
        return dict(Mask(os.environ, self.__dict__).value(found))
