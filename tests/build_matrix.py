"""Builds fastpost with several compilers, warnings being errors, and runs the operations' tests on each core.

    python tests/build_matrix.py [BUILD...]     default: g++ g++:static clang++

A build is a compiler on PATH; ":static" links libstdc++ into the core, which is all that some systems offer. Prints a table;
the exit status is 1 where a build failed or its compiler is missing. Builds and logs stay in build/matrix. The Python that
runs this needs what the tests need, and setuptools, pybind11, CMake and Ninja.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
DEFAULT = ("g++", "g++:static", "clang++")
OPERATIONS = ("test_params.py", "test_rounding.py", "test_restore_adamw.py", "test_noise.py", "test_divergence.py")
THREADS = ("a_fork_gets_threads_of_its_own", "calls_from_many_threads_are_served_at_once")


class Failed(Exception):
    """A step of a build; the message is for the table."""


class Outcome(NamedTuple):
    """One row of the table."""

    build: str
    compiler: str
    glibc: str  # the newest symbol version that the core asks for
    libstdcxx: str
    result: str
    passed: bool

    def cells(self) -> tuple[str, ...]:
        return self[:-1]


def compiler(build: str) -> str:
    """The compiler's own name and version.

    Raises:
        Failed: it is not on PATH.
    """
    name = build.partition(":")[0]
    if shutil.which(name) is None:
        package = name.replace("clang++", "clang")
        raise Failed(f"{name} was not found (Debian: apt-get install {package})")
    return subprocess.run([name, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def folder(build: str) -> Path:
    """Where it is built unless said otherwise."""
    return ROOT / "build" / "matrix" / build.replace(":", "-")


def step(what: str, command: list[str | Path], log: Path, cwd: Path, **env: str) -> str:
    """Runs a command with these variables besides the environment's; returns its output."""
    kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CFLAGS", "CXXFLAGS", "LDFLAGS", "PYTHONPATH")}
    kept["PATH"] += f":{Path(sys.executable).parent}"  # CMake's and Ninja's place where no virtual environment is active
    if shutil.which("ccache"):  # ":static" compiles what the compiler's own build did
        kept["CMAKE_CXX_COMPILER_LAUNCHER"] = "ccache"
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"FASTPOST_CUDA": "0"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with log.open("a") as file:
        file.write(done.stdout)
    if done.returncode:
        raise Failed(f"{what} failed; see {log}\n{done.stdout[-3000:]}")
    return done.stdout


def newest(core: Path, family: str) -> str:
    """The newest version of a family of symbols (GLIBC, GLIBCXX) that a library asks for."""
    text = subprocess.run(["readelf", "--version-info", core], capture_output=True, text=True, check=True).stdout
    found = re.findall(rf"Name: {family}_([\d.]+)", text)
    return max(found, key=lambda version: [int(part) for part in version.split(".")], default="none")


def try_build(build: str, folder: Path, operations: Sequence[str] = OPERATIONS) -> Outcome:
    """Builds, imports and tests in `folder`; what CMake and the compiler left there before is used again.

    Args:
        operations: files of tests to run.

    Raises:
        Failed: with the end of the output.
    """
    version = compiler(build)
    for stale in ("tests", "site"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    log = folder / "output.log"
    log.unlink(missing_ok=True)
    name, _, linking = build.partition(":")
    flags = {"CXX": name, "CXXFLAGS": "-Werror"}
    if linking == "static":
        flags["LDFLAGS"] = "-static-libstdc++"
    setup = [sys.executable, "setup.py", "build", "--build-base", folder, "--build-lib", folder / "site"]
    step("the build", setup, log, ROOT, **flags)
    (core,) = (folder / "site" / "fastpost").glob("_C*")
    dynamic = newest(core, "GLIBCXX")
    if (dynamic == "none") != (linking == "static"):
        raise Failed(f"the core asks for libstdc++ symbols up to {dynamic}")

    there = {"PYTHONPATH": str(folder / "site"), "OMP_NUM_THREADS": "1"}
    script = "from fastpost.backends import native; print(native.core().__file__)"
    where = step("the import", [sys.executable, "-c", script], log, folder, **there)
    if where.strip() != str(core):
        raise Failed(f"{where.strip()} was loaded, not {core}")
    pytest = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider"]
    passed = 0
    for tests in (
        ["-k", "cpu", *(f"tests/{file}" for file in operations)],
        [f"tests/test_build.py::test_{t}" for t in THREADS],
    ):
        counted = re.search(r"^(\d+) passed", step("the tests", [*pytest, *tests], log, folder, **there), re.MULTILINE)
        if counted is None:
            raise Failed(f"no test ran; see {log}")
        passed += int(counted[1])
    return Outcome(build, version, newest(core, "GLIBC"), dynamic, f"{passed} tests passed", True)


def table(rows: list[tuple[str, ...]]) -> str:
    """Markdown, so that it can go into the documentation as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def main(builds: list[str]) -> int:
    if any(build.startswith("-") for build in builds):
        print(__doc__)
        return 2
    outcomes = []
    for build in builds or DEFAULT:
        print(f"{build} ...", flush=True)
        try:
            outcomes.append(try_build(build, folder(build)))
        except Failed as failure:
            first, _, rest = str(failure).partition("\n")
            print(rest or first, flush=True)
            outcomes.append(Outcome(build, "", "", "", f"FAILED: {first}", False))
    print(table([("build", "compiler", "glibc", "libstdc++", "result"), *(outcome.cells() for outcome in outcomes)]))
    return 0 if all(outcome.passed for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
