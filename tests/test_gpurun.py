"""bench/gpu.sh and what it runs, without a GPU: the dry run, the stages' bookkeeping, a rehearsal of the GPU tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from fastpost.bench import profiled
from fastpost.bench.registry import Target
from fastpost.bench.run import load

from . import gpu_sanitize, rehearsal

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
    stages = [word for stage in ("tests", "bench", "sanitizer", "profile") for word in ("--only", stage)]
    done = run(SCRIPT, "--dry-run", *stages, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for family in ("params", "rounding", "noise", "divergence", "rows", "sam"):
        (count,) = re.findall(rf"test_gpu_{family}.py: (\d+) tests", done.stdout)
        assert int(count) > 10
    assert "290 tensors" in done.stdout
    assert re.search(r"\d+ cases, about \d+ s", done.stdout)
    assert "--tool racecheck: python -m tests.gpu_sanitize cuda" in done.stdout
    assert "fastpost.bench.profiled kl_train_128256_float32" in done.stdout
    assert done.stdout.count("  ok  ") == 4
    assert [done.stdout.index(f"== {stage}") for stage in ("tests", "bench", "sanitizer", "profile")] == sorted(
        done.stdout.index(f"== {stage}") for stage in ("tests", "bench", "sanitizer", "profile")
    )
    budget = int(re.search(r"takes at most (\d+) s", done.stdout)[1])  # type: ignore[index]
    assert budget <= 8 * 60
    planned = int(re.search(r"\d+ cases, about (\d+) s", done.stdout)[1])  # type: ignore[index]
    assert planned <= 300  # the stage's share
    assert list(tmp_path.iterdir()) == []
    assert sorted((ROOT / "bench" / "data").iterdir()) == before
    for never_timed in (
        "distillation_rows",
        "linear_distillation_cuda",
        "top_k_rows",
        "shard_rows",
        "linear_top_k_cuda",
        "stash_ulp",
        "masters",
    ):
        assert 0 < done.stdout.index(f"\n{never_timed}") < done.stdout.index("\nkl_compiled")
    quick = run(SCRIPT, "--dry-run", "--quick", "--only", "bench")
    assert "kl_compiled" in done.stdout
    assert "kl_train" in quick.stdout
    assert "kl_compiled" not in quick.stdout


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_dry_run_compiles_the_cuda_core() -> None:
    kept = {}
    if "CCACHE_DIR" in os.environ:  # it may hold what the environment's build has compiled, in a folder as deep as this
        (archs,) = re.findall(r'set\(FASTPOST_CUDA_ARCHS "(.*?)"', (ROOT / "CMakeLists.txt").read_text())
        (ROOT / "build").mkdir(exist_ok=True)
        kept = {"FASTPOST_CUDA_ARCHS": archs, "CMAKE_CUDA_COMPILER_LAUNCHER": "ccache", "TMPDIR": str(ROOT / "build")}
    done = run(SCRIPT, "--dry-run", "--only", "build", **kept)
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
  *judge*unwritten*) exit ${FOUND} ;;
  *pytest*tests/*) echo "1 failed; kernels in $TRITON_CACHE_DIR"; exit 3 ;;
  *"fastpost bench"*) echo "started; kernels in $TRITON_CACHE_DIR"; sleep 60 ;;
  *fastpost.bench.goals*) echo "goals of: ${*:3}" ;;
esac
"""
SANITIZER = """#!/bin/bash
case "$*" in
  --help) echo "  --kernel-name arg" ;;
  *overrun* | *unwritten*) echo "$*"; exit ${FOUND} ;;
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
    stages = ["--only", "tests", "--only", "bench", "--only", "sanitizer"]
    done = pretend(pretended, *stages, "--seconds", "9", "--output", str(out))
    assert done.returncode == 3, done.stdout + done.stderr
    assert re.search(r"tests +FAILED with status 3", done.stdout)
    assert re.search(r"bench +TIMED OUT after \d+ s", done.stdout)
    assert re.search(r"sanitizer +not run: no time left", done.stdout)
    assert "3 stages failed" in done.stdout
    assert "fastpost on NVIDIA X100" in done.stdout
    assert "goals of: \n" in done.stdout  # there is no CSV of this run
    kernels = pretended / "build" / "gpu" / "triton"  # compiled once for all stages
    assert (out / "bench.log").read_text() == f"started; kernels in {kernels}\n"
    assert (out / "tests.log").read_text().endswith(f"kernels in {kernels}\n")
    assert sorted(p.name for p in out.iterdir()) == ["bench.log", "summary.txt", "tests.log"]
    after = pretend(pretended, "--only", "tests", "--only", "sanitizer", "--output", str(out))
    assert after.returncode == 1
    assert re.search(r"sanitizer +ok", after.stdout)


def test_the_build_has_its_time_and_its_failure_ends_the_run(pretended: Path) -> None:
    (pretended / "pyproject.toml").write_text('version = "1"\n')
    compiler = pretended / "bin" / "cmake"
    compiler.write_text("#!/bin/bash\nsleep 4\necho 'row_sums.cuh: error: a semicolon is missing'\nexit 1\n")
    compiler.chmod(0o755)
    done = pretend(pretended, "--seconds", "3", "--output", str(pretended / "out"))
    assert re.search(r"build +FAILED with status 1", done.stdout), done.stdout
    assert "a semicolon is missing" in done.stdout
    for stage in ("tests", "bench", "sanitizer", "profile"):
        assert re.search(rf"{stage} +not run: the build failed", done.stdout)
    assert done.returncode == 5


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
    assert lines[-1] == f"{len(lines) - 1} inputs run, all there are"
    assert gpu_sanitize.main("cpu", "cpu", seconds=0) == 0
    few = capsys.readouterr().out.splitlines()
    for family in ("lists of", "noise on", "rows of", "SAM steps", "SAM of", "heads of"):
        assert any(line.startswith(family) for line in few)
    assert few[-1] == "6 inputs run, then time was over"
    gpu_sanitize.unwritten("cpu")


TORCHS = """=========     Uninitialized access by a copy, source 0x7f0000000000 of size 256 bytes
=========     Host Frame: at::native::copy_kernel_cuda in /usr/lib/python/torch/lib/libtorch_cuda.so
=========
"""
OURS = """========= Uninitialized __global__ memory read of size 4 bytes
=========     at void fastpost::sum_kernel<float>(fastpost::Table)+0x90
=========     by thread (0,0,0) in block (0,0,0)
=========
"""


@pytest.mark.parametrize(
    ("log", "verdict"),
    [
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        (2 * TORCHS + "========= ERROR SUMMARY: 2 errors\n", 0),
        (TORCHS + OURS + "========= ERROR SUMMARY: 2 errors\n", 86),
        (TORCHS + "========= ERROR SUMMARY: 2 errors\n", 1),
        (TORCHS, 1),
    ],
    ids=["nothing", "only torch's", "ours among torch's", "more than was printed", "cut short"],
)
def test_initchecks_reports_of_torchs_copies_cannot_hide_ours(log: str, verdict: int, tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("========= COMPUTE-SANITIZER\n" + log)
    assert gpu_sanitize.judge(file) == verdict


def test_a_profile_holds_our_contenders_and_nothing_else() -> None:
    calls: list[str] = []
    done = profiled.profile(
        ["kl_train_128256_float32", "perturb_flat_bfloat16"], Target(torch.device("cpu"), 2e-4),
        lambda: calls.append("start"), lambda: calls.append("stop"),
    )  # fmt: skip
    assert done == [
        "kl_train_128256_float32: in place",
        "kl_train_128256_float32: fresh gradients",
        "perturb_flat_bfloat16: sam_perturb_",
        "perturb_flat_bfloat16: sam_restore_",
    ]
    assert calls == ["start", "stop"] * 4


def test_what_the_script_profiles_exists() -> None:
    (names,) = re.findall(r"^profiled=\(([^)]*)\)", SCRIPT.read_text(), re.M)
    assert set(names.split()) <= set(load([], "cuda"))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="rehearsed with the compiled core")
def test_the_gpu_tests_are_rehearsed_on_the_cpu() -> None:
    """Their own code, each body that they borrow once, and nowhere a tensor of the host among the device's."""
    files = sorted(str(p) for p in (ROOT / "tests").glob("test_gpu_*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "tests.rehearsal", "-p", "no:cacheprovider", *files],
        env={**os.environ, "FASTPOST_GPU_TESTS": "cpu"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])  # type: ignore[index]
    assert passed > 500


def test_a_rehearsal_refuses_what_a_device_would(monkeypatch: pytest.MonkeyPatch) -> None:
    device = "".join(("c", "pu"))  # a name of its own
    monkeypatch.setattr(rehearsal, "DEVICE", device)
    with rehearsal.Sides():
        there, host = torch.ones(3, device=device), torch.ones(3)
        moved, scalar = host.to(device), torch.ones(())
        index = torch.arange(2)
        for allowed in (lambda: (there * 2 + moved) * scalar, lambda: there.cpu() + host, lambda: there[index] + there[:2]):
            allowed()
        there[:2] = host[:2]
        for refused in (
            lambda: there[:2] + host[:2], lambda: torch.cat([moved, host]), lambda: host[there.long()],
            lambda: there.sum() * host, lambda: there.index_put_((index,), host[:2]), lambda: there.numpy(),
            lambda: np.asarray(there),
        ):  # fmt: skip
            with pytest.raises(AssertionError, match="on the device"):
                refused()
