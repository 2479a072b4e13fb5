"""docs/r3f.md: its code blocks run, and what it names exists."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from fastpost.r3f import relatives

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "r3f.md").read_text(encoding="utf-8")


def test_python_blocks_run_one_after_the_other() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) >= 2
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/r3f.md", "exec"), namespace)
    assert namespace["weight"].grad is not None
    assert namespace["model"].lm_head.weight.grad is not None


def test_every_relative_has_a_line() -> None:
    table = TEXT[TEXT.index("## Relatives") :]
    assert {name for name in relatives.__all__ if f"| `{name}` |" in table} == set(relatives.__all__)


def test_files_that_it_names_exist() -> None:
    for path in re.findall(r"`((?:tests|examples)/\w+\.py)`", TEXT):
        assert (ROOT / path).exists(), path


def test_numbers_in_the_text_are_those_of_the_csv() -> None:
    """Released R3F with dropout does not depend on eps; without, it falls as eps squared."""
    with (ROOT / "bench" / "data" / "r3f-what-moves.csv").open() as file:
        rows = list(csv.DictReader(file))

    def kl(mode: str, eps: float) -> float:
        return next(float(r["symm_kl"]) for r in rows if mode in r["mode"] and abs(float(r["eps"]) / eps - 1) < 1e-6)

    assert abs(kl("independent", 1e-5) / kl("independent", 1e-7) - 1) < 1e-4
    assert abs(kl("independent", 1e-2) / kl("independent", 1e-7) - 1) < 0.05
    for mode in ("shared", "off"):
        assert 50 < kl(mode, 1e-3) / kl(mode, 1e-4) < 200
        assert kl(mode, 1e-5) < 1e-9
