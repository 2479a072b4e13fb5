"""Build glue only: hands CMakeLists.txt to CMake and Ninja. Never imports torch, so that build isolation works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


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
        import pybind11

        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        arguments = [
            "-G",
            "Ninja",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DFASTPOST_VERSION={self.distribution.get_version()}",
            f"-DFASTPOST_CUDA={cuda}",
        ]
        if archs := os.environ.get("FASTPOST_CUDA_ARCHS"):
            arguments.append(f"-DFASTPOST_CUDA_ARCHS={archs}")
        subprocess.run(["cmake", *arguments, str(ROOT)], cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--target", "install"], cwd=build, check=True)


setup(
    ext_modules=[CMakeExtension("fastpost._C")],
    cmdclass={"build_ext": CMakeBuild},
    packages=[*find_packages(include=["fastpost", "fastpost.*"]), "fastpost.bench", "fastpost.triton_kernels"],
    # The two top-level folders are installed inside the package: modules called "bench" and "triton_kernels" would
    # collide with packages in wide use.
    package_dir={"fastpost.bench": "bench", "fastpost.triton_kernels": "triton_kernels"},
    package_data={"fastpost": ["py.typed"]},
)
