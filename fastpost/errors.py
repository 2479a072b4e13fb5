"""Errors that say what was wrong and what would have been right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NativeUnavailable(ImportError):
    """The compiled core could not be loaded; the message says why and what to do."""


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot serve this call."""


def unknown(what: str, given: object, known: Iterable[str]) -> ValueError:
    """A ValueError for a name that does not exist, naming the nearest one that does."""
    names = list(known)
    near = difflib.get_close_matches(str(given), names, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {what} {given!r}.{hint} Valid: {', '.join(names)}.")
