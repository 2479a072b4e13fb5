"""The rules of docs/architecture.md: who may import whom, and what stays in which room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = {"errors", "plan", "distributed", "rng", "modes", "interrupts"}
# What each floor may import, beside itself and what everybody may.
BELOW = {
    "ops": {"backends", "dispatch"},
    "backends": {"dispatch"},
    "dispatch": set(),
    "sam": {"ops"},
    "r3f": {"ops"},
    "gap": {"ops"},
    "integrations": {"ops", "sam", "r3f", "gap"},
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
        assert ("pybind11" in text) <= (path == "csrc/bindings.cpp"), path
