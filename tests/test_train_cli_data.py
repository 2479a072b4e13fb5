"""`fastpost train`: labels by every door, columns and separators that are recognised or named, what is held out."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fastpost.bench.studies import gap_sweep
from fastpost.cli import main, tables, train_data, train_gap, train_options, train_run

from .train_cli import LENGTH, WORDS, words_of


def read(path: Path, **given: Any) -> train_data.Data:
    """None of the rows is held out, because the same ones are given to validate on."""
    return train_data.read(train_options.DataOptions(train_file=str(path), validation_file=str(path), **given))


def write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def rows_of(data: train_data.Data) -> list[tuple[str, str | None, str | None]]:
    return [(row.text, row.pair, row.label) for row in data.train]


# -- a label that nobody named ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "labels"),
    [
        ("text,sentiment", ["pos", "neg"]),
        ("text,labels", ["1", "0"]),
        ("text,Label", ["1", "0"]),
        ("text,review_class", ["1", "2", "3", "4"]),
        ("text,v7", ["ham", "spam"]),  # nothing but values that recur
        ("text,stars", ["1.0", "5.0"]),
    ],
)
def test_a_column_that_may_be_the_label_is_named(models, files, tmp_path, capsys, head, labels) -> None:
    path = write(tmp_path / "x.csv", head + "\n" + "".join(f"text {k},{labels[k % len(labels)]}\n" for k in range(8)))
    name = head.split(",")[1]
    for model in ("encoder", "causal"):
        words = words_of("none", models, {**files, "rows.jsonl": str(path), "held.jsonl": str(path)}, tmp_path / "out")
        words[words.index("--model") + 1] = models[model]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"x.csv: no column is called label. Say --label_column {name}, or --label_column none to model the" in error
        assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert read(path, label_column=name).labels == tuple(sorted(label.removesuffix(".0") for label in labels))
    assert read(path, label_column="none").labels == ()


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("id", range(8)),
        ("source", ["web", "book"] * 4),
        ("language", ["en", "de"] * 4),
        ("score", [0.1 * k for k in range(8)]),
        ("title", [f"title {k}" for k in range(8)]),
        ("meta", [{"a": 1}] * 8),
        ("dump", ["one"] * 8),
    ],
)
def test_other_columns_are_left_alone(tmp_path, name, values) -> None:
    lines = [json.dumps({"text": f"text {k}", name: value}) for k, value in enumerate(values)]
    data = read(write(tmp_path / "x.jsonl", "\n".join(lines)), label_column="none")
    assert data.labels == ()
    assert data.notes == (f"columns not used: {name}",)


def test_a_column_without_a_name_is_named_so(tmp_path) -> None:
    assert read(write(tmp_path / "x.csv", ",text\n0,a\n1,b\n")).notes == ("columns not used: one without a name",)


def test_two_columns_and_those_that_a_data_set_declares(tmp_path) -> None:
    import datasets

    path = write(tmp_path / "x.csv", "text,topic,emotion\n" + "".join(f"t {k},{'ab'[k % 2]},{k % 2}\n" for k in range(8)))
    with pytest.raises(ValueError, match="Say --label_column NAME to learn one of topic, emotion, or --label_column none"):
        read(path)
    kinds = [f"kind {k}" for k in range(30)]
    features = datasets.Features(text=datasets.Value("string"), fine=datasets.ClassLabel(names=kinds))
    rows = datasets.Dataset.from_dict({"text": [f"t {k}" for k in range(30)], "fine": list(range(30))}, features=features)
    (tmp_path / "data").mkdir()
    rows.to_parquet(tmp_path / "data" / "train.parquet")
    options = train_options.DataOptions(dataset=str(tmp_path / "data"))
    with pytest.raises(ValueError, match="Say --label_column fine, or"):
        train_data.read(options)


def test_columns_that_the_first_row_lacks(tmp_path) -> None:
    rows = [{"text": "a b c"}, *({"text": f"hello {k}", "sentiment": k % 2} for k in range(4))]
    path = write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2 has a column sentiment, .* Say --label_column none to"):
        read(path)
    data = read(path, label_column="none")
    assert (data.labels, data.notes) == ((), ("columns not used: sentiment",))
    labelled = [{"label": k % 2, **row} for k, row in enumerate(rows)]
    data = read(write(tmp_path / "y.jsonl", "\n".join(map(json.dumps, labelled))))
    assert (data.labels, data.notes) == (("0", "1"), ("columns not used: sentiment",))
    empty = [{"text": "a"}, {"text": "b", "sentiment": None}]  # as tables of several sources have it
    assert read(write(tmp_path / "z.jsonl", "\n".join(map(json.dumps, empty)))).labels == ()


# -- every door -------------------------------------------------------------------------------------------------------------

DOORS = ["x.csv", "x.CSV", "x.tsv", "x.jsonl", "x.JSONL"]


def through_every_door(folder: Path, rows: list[tuple[str, str]]) -> dict[str, train_data.Data]:
    """The same rows as CSV, TSV and JSON lines, by --train_file and by --dataset."""
    found = {}
    for number, name in enumerate(DOORS):
        if name.lower().endswith(".jsonl"):
            content = "".join(f'{{"text": {json.dumps(text)}, "label": {label}}}\n' for text, label in rows)
        else:
            mark = "\t" if name.endswith(".tsv") else ","
            bare = [(text, label.strip('"')) for text, label in rows]
            content = f"text{mark}label\n" + "".join(f"{text}{mark}{label}\n" for text, label in bare)
        found[name] = read(write(folder / str(number) / name, content))
        if name == name.lower():
            write(folder / f"hub{number}" / f"train{Path(name).suffix}", content)
            options = train_options.DataOptions(dataset=str(folder / f"hub{number}"), validation_split="train")
            found[f"--dataset {name}"] = train_data.read(options)
    return found


@pytest.mark.parametrize(
    ("written", "names"),
    [
        (["1.0", "0.0", "1", "0"], ["1", "0", "1", "0"]),
        (["3.", "-2.00", "10", "3.0"], ["3", "-2", "10", "3"]),
        (["true", "false", "true", "true"], ["true", "false", "true", "true"]),
        (['"NA"', '"None"', '"null"', '"nan"'], ["NA", "None", "null", "nan"]),
        (['"+1"', '"-1"', '"1"', '"+x"'], ["1", "-1", "1", "+x"]),
        (['"01"', '"1"', '"007"', '"x"'], ["01", "1", "007", "x"]),
        (['" yes "', '"no"', '"yes"', '"no "'], ["yes", "no", "yes", "no"]),
    ],
)
def test_labels_mean_the_same_by_every_door(tmp_path, written, names) -> None:
    if "3." in written:  # not JSON
        written = [label.replace("3.", "3.0") if label == "3." else label for label in written]
    rows = [(f"text {k}", label) for k, label in enumerate(written)]
    found = through_every_door(tmp_path, rows)
    for door, data in found.items():
        assert [row.label for row in data.train] == names, door
        assert [row.text for row in data.train] == [text for text, _ in rows], door
    assert len(found) == 8


def test_capital_truth_values_and_fractions(tmp_path) -> None:
    path = write(tmp_path / "x.csv", "text,label\na,True\nb,FALSE\nc,true\n")
    assert [row.label for row in read(path).train] == ["true", "false", "true"]
    for door, content in (
        ("x.csv", "text,label\na,0.00\nb,0.10\n"),
        ("x.csv", "text,label\na,1\nb,1e-1\n"),
        ("x.tsv", "text\tlabel\na\t1\nb\t.5\n"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 0.25}\n'),
        ("x.jsonl", '{"text": "a", "label": "1"}\n{"text": "b", "label": "0.25"}\n'),
    ):
        with pytest.raises(ValueError, match=r"line 3: the label|line 2: the label .* is a number with a fraction"):
            read(write(tmp_path / door, content))
    write(tmp_path / "hub" / "train.csv", "text,label\na,0.5\nb,1.5\n")
    with pytest.raises(ValueError, match=r"the label 0\.5 is a number with a fraction"):
        train_data.read(train_options.DataOptions(dataset=str(tmp_path / "hub")))
    with pytest.raises(ValueError, match="no label"):
        read(write(tmp_path / "x.jsonl", '{"text": "a", "label": NaN}\n'))


# -- tables -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("x.csv", "text;label\na, b;yes\nc;no\n", "columns separated by semicolons"),
        ("x.csv", 'text\tlabel\n"a, b"\tyes\nc\tno\n', "columns separated by tabs"),
        ("x.csv", "label|text\nyes|a, b\nno|c\n", "columns separated by bars"),
        ("x.tsv", 'text,label\n"a, b",yes\nc,no\n', "columns separated by commas"),
        ("x.csv", 'text, label\n"a, b", yes\nc, no\n', ""),
        ("x.csv", ' text ,label \n"a, b",yes\nc,no\n', ""),
        ("x.tsv", " label\ttext \nyes\ta, b\nno\tc\n", ""),
        ("x.csv", 'text,label\r\n"a, b",yes\r\nc,no\r\n', ""),
        ("x.csv", 'text,label\r"a, b",yes\rc,no\r', ""),
        ("x.csv", '\ufefftext,label\n\n"a, b",yes\n\nc,no', ""),
        ("x.jsonl", '{" text": "a, b", "label ": "yes"}\r\n{" text": "c", "label ": "no"}\r\n', ""),
    ],
)
def test_separators_and_headers_that_are_recognised(tmp_path, name, content, note) -> None:
    data = read(write(tmp_path / name, content))
    assert rows_of(data) == [("a, b", None, "yes"), ("c", None, "no")]
    assert data.notes == ((note,) if note else ())
    assert note in data.summary()


@pytest.mark.parametrize(
    ("name", "content", "names"),
    [
        ("x.csv", "I love it,1\nI hate it,0\nso good,1\nso bad,0\n", "text, label"),
        ("x.csv", '1,"I love it, really"\n0,I hate it\n1,so good\n0,so bad\n', "label, text"),
        ("x.tsv", "a b\tc d\tyes\ne f\tg h\tno\ni j\tk l\tno\nm n\to p\tyes\n", "text, pair, label"),
        ("x.csv", "I love it;1\nI hate it;0\nso good;1\nso bad;0\n", "text, label"),
    ],
)
def test_a_table_without_a_header_is_recognised(tmp_path, name, content, names) -> None:
    data = read(write(tmp_path / name, content))
    assert len(data.train) == 4
    assert len(data.labels) == 2
    assert all(row.text.count(" ") >= 1 for row in data.train)
    assert (data.train[0].pair is not None) == ("pair" in names)
    assert data.train[0].label in ("1", "yes")
    assert data.notes[0].endswith(f"no header: the columns are taken as {names}")


def test_names_of_columns_are_not_taken_for_data(tmp_path) -> None:
    for header in ("a sentence,stars", "a sentence,1"):  # another name, and a first row whose value does not recur
        rows = "I love it,3\nI hate it,0\nso good,3\nso bad,0\n"
        with pytest.raises(ValueError, match="put one on top"):
            read(write(tmp_path / "x.csv", f"{header}\n{rows}"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "I love it,1\nI hate it,0\n", "separated by commas is: I love it | 1. If these are"),
        (
            "x.csv",
            "I love it,1\nI hate it,0\n",
            "the file has no header: put one on top, such as text,label",
        ),
        ("x.csv", "great; really;1\nbad;x;0\n", "separated by semicolons is: great | really | 1."),
        ("x.tsv", "fine\t1\n", "such as text<tab>label"),
        ("x.tsv", "fine\tbad\t1\n", "such as text<tab>pair<tab>label"),
        ("x.csv", "Text,label\na,b\n", "Did you mean 'Text'? If these are the columns' names, choose one by --text_column"),
        ("x.csv", 'text,label\n"a,1\nb,0\n', "line 3: unexpected end of data"),
        ("x.csv", "text,label\na\rb,1\nc,0\n", "line 2: a carriage return in a field without quotes"),
        ("x.jsonl", '{"text": "a"}\n{"text": "b\\ud800"}\n', "line 2: half of a surrogate pair"),
        ("x.csv", "text, text\na,b\n", "two columns are called 'text'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(write(tmp_path / name, content))


def test_the_advice_for_one_column_names_one(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"put one on top, such as text$"):
        read(write(tmp_path / "x.csv", "I love it\nI hate it\n"))


def test_a_carriage_return_inside_a_field_adds_no_row(tmp_path) -> None:
    content = 'text,label\n"a\rb",yes\n"c\r\nd",no\n'
    expected = [("a\rb", None, "yes"), ("c\r\nd", None, "no")]
    assert rows_of(read(write(tmp_path / "x.csv", content))) == expected
    write(tmp_path / "hub" / "train.csv", content)
    options = train_options.DataOptions(dataset=str(tmp_path / "hub"), validation_split="train")
    assert rows_of(train_data.read(options)) == expected
    assert rows_of(read(write(tmp_path / "x.tsv", "text\tlabel\na\rb\tyes\nc\tno\r\n"))) == [
        ("a\rb", None, "yes"),
        ("c", None, "no"),
    ]


@pytest.mark.parametrize("name", ["x.csv", "x.CSV", "x.Tsv", "x.JsonL", "x.TXT", "x.md"])
def test_gap_sweep_reads_the_same_files(tmp_path, name) -> None:
    suffix = Path(name).suffix.lower()
    content = {
        ".csv": "id;text\n1;a, b\n2;\n3;c\n",
        ".tsv": "id\ttext\n1\ta, b\n2\t\n3\tc\n",
        ".jsonl": '{"text": "a, b"}\n{"text": ""}\n{"text": "c"}\n',
    }
    path = write(tmp_path / name, content.get(suffix, "a, b"))
    assert gap_sweep.read(path) == (["a, b", "", "c"] if suffix in content else ["a, b"])
    assert tables.suffix_of(path) == suffix


def test_files_of_options_and_of_tasks_in_capitals(models, files, tmp_path) -> None:
    from fastpost.gap.tasks import read_task

    write(tmp_path / "RUN.YAML", f"method: sam\ntrain_file: {files['rows.jsonl']}\nuse_cpu: true\n")
    assert train_options.parse([str(tmp_path / "RUN.YAML")]).method == "sam"
    write(tmp_path / "RUN.Json", json.dumps({"method": "sam", "train_file": files["rows.jsonl"], "use_cpu": True}))
    assert train_options.parse([str(tmp_path / "RUN.Json")]).method == "sam"
    question = json.dumps({"context": "a", "choices": ["b", "c"], "answer": 0})
    assert len(read_task(write(tmp_path / "Q.JSONL", question))) == 1


# -- what is held out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts", [{"a": 95, "b": 5}, {"a": 40, "b": 1}, {"a": 9, "b": 9, "c": 2}, {"a": 300, "b": 30, "c": 3}]
)
def test_every_label_stays_in_training_and_is_held_out_alike(counts) -> None:
    rows = [train_data.Row(f"{label} {k}", None, label) for label, n in counts.items() for k in range(n)]
    train, held = train_data.hold_out(rows)
    assert (train, held) == train_data.hold_out(rows)
    assert sorted(map(str, train + held)) == sorted(map(str, rows))
    assert len(held) == max(len(rows) // 10, 1)
    assert {row.label for row in train} == set(counts)
    for label, count in Counter(row.label for row in held).items():
        assert count <= -(-counts[str(label)] // 10)


def test_two_rows_of_one_label_and_one_of_another(tmp_path) -> None:
    path = write(tmp_path / "x.csv", "text,label\na,x\nb,x\nc,y\n")
    data = train_data.read(train_options.DataOptions(train_file=str(path)))
    assert data.labels == ("x", "y")
    assert {row.label for row in data.train} == {"x", "y"}
    assert [row.label for row in data.validation] == ["x"]
    assert data.majority() == ("x", 1.0)


@pytest.mark.parametrize("lines", [1, 4])
def test_of_a_text_of_few_lines_the_last_tenth_of_its_tokens_is_held_out(models, files, tmp_path, lines) -> None:
    words = [WORDS[k % len(WORDS)] for k in range(1000)]
    text = "\n".join(" ".join(words[k::lines]) for k in range(lines))
    path = write(tmp_path / "x.txt", text)
    given = words_of("sam_lm", models, {**files, "text.txt": str(path)}, tmp_path / "out")
    at = given.index("--validation_file")
    del given[at : at + 2]
    job = train_run.prepare(train_options.parse(given[1:]))
    ids = job.tokenizer(text)["input_ids"]
    assert len(ids) == 1000
    trained = [token for block in job.train for token in block["input_ids"]]
    held = [token for block in job.validation for token in block["input_ids"]]
    assert trained == ids[: 900 // LENGTH * LENGTH]
    assert held == ids[900 : 900 + 100 // LENGTH * LENGTH]
    assert "1 text (its last tenth held out)" in job.summary
    assert main(given) == 0
    gap = ["--method", "gap", "--model", models["causal"], "--train_file", str(path), "--use_cpu", "--max_length", "4"]
    found = train_gap.prepare(train_options.parse(gap)).ids[0].tolist()
    assert found == ids[:900][-32:]  # as many as the model has positions


def test_a_short_text_is_cut_in_the_middle_at_most() -> None:
    assert train_data.cut(list(range(40)), 12) == (list(range(28)), list(range(28, 40)))
    assert train_data.cut(list(range(10)), 12) == ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9])
    assert train_data.cut(list(range(300)), 12) == (list(range(270)), list(range(270, 300)))


# -- gap --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["'same'", "k"])
def test_gap_climbs_on_texts_whatever_their_labels(models, files, tmp_path, label) -> None:
    texts = [" ".join(WORDS[k : k + 20]) for k in range(0, 60, 3)]
    rows = [{"text": text, "pair": "x", "label": eval(label, {"k": k})} for k, text in enumerate(texts)]
    path = write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--method", "gap", "--model", models["causal"], "--train_file", str(path), "--use_cpu"]
    words += ["--gap_steps", "1", "--max_length", "4", "--text_index", "3"]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    assert train_gap.prepare(train_options.parse(words[1:])).ids.shape == (1, 20)


def test_gap_is_no_work_for_several_processes(models, files, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    words = ["train", "--method", "gap", "--model", models["causal"], "--train_file", files["text.txt"]]
    assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
    assert "--method gap climbs one text in one process, and 2 were started" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_gap_refuses_columns_that_it_does_not_read(models, files, tmp_path, capsys) -> None:
    words = ["train", "--method", "gap", "--model", models["causal"], "--train_file", files["rows.jsonl"], "--use_cpu"]
    for option in ("--label_column", "--pair_column"):
        assert main([*words, option, "label", "--output_dir", str(tmp_path / "out")]) == 2
        assert f"{option}: --method gap reads texts" in capsys.readouterr().err
