"""Build glue only: hands CMakeLists.txt to CMake and Ninja. Never imports torch, so that build isolation works."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
MOST_LINES = 40  # of a failed step's output that are repeated at the end

BY_HAND = "pip install 'setuptools>=77' 'pybind11>=3.0' 'cmake>=3.24' 'ninja>=1.11'"

# What a failed step's output holds, and what to do then. The first that fits is said.
REMEDIES = {
    "No space left on device": "The disk is full: free space in {build} and where temporary files go (TMPDIR).",
    "Killed signal|memory exhausted|out of memory|Cannot allocate memory": (
        "Memory ran out: CMAKE_BUILD_PARALLEL_LEVEL=1 compiles one file at a time."
    ),
    r"No CMAKE_CXX_COMPILER could be found|Could not find (the )?compiler|CXX_COMPILER:\s+.*\s+is not": (
        "No C++ compiler was found. Install one (apt-get install g++, dnf install gcc-c++), or set CXX to yours."
    ),
    r"Development\.Module": (
        "Python's headers were not found. Install them (apt-get install python3-dev, dnf install python3-devel)."
    ),
    "or higher is required": f"CMake is too old. `pip install .` brings a newer one; with --no-build-isolation: {BY_HAND}.",
    "unrecognized (command[- ]line )?option|unknown argument|bad value .*-march|unknown target CPU": (
        "The compiler is too old: GCC 11, Clang 14 or newer is needed. Set CXX to one."
    ),
    "is not able to compile a simple test program": (
        "The compiler cannot build an empty program, for the reason above. Mend it, or set CXX to use another."
    ),
    "": "docs/cluster.md lists the compilers that fastpost is tested with; set CXX to use one of them.",
}


def fail(what: str) -> NoReturn:
    raise SystemExit(f"fastpost was not built: {what}")


def explain(what: str, output: str, build: Path) -> NoReturn:
    """Ends the build with what its tool said, which may lie far up by now, and what to do."""
    # Ninja prints what a failed command said below that command, and the output of others after it.
    said = re.findall(r"^FAILED: .*\n.*\n((?:(?!\[\d+/\d+\]|ninja: |FAILED: ).*\n)*)", output, re.MULTILINE)
    lines = "".join(said).splitlines()[:MOST_LINES] or output.splitlines()[-MOST_LINES:]
    remedy = next(remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, output))
    fail("\n".join([f"{what}:", *(f"    {line}" for line in lines), remedy.format(build=build)]))


def run(what: str, command: list[str], build: Path) -> None:
    """Runs a step of the build and passes its output on."""
    output = []
    with subprocess.Popen(
        command, cwd=build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as step:
        assert step.stdout is not None
        for line in step.stdout:
            output.append(line)
            print(line, end="", flush=True)
    if step.returncode:
        explain(f"{what} failed (exit status {step.returncode})", "".join(output), build)


def surroundings() -> str:
    """What CMake reads from the environment at its first run in a folder and never again."""
    names = {"CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX"}
    read = {n: v for n, v in os.environ.items() if n in names or n.startswith(("CMAKE_", "FASTPOST_"))}
    return json.dumps([read, [shutil.which(tool) for tool in ("c++", "g++", "clang++", "nvcc")]], sort_keys=True)


class CMakeExtension(Extension):
    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        cuda = os.environ.get("FASTPOST_CUDA", "auto").lower()
        if cuda not in {"auto", "0", "1"}:
            raise SystemExit(f"FASTPOST_CUDA={cuda!r}: use auto (build the CUDA core when nvcc is found), 0 or 1.")
        nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
        if cuda == "1" and not (nvcc and shutil.which(nvcc)):
            raise SystemExit(
                "FASTPOST_CUDA=1, but nvcc was not found. Put it on PATH or set CUDACXX to it; "
                "FASTPOST_CUDA=0 builds the CPU core alone."
            )
        missing = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        missing += ["pybind11"] * (importlib.util.find_spec("pybind11") is None)
        if missing:
            fail(f"no {' and no '.join(missing)} found. `pip install .` brings them; with --no-build-isolation: {BY_HAND}.")
        import pybind11

        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # Beside the sources where FASTPOST_BUILD_DIR says so: a compiler's cache knows files by their relative paths.
        build = (ROOT / (os.environ.get("FASTPOST_BUILD_DIR") or Path(self.build_temp).resolve()) / "cmake").resolve()
        try:
            build.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"the folder {build} could not be made ({error.strerror}). Build from a folder that may be written to.")
        arguments = [
            "-G",
            "Ninja",
            # pip builds in a new environment each time, and CMake would go on with the Ninja of the last one.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTPOST_VERSION={self.distribution.get_version()}",
            f"-DFASTPOST_CUDA={cuda}",
        ]
        if archs := os.environ.get("FASTPOST_CUDA_ARCHS"):
            arguments.append(f"-DFASTPOST_CUDA_ARCHS={archs}")
        # A folder that CMake has seen under another compiler, or failed in, is begun afresh.
        seen, now = build / "surroundings.json", surroundings()
        if (build / "CMakeCache.txt").exists() and not (seen.exists() and seen.read_text() == now):
            arguments.insert(0, "--fresh")
        seen.unlink(missing_ok=True)
        run("CMake's configuration", ["cmake", *arguments, str(ROOT)], build)
        seen.write_text(now)
        run("the compilation", ["cmake", "--build", ".", "--target", "install"], build)


setup(
    ext_modules=[CMakeExtension("fastpost._C")],
    cmdclass={"build_ext": CMakeBuild},
    packages=[
        *find_packages(include=["fastpost", "fastpost.*"]),
        "fastpost.bench",
        "fastpost.bench.studies",
        "fastpost.triton_kernels",
    ],
    # The two top-level folders are installed inside the package: modules called "bench" and "triton_kernels" would
    # collide with packages in wide use.
    package_dir={"fastpost.bench": "bench", "fastpost.triton_kernels": "triton_kernels"},
    package_data={"fastpost": ["py.typed"], "fastpost.cli": ["train_report.html"]},
)
