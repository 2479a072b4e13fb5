"""Every numeric option of `train` and of three studies: -1, 0, nan, infinity or a word works, or is one line and writes
nothing."""

from __future__ import annotations

import dataclasses
import gc
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml

from fastpost.bench.studies import __main__ as studies
from fastpost.bench.studies import compare, gap_sweep, probe
from fastpost.cli import main, methods, train_options, train_report
from fastpost.cli.options import Range
from fastpost.integrations.options import PostTrainingOptions
from fastpost.integrations.transformers import PostTrainingArguments

from .train_cli import COMMON, LENGTH, saved, words_of

VALUES = ("-1", "0", "nan", "inf", "word", "0.5")
SHORT = ["--eval_strategy", "no"]


def numeric(cls: type) -> list[str]:
    """The options of a dataclass that take a number."""
    hints = get_type_hints(cls)
    found = []
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if f.init and {int, float} & set(kinds):
            found.append(f.name)
    return found


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> Iterator[None]:
    """The trainer collects garbage when it begins, which takes longer than a run this small; what is there is no garbage."""
    gc.freeze()
    yield
    gc.unfreeze()


OF_GAP = numeric(train_options.GapOptions)
OF_TRAINING = [*numeric(train_options.DataOptions), *numeric(PostTrainingArguments)]


def method_of(name: str) -> str:
    if name in OF_GAP:
        return "gap"
    return "r3f" if name.startswith("r3f_") else "sam"


def words_for(name: str, models: dict[str, str], files: dict[str, str], out: Path) -> list[str]:
    if name in OF_GAP:
        words = ["--method", "gap", "--model", models["causal"], "--train_file", files["texts.jsonl"], "--use_cpu"]
        words += ["--validation_file", files["held.txt"], "--max_length", "4", "--gap_steps", "2"]
    else:
        words = ["--method", method_of(name), "--model", models["encoder"], "--train_file", files["rows.jsonl"], *SHORT]
        words += ["--validation_file", files["held.jsonl"], *COMMON, "--max_steps", "2"]
    return ["train", *words, "--output_dir", str(out)]


def one_line(capsys: pytest.CaptureFixture[str], command: str) -> str:
    said = capsys.readouterr()
    program = "fastpost" if command == "train" else "studies"
    assert said.err.startswith(f"{program} {command}: error: "), said.err
    assert said.err.count("\n") == 1, said.err
    return said.err


def test_every_number_of_a_training_run_has_a_range() -> None:
    """An option that a new version of transformers brings shows here."""
    assert set(OF_TRAINING) - set(numeric(PostTrainingOptions)) == set(train_options.RANGES) - set(OF_GAP)
    assert len(OF_TRAINING) > 35
    assert len(OF_GAP) > 10


@pytest.mark.parametrize("name", [*OF_TRAINING, *OF_GAP])
def test_a_number_works_or_is_one_line(models, files, tmp_path, capsys, monkeypatch, name) -> None:
    monkeypatch.setattr(train_report, "draw", lambda *_: b"")  # the slowest part of a run this short
    worked = []
    for value in VALUES:
        out = tmp_path / value
        status = main([*words_for(name, models, files, out), f"--{name}", value])
        assert status in (0, 2)
        if status == 0:
            weights = saved(out)
            assert all(bool(torch.isfinite(w).all()) for w in weights.values()), value
            worked.append(value)
            capsys.readouterr()
        else:
            one_line(capsys, "train")
            assert not out.exists()
    assert {"nan", "word"}.isdisjoint(worked)
    assert len(worked) < len(VALUES) - 2


@pytest.mark.parametrize(
    ("name", "refused", "taken"),
    [
        ("learning_rate", "-1 nan inf", "0 1e-3"),
        ("adam_beta1", "1.5 1 -0.1 nan", "0 0.5"),
        ("adam_epsilon", "-1 0", "1e-12"),
        ("gradient_accumulation_steps", "-1 0 1.5", "1"),
        ("dataloader_num_workers", "-1", "0"),
        ("max_steps", "0 -2", "-1 1"),
        ("logging_steps", "0 -1 2.5", "0.5 2"),
        ("seed", "-1 4294967296", "0"),
        ("max_grad_norm", "-1 nan", "0 inf"),
        ("sam_ascent_fraction", "0 1.5", "0.25 1"),
    ],
)
def test_which_numbers_work(models, files, tmp_path, capsys, name, refused, taken) -> None:
    words = words_for(name, models, files, tmp_path / "out")[1:]
    for value in refused.split():
        with pytest.raises(ValueError, match=name.removeprefix("sam_")):
            train_options.parse([*words, f"--{name}", value])
    for value in taken.split():
        assert getattr(train_options.parse([*words, f"--{name}", value]).arguments, name) == float(value)


