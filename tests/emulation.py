"""The CUDA core on the CPU: csrc/cuda compiled by the host compiler with tests/cuda_emulation in place of CUDA.

What runs is the kernels' own source and the backend's own launcher code, on CPU tensors: indexing, barriers, sums and the
arithmetic are tested where there is no GPU. `CUDA_EMULATION=1 pytest ...` switches it on for a whole run.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

ROOT = Path(__file__).parent.parent


def enabled() -> bool:
    return os.environ.get("CUDA_EMULATION") == "1"


def build(build_dir: Path, *options: str) -> Path:
    """Builds the native module with these options for CMake; returns its file."""
    run_cmake(build_dir, *options)
    return built(build_dir)


def built(build_dir: Path) -> Path:
    (module,) = (build_dir / "out").glob("_C*.so")
    return module


def run_cmake(build_dir: Path, *options: str) -> None:
    import pybind11

    build_dir.mkdir(parents=True, exist_ok=True)
    if shutil.which("ccache"):  # the CPU core is compiled as for the wheel, whose objects the cache may hold
        options = ("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache", *options)
    configure = [
        "cmake", "-S", ROOT, "-B", build_dir, "-G", "Ninja", f"-DCMAKE_INSTALL_PREFIX={build_dir / 'out'}",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", "-DFASTPOST_CUDA=0", *options,
    ]  # fmt: skip
    for command in (configure, ["cmake", "--build", build_dir, "--target", "install"]):
        run = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"building the core in {build_dir} failed:\n{run.stdout}\n{run.stderr}")


def load(module: Path) -> None:
    """Makes this core the one that fastpost loads."""
    spec = importlib.util.spec_from_file_location("fastpost._C", module)
    assert spec is not None
    assert spec.loader is not None
    core: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    sys.modules["fastpost._C"] = core


def activate() -> None:
    """Makes the emulated core the one that fastpost loads, and its cuda backend the one that serves CPU tensors."""
    build_dir = ROOT / "build" / "emulated" / "cmake"  # as deep as the wheel's, or ccache would see other paths
    if "PYTEST_XDIST_WORKER" not in os.environ:  # the process that starts the workers has built it before
        run_cmake(build_dir, f"-DFASTPOST_CUDA_EMULATION={ROOT / 'tests' / 'cuda_emulation'}")
    load(built(build_dir))

    from fastpost import dispatch
    from fastpost.backends import cuda
    from fastpost.backends.serving import refusal

    cuda.status = lambda: (True, "the CUDA core, emulated on the CPU")  # type: ignore[assignment]
    cuda._where = lambda device: (0, 0)  # type: ignore[assignment]
    cuda._is_captured = cuda._is_watched = lambda: False  # type: ignore[assignment]
    cuda.refuses = lambda op, device, dtype, walkable: refusal(  # type: ignore[assignment]
        vars(cuda), op, None if device == "cpu" else f"serves no {device} here", dtype, walkable
    )
    dispatch._DEFAULT_ORDER["cpu"] = ("cuda", "reference")
    cuda.row_losses = _as_on_the_cpu(cuda.row_losses)  # type: ignore[assignment]


def _as_on_the_cpu(row_losses: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves to the other way what is refused of CPU tensors and shows in a device's values."""
    from fastpost.backends import native

    def checked(task: Any, *grads: Any) -> Any:
        if native.core().needs_dispatcher(()):  # values cannot be read here
            return row_losses(task, *grads)
        labels = task.labels
        if isinstance(labels, Tensor) and bool(
            ((labels != task.ignore_index) & ((labels < 0) | (labels >= task.clean.shape[-1]))).any()
        ):
            return None
        found = row_losses(task, *grads)
        in_place = any(g is not None and g.data_ptr() == t.data_ptr() for g, t in zip(grads, task[1:3], strict=True))
        return None if found is None or not (in_place or all(bool(value.isfinite()) for value in found)) else found

    return checked
