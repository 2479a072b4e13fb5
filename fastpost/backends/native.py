"""Loads the compiled core, and explains a failure when the core is first needed rather than at import."""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

from fastpost.errors import NativeUnavailable


@functools.cache
def _load() -> tuple[Any, str | None]:
    try:
        return importlib.import_module("fastpost._C"), None
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "fastpost._C":
            loadable = {f"_C{suffix}" for suffix in EXTENSION_SUFFIXES}
            there = {path.name for path in Path(__file__).parents[1].glob("_C.*")}
            others = ", ".join(sorted(there - loadable))
            found = f" (Python {sys.version_info[0]}.{sys.version_info[1]} does not load {others})" if others else ""
            why = (
                f"fastpost's compiled core is missing{found}. It is built by `pip install .` (needs a C++17 compiler; CMake "
                "and Ninja come with the build); an editable install builds it into the package folder, and each Python "
                "version needs its own build."
            )
        else:
            why = (
                f"fastpost's compiled core was found but could not be loaded: {error}. It was most likely built for "
                "another Python, C library or machine; reinstall fastpost in this environment."
            )
        return None, why


def failure() -> str | None:
    """Why the compiled core cannot be loaded, or None when it can."""
    return _load()[1]


def core() -> Any:
    """The compiled module `fastpost._C`.

    Raises:
        NativeUnavailable: the module is missing or broken; the message says what to do.
    """
    module, why = _load()
    if why is not None:
        raise NativeUnavailable(f"{why} `fastpost doctor` shows more; the reference backend works without it.")
    return module
