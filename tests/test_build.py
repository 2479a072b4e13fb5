"""What a newcomer meets before the first operation: the build, the import, the choice of a backend."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
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
    ours = ("libstdc++", "libm.", "libgcc_s", "libc.", "ld-linux", "libpthread", "libdl")
    foreign = [n for n in needed if not n.startswith(ours)]
    assert foreign == []


def test_no_source_names_a_symbol_version() -> None:
    """Such a name binds the core to one libstdc++, and to a linker that finds it there."""
    for path in (ROOT / "csrc").rglob("*.*"):
        assert "symver" not in path.read_text(), path


# -- builds that fail ------------------------------------------------------------------------------------------------------

CXX = shutil.which("g++") or shutil.which("c++")
real = f'PATH=/usr/bin:/bin exec {CXX} "$@"'  # the fake's own PATH holds no assembler


def build(folder: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py, or another command, with nothing on PATH but what lies in folder / "bin"."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("CMAKE_") and k not in ("CC", "CXX", "CUDACXX", "LDFLAGS")
    }
    setup = [
        sys.executable,
        str(ROOT / "setup.py"),
        "build_ext",
        "--build-temp",
        str(folder / "temp"),
        "--build-lib",
        str(folder),
    ]
    env = kept | {"PATH": str(folder / "bin"), "FASTPOST_CUDA": "0"} | env
    return subprocess.run(command or setup, env=env, capture_output=True, text=True, cwd=ROOT)


def tool(folder: Path, name: str, script: str) -> str:
    """Puts a shell script on the path of `build`."""
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for `build` with CMake and Ninja and no compiler."""
    for name in ("cmake", "ninja"):
        tool(tmp_path, name, f'exec {shutil.which(name)} "$@"')
    return tmp_path


def test_setup_never_imports_torch_and_asks_for_nvcc_by_name(tmp_path: Path) -> None:
    assert "import torch" not in (ROOT / "setup.py").read_text()
    for cuda, message in (("1", "nvcc was not found"), ("yes", "use auto")):
        done = build(tmp_path, FASTPOST_CUDA=cuda)
        assert done.returncode != 0
        assert message in done.stderr


def test_a_build_without_its_tools_names_them(tmp_path: Path, tools: Path) -> None:
    (tools / "bin" / "ninja").unlink()
    done = build(tools)
    assert done.returncode == 1
    assert re.fullmatch(r"fastpost was not built: no ninja found\. .*pip install .*'ninja>=1.11'\.\n", done.stderr)
    (tools / "bin" / "cmake").unlink()
    assert "no cmake and no ninja found" in build(tools).stderr
    nowhere = tmp_path / "file"
    nowhere.touch()
    done = build(tools, sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-temp", str(nowhere))
    assert "no cmake" in done.stderr
    for name in ("cmake", "ninja"):
        tool(tools, name, "exit 1")
    done = build(tools, sys.executable, str(ROOT / "setup.py"), "build_ext", "--build-temp", str(nowhere))
    assert re.fullmatch(r"fastpost was not built: the folder .* could not be made \(Not a directory\)\. .*\n", done.stderr)


@pytest.mark.parametrize(
    ("script", "variables", "said", "remedy"),
    [
        (None, {}, "No CMAKE_CXX_COMPILER could be found", "No C++ compiler was found. Install one"),
        (None, {"CXX": "/nowhere/g++"}, "/nowhere/g++", "No C++ compiler was found. Install one"),
        ("echo a broken libc >&2; exit 1", {}, "a broken libc", "cannot build an empty program, for the reason above"),
        (
            "/bin/dd if=/dev/zero of=/dev/full bs=1 count=1 || exit 1",
            {},
            "No space left on device",
            "The disk is full: free space in {temp}",
        ),
        (
            'case "$*" in *csrc*) echo "api.h:1:2: error: unheard of" >&2; exit 1; esac',
            {},
            "api.h:1:2: error: unheard of",
            "docs/cluster.md lists the compilers",
        ),
        (
            'case "$*" in *csrc*) echo "fatal error: Killed signal terminated program cc1plus" >&2; exit 1; esac',
            {},
            "Killed signal",
            "Memory ran out: CMAKE_BUILD_PARALLEL_LEVEL=1",
        ),
        (
            "case \"$*\" in *-march*) echo \"error: bad value ('x86-64-v4') for '-march=' switch\" >&2; exit 1; esac",
            {},
            "bad value",
            "The compiler is too old: GCC 11",
        ),
    ],
    ids=["no compiler", "no such compiler", "broken", "disk", "error", "memory", "old"],
)
def test_a_failed_build_ends_in_what_its_tools_said_and_a_remedy(
    tools: Path, script: str | None, variables: dict[str, str], said: str, remedy: str
) -> None:
    if script is not None:
        tool(tools, "c++", f"{script}\n{real}")
    done = build(tools, **variables)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    first, *lines, last = done.stderr[done.stderr.index("fastpost was not built") :].splitlines()
    assert re.fullmatch(r"fastpost was not built: .* failed \(exit status \d+\):", first)
    assert any(said in line for line in lines), done.stderr
    assert 0 < len(lines) <= 40
    assert last.startswith(remedy.format(temp=tools / "temp")) or f" {remedy}" in last, last


def test_a_mended_environment_is_not_hidden_by_what_cmake_remembers(tools: Path) -> None:
    """In the same folder, as `pip install .` in a clone: after a failure, and after a success that used another compiler."""
    assert "No C++ compiler" in build(tools).stderr
    tool(tools, "c++", f'case "$*" in *csrc*) echo first compiler >&2; exit 1; esac\n{real}')
    assert "    first compiler\n" in build(tools).stderr  # its configuration succeeds
    other = tool(tools, "other", f'case "$*" in *csrc*) echo second compiler >&2; exit 1; esac\n{real}')
    assert "    second compiler\n" in build(tools, CXX=other).stderr
    assert "    first compiler\n" in build(tools).stderr


def test_pip_shows_the_compilers_error_without_being_asked_for_more(tools: Path) -> None:
    source = tools / "source"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "tests", "docs", "examples", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=ignored)
    tool(tools, "c++", f'case "$*" in *csrc*) echo "api.h:1:2: error: unheard of" >&2; exit 1; esac\n{real}')
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target"]
    done = build(tools, *pip, str(tools / "site"), str(source))
    assert done.returncode != 0
    text = done.stdout + done.stderr
    assert "fastpost was not built: the compilation failed" in text
    assert "api.h:1:2: error: unheard of" in text
    assert "docs/cluster.md lists the compilers" in text


