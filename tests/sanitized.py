"""Tests with the compiled core under AddressSanitizer: `python -m tests.sanitized tests/test_sam_fuzz.py ...`.

Builds the core for it in build/sanitized and runs pytest in a process where the sanitizer watches all memory, torch's too: a
read or write past the end of a tensor ends the process with both stacks. What the last sequence of a fuzz test did is in
build/sanitized, a file for each process of tests.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests import emulation

BUILD = emulation.ROOT / "build" / "sanitized"
SEQUENCES = 2000


def main(arguments: list[str]) -> None:
    flags = "-fsanitize=address -fno-omit-frame-pointer -g1"
    core = emulation.build(BUILD, f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_MODULE_LINKER_FLAGS=-fsanitize=address")
    # The sanitizer comes first in the process, and the C++ library with it, or exceptions would pass it by.
    names = ("libasan.so", "libstdc++.so")
    compiler = os.environ.get("CXX", "c++")
    libraries = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = {
        "FASTPOST_SEQUENCES": str(SEQUENCES),
        "FASTPOST_TRACE": str(BUILD),
        "OMP_NUM_THREADS": "1",
        **os.environ,
        "FASTPOST_TEST_CORE": str(core),
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",  # Python's own memory is never given back
    }
    # Captured by sys alone, so that the sanitizer's report, which is written past Python, is seen.
    os.execve(sys.executable, [sys.executable, "-m", "pytest", "--capture=sys", *arguments], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
