"""Many texts on one model: rows are those of single runs, the model ends as it began, a stopped sweep goes on."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastpost
from fastpost.gap import sweep
from fastpost.gap.many import COLUMNS

from .test_gap import VOCABULARY, bits, same, tiny_model

HELD_OUT, REPORTED = (torch.randint(1, VOCABULARY, (4, 10), generator=torch.Generator().manual_seed(k)) for k in (11, 12))


def texts(n: int = 4) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(9)
    return {f"text {k}": torch.randint(1, VOCABULARY, (8 + k,), generator=g) for k in range(n)}


def evaluate(model: torch.nn.Module) -> float:
    return -float(model(input_ids=HELD_OUT, labels=HELD_OUT).loss)


def test(model: torch.nn.Module) -> float:
    return -float(model(input_ids=REPORTED, labels=REPORTED).loss)


test.__test__ = False  # type: ignore[attr-defined]


def recipe(**options: object) -> fastpost.GAP:
    return fastpost.GAP(n_steps=3, lr=5e-3, min_steps=0, **options)  # type: ignore[arg-type]


def test_rows_are_those_of_single_runs() -> None:
    model = tiny_model()
    start = bits(model)
    rows = sweep(recipe(max_drift=1e9), model, texts(), evaluate, test=test)
    assert same(bits(model), start)
    for name, ids in texts().items():
        single = recipe(max_drift=1e9)(tiny_model(), ids, evaluate=evaluate, test=test)
        mine = [row for row in rows if row["text"] == name]
        assert [row["loss"] for row in mine] == single.losses
        assert [row["score"] for row in mine] == single.scores
        assert [row["drift"] for row in mine] == single.drift
        (kept,) = [row for row in mine if row["kept"]]
        assert kept["step"] == single.best_step
        assert [kept["test_untouched"], kept["test_kept"]] == single.test_scores
        assert kept["stop_reason"] == single.stop_reason


def test_without_selection_and_without_a_file() -> None:
    calls = []
    rows = sweep(recipe(), tiny_model(), texts(2), progress=lambda *a: calls.append(a))
    assert [row["step"] for row in rows if row["kept"]] == [3, 3]
    assert {row["score"] for row in rows} == {""}
    assert calls == [(1, 2, "text 0"), (2, 2, "text 1")]


def test_a_stopped_sweep_goes_on(tmp_path: Path) -> None:
    whole = sweep(recipe(), tiny_model(), texts(), evaluate, output=tmp_path / "whole.csv")
    model, output, seen = tiny_model(), tmp_path / "runs" / "parts.csv", []
    start = bits(model)

    def stop(done: int, total: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(recipe(), model, texts(), evaluate, output=output, progress=stop)
    assert same(bits(model), start)
    assert {row["text"] for row in csv.DictReader(output.open())} == {"text 0", "text 1"}

    def counted(m: torch.nn.Module) -> float:
        seen.append(1)
        return evaluate(m)

    rows = sweep(recipe(), tiny_model(), texts(), counted, output=output)
    assert rows == whole
    assert len(seen) == len([row for row in rows if row["text"] in ("text 2", "text 3")])
    assert output.read_text() == (tmp_path / "whole.csv").read_text()
    assert list(csv.DictReader(output.open()).fieldnames or ()) == list(COLUMNS)
    assert not list(output.parent.glob(".*"))
    assert sweep(recipe(), tiny_model(), texts(), evaluate, output=output) == whole  # nothing is left to do


def test_interrupted_within_a_text_leaves_no_half_run(tmp_path: Path) -> None:
    model, output, calls = tiny_model(), tmp_path / "runs.csv", []
    start = bits(model)

    def fails(m: torch.nn.Module) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("out of patience")
        return evaluate(m)

    with pytest.raises(RuntimeError, match="out of patience"):
        sweep(recipe(), model, texts(), fails, output=output)
    assert same(bits(model), start)
    assert {row["text"] for row in csv.DictReader(output.open())} == {"text 0"}


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, output = tiny_model(), tmp_path / "runs.csv"
    start = bits(model)
    two = dict(list(texts().items())[:2])
    sweep(recipe(), model, two, evaluate, output=output)
    before = output.read_text()

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastpost.gap.many.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        sweep(recipe(), model, texts(), evaluate, output=output)
    assert same(bits(model), start)
    assert output.read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs.csv", "runs.csv.json"]
    monkeypatch.undo()
    assert len({row["text"] for row in sweep(recipe(), model, texts(), evaluate, output=output)}) == 4


@pytest.mark.parametrize("change", ["options", "weights", "text", "renamed", "sidecar", "probe"])
def test_another_sweeps_file_is_refused(change: str, tmp_path: Path) -> None:
    output = tmp_path / "runs.csv"
    sweep(recipe(), tiny_model(), texts(2), evaluate, output=output)
    before = output.read_text()
    gap, model, given, options = recipe(), tiny_model(), texts(), {}
    if change == "probe":
        gap = recipe(max_kl=1.0)
        sweep(gap, model, texts(2), evaluate, output=output.with_name("kl.csv"), probe=torch.tensor([[1, 2, 3]]))
        output, options = output.with_name("kl.csv"), {"probe": torch.tensor([[1, 2, 4]])}
        before = output.read_text()
    elif change == "options":
        gap = recipe(max_drift=3.0)
    elif change == "weights":
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3
    elif change == "text":
        given["text 1"] = given["text 1"].flip(0)
    elif change == "renamed":
        given = {f"other {name}": ids for name, ids in given.items()}
    else:
        Path(f"{output}.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"another sweep|not among the texts"):
        sweep(gap, model, given, evaluate, output=output, **options)
    assert output.read_text() == before


def test_files_are_utf_8_whatever_the_locale_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, path_open = [], Path.open

    def noted(self: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        opened.append(options.get("encoding"))
        return path_open(self, mode, *args, **options)

    monkeypatch.setattr(Path, "open", noted)
    for _ in range(2):
        sweep(recipe(), tiny_model(), {"é": texts(1)["text 0"]}, output=tmp_path / "runs.csv")
    assert set(opened) == {"utf-8"}
    assert "é," in (tmp_path / "runs.csv").read_bytes().decode("utf-8")


def test_names_are_strings_and_numbers_may_be_numpy_s(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="named by strings, not int"):
        sweep(recipe(), tiny_model(), {0: next(iter(texts().values()))}, evaluate, output=tmp_path / "a.csv")
    for _ in range(2):
        sweep(recipe(max_drift=np.float64(3)), tiny_model(), texts(1), evaluate, output=tmp_path / "b.csv")


def test_no_texts() -> None:
    with pytest.raises(ValueError, match="no texts"):
        sweep(recipe(), tiny_model(), {})
