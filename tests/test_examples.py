"""The examples run, at small sizes, on text that the test makes."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    words = ["the", "cat", "sat", "on", "a", "mat", "then", "we", "went", "to", "see", "some", "old", "friends"]
    text = {str(k): [" ".join(words[(k + j) % 7 :]) + ("?" if j % 2 else ".") for j in range(3 + k % 3)] for k in range(30)}
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps({"text": text}))
    return path


def test_causal_lm_r3f(dialogues: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "causal_lm_r3f.py"))
    example["main"](
        [str(dialogues), "--pretraining-steps", "3", "--batch-size", "6", "--micro-batch-size", "4", "--context", "48"]
    )
    printed = capsys.readouterr().out
    assert "27 dialogues to learn from, 3 held out" in printed
    rows = {name: line for line in printed.splitlines() for name in ("start", "plain", "R3F") if f"│ {name}" in line}
    perplexities = {name: float(re.findall(r"([\d.]+) ±", line)[0]) for name, line in rows.items()}
    assert perplexities["plain"] < perplexities["start"]
    assert perplexities["R3F"] < perplexities["start"]
    assert perplexities["R3F"] != perplexities["plain"]


def test_causal_lm_r3f_refuses_too_little_text(tmp_path: Path) -> None:
    example = runpy.run_path(str(EXAMPLES / "causal_lm_r3f.py"))
    path = tmp_path / "few.json"
    path.write_text(json.dumps({"text": {"0": ["hello", "you"]}}))
    with pytest.raises(SystemExit, match="1 dialogues of two turns or more; 20 are needed"):
        example["main"]([str(path)])
