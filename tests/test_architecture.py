"""The rules of docs/architecture.md: who may import whom, and what stays in which room."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fastpost
from fastpost.backends import native

from .conftest import CPU_BACKENDS

ROOT = Path(__file__).parent.parent
BASE = {"errors", "plan", "row_tasks", "distributed", "ranks", "rng", "modes", "norm_stats"}
# What each floor may import, beside itself and what everybody may.
BELOW = {
    "ops": {"backends", "dispatch"},
    "backends": {"dispatch"},
    "dispatch": set(),
    "sam": {"ops"},
    "r3f": {"ops"},
    "gap": {"ops"},
    "anchor": {"ops", "r3f"},
    "integrations": {"ops", "sam", "r3f", "gap", "anchor"},
}


def room(module: str) -> str:
    return module.split(".")[1]


def imported(path: Path) -> set[str]:
    """The rooms of fastpost that a file imports from, at whatever depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "fastpost":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastpost."):
            found.add(room(str(node.module)))
        elif isinstance(node, ast.Import):
            found |= {room(alias.name) for alias in node.names if alias.name.startswith("fastpost.")}
    return found


def sources(where: str, *suffixes: str) -> dict[str, str]:
    files = [path for path in (ROOT / where).rglob("*") if path.suffix in suffixes]
    assert files
    return {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in files}


@pytest.mark.parametrize("floor", BELOW)
def test_arrows_point_downward(floor: str) -> None:
    paths = [ROOT / "fastpost" / f"{floor}.py", *(ROOT / "fastpost" / floor).rglob("*.py")]
    paths = [path for path in paths if path.exists()]
    assert paths
    for path in paths:
        assert imported(path) <= BELOW[floor] | BASE | {floor}, path


def test_only_ops_define_autograd() -> None:
    classes = ("autograd.Function)", "(Function)")
    holders = [path for path, text in sources("fastpost", ".py").items() if any(name in text for name in classes)]
    assert holders
    assert all(path.startswith("fastpost/ops/") for path in holders), holders


def test_kernels_know_neither_fastpost_nor_torch() -> None:
    for path, text in sources("triton_kernels", ".py").items():
        assert "import fastpost" not in text, path
        assert "from fastpost" not in text, path
    for path, text in sources("csrc", ".h", ".cpp", ".cu", ".cuh").items():
        assert "torch/" not in text, path
        assert "ATen" not in text, path
        assert ("pybind11" in text) <= (path in ("csrc/bindings.cpp", "csrc/bindings.h")), path
        assert ("py::" in text) <= (path in ("csrc/bindings.cpp", "csrc/bindings.h", "csrc/row_bindings.cpp")), path
        assert ("Python.h" in text) <= (path in ("csrc/tensors.h", "csrc/tensors.cpp")), path
    for path, text in sources("fastpost/ops", ".py").items():
        assert ("native." in text) <= (path in ("fastpost/ops/lists.py", "fastpost/ops/registry.py")), path


def test_what_needs_the_emulated_core_is_run_on_it() -> None:
    """By the step of `make test-kernels` that sets CUDA_EMULATION: tests that are skipped elsewhere, and those that they
    build on, which say what every backend promises."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (step,) = (line for line in makefile.splitlines() if "CUDA_EMULATION=1" in line)
    (operations,) = re.findall(r"^operations := (.*)$", makefile, re.M)
    run = set(step.replace("$(operations)", operations).split())
    needing = set()
    for path, text in sources("tests", ".py").items():
        if re.search(r"^\w+ = pytest\.mark\.skipif\(not emulation\.enabled\(\)", text, re.M):
            needing |= {path, *(f"tests/{name}.py" for name in re.findall(r"^from \.(test_\w+) import", text, re.M))}
    assert {"tests/test_cuda_rows.py", "tests/test_divergence.py"} <= needing
    assert needing <= run, needing - run


def private_names(path: Path) -> set[str]:
    """The functions, methods, classes and attributes that a file keeps to itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def touched(source: str, method: str, hidden: set[str]) -> set[str]:
    """Private names of a method that a file outside of it uses: by import, of other objects, or of its own subclasses."""
    tree = ast.parse(source)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"fastpost.{method}")
        for alias in node.names
    }
    inherits: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id in imported for b in node.bases):
            inherits |= {id(inner) for inner in ast.walk(node)}
    found = imported & hidden
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in hidden:
            itself = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            if not itself or id(node) in inherits:
                found.add(ast.unparse(node))
    return found


@pytest.mark.parametrize("method", ["sam", "r3f", "anchor"])
def test_private_names_of_a_method_stay_private(method: str) -> None:
    """Integrations, commands and benches use what a method offers to everybody who writes a trainer."""
    hidden = set().union(*(private_names(path) for path in (ROOT / "fastpost" / method).rglob("*.py")))
    for folder in ("fastpost/integrations", "fastpost/cli", "fastpost/conformance", "bench", "examples"):
        for path, source in sources(folder, ".py").items():
            assert not touched(source, method, hidden), path


def test_private_names_stay_in_their_module_of_sam() -> None:
    """But for a subclass, which may use what it inherits."""
    assert len(list((ROOT / "fastpost/sam").glob("*.py"))) <= 15
    paths = list((ROOT / "fastpost/sam").rglob("*.py"))
    names = {path: private_names(path) for path in paths}
    for path in paths:
        others = set().union(*(names[other] for other in paths if other != path)) - names[path]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in others:
                assert isinstance(node.value, ast.Name), (path, ast.unparse(node))
                assert node.value.id in ("self", "cls"), (path, ast.unparse(node))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastpost."):
                assert not any(alias.name.startswith("_") for alias in node.names), (path, ast.unparse(node))


def test_a_radius_passes_six_functions_from_sam_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that docs/architecture.md lists."""
    if "cpu" not in CPU_BACKENDS:
        pytest.skip("the CPU core is not built")
    core = native.core().cpu
    plain, walks = core.sam_perturb, []

    def perturb(plan: Any, squared: Any, rho: float, *rest: Any) -> Any:
        assert rho == 0.375
        frames = [frame.frame for frame in inspect.stack()]
        inside = [f.f_code.co_name for f in frames if Path(f.f_code.co_filename).is_relative_to(ROOT / "fastpost")]
        walks.append(inside[::-1])
        return plain(plan, squared, rho, *rest)

    monkeypatch.setattr(core, "sam_perturb", perturb)
    w = torch.ones(3, requires_grad=True)
    opt = fastpost.SAM([w], torch.optim.SGD, rho=0.375, lr=0.1)
    w.grad = torch.ones(3)
    opt.first_step()
    walk = ["called", "first_step", "_perturb", "apply", "run", "sam_perturb_"]
    assert walks == [walk]
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    listed = re.findall(r"`(?:\w+\.)*(\w+)`", text.split("passes these six functions", 1)[1].split(".\n", 1)[0])
    assert listed == walk


def test_the_rule_about_private_names_sees_each_way_of_touching_one() -> None:
    source = """
from fastpost.sam import SAMWindow, _hidden
class Window(SAMWindow):
    def run_pass(self): return self._hidden_too
class Other:
    def mine(self): return self._hidden_too
def f(opt): return opt._hidden_three
"""
    names = {"_hidden", "_hidden_too", "_hidden_three"}
    assert touched(source, "sam", names) == {"_hidden", "self._hidden_too", "opt._hidden_three"}
    assert touched(source, "r3f", names) == {"opt._hidden_three"}
