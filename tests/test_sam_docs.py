"""docs/sam.md: its code blocks run, and every test that it names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "sam.md").read_text(encoding="utf-8")


def test_python_blocks_run_one_after_the_other() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) >= 2
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/sam.md", "exec"), namespace)
    assert not namespace["opt"].is_perturbed


def test_every_test_that_proves_a_property_exists() -> None:
    named = re.findall(r"\[(\w+)\]\(\.\./(tests/test_\w+\.py)\)", TEXT)
    assert len(named) > 30
    for name, path in named:
        assert f"def test_{name}(" in (ROOT / path).read_text(encoding="utf-8"), (name, path)


def test_every_variant_has_a_line() -> None:
    from fastpost.sam import variants

    table = TEXT[TEXT.index("## Variants") : TEXT.index("## What 16 bits")]
    for name, value in vars(variants).items():
        if isinstance(value, type) and issubclass(value, variants.Variant) and value is not variants.Variant:
            assert name in table
