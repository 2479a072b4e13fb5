"""The README's Python blocks run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.split("fastpost.", 1)[1].split("(", 1)[0])
def test_python_blocks_run(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


def test_there_is_a_block_for_each_method() -> None:
    joined = "\n".join(BLOCKS)
    assert all(name in joined for name in ("fastpost.SAM(", "fastpost.R3F(", "fastpost.R4F(", "fastpost.GAP("))