WRONG_TYPES: list[Any] = [[1, 2], {"a": 1}, "word", True]


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_wrong_types_in_files_of_options(models, files, tmp_path, capsys, form) -> None:
    """Of every numeric option, and of those that take words; from JSON a few."""
    path = tmp_path / f"run.{form}"
    words = {"method", "model", "output_dir", "train_file", "optim", "lr_scheduler_type", "dtype", "noise_type", "sam_scope"}
    for name in (*OF_TRAINING, *OF_GAP, *sorted(words))[:: 1 if form == "yaml" else 10]:
        base = {"method": method_of(name), "train_file": files["rows.jsonl"], "use_cpu": True, "model": models["encoder"]}
        for value in WRONG_TYPES:
            if name in words and not isinstance(value, (list, dict)):
                continue
            settings = {**base, "output_dir": str(tmp_path / "out"), name: value}
            path.write_text((yaml.safe_dump if form == "yaml" else json.dumps)(settings))
            assert main(["train", str(path)]) == 2, (name, value)
            error = one_line(capsys, "train")
            assert name in error, error
            if isinstance(value, (list, dict)) and (name, value) != ("sam_scope", [1, 2]):  # names that fit no parameter
                assert "not a list" in error or "not a mapping" in error, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words",
    [
        "--optim_args a=b,c",
        "--optim adamw_bnb_8bit",
        "--lr_scheduler_type cosine_with_min_lr",
        "--lr_scheduler_kwargs {}x",
        '--lr_scheduler_type cosine --lr_scheduler_kwargs {"wrong":1}',
    ],
)
def test_what_optimizer_and_schedule_refuse_is_one_line_too(models, files, tmp_path, capsys, words) -> None:
    assert main([*words_for("learning_rate", models, files, tmp_path / "out"), *words.split()]) == 2
    one_line(capsys, "train")
    assert not (tmp_path / "out").exists()


def test_a_scope_that_fits_nothing_is_refused_before_anything_is_written(models, files, tmp_path, capsys) -> None:
    words = words_of("sam", models, files, tmp_path / "out", "--sam_scope", "nothing*")
    assert main(words) == 2
    assert "sam_scope: no parameter's name fits 'nothing*'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- the other commands -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", numeric(compare.CompareArguments))
def test_compare(models, tmp_path, capsys, name) -> None:
    for split in ("train", "dev"):
        lines = [f"s\t{k % 2}\t\ta sentence of {k} words\n" for k in range(40)]
        (tmp_path / f"{split}.tsv").write_text("".join(lines))
    base = ["--methods", "adamw", "--model", models["encoder"], "--output-dir", str(tmp_path / "out")]
    base += ["--task", "cola", "--data-dir", str(tmp_path)]
    worked = []
    for value in VALUES:
        option = f"--{name.replace('_', '-')}"
        try:
            compare.prepare(compare.parse([*base, option, value]))
            worked.append(value)
        except ValueError:
            assert studies.main(["compare", *base, option, value]) == 2
            assert option in one_line(capsys, "compare")
    assert {"nan", "inf", "word"}.isdisjoint(worked)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "cls", "parse", "needed"),
    [
        ("probe", probe.ProbeArguments, probe.parse, []),
        ("gap-sweep", gap_sweep.SweepArguments, gap_sweep.parse, ["--texts", "texts.txt"]),
    ],
)
def test_probe_and_gap_sweep(tmp_path, capsys, monkeypatch, command, cls, parse, needed) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("a text")
    for name in numeric(cls):
        option = f"--{name.replace('_', '-')}"
        worked = []
        for value in VALUES:
            try:
                parse([*needed, option, value])
                worked.append(value)
            except ValueError:
                assert studies.main([command, *needed, option, value]) == 2
                error = one_line(capsys, command)
                assert option in error or name in error
        assert {"nan", "word"}.isdisjoint(worked), name
        assert "-1" not in worked or name == "max_steps", name
    assert [path.name for path in tmp_path.iterdir()] == ["texts.txt"]


def test_a_list_and_a_mapping_for_compare(tmp_path, capsys) -> None:
    path = tmp_path / "options.yaml"
    for text in ("lr: [1, 2]", "lr: {a: 1}", "epochs: word"):
        path.write_text(text)
        assert studies.main(["compare", str(path)]) == 2
        assert "invalid float value" in one_line(capsys, "compare")


# -- ranges -----------------------------------------------------------------------------------------------------------------


def test_ranges() -> None:
    share = Range(0, 1, below=True)
    assert [value in share for value in (-0.1, 0, 0.5, 1, float("nan"), float("inf"))] == [
        False,
        True,
        True,
        False,
        False,
        False,
    ]
    assert str(share) == "at least 0 and less than 1"
    steps = Range(1, also=(-1,))
    assert [value in steps for value in (-2, -1, 0, 1)] == [False, True, False, True]
    assert str(steps) == "at least 1 or -1"
    assert float("inf") in Range(0, infinite=True)
    assert float("nan") not in Range(infinite=True)
    assert str(Range(0, above=True)) == "more than 0"
    assert str(Range()) == "a finite number"


# -- at once ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["train"], 2, "usage: fastpost train"),
        (["train", "--help"], 0, "usage: fastpost train"),
        (["gap-sweep", "--limit", "3"], 2, "fastpost gap-sweep is a study now"),
    ],
)
def test_what_needs_nothing_slow_is_said_at_once(words, status, said) -> None:
    import subprocess
    import sys

    code = f"import sys; from fastpost.cli import main; status = main({words!r}); print(status, 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.split()[-2:] == [str(status), "False"]
    assert said in ran.stdout + ran.stderr


def test_the_list_of_methods_is_the_one_that_is_done() -> None:
    assert set(methods.METHODS) == {*train_options.PARTS, "gap"}
    assert typing.get_type_hints(train_options.Run)["method"] is str
    assert LENGTH > 4
