"""Writing files so that a killed process or a full disk leaves the old one."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, fill: Callable[[Path], object]) -> None:
    """Lets `fill` write beside the file and moves that into place."""
    temporary = path.with_suffix(".part" + path.suffix)
    try:
        fill(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """`replace_file` with a text, in UTF-8."""
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def check_folder(folder: Path) -> None:
    """Raises OSError where the folder can neither be used nor made; leaves nothing behind."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        path.rmdir()
