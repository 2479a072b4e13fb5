"""docs/tutorial.md: its blocks run on a small model, and what it quotes has the form of what they print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastpost.bench.studies import smollm2, stdlib

from . import docs
from .tiny import build, word_level_bert

PAGE = "docs/tutorial.md"


def form(text: str) -> list[str]:
    """The lines without their numbers and spaces."""
    return [re.sub(r"[-+]?[\d.]+", "#", " ".join(line.split())) for line in text.strip().splitlines()]


def test_the_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    areas = ("internet", "numbers and dates")
    texts = tuple((area, f"{k}.py", f"text {k} of {area} " * 8) for k in range(12) for area in areas)
    words = sorted({word for _, _, text in texts for word in text.split()})
    word_level_bert(tmp_path, words)  # for its tokenizer
    model: Any = build("llama")
    model.resize_token_embeddings(len(words) + 16)
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(smollm2, "folder", lambda: tmp_path)
    monkeypatch.setattr(stdlib, "docstrings", lambda: texts)

    found = docs.blocks(PAGE)
    namespace: dict[str, Any] = {"__name__": "tutorial"}
    python = [k for k, block in enumerate(found) if block.language == "python"]
    assert len(python) == 4
    torch.manual_seed(0)
    for k in python:
        code = found[k].code.replace("40, 4, 64", "2, 2, 16")
        exec(compile("\n" * (found[k].line - 1) + code, str(docs.ROOT / PAGE), "exec"), namespace)
        quoted = next((block.code for block in found[k + 1 : k + 2] if block.language == "text"), "")
        assert form(capsys.readouterr().out) == form(quoted)
    assert set(namespace["results"]) == {"start", "plain", "sam", "r3f"}
    assert all(value.isfinite().all() for values in namespace["results"].values() for value in values)
