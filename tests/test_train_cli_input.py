"""`fastpost train`: data in every form, options, files of options, and what is refused before anything is written."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from fastpost.bench.studies.arguments import joined
from fastpost.cli import main, train_data, train_options, train_run
from fastpost.cli import models as lm
from fastpost.cli.methods import METHODS

from .train_cli import (
    LENGTH,
    assert_same,
    saved,
    words_of,
)

# -- data -------------------------------------------------------------------------------------------------------------------


def options(**given: Any) -> train_options.DataOptions:
    return train_options.DataOptions(**given)


def every_row(path: Path, **given: Any) -> train_data.Data:
    """None is held out, because the same rows are given to validate on."""
    return train_data.read(options(train_file=str(path), validation_file=str(path), **given))


def test_the_same_rows_from_every_form(tmp_path) -> None:
    rows = [(f"a text, {k}", f'say "{k}"', ("yes", "no", "it is")[k % 3]) for k in range(21)]
    folder = tmp_path / "data"
    folder.mkdir()
    lines = [json.dumps({"text": a, "pair": b, "label": c}) for a, b, c in rows]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    (tmp_path / "x.tsv").write_text(
        "label\ttext\tpair\n" + "".join(f"{c}\t{a}\t{b}\n" for a, b, c in rows), encoding="utf-8"
    )
    with (tmp_path / "x.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([("pair", "sentence", "class"), *((b, a, c) for a, b, c in rows)])
    found = [
        train_data.read(options(train_file=str(folder / "train.jsonl"))),
        train_data.read(options(train_file=str(tmp_path / "x.tsv"))),
        train_data.read(options(train_file=str(tmp_path / "x.csv"), text_column="sentence", label_column="class")),
        train_data.read(options(dataset=str(folder))),
    ]
    assert all(data == found[0] for data in found)
    assert found[0].labels == ("it is", "no", "yes")
    assert (len(found[0].train), len(found[0].validation)) == (19, 2)
    assert {(r.text, r.pair, r.label) for r in found[0].train + found[0].validation} == set(rows)
    plain = train_data.read(options(train_file=str(folder / "train.jsonl"), pair_column="none", label_column="none"))
    assert plain.labels == ()
    assert plain.train[0].pair is plain.train[0].label is None


def test_labels_of_numbers_are_in_their_order_and_a_model_keeps_its_own(models, files, tmp_path) -> None:
    path = tmp_path / "n.jsonl"
    path.write_text(
        "".join(json.dumps({"text": "the", "label": n}) + "\n" for n in (10, 9, -1, 2, 9, 10, 2, 9)), encoding="utf-8"
    )
    assert train_data.read(options(train_file=str(path))).labels == ("-1", "2", "9", "10")
    path.write_text(
        "".join(json.dumps({"text": "a", "label": n}) + "\n" for n in ("²", "01", "--5", "1", "2")), encoding="utf-8"
    )
    assert every_row(path).labels == ("01", "1", "2", "--5", "²")
    config = transformers.AutoConfig.from_pretrained(
        models["encoder"], id2label={0: "prose", 1: "code"}, label2id={"prose": 0, "code": 1}
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models["encoder"], config=config)
    model.save_pretrained(tmp_path / "own")
    transformers.AutoTokenizer.from_pretrained(models["encoder"]).save_pretrained(tmp_path / "own")
    words = words_of("none", {"encoder": str(tmp_path / "own")}, files, tmp_path / "out")
    job = train_run.prepare(train_options.parse(words[1:]))
    assert job.fresh == []
    assert job.model.config.id2label == {0: "prose", 1: "code"}
    names = [json.loads(line)["label"] for line in Path(files["rows.jsonl"]).read_text(encoding="utf-8").splitlines()]
    assert [row["labels"] for row in job.train] == [int(name == "code") for name in names]


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_a_model_of_another_task_gets_a_head_and_the_loss_of_this_one(models, files, tmp_path, problem) -> None:
    config = transformers.AutoConfig.from_pretrained(models["encoder"], num_labels=3, problem_type=problem)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(models["encoder"], config=config)
    model.save_pretrained(tmp_path / "own")
    transformers.AutoTokenizer.from_pretrained(models["encoder"]).save_pretrained(tmp_path / "own")
    whole = ["--dataloader_drop_last", "--per_device_eval_batch_size", "3"]
    words = words_of("none", {"encoder": str(tmp_path / "own")}, files, tmp_path / "out", *whole)
    job = train_run.prepare(train_options.parse(words[1:]))
    assert job.fresh == [f"classifier.{name} (of 3 labels there)" for name in ("bias", "weight")]
    trainer = train_run.assemble(job)
    batches = list(trainer.get_eval_dataloader())
    assert sum(len(batch["labels"]) for batch in batches) == len(job.validation)  # none is dropped
    assert len(job.validation) % len(batches[0]["labels"])
    found = job.model.eval()(**batches[0])
    logits = found.logits.detach().double()
    expected = logits.logsumexp(-1) - logits.gather(1, batches[0]["labels"][:, None])[:, 0]
    assert found.loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)


def test_labels_that_a_hub_data_set_names(tmp_path) -> None:
    import datasets

    features = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["zebra", "ant"]))
    rows = datasets.Dataset.from_dict({"text": ["a b", "c", "d e"], "label": [0, 1, 0]}, features=features)
    for split in ("train", "validation"):
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "data" / f"{split}.parquet")
    data = train_data.read(options(dataset=str(tmp_path)))
    assert data.train == data.validation == [
        train_data.Row("a b", None, "zebra"), train_data.Row("c", None, "ant"), train_data.Row("d e", None, "zebra")
    ]  # fmt: skip
    assert data.labels == ("ant", "zebra")
    assert not data.held_out
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        train_data.read(options(dataset=str(tmp_path), validation_split="valid"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": }\n', r"x\.jsonl, line 2: Expecting value"),
        ("x.jsonl", '["a"]\n', "line 1: expected an object with a text, found list"),
        ("x.jsonl", '{"txt": "a"}\n', "Did you mean 'txt'"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', "line 2: there is no label"),
        ("x.jsonl", '{"text": "a", "label": 0.5}\n', "line 1: the label 0.5 is a number with a fraction"),
        ("x.jsonl", '{"text": " ", "label": 1}\n', "line 1: the text is empty"),
        ("x.jsonl", '{"text": "a", "pair": "b"}\n', "pairs are classified"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 1}\n', "every training row has the label '1'"),
        ("x.jsonl", '{"text": "a"}\n{"text": "b", "label": 1}\n', "line 2 has a label, and the first row has none"),
        ("x.jsonl", '{"text": "a", "label": 0}\n{"text": "b", "pair": "c", "label": 1}\n', "line 2 has a pair"),
        ("x.jsonl", '{"text": "a", "pair": null, "label": 0}\n{"text": "a", "pair": "b", "label": 1}\n', "line 2: a row"),
        ("x.tsv", "text\tlabel\na\t \nb\t1\n", "line 2: no label"),
        ("x.csv", "text,label,label\na,0,1\n", "two columns are called 'label'"),
        ("x.tsv", "text\tlabel\na\tb\nc\n", r"x\.tsv, line 3: 1 columns, the header has 2"),
        ("x.csv", "text,label\n", "holds no rows"),
        ("x.txt", " \n", "holds no text"),
        ("x.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n', "a single row of each label, so"),
        ("x.parquet", "", "Known: text"),
        ("x.csv", b"text\n\xff\n", r"x\.csv: not UTF-8 \(.* at byte 5\); save it as UTF-8, from Latin-1 by iconv -f LATIN1"),
        ("x y.csv", "text\na".encode("utf-16"), r"from UTF-16 by iconv -f UTF-16 -t UTF-8 '.*x y\.csv' > NEW"),
        ("x.csv", gzip.compress(b"text\n"), r"x\.csv: not UTF-8 \(.*\) but compressed; unpack it by gunzip -c .*x\.csv"),
    ],
)  # fmt: skip
def test_broken_data_name_file_and_line(tmp_path, name, content, message) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        train_data.read(options(train_file=str(path)))


# -- options ----------------------------------------------------------------------------------------------------------------


def test_a_file_of_options_and_the_one_that_a_run_leaves(models, files, tmp_path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"method: sam\nmodel: {models['encoder']}\ntrain_file: {files['rows.jsonl']}\noutput_dir: {tmp_path / 'a'}\n"
        f"max_steps: 2\nuse_cpu: true\nsave_strategy: 'no'\n"
        f"learning_rate: 1.0e-2\nsam_rho: 9\nmax_length: {LENGTH}\n",
        encoding="utf-8",
    )
    assert main(["train", str(config), "--sam_rho", "0.3", "--disable-tqdm", "true"]) == 0
    again = (tmp_path / "a" / "run.yaml").read_text(encoding="utf-8")
    assert "sam_rho: 0.3" in again
    assert main(["train", "--output_dir", str(tmp_path / "b"), "--config", str(tmp_path / "a" / "run.yaml")]) == 0
    assert_same(saved(tmp_path / "a"), saved(tmp_path / "b"))
    arguments = transformers.TrainingArguments
    told = torch.load(tmp_path / "a" / "training_args.bin", weights_only=False)
    assert isinstance(told, arguments)
    assert (told.sam_rho, told.learning_rate, told.method) == (0.3, 1e-2, "sam")


def test_help_is_one_screen_and_names_what_there_is(capsys) -> None:
    for word in ("--help", "-h"):
        assert main(["train", word]) == 0
        shown = capsys.readouterr().out
        lines = shown.splitlines()
        assert len(lines) <= 40
        assert max(map(len, lines)) < 80
        assert shown.index("examples:") < shown.index("--output_dir DIR")
    names = {action.dest for action in train_options.build_parser()._actions}
    assert set(re.findall(r"--(\w+)", shown)) - {"help"} <= names
    assert "--help-all" in shown
    words = re.findall(r"--method (\S+) ", shown)
    assert {"sam", "r3f", "gap"} <= set(words) <= {*METHODS, "METHOD"}
    assert all(method in shown for method in METHODS)
    heads = re.findall(r"^  (\w*) +--((?:sam|r3f|anchor|gap)_\w+)", shown, re.M)
    assert {head.lower() for head, _ in heads if head} == {"sam", "r3f", "anchor", "gap"}
    last = ""
    for head, option in heads:  # each option below the method that it is of
        last = head.lower() or last
        assert option.startswith(last)


def test_lists_take_spaces_and_commas(tmp_path) -> None:
    base = ["--method", "sam", "--train_file", str(tmp_path / "x.txt"), "--output_dir", str(tmp_path / "out")]
    (tmp_path / "x.txt").write_text("a text")
    for words in (["a*", "b*"], ["a*,b*"], ["a*,", "b*"], ["a*", ",b*"]):
        run = train_options.parse([*base, "--sam_scope", *words, "--report-to", "tensorboard,none", "--seed", "3"])
        assert run.arguments.patterns() == ["a*", "b*"]
        assert run.arguments.seed == 3
        assert run.arguments.report_to == ["tensorboard", "none"]
    with pytest.raises(ValueError, match=r"--sam_scope.*: expected at least one argument"):
        train_options.parse([*base, "--sam_scope"])
    assert joined(["--tasks", "-1", "x", "--lr", "2"], ("tasks",)) == ["--tasks", "-1,x", "--lr", "2"]
    assert joined(["--tasks"], ("tasks",)) == ["--tasks"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"method": "sam", "train_file": str(tmp_path / "x.txt"), "sam_scope": ["a*", "b*"]}))
    assert train_options.parse([str(path)]).arguments.patterns() == ["a*", "b*"]


def test_help_all_groups_every_option_by_method() -> None:
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as stop:
        main(["train", "--help-all"])
    assert stop.value.code == 0
    heads = ["what to train, and on what", "SAM", "R3F", "anchor", "GAP", "transformers' TrainingArguments"]
    parts = re.split(r"^(" + "|".join(map(re.escape, heads)) + r"):$", printed.getvalue(), flags=re.M)
    assert parts[1::2] == heads
    groups = {head: set(re.findall(r"^  --(\w+)", text, re.M)) for head, text in zip(heads, parts[2::2], strict=True)}
    assert {"method", "model", "train_file", "dataset", "label_column", "output_dir"} <= groups[heads[0]]
    assert {"sam_rho", "sam_adaptive", "sam_ascent_fraction"} <= groups["SAM"]
    assert all(name.startswith("sam_") for name in groups["SAM"])
    assert {"r3f_lambda", "r3f_eps", "noise_type"} <= groups["R3F"]
    assert {"gap_steps", "gap_lr", "gap_max_drift", "tasks", "text_index"} <= groups["GAP"]
    theirs = {f.name for f in transformers.TrainingArguments.__dataclass_fields__.values() if f.init} - {"output_dir"}
    assert {"anchor", "anchor_kl", "sft_weighting"} <= groups["anchor"]
    assert theirs <= groups[heads[5]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--method sam --sam_rho -1", "sam_rho must be finite and >= 0, not -1.0"),
        ("--method sam --sam_roh 0.1", "unknown option '--sam_roh'. Did you mean '--sam_rho'?"),
        ("--method samlm", "unknown method 'samlm'. Did you mean 'sam_lm'?"),
        ("--method sam+gap", "--method sam+gap: these do not combine. GAP climbs on one text"),
        ("--method r3f+sam", "write sam+r3f"),
        ("--method sam_lm+r3f", "--sam_rho 0.15 --sam_ascent_fraction 0.25"),
        ("", "--method is needed: none, sam, sam_lm, asam, r3f, r4f, sam+r3f, sam+r4f, tram, anchor, "),
        ("--method anchor+sam", "write sam+anchor"),
        ("--method asam+anchor", "write --method sam+anchor --sam_adaptive True --sam_rho 0.5"),
        ("--method anchor --anchor context", "cuts them into blocks, of which none has a context"),
        ("--method sam --anchor_kl 0.1", "--anchor_kl is an option of an anchor, which --method sam does not do"),
        ("--method r3f --sam_rho 0.1", "--sam_rho is an option of SAM, which --method r3f does not do"),
        ("--method sam --noise-type normal", "--noise_type is an option of R3F"),
        ("--method sam --gap_lr 1e-3", "--gap_lr is an option of --method gap, not of sam"),
        ("--method gap --learning_rate 1e-3", "--learning_rate is an option of training runs"),
        ("--method gap --no_dataloader_pin_memory", "--dataloader_pin_memory is an option of training runs"),
        ("--method gap --gap_lr -1", "lr must be finite and > 0"),
        ("--method gap --text_index 99", "--text_index 99: the training data hold"),
        ("--method r3f --r3f_fused_linear True", "fused_linear needs a model whose get_output_embeddings() is a plain nn."),
        ("--method r3f --r3f_embedding nope", "unknown embedding 'nope'. Valid: "),
        ("--method anchor --anchor lora_off", "'lora_off' switches the adapters of a PEFT model off, and Bert"),
        ("--method anchor --anchor_fused_linear True", "Anchor: fused_linear needs a model whose get_output_embeddings()"),
        ("--method sam --fp16 --use_cpu", "--fp16: on a CPU there is no training in float16"),
        ("--method sam --per_device_train_batch_size big", "invalid int value: 'big'"),
        ("--method sam --max_length 99", "--max_length 99: the model takes 32 tokens"),
        ("--method sam --model /nowhere/model", "--model /nowhere/model cannot be loaded: there is no such folder"),
        ("--method sam --model ./nomodel", "--model ./nomodel cannot be loaded: there is no such folder"),
        ("--method gap --model ../no/such/model", "--model ../no/such/model cannot be loaded: there is no such folder"),
        ("--method sam --model nomodel", "cannot be loaded: there is no such folder here, and of the hub's: "),
        ("--method sam --model owner/nomodel", "cannot be loaded: there is no such folder here, and of the hub's: "),
        ("--method sam --model tests", "--model tests cannot be loaded: the folder holds no config.json"),
        ("--method sam --model pyproject.toml", "cannot be loaded: it is a file; give the folder that it is in"),
        ("--method asam --sam_adaptive false", "--method asam is adaptive by itself"),
        ("--method asam+r3f", "write --method sam+r3f --sam_adaptive True --sam_rho 0.5"),
        ("--method r3f+r4f", "r4f is r3f with a normalised head; choose one"),
        ("--method r4f --label_column none", "--method r4f normalises the head of a classifier"),
        ("--method r3f --neftune_noise_alpha 5", "--neftune_noise_alpha adds noise to the embeddings of both passes"),
        ("--method sam+r3f --neftune_noise_alpha 5", "of both passes that --method sam+r3f compares; choose one"),
        ("--method r4f --sam_rho 0.1", "--sam_rho is an option of SAM, which --method r4f does not do"),
        ("--method dropout", "unknown method 'dropout'. Valid: none, sam,"),
        ("--method sam --sam_radius_of_the_ball 1", "unknown option '--sam_radius_of_the_ball'. `fastpost train --help-"),
        ("--method sam --validation_file nowhere.txt", "--validation_file: no such file: nowhere.txt"),
        ("--method sam --validation_file .", "--validation_file: . is a folder, not a file"),
        ("--method sam --dataset x", "give one of the two"),
        ("--method sam --resume_from_checkpoint True", "there is no checkpoint in"),
        ("--method sam --config missing.yaml", "no such file: missing.yaml"),
        ("--method sam --optim adalomo", "optim='adalomo' steps inside backward"),
        ("--method sam --report_to wandbb", "wandbb is not supported"),
        ("--method sam --save_strategy epoch --eval_strategy no --load_best_model_at_end", "eval strategy to match"),
        ("--method sam --deepspeed nope.json", "deepspeed"),
        ("--method sam --label_column text", "text, pair and label are three columns"),
        ("--method sam --dtype float23", "choose from 'float32', 'bfloat16', 'auto'"),
        ("--method sam --per_device_train_batch_size 0", "--per_device_train_batch_size must be at least 1"),
        ("--method sam --eval_do_concat_batches false", "a classifier is scored on all batches of an evaluation together"),
        ("--method sam --dataloader_drop_last --per_device_train_batch_size 99", "training examples make no whole batch"),
        ("--method sam --dataloader_persistent_workers", "persistent_workers option needs num_workers > 0"),
        ("--method sam --model . --output_dir .", "--output_dir . is the folder of --model, which would be overwritten"),
        ("--method sam --label_names foo", "--label_names: fastpost train makes the batches"),
        ("--method sam --metric_for_best_model accuracies", "Did you mean 'accuracy'?"),
        ("--method gap --gap_lr 1e30 --max_length 3", "evaluate returned NaN"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line_and_writes_nothing(models, files, tmp_path, capsys, monkeypatch, words, message) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    model = models["causal" if "gap" in words else "encoder"]
    given = [
        "train",
        "--train_file",
        files["rows.jsonl"],
        "--model",
        model,
        "--output_dir",
        str(tmp_path / "out"),
        "--use_cpu",
    ]
    assert main([*given, *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fastpost train: error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_batch_that_dataloader_drop_last_needs_is_of_all_gpus(models, files, tmp_path) -> None:
    run = train_options.parse(words_of("sam", models, files, tmp_path / "out", "--dataloader_drop_last")[1:])
    run.arguments.per_device_train_batch_size = 15  # of 20 rows
    run.arguments._n_gpu = 2
    with pytest.raises(ValueError, match="the 20 training examples make no whole batch of 30"):
        train_run.prepare(run)


def test_files_of_options_in_the_words_of_yaml_and_json(models, files, tmp_path, capsys) -> None:
    config = tmp_path / "run.json"
    settings = {"train_file": files["rows.jsonl"], "method": "sam", "report_to": [], "sam_rho": "1e-1", "fp16": False}
    config.write_text(json.dumps(settings, indent="\t"), encoding="utf-8")
    run = train_options.parse([str(config), "--use_cpu"])
    assert (run.arguments.report_to, run.arguments.sam_rho) == ([], 0.1)
    path = tmp_path / "run.yaml"
    path.write_text(f"train_file: {files['rows.jsonl']}\nmethod: sam\nsave_strategy: no\nuse_cpu: yes\nbf16: off\n")
    run = train_options.parse([str(path), "--report_to", "none"])
    assert (run.arguments.save_strategy, run.use_cpu, run.arguments.bf16) == ("no", True, False)
    path.write_text("method: [sam\n")
    assert main(["train", str(path)]) == 2
    assert "run.yaml: while parsing" in capsys.readouterr().err


def test_columns_without_a_name_and_pairs_that_are_nowhere(tmp_path) -> None:
    table, rows = tmp_path / "x.csv", tmp_path / "x.jsonl"
    table.write_text("v1,v2,,\nham,a text,,\nspam,another,,\n")
    data = every_row(table, text_column="v2", label_column="v1")
    assert [row.label for row in data.train] == ["ham", "spam"]
    rows.write_text("".join(json.dumps({"text": "a", "pair": None, "label": k}) + "\n" for k in range(2)))
    assert [row.pair for row in every_row(rows).train] == [None, None]


def test_half_a_file_of_weights_and_short_models(models, files, tmp_path, capsys) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models["causal"], broken)
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    for method in ("sam", "gap"):
        words = ["--method", method, "--train_file", files["text.txt"], "--model", str(broken), "--use_cpu"]
        assert main(["train", *words, "--output_dir", str(tmp_path / "out")]) == 2
        assert f"--model {broken} cannot be loaded" in capsys.readouterr().err
    torch.manual_seed(0)
    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 1, "n_positions": 6, "vocab_size": 7}
    lm.check_causal(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)))


def test_encoders_are_no_language_models(models, files, tmp_path, capsys) -> None:
    out = str(tmp_path / "out")
    text = ["--train_file", files["text.txt"], "--model", models["encoder"], "--use_cpu", "--output_dir", out]
    assert main(["train", "--method", "none", *text, "--max_length", "8"]) == 2
    error = capsys.readouterr().err
    assert "the data have no labels, and BertLMHeadModel is no causal language model" in error
    assert "--label_column names a column of labels" in error
    assert main(["train", "--method", "gap", *text]) == 2
    assert "is no trained causal language model: it has no weights for" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_keys_of_a_file_and_models_that_data_need(models, files, tmp_path, capsys) -> None:
    config = tmp_path / "run.json"
    empty = tmp_path / "empty.yaml"
    for content, message in ((b"# nothing\n", "holds no settings"), (b"seed: \xff\n", "not UTF-8 (")):
        empty.write_bytes(content)
        assert main(["train", str(empty)]) == 2
        assert f"empty.yaml{'' if content[0] == 35 else ':'} {message}" in capsys.readouterr().err
    config.write_text('{"method": "sam", "r3f_lambd": 1.0}', encoding="utf-8")
    assert main(["train", str(config)]) == 2
    assert "Did you mean 'r3f_lambda'?" in capsys.readouterr().err
    assert main(["train", "--method", "sam", "--train_file", files["text.txt"], "--output_dir", str(tmp_path / "out")]) == 2
    assert "--model has to be a causal language model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_line_ends_end_a_row_and_pairs_are_in_both_files(tmp_path) -> None:
    table = tmp_path / "table.csv"
    table.write_text('text,label\na\u2028b\x0cc,yes\n"d\ne",no\n', encoding="utf-8", newline="")
    found = every_row(table)
    assert [row.text for row in found.train] == ["a\u2028b\x0cc", "d\ne"]
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("text,pair,label\na,b,yes\nc,d,no\n")
    for one, other in ((table, pairs), (pairs, table)):
        with pytest.raises(ValueError, match="differ in having pairs"):
            train_data.read(options(train_file=str(one), validation_file=str(other)))
