"""Names of models, and what to say where nothing can be loaded by one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

# What transformers and safetensors raise for a folder that holds no such model, or half of one.
_CANNOT_LOAD = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)
# Of a hub's names there are only `name` and `owner/name`.
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Around whatever loads --model.

    Raises:
        ValueError: no such folder, none that holds a model, or what the loaders raise, in one line.
    """
    path = Path(name)
    if path.is_file():
        raise ValueError(f"--model {name} cannot be loaded: it is a file; give the folder that it is in")
    if not path.is_dir() and not _HUB_NAME.fullmatch(name):
        raise ValueError(f"--model {name} cannot be loaded: there is no such folder")
    if path.is_dir() and not any((path / config).is_file() for config in ("config.json", "adapter_config.json")):
        raise ValueError(f"--model {name} cannot be loaded: the folder holds no config.json")
    try:
        yield
    except _CANNOT_LOAD as error:
        told = next(iter(str(error).strip().splitlines()), type(error).__name__)
        where = "" if path.is_dir() else "there is no such folder here, and of the hub's: "
        raise ValueError(f"--model {name} cannot be loaded: {where}{told}") from error


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' warnings about weights that are missing or loaded elsewhere; fastpost prints its own."""
    import transformers

    logging: Any = transformers.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