def test_a_second_build_finds_the_tools_of_its_own_environment(tools: Path) -> None:
    """pip removes the environment of a build, with its CMake and Ninja, and keeps the folder that was built in."""
    tool(tools, "c++", f'case "$*" in *csrc*) exit 1; esac\n{real}')
    assert "the compilation failed" in build(tools).stderr
    (tools / "bin" / "ninja").rename(tools / "ninja")
    again = build(tools, PATH=f"{tools / 'bin'}:{tools}")
    assert "the compilation failed" in again.stderr, again.stderr


# -- cores that do not load ------------------------------------------------------------------------------------------------


def core_named(tmp_path: Path, name: str, content: bytes) -> str:
    """What a fastpost whose core is this file says of it."""
    package = tmp_path / "fastpost"
    shutil.copytree(ROOT / "fastpost", package, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    (package / name).write_bytes(content)
    code = "import fastpost.backends.native as n; print(n.__file__); print(n.failure())"
    # -S: without site-packages, or an editable installation would offer its own core.
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    where, _, why = done.stdout.partition("\n")
    assert where.startswith(str(tmp_path)), done.stderr
    return why


@pytest.mark.skipif(sys.platform != "linux", reason="the loader's words are glibc's")
@pytest.mark.parametrize("fault", ["text", "cut off", "newer glibc", "undefined symbol"])
def test_a_core_that_cannot_be_loaded_is_explained_in_the_loaders_words(tmp_path: Path, fault: str) -> None:
    core = Path(native.core().__file__).read_bytes()
    if fault == "text":
        content, words = b"this is no library, and longer than the header of one: " + bytes(64), "invalid ELF header"
    elif fault == "cut off":
        content, words = core[:32], "file too short"
    elif fault == "newer glibc":
        content, words = re.sub(rb"\0GLIBC_2\.\d\d\0", b"\0GLIBC_9.99\0", core), "version `GLIBC_9.99' not found"
    else:
        library = tmp_path / "library.so"
        source = 'extern "C" void nowhere(); extern "C" void* PyInit__C() { nowhere(); return nullptr; }'
        compile = [str(CXX), "-shared", "-fPIC", "-x", "c++", "-", "-o", str(library), "-Wl,-z,now"]
        subprocess.run(compile, input=source, text=True, check=True)
        content, words = library.read_bytes(), "undefined symbol: nowhere"
    assert content != core
    why = core_named(tmp_path, f"_C{EXTENSION_SUFFIXES[0]}", content)
    assert why.startswith("fastpost's compiled core was found but could not be loaded: "), why
    assert words in why
    assert "reinstall fastpost" in why


def test_a_core_of_another_python_is_named(tmp_path: Path) -> None:
    why = core_named(tmp_path, "_C.cpython-39-x86_64-linux-gnu.so", b"")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert f"compiled core is missing (Python {version} does not load _C.cpython-39-x86_64-linux-gnu.so)" in why
    assert "pip install ." in why


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
    code = "import torch, fastpost; fastpost.flip_signs_([torch.ones(3)], 1); print(fastpost.dispatch.forced())"
    assert python(code, FASTPOST_BACKEND="reference").stdout == "reference\n"
    assert "Did you mean 'triton'" in python(code, FASTPOST_BACKEND="tritn").stderr
    assert "avx2" in python(code, FASTPOST_CPU_ISA="avx9", FASTPOST_BACKEND="cpu").stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test finds missing")
def test_an_unavailable_backend_says_why() -> None:
    assert "CUDA" in fastpost.backends()["cuda"].reason
    with pytest.raises(BackendUnavailable, match="CUDA"):
        fastpost.use_backend("cuda")


@pytest.mark.skipif(sys.platform != "linux", reason="counts the process's threads")
def test_loops_run_on_the_threads_that_torch_computes_with() -> None:
    """Others would share the cores with torch's, which spin for a while after each of its operations."""
    code = """
import os, torch, fastpost
from fastpost.ops import params as ops
torch.set_num_threads(3)
x = torch.ones(1 << 21)
x.mul(2)
before = set(os.listdir("/proc/self/task"))
assert ops.squared_norm([x]).item() == 1 << 21
fastpost.symmetric_kl(x.view(256, -1), x.view(256, -1))
assert len(before) >= 3
print(len(set(os.listdir("/proc/self/task")) - before))
"""
    assert python(code, FASTPOST_BACKEND="cpu").stdout == "0\n"


@pytest.mark.parametrize("loaded", [True, False])
def test_a_fork_gets_threads_of_its_own(loaded: bool) -> None:
    """Also where the core is not loaded yet, and torch's threads have run."""
    code = f"""
import os, torch
from fastpost.ops import params as ops
torch.set_num_threads(3)
g = [torch.ones(1 << 20)]
g[0].mul(2)
assert not {loaded} or ops.squared_norm(g).item() == 1 << 20
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
