"""The study gap-sweep end to end at small sizes: the CSV, the plot, the table, going on, refusals."""

from __future__ import annotations

import csv
import functools
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from fastpost import GAP
from fastpost.bench.studies import gap_sweep, small_lm
from fastpost.bench.studies.__main__ import main


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"vocabulary": 320, "width": 16, "layers": 1, "heads": 2, "context": 32, "batch_size": 2, "eval_windows": 6}
    monkeypatch.setattr(small_lm, "LmOptions", functools.partial(small_lm.LmOptions, **sizes, files_bytes=200_000))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "code.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["doc_id", "text"])
        writer.writerows([[k, f"def f{k}(x):\n    return x + {k}\n" * (k + 2)] for k in range(4)])
    return path


def arguments(texts: Path, output: Path, *more: str) -> list[str]:
    options = ["--texts", str(texts), "--limit", "3", "--n_steps", "2", "--lr", "1e-3", "--lm_steps", "3"]
    return ["gap-sweep", *options, "--output_dir", str(output), *more]


def test_rows_plot_and_table(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    plain = tmp_path / "prose.txt"
    plain.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    assert main(arguments(f"{texts},{plain}", output)) == 0  # type: ignore[arg-type]
    rows = list(csv.DictReader((output / "gap-sweep.csv").open()))
    named = {row["text"] for row in rows}
    assert len(named) == 4
    assert "prose/0" in named
    assert named < {"code/0", "code/1", "code/2", "code/3", "prose/0"}
    assert {row["seed"] for row in rows} == {"0"}
    assert (output / "gap-sweep.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "code" in printed
    assert "prose" in printed
    assert "standard error of" in printed
    before = (output / "gap-sweep.csv").read_text()
    assert main(arguments(f"{texts},{plain}", output)) == 0  # type: ignore[arg-type]  # nothing is left to do
    assert (output / "gap-sweep.csv").read_text() == before


def test_seeds_draw_other_texts_from_other_models(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    assert main(arguments(texts, output, "--limit", "2", "--seeds", "0,1,2")) == 0
    rows = list(csv.DictReader((output / "gap-sweep.csv").open()))
    by_seed = {seed: {row["text"] for row in rows if row["seed"] == seed} for seed in "012"}
    assert all(len(named) == 2 for named in by_seed.values())
    assert len({frozenset(named) for named in by_seed.values()}) > 1
    losses = [float(row["score"]) for row in rows if row["step"] == "0"]
    assert len(set(losses)) == 3  # the untouched models
    assert sorted(path.name for path in output.glob("seed-*.csv")) == ["seed-0.csv", "seed-1.csv", "seed-2.csv"]
    assert re.search(r"code\s+│\s+6\s+│", capsys.readouterr().out)


def test_tasks_choose_on_one_half_and_report_the_other(texts: Path, tmp_path: Path) -> None:
    questions = tmp_path / "which.jsonl"
    lines = [{"context": f"def f{k}(x):", "choices": ["\n    return", " import"], "answer": k % 2} for k in range(12)]
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out"
    assert main(arguments(texts, output, "--tasks", str(questions), "--limit", "1")) == 0
    rows = list(csv.DictReader((output / "gap-sweep.csv").open()))
    scores = {float(row["score"]) for row in rows}
    assert scores <= {k / 6 for k in range(7)}
    # Every even question has the first answer, every odd one the second: one half is right where the other is wrong.
    kept = next(row for row in rows if row["kept"] == "1")
    assert float(rows[0]["score"]) == pytest.approx(1 - float(kept["test_untouched"]))


def test_held_out_text(texts: Path, tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text("def g(x):\n    return [y for y in x if y]\n" * 60)
    assert main(arguments(texts, tmp_path / "out", "--held_out", str(held))) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--texts", "nowhere.csv"], "nowhere.csv is not a file"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--lr", "-1"], "lr must be finite and > 0"),
        (["--drift", "3"], "max-drift"),
        (["--held_out", "nowhere.txt"], "nowhere.txt is not a file"),
        (["--seeds", "1,x"], "--seeds wants whole numbers"),
        (["--tasks", "nowhere.json"], "no such file: nowhere.json"),
        (["--model", "somewhere"], "--model needs --tasks or --held-out"),
    ],
)
def test_refusals(texts: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(texts, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_only_running_shows_is_one_line_too(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, latin, rows = tmp_path / "short.txt", tmp_path / "latin.txt", tmp_path / "rows.json"
    short.write_text("a few words")
    latin.write_bytes("déjà vu ".encode("latin-1") * 500)
    rows.write_text('{"text": "a"}\n')
    (tmp_path / "word.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "taken").write_text("")
    for more, message in (
        (["--model", str(tmp_path), "--held_out", str(short)], "cannot be loaded"),
        (["--held_out", str(short)], "less than two windows"),
        (["--held_out", str(latin)], "latin.txt: not UTF-8"),
        (["--texts", str(rows)], "texts are CSV, TSV or JSON lines with a column `text`, or plain text"),
        (["--texts", str(tmp_path / "word.jsonl")], "no texts to climb on"),
        (["--output_dir", str(tmp_path / "taken")], "exists"),
    ):
        assert main(arguments(texts, tmp_path / "out", *more)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_ctrl_c_is_one_line_and_what_was_finished_is_kept(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    climbs = []

    def interrupted(*args: object, **kwargs: object) -> object:
        climbs.append(1)
        if len(climbs) == 2:
            raise KeyboardInterrupt
        return gap(*args, **kwargs)

    gap = GAP.__call__
    monkeypatch.setattr(GAP, "__call__", interrupted)
    assert main(arguments(texts, tmp_path / "out")) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert len({row["text"] for row in csv.DictReader((tmp_path / "out" / "seed-0.csv").open())}) == 1


def test_the_step_in_the_table_is_a_median(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "seed": 0,
            "text": f"t/{k}",
            "step": step,
            "kept": int(step == kept),
            "score": 0.0,
            "test_untouched": 0.0,
            "test_kept": 0.0,
        }
        for k, kept in enumerate((0, 2))
        for step in range(3)
    ]
    Console().print(gap_sweep.table(rows, "score"))
    assert re.search(r"t\s+│\s+2 │\s+1 │", capsys.readouterr().out)


def test_options_from_a_file(texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "sweep.json"
    config.write_text(json.dumps({"texts": str(texts), "limit": 2, "n_steps": 1, "lm_steps": 3}))
    assert main(["gap-sweep", str(config), "--output_dir", str(tmp_path / "out")]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "gap-sweep.csv").open()))
    assert len({row["text"] for row in rows}) == 2
    assert {row["step"] for row in rows} == {"0", "1"}
    config.write_text(json.dumps({"text": str(texts)}))
    assert main(["gap-sweep", str(config)]) == 2
    assert "texts" in capsys.readouterr().err


def test_files_without_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong, empty = tmp_path / "wrong.csv", tmp_path / "empty.txt"
    wrong.write_text("a,b\n1,2\n")
    empty.write_text(" \n")
    for path, message in (
        (wrong, "no column 'text' in its first row, which separated by commas is: a | b."),
        (empty, "holds no text"),
    ):
        assert main(arguments(path, tmp_path / "out")) == 2
        assert message in capsys.readouterr().err


def test_other_data_to_score_on_and_files_of_one_name_are_refused(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for k, path in enumerate(held):
        path.write_text(f"{k} and the quick brown fox jumps over {k} lazy dogs. " * 40)
    output = tmp_path / "out"
    assert main(arguments(texts, output, "--held_out", str(held[0]))) == 0
    assert main(arguments(texts, output, "--held_out", str(held[1]))) == 2
    assert "another sweep" in capsys.readouterr().err
    (tmp_path / "more").mkdir()
    twin = tmp_path / "more" / texts.name
    twin.write_bytes(texts.read_bytes())
    assert main(arguments(Path(f"{texts},{twin}"), tmp_path / "other")) == 2
    assert "two files are called 'code'" in capsys.readouterr().err
