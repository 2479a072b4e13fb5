"""bench/gpu.sh and what it runs, without a GPU: the dry run, the stages' bookkeeping, a rehearsal of the GPU tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from . import gpu_sanitize

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "bench" / "gpu.sh"
pytestmark = pytest.mark.skipif(sys.platform != "linux" or shutil.which("bash") is None, reason="a bash script for Linux")


def run(script: Path, *arguments: str, timeout: int = 300, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("OUT", "FASTPOST_BACKEND")}
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={**clean, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_dry_run_builds_and_lists_without_leaving_anything(tmp_path: Path) -> None:
    before = sorted((ROOT / "bench" / "data").iterdir())
    stages = ["--only", "tests", "--only", "sanitizer", "--only", "bench"]
    done = run(SCRIPT, "--dry-run", *stages, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for family in ("params", "rounding", "noise", "divergence", "sam"):
        (count,) = re.findall(rf"test_gpu_{family}.py: (\d+) tests", done.stdout)
        assert int(count) > 10
    assert "290 tensors" in done.stdout
    assert re.search(r"\d+ cases, about \d+ s", done.stdout)
    assert "--tool racecheck: python -m tests.gpu_sanitize cuda" in done.stdout
    assert done.stdout.count("  ok  ") == 3
    assert list(tmp_path.iterdir()) == []
    assert sorted((ROOT / "bench" / "data").iterdir()) == before
    quick = run(SCRIPT, "--dry-run", "--quick", "--only", "bench")
    assert "kl_compiled" in done.stdout
    assert "kl_train" in quick.stdout
    assert "kl_compiled" not in quick.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_dry_run_compiles_the_cuda_core() -> None:
    done = run(SCRIPT, "--dry-run", "--only", "build")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "params.cu.o" in done.stdout


def test_a_python_in_which_fastpost_is_not_installed_finds_all_of_it(tmp_path: Path) -> None:
    """On PYTHONPATH a folder of packages brings no editable installs."""
    python = tmp_path / "python"
    packages = sysconfig.get_paths()["purelib"]
    python.write_text(f'#!/bin/bash\nPYTHONPATH=$PYTHONPATH:{packages} exec {sys._base_executable} "$@"\n')
    python.chmod(0o755)
    bare = [str(python), "-c", "import fastpost.bench"]
    missing = subprocess.run(bare, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert "No module named 'fastpost.bench'" in missing.stderr
    done = run(SCRIPT, "--dry-run", "--only", "bench", PYTHON=str(python))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "290 tensors" in done.stdout


def test_unknown_options_are_named() -> None:
    for arguments, message in (
        (["--dryrun"], "unknown option --dryrun"),
        (["--only", "test"], "not test"),
        (["--seconds", "soon"], "not soon"),
        (["--output"], "--output needs a value"),
    ):
        done = run(SCRIPT, *arguments)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert "--dry-run" in run(SCRIPT, "--help").stdout


# A Python whose tests fail and whose benches never end; a sanitizer that finds what is planted, or nothing at all.
PYTHON = """#!/bin/bash
case "$*" in
  *pytest*tests/*) echo "1 failed"; exit 3 ;;
  *"fastpost bench"*) echo started; sleep 60 ;;
esac
"""
SANITIZER = """#!/bin/bash
case "$*" in
  --help) echo "  --kernel-name arg" ;;
  *overrun | *unwritten) echo "$*"; exit ${FOUND} ;;
  *racecheck*) [[ "$*" == *"--kernel-name kernel_substring=fastpost"* ]] ;;
esac
"""


@pytest.fixture
def pretended(tmp_path: Path) -> Path:
    """A copy of the script among tools that only pretend."""
    for folder in ("bench", "tests", "bin"):
        (tmp_path / folder).mkdir()
    (tmp_path / "tests" / "test_gpu_x.py").touch()
    shutil.copy(SCRIPT, tmp_path / "bench")
    for name, text in (
        ("python", PYTHON),
        ("compute-sanitizer", SANITIZER),
        ("nvidia-smi", "#!/bin/bash\necho 'NVIDIA X100'\n"),
    ):
        tool = tmp_path / "bin" / name
        tool.write_text(text)
        tool.chmod(0o755)
    return tmp_path


def pretend(where: Path, *arguments: str, found: int = 86) -> subprocess.CompletedProcess[str]:
    path = f"{where / 'bin'}:{os.environ['PATH']}"
    return run(where / "bench" / "gpu.sh", *arguments, PYTHON=str(where / "bin" / "python"), PATH=path, FOUND=str(found))


def test_a_stage_that_fails_or_hangs_stops_no_other_and_is_counted(pretended: Path) -> None:
    out = pretended / "out"
    stages = ["--only", "tests", "--only", "sanitizer", "--only", "bench"]
    done = pretend(pretended, *stages, "--seconds", "12", "--output", str(out))
    assert done.returncode == 2, done.stdout + done.stderr
    assert re.search(r"tests +FAILED with status 3", done.stdout)
    assert re.search(r"sanitizer +ok", done.stdout)
    assert re.search(r"bench +TIMED OUT after \d+ s", done.stdout)
    assert "2 stages failed" in done.stdout
    assert "fastpost on NVIDIA X100" in done.stdout
    assert (out / "bench.log").read_text() == "started\n"
    assert sorted(p.name for p in out.iterdir()) == ["bench.log", "sanitizer.log", "summary.txt", "tests.log"]


def test_a_sanitizer_that_misses_a_planted_defect_has_checked_nothing(pretended: Path) -> None:
    done = pretend(pretended, "--only", "sanitizer", found=0)
    assert done.returncode == 1
    assert "FAILED  memcheck on overrun: exit status 0, expected 86" in done.stdout
    assert "FAILED  initcheck on unwritten" in done.stdout
    assert "ok      racecheck on cuda" in done.stdout
    assert "ok      memcheck on triton" in done.stdout


def test_what_the_sanitizers_run_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_sanitize.main("cpu", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 30
    assert "1,700 tensors" in lines
    gpu_sanitize.unwritten("cpu")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="rehearsed with the compiled core")
def test_the_gpu_tests_are_rehearsed_on_the_cpu() -> None:
    """Their own code, without the bodies that they borrow, which run on the CPU anyway."""
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_gpu_*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "tests.gpu", "-p", "no:cacheprovider", *files],
        env={**os.environ, "FASTPOST_GPU_TESTS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])  # type: ignore[index]
    assert passed > 200
