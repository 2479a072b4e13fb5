"""The recipes of docs/recipes.md for other people's trainers, where those are installed."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from . import docs
from .tiny import build, word_level_bert

PAGE = "docs/recipes.md"
SETTINGS = {
    "model_name_or_path": "model", "stage": "sft", "do_train": True, "finetuning_type": "full", "dataset": "d",
    "dataset_dir": "data", "template": "alpaca", "cutoff_len": 64, "output_dir": "out", "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "max_steps": 3, "logging_steps": 1, "save_strategy": "no",
    "report_to": "none", "use_cpu": True,
}  # fmt: skip


def test_recipes_are_short() -> None:
    first = docs.blocks(PAGE)[0]
    assert first.reason is not None
    assert sum(bool(line.strip()) for line in first.code.splitlines()) <= 15


@pytest.mark.skipif(importlib.util.find_spec("llamafactory") is None, reason="LLaMA-Factory is not installed")
@pytest.mark.parametrize("method", ["none", "sam", "sam+r3f"])
def test_llama_factory(tmp_path: Path, method: str) -> None:
    words = ["\n", *map(str, range(40)), "add", "Below", "is", "an", "instruction", "Response", "Instruction", ":", "###"]
    word_level_bert(tmp_path / "model", words)  # for its tokenizer
    model = build("llama")
    model.resize_token_embeddings(len(words) + 16)  # type: ignore[operator]
    model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    (tmp_path / "data").mkdir()
    rows = [{"instruction": f"add {k}", "input": "", "output": str(k + 1)} for k in range(39)]
    (tmp_path / "data" / "d.json").write_text(json.dumps(rows))
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json"}}))
    (tmp_path / "run.yaml").write_text(json.dumps(SETTINGS))  # which is YAML too
    code = docs.blocks(PAGE)[0].code
    assert 'method="sam", sam_rho=0.05' in code
    (tmp_path / "train.py").write_text(code.replace('method="sam", sam_rho=0.05', f"method={method!r}"))
    done = subprocess.run(
        [sys.executable, "train.py", "run.yaml"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(docs.ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    logged = set().union(*history)
    assert ("sam/seen_cosine" in logged) == ("sam" in method)
    assert ("r3f/symm_kl" in logged) == ("r3f" in method)
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in history if "loss" in line)
