"""The examples run as a user runs them, on tiny models and real text; fsdp2_sam.py runs in test_torchrun.py."""

from __future__ import annotations

import ast
import csv
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = ["--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true", "--logging_steps", "1"]


def run(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", [name, *words])
    torch.manual_seed(0)
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_there_are_six_short_scripts() -> None:
    names = ["fsdp2_sam.py", "gap_select.py", "hf_trainer.py", "lora_anchor.py", "sam_loop.py", "trl_lora_sam.py"]
    assert sorted(path.name for path in EXAMPLES.iterdir() if path.is_file()) == names
    for name in names:
        source = (EXAMPLES / name).read_text(encoding="utf-8")
        assert len(source.splitlines()) < 60, name
        assert f"examples/{name}" in str(ast.get_docstring(ast.parse(source)))


@pytest.mark.parametrize("name", ["sam_loop.py", "gap_select.py"])
def test_without_arguments_an_example_says_how_it_is_called(monkeypatch, name) -> None:
    with pytest.raises(SystemExit, match=f"python examples/{name} MODEL"):
        run(monkeypatch, name)


def test_sam_loop(models, files, tmp_path, monkeypatch, capsys) -> None:
    found = run(monkeypatch, "sam_loop.py", models["causal"], files["text.txt"], str(tmp_path / "out"))
    printed = capsys.readouterr().out
    before, after = map(float, re.findall(r"held-out loss: ([\d.]+) before, ([\d.]+) after", printed)[0])
    assert after != before
    assert printed.count("seen 0.05 (cosine 1.00)") == 10
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert found["optimizer"].skipped_steps == 0
    (tmp_path / "short.txt").write_text("the parser")
    with pytest.raises(SystemExit, match="two blocks of 32 are needed"):
        run(monkeypatch, "sam_loop.py", models["causal"], str(tmp_path / "short.txt"))


@pytest.mark.parametrize("method", ["none", "sam", "r3f", "sam+r3f"])
def test_hf_trainer(models, files, tmp_path, monkeypatch, capsys, method) -> None:
    rows = [json.loads(line) for line in Path(files["rows.jsonl"]).read_text(encoding="utf-8").splitlines()]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words = ["--model", models["encoder"], "--train_file", str(tmp_path / "rows.csv"), "--method", method]
    found = run(monkeypatch, "hf_trainer.py", *words, "--max_steps", "3", *QUICK, "--output_dir", str(tmp_path / "out"))
    scores, seen = map(ast.literal_eval, capsys.readouterr().out.strip().splitlines()[-2:])
    assert 0 <= scores["eval_accuracy"] <= 1
    assert set(seen) == {"sam": {"sam/seen_over_intended"}, "r3f": {"r3f/symm_kl"}, "none": set()}.get(
        method, {"sam/seen_over_intended", "r3f/symm_kl"}
    )
    if "sam" in method:
        assert seen["sam/seen_over_intended"] == pytest.approx(1, abs=1e-3)
    assert found["model"].config.label2id == {"code": 0, "prose": 1}
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_trl_lora_sam(models, files, tmp_path, monkeypatch, capsys) -> None:
    words = ["--model", models["causal"], "--train_file", files["texts.jsonl"], "--rank", "2", "--max_length", "16"]
    words += ["--max_steps", "3", "--learning_rate", "1e-3", "--sam_rho", "0.05", "--bf16", "false", "--save_strategy", "no"]
    found = run(monkeypatch, "trl_lora_sam.py", *words, *QUICK, "--output_dir", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    seen = [float(value) for value in re.findall(r"step \d: loss \S+ e seen / intended ([\d.]+)", printed)]
    assert seen == pytest.approx([1, 1, 1], abs=1e-2)
    trained = {name for name, p in found["trainer"].model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_lora_anchor(models, files, tmp_path, monkeypatch, capsys) -> None:
    words = ["--model", models["causal"], "--train_file", files["text.txt"], "--kept_file", files["held.txt"]]
    words += ["--block", "16"]
    words += ["--rank", "2", "--max_steps", "3", "--learning_rate", "1e-2", "--anchor_kl", "0.5", "--save_strategy", "no"]
    found = run(monkeypatch, "lora_anchor.py", *words, *QUICK, "--output_dir", str(tmp_path / "out"))
    told = re.findall(r"anchor_kl (\S+), (\w+) text: ([\d.]+) nats ([+-][\d.]+)", capsys.readouterr().out)
    assert [line[:2] for line in told] == [("0", "new"), ("0", "old"), ("0.5", "new"), ("0.5", "old")]
    assert told[0][2] == told[2][2], "the second run did not begin from the same weights"
    assert float(told[0][3]) < 0
    assert told[0][3] != told[2][3]
    kls = [line["anchor/kl"] for line in found["trainer"].state.log_history if "anchor/kl" in line]
    assert min(kls) > 0  # dropout is on in the model and off in the reference
    trained = {name for name, p in found["model"].named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)


def test_gap_select(models, files, tmp_path, monkeypatch, capsys) -> None:
    text = tmp_path / "climb.txt"
    text.write_text(Path(files["held.txt"]).read_text(encoding="utf-8")[:400], encoding="utf-8")
    found = run(monkeypatch, "gap_select.py", models["causal"], files["text.txt"], str(text), str(text))
    printed = capsys.readouterr().out
    told = re.findall(r"step (\d+) of (\d+) kept \((\w+)\)\n.*data: ([\d.]+) before, ([\d.]+) after", printed)
    assert len(told) == 2
    assert told[0] == told[1], "the second text did not begin from the same weights"
    kept, last = int(told[0][0]), int(told[0][1])
    assert 0 <= kept <= last <= 15
    assert (told[0][3] == told[0][4]) == (kept == 0)
    assert len(found["blocks"]) >= 4
