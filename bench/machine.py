"""What a row of measurements says of where it was made: the processor, and the commit of the sources."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import fastpost


def cpu() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def printed_by(*command: str) -> str:
    """What a command prints, or nothing where there is no such command or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """The commit that the sources are of, "-dirty" where they differ from it; FASTPOST_COMMIT on machines without git."""
    given = os.environ.get("FASTPOST_COMMIT")
    if given:
        return given
    git = ("git", "-C", str(Path(__file__).parent))
    found = printed_by(*git, "rev-parse", "--short=12", "HEAD")
    if not found:
        return f"unknown, of {fastpost.__version__}"
    # Tables of measurements are written while this is asked.
    changed = printed_by(*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)*.csv")
    return f"{found}-dirty" if changed else found
