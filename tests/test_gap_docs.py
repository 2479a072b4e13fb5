"""docs/gap.md: its code blocks run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "gap.md").read_text(encoding="utf-8")


def test_python_blocks_run_one_after_the_other() -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert len(blocks) == 4
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "docs/gap.md", "exec"), namespace)
    namespace["result"].rollback()
    assert namespace["delta"].norm() == 0
    assert len({row["text"] for row in namespace["rows"]}) == 3


def test_a_loss_times_minus_one_has_the_gradient_times_minus_one_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, x = torch.nn.Linear(20, 30), torch.randn(8, 20)
    loss = torch.nn.functional.cross_entropy(model(x), torch.arange(8))
    up = torch.autograd.grad(-loss, list(model.parameters()), retain_graph=True)
    down = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(a, -b) for a, b in zip(up, down, strict=True))
