"""Errors that say what was wrong and what would have been right."""

from __future__ import annotations

import codecs
import difflib
import shlex
from collections.abc import Iterable
from pathlib import Path

_CLOSE = 0.65  # of difflib's ratio; farther names mislead


class NativeUnavailable(ImportError):
    """The compiled core could not be loaded; the message says why and what to do."""


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot serve this call."""


def no_file(path: Path) -> FileNotFoundError:
    """For a path that is no file; where it is a folder, that is said."""
    return FileNotFoundError(f"{path} is a folder, not a file" if path.is_dir() else f"no such file: {path}")


def not_utf8(path: Path, error: UnicodeDecodeError) -> ValueError:
    """For a file of another encoding, or a compressed one: where, and how it is converted."""
    found, file = f"{path}: not UTF-8 ({error.reason} at byte {error.start})", shlex.quote(str(path))
    begins = bytes(error.object[:2])
    if begins == b"\x1f\x8b":
        return ValueError(f"{found} but compressed; unpack it by gunzip -c {file} > NEW")
    is_utf16 = begins in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    name, code = ("UTF-16", "UTF-16") if is_utf16 else ("Latin-1", "LATIN1")
    return ValueError(f"{found}; save it as UTF-8, from {name} by iconv -f {code} -t UTF-8 {file} > NEW")


def nearest(given: object, known: Iterable[str]) -> str:
    """The sentence " Did you mean ...?" where a known name is close, else ""; dashes and capitals count for nothing."""
    names = {name.lstrip("-").replace("-", "_").lower(): name for name in known}
    near = difflib.get_close_matches(str(given).lstrip("-").replace("-", "_").lower(), names, n=1, cutoff=_CLOSE)
    return f" Did you mean {names[near[0]]!r}?" if near else ""


def unknown(what: str, given: object, known: Iterable[str]) -> ValueError:
    """A ValueError for a name that does not exist, naming the nearest one that does, if one is close."""
    names = list(known)
    return ValueError(f"unknown {what} {given!r}.{nearest(given, names)} Valid: {', '.join(names)}.")
