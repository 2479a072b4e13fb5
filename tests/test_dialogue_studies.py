"""The studies on dialogues run, at small sizes, on text that the test makes."""

from __future__ import annotations

import csv
import json
import random
import re
import runpy
from pathlib import Path

import pytest

from fastpost.gap.zero_shot import Score

STUDIES = Path(__file__).parent.parent / "bench" / "studies"


@pytest.fixture
def dialogues(tmp_path: Path) -> Path:
    words = ["the", "cat", "sat", "on", "a", "mat", "then", "we", "went", "to", "see", "some", "old", "friends"]
    text = {str(k): [" ".join(words[(k + j) % 7 :]) + ("?" if j % 2 else ".") for j in range(3 + k % 3)] for k in range(30)}
    path = tmp_path / "dialogues.json"
    path.write_text(json.dumps({"text": text}))
    return path


def test_causal_lm_r3f(dialogues: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(STUDIES / "causal_lm_r3f.py"))
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
    example = runpy.run_path(str(STUDIES / "causal_lm_r3f.py"))
    path = tmp_path / "few.json"
    path.write_text(json.dumps({"text": {"0": ["hello", "you"]}}))
    with pytest.raises(SystemExit, match="1 dialogues of two turns or more; 20 are needed"):
        example["main"]([str(path)])


@pytest.fixture
def gap_data(tmp_path: Path, dialogues: Path) -> Path:
    folder = tmp_path / "gap"
    folder.mkdir()
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghij", k=draw.randrange(3, 9))) for _ in range(400)]
    rows = [f"{k},{' '.join(draw.choices(words, k=60))},prose" for k in range(60)]
    (folder / "train_data_prose.csv").write_text("\n".join(["doc_id,text,corpus", *rows]) + "\n")
    (folder / "validation_data_talk.json").write_text(dialogues.read_text())
    asked = [f"{k},Is {k} even?,Two halves of {k}.,{('yes', 'no')[k % 2]}" for k in range(10)]
    (folder / "validation_data_pubmed_qa.csv").write_text("\n".join(["pubid,question,abstract,final_decision", *asked]))
    return folder


def test_gap_opt(
    gap_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    example = runpy.run_path(str(STUDIES / "gap_opt.py"))
    output = tmp_path / "out" / "runs.csv"
    sizes = ["--steps", "2", "--limit", "8", "--lm-steps", "4", "--texts", "2", "--context", "64", "--output", str(output)]
    example["main"]([str(gap_data), *sizes])
    printed = capsys.readouterr().out
    for told in ("F1", "acc.", "published", "held out", "2 texts, 2 tasks"):
        assert told in printed
    rows = list(csv.DictReader(output.open()))
    assert len(rows) == 2 * 3 * 2
    assert {(row["step"], row["evaluation_there"]) for row in rows} == {("0", "1"), ("1", "2"), ("2", "3")}
    untouched = {(row["task"], row["score"]) for row in rows if row["step"] == "0"}
    assert len(untouched) == 2  # the second text began from the same weights
    with pytest.raises(SystemExit, match="holds 0 train_data"):
        example["main"]([str(tmp_path / "out")])


def test_gap_opt_readings() -> None:
    """As published never loses; held out, the state is chosen on other examples than those reported."""
    example = runpy.run_path(str(STUDIES / "gap_opt.py"))
    states = [{"a": Score((0.0, 0.5, 0.0, 0.5))}, {"a": Score((1.0, 0.0, 1.0, 0.0))}, {"a": Score((0.0, 0.9, 0.0, 1.0))}]
    assert example["as_published"](states).step == 1
    assert example["as_published"](states[::2]).step == 1
    reading = example["held_out"](states)
    assert reading.step == 1
    assert reading.untouched["a"].values == (0.5, 0.5)
    assert reading.kept["a"].values == (0.0, 0.0)
