"""The wheel as `make wheel` leaves it: what is in it, what it asks of a system, and that it works by itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from fastpost.backends import native

ROOT = Path(__file__).parent.parent
MOST_BYTES = 13 << 19  # 6.5 MiB: machine code for four architectures is most of it
LIBSTDCXX = (3, 4, 29)  # GCC 11's, which is RHEL 9's; a newer one would keep the wheel from systems whose glibc suffices
# What every glibc system has; anything else would have to come from somewhere.
SYSTEM = ("libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0", "ld-linux")


@pytest.fixture(scope="module")
def wheel() -> Path:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    found = sorted((ROOT / "dist").glob(f"fastpost-*-{tag}-{tag}-*.whl"))
    if not found:
        pytest.skip("no wheel of this Python in dist/; `make wheel` builds it, as does `make test`")
    return found[-1]


@pytest.fixture(scope="module")
def module(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled module out of the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.startswith("fastpost/_C")]
        return Path(archive.extract(name, folder))


def needed(library: Path) -> list[str]:
    with library.open("rb") as file:
        dynamic = ELFFile(file).get_section_by_name(".dynamic")
        return [entry.needed for entry in dynamic.iter_tags("DT_NEEDED")]


def versions(library: Path, family: str) -> list[tuple[int, ...]]:
    """The versions of a library's symbols that this one asks for, such as GLIBC's."""
    with library.open("rb") as file:
        section = ELFFile(file).get_section_by_name(".gnu.version_r")
        names = [aux.name for _, auxiliaries in section.iter_versions() for aux in auxiliaries]
    return [tuple(map(int, n.split("_")[1].split("."))) for n in names if re.fullmatch(rf"{family}_[\d.]+", n)]


def complaints(name: str, size: int, contents: Iterable[str], library: Path) -> list[str]:
    """What keeps a wheel from being handed out."""
    found = []
    tag = re.search(r"manylinux_(\d+)_(\d+)_(x86_64|aarch64)\.whl$", name)
    if tag is None:
        found.append(f"{name} does not say which Linux it runs on")
    elif max(versions(library, "GLIBC"), default=(0,)) > (int(tag[1]), int(tag[2])):
        found.append(f"{name} promises an older glibc than it asks for")
    newest = max(versions(library, "GLIBCXX"), default=(0,))
    if newest > LIBSTDCXX:
        found.append(f"asks for GLIBCXX_{'.'.join(map(str, newest))}, which systems with GCC 11's libstdc++ lack")
    if size > MOST_BYTES:
        found.append(f"{size} bytes, more than {MOST_BYTES}")
    foreign = [n for n in needed(library) if not n.startswith(SYSTEM)]
    if foreign:
        found.append(f"needs {', '.join(foreign)}")
    files = set(contents)
    for wanted in (
        "fastpost/py.typed",
        "fastpost/sam/optimizer.py",
        "fastpost/bench/run.py",
        "fastpost/triton_kernels/noise.py",
    ):
        if wanted not in files:
            found.append(f"lacks {wanted}")
    for unwanted in ("tests/", "csrc/", "bench/", "triton_kernels/"):
        if any(f.startswith(unwanted) for f in files):
            found.append(f"holds {unwanted}")
    return found


def test_it_can_be_handed_out(wheel: Path, module: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert complaints(wheel.name, wheel.stat().st_size, archive.namelist(), module) == []
        metadata = next(archive.read(n).decode() for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    assert "Requires-Dist: torch>=" in metadata
    assert "License-Expression: Apache-2.0" in metadata


def test_every_module_of_the_tree_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    tree = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastpost").rglob("*.py")}
    assert tree - held == set()


@pytest.mark.skipif(not hasattr(native.core(), "cuda"), reason="built without nvcc")
def test_it_holds_code_for_four_architectures_and_newer_ones(module: Path) -> None:
    pytest.importorskip("triton", reason="cuobjdump comes with Triton's package")
    from .test_cuda_compiled import dump

    assert set(re.findall(r"\.(sm_\d+)\.cubin", dump("-lelf", module))) == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert set(re.findall(r"\.(sm_\d+)\.ptx", dump("-lptx", module))) == {"sm_120"}


def test_the_checks_see_planted_defects(tmp_path: Path, wheel: Path, module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "bad.cpp"
    source.write_text('#include <omp.h>\nextern "C" int threads() { return omp_get_max_threads(); }\n')
    bad = tmp_path / "bad.so"
    subprocess.run(["g++", "-fopenmp", "-shared", "-fPIC", "-o", bad, source], check=True)
    good = ["fastpost/py.typed", "fastpost/sam/optimizer.py", "fastpost/bench/run.py", "fastpost/triton_kernels/noise.py"]
    name = wheel.name
    tag = re.search(r"manylinux_\d+_\d+", name)
    assert tag is not None
    assert complaints(name, 1, good, module) == []
    assert [c for c in complaints(name, 1, good, bad) if "libgomp" in c]
    assert [c for c in complaints(name, MOST_BYTES + 1, good, module) if "bytes" in c]
    assert [c for c in complaints("fastpost-1-cp311-cp311-linux_x86_64.whl", 1, good, module) if "which Linux" in c]
    assert [c for c in complaints(name.replace(tag[0], "manylinux_2_5"), 1, good, module) if "promises an older" in c]
    with monkeypatch.context() as patch:
        patch.setattr(f"{__name__}.LIBSTDCXX", (3, 4, 19))
        assert [c for c in complaints(name, 1, good, module) if re.match(r"asks for GLIBCXX_3\.4\.2\d,", c)]
    assert complaints(name, 1, good[1:], module) == ["lacks fastpost/py.typed"]
    assert complaints(name, 1, [*good, "tests/tiny.py"], module) == ["holds tests/"]


def test_installed_by_itself_it_passes_the_operations_tests(wheel: Path, tmp_path: Path) -> None:
    """From a folder that holds the tests and nothing of the tree; torch is the one that is here."""
    site, run = tmp_path / "site", tmp_path / "run"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel]
    subprocess.run([str(part) for part in pip], check=True)
    shutil.copytree(ROOT / "tests", run / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    env = {k: v for k, v in os.environ.items() if not k.startswith("FASTPOST_")} | {"PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import fastpost; print(fastpost.__file__)"], cwd=run, env=env, capture_output=True, text=True
    )
    assert where.stdout.startswith(str(site)), where.stdout + where.stderr
    tests = ["tests/test_params.py", "tests/test_noise.py", "tests/test_rounding.py", "tests/test_divergence.py"]
    pytest_run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu", *tests]
    done = subprocess.run(pytest_run, cwd=run, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
