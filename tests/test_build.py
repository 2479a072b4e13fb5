"""What a newcomer meets before the first operation: the build, the import, the choice of a backend."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastpost
from fastpost import dispatch
from fastpost.backends import native
from fastpost.errors import BackendUnavailable
from fastpost.ops import params as ops

ROOT = Path(__file__).parent.parent


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env={**os.environ, **env}, capture_output=True, text=True, cwd=ROOT
    )


def test_import_loads_nothing_and_warns_of_nothing() -> None:
    code = (
        "import sys, fastpost\n"
        "heavy = {'torch', 'triton', 'transformers', 'numpy', 'rich', 'fastpost._C'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "dir(fastpost); fastpost.__version__\n"
        "try: fastpost.SMA\n"
        "except AttributeError as error: print(error)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "'SMA'" in done.stdout
    assert done.stderr == ""


def test_every_public_name_is_there() -> None:
    for name in fastpost.__all__:
        assert getattr(fastpost, name) is not None


def test_version_has_one_home() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{fastpost.__version__}"' in text
    assert native.core().version == fastpost.__version__


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_the_core_needs_no_torch_no_cuda_and_no_openmp_runtime() -> None:
    output = subprocess.run(["readelf", "-d", native.core().__file__], capture_output=True, text=True, check=True).stdout
    needed = [line.split("[")[1].rstrip("]") for line in output.splitlines() if "(NEEDED)" in line]
    assert needed
    foreign = [n for n in needed if not n.startswith(("libstdc++", "libm.", "libgcc_s", "libc.", "ld-linux", "libpthread"))]
    assert foreign == []


def test_setup_never_imports_torch_and_asks_for_nvcc_by_name(tmp_path: Path) -> None:
    assert "import torch" not in (ROOT / "setup.py").read_text()
    build = [
        sys.executable,
        str(ROOT / "setup.py"),
        "build_ext",
        "--build-temp",
        str(tmp_path),
        "--build-lib",
        str(tmp_path),
    ]
    for cuda, message in (("1", "nvcc was not found"), ("yes", "use auto")):
        env = {k: v for k, v in os.environ.items() if k != "CUDACXX"} | {"PATH": str(tmp_path), "FASTPOST_CUDA": cuda}
        done = subprocess.run(build, env=env, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode != 0
        assert message in done.stderr


def test_without_the_core_reference_serves_with_a_warning_and_cpu_explains() -> None:
    code = """
import sys, warnings
sys.modules["fastpost._C"] = None
import torch, fastpost
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        assert torch.equal(fastpost.add_noise(torch.ones(3), 0.0), torch.ones(3))
assert len(caught) == 1 and "slow reference backend" in str(caught[0].message), [str(c.message) for c in caught]
try:
    fastpost.use_backend("cpu")
except RuntimeError as error:
    assert "compiled core is missing" in str(error) and "pip install" in str(error), error
from fastpost.backends import native
try:
    native.core()
except ImportError as error:
    assert "fastpost doctor" in str(error)
print("fine")
"""
    done = python(code)
    assert done.stdout == "fine\n", done.stderr


def test_backend_choice_by_name_context_and_environment() -> None:
    x = [torch.ones(3)]
    with pytest.raises(ValueError, match="Did you mean 'cuda'"):
        fastpost.use_backend("cude")
    with fastpost.use_backend("reference"), fastpost.use_backend("cpu"):
        assert dispatch.select("negate_", x[0].device, x[0].dtype).__module__ == "fastpost.backends.cpu"
    assert dispatch.select("negate_", x[0].device, x[0].dtype).__module__ == "fastpost.backends.cpu"
    assert dispatch.select("negate_", x[0].device, torch.float64).__module__ == "fastpost.backends.reference"
    with fastpost.use_backend("cpu"), pytest.raises(BackendUnavailable, match=r"float64.*use_backend\('reference'\)"):
        ops.negate_([torch.ones(3).double()])
    code = "import torch, fastpost; fastpost.flip_signs_([torch.ones(3)], 1); print(fastpost.dispatch._current())"
    assert python(code, FASTPOST_BACKEND="reference").stdout == "reference\n"
    assert "Did you mean 'triton'" in python(code, FASTPOST_BACKEND="tritn").stderr
    assert "avx2" in python(code, FASTPOST_CPU_ISA="avx9", FASTPOST_BACKEND="cpu").stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test finds missing")
def test_an_unavailable_backend_says_why() -> None:
    assert "CUDA" in fastpost.backends()["cuda"].reason
    with pytest.raises(BackendUnavailable, match="CUDA"):
        fastpost.use_backend("cuda")


def test_a_fork_gets_threads_of_its_own() -> None:
    code = """
import os, torch
from fastpost.ops import params as ops
g = [torch.ones(1 << 20)]
assert ops.squared_norm(g).item() == 1 << 20
pid = os.fork()
if pid == 0:
    os._exit(0 if ops.squared_norm(g).item() == 1 << 20 else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT).stdout == "0\n"
    )


def test_calls_from_many_threads_are_served_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    grads = [[torch.full((200_000,), float(i))] for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        norms = list(pool.map(lambda g: [ops.squared_norm(g).item() for _ in range(20)], grads))
    assert norms == [[200_000.0 * i * i] * 20 for i in range(8)]
