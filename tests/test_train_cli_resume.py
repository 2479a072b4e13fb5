"""`fastpost train`: what differs from the run that is resumed is named, incomplete checkpoints are passed over and
named, and a process that is killed at any moment loses no more than the steps since its last checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fastpost.cli import main, train_checkpoints, train_options, train_run
from fastpost.integrations.transformers import PostTrainer, PostTrainingArguments

from .train_cli import Page, assert_same, saved, table, words_of

EVERY = ["--save_strategy", "steps", "--save_steps", "1"]
RESUME = ["--resume_from_checkpoint", "True"]


@pytest.fixture(scope="module")
def run_of_four(models, files, tmp_path_factory) -> Path:
    """A folder with checkpoints of steps 1 to 4."""
    folder = tmp_path_factory.mktemp("four")
    assert main(words_of("sam", models, files, folder, *EVERY)) == 0
    assert [path.name for path in train_checkpoints.checkpoints_of(folder)] == [f"checkpoint-{k}" for k in (4, 3, 2, 1)]
    return folder


@pytest.fixture
def stopped(run_of_four: Path, tmp_path: Path) -> Path:
    """A copy of it, as if the run had been killed after step 3."""
    folder = tmp_path / "stopped"
    shutil.copytree(run_of_four, folder)
    shutil.rmtree(folder / "checkpoint-4")
    return folder


# -- what differs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "0.5"], "learning_rate: 0.01 then, 0.5 now"),
        (["--sam_rho", "0.7"], "sam_rho: 0.2 then, 0.7 now"),
        (["--weight_decay", "0"], "weight_decay: 0.05 then, 0.0 now"),
        (["--max_steps", "9"], "max_steps: 4 then, 9 now"),
        (["--optim", "sgd"], "optim: adamw_torch then, sgd now"),
        (["--seed", "7"], "seed: 42 then, 7 now"),
        (["--max_length", "8"], "max_length: 12 then, 8 now"),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps: 1 then, 2 now"),
    ],
)
def test_other_options_are_named_and_refused(models, files, stopped, capsys, words, message) -> None:
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    assert main(words_of("sam", models, files, stopped, *EVERY, *RESUME, *words)) == 2
    error = capsys.readouterr().err
    assert f"checkpoint-3 was made by another run ({message}); --resume_with_changes True resumes with" in error
    assert error.count("\n") == 1
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_another_method_model_data_and_labels_are_named(models, files, stopped, tmp_path, capsys) -> None:
    def refused(words: list[str]) -> str:
        assert main(words) == 2
        return capsys.readouterr().err

    assert "(method: sam then, none now)" in refused(words_of("none", models, files, stopped, *RESUME))
    copy = tmp_path / "copy"
    shutil.copytree(models["encoder"], copy)
    error = refused(words_of("sam", {**models, "encoder": str(copy)}, files, stopped, *RESUME))
    assert f"(model: {models['encoder']} then, {copy} now)" in error
    lines = Path(files["rows.jsonl"]).read_text(encoding="utf-8").splitlines()
    other = tmp_path / "rows.jsonl"
    other.write_text("\n".join([lines[1], lines[0], *lines[2:]]), encoding="utf-8")
    error = refused(words_of("sam", models, {**files, "rows.jsonl": str(other)}, stopped, *RESUME))
    assert re.search(r"\(training data: 20 rows \(digest (\w+)\) then, 20 rows \(digest (?!\1)\w+\) now\)", error)
    other.write_text("\n".join(lines[:-2]), encoding="utf-8")
    error = refused(words_of("sam", models, {**files, "rows.jsonl": str(other)}, stopped, *RESUME))
    assert re.search(r"\(training data: 20 rows .* then, 18 rows .* now\)", error)
    renamed = {"code": "fraud", "prose": "ok"}
    paths = {}
    for name in ("rows.jsonl", "held.jsonl"):
        rows = [json.loads(line) for line in Path(files[name]).read_text(encoding="utf-8").splitlines()]
        paths[name] = str(tmp_path / name)
        Path(paths[name]).write_text("".join(json.dumps({**r, "label": renamed[r["label"]]}) + "\n" for r in rows))
    error = refused(words_of("sam", models, {**files, **paths}, stopped, *RESUME))
    assert "labels: code, prose then, fraud, ok now" in error
    third = json.dumps({"text": "a", "label": "third"})
    Path(paths["rows.jsonl"]).write_text("\n".join([*lines, third]), encoding="utf-8")
    three = {**files, "rows.jsonl": paths["rows.jsonl"]}
    error = refused(words_of("sam", models, three, stopped, *RESUME, "--resume_with_changes", "True"))
    assert "cannot be resumed: labels: code, prose then, code, prose, third now" in error


def test_changes_without_a_checkpoint_are_refused(models, files, tmp_path, capsys) -> None:
    """The option would do nothing."""
    for resumes in ([], ["--resume_from_checkpoint", "False"]):
        assert main(words_of("none", models, files, tmp_path / "out", *resumes, "--resume_with_changes", "True")) == 2
        assert "give --resume_from_checkpoint True as well" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_that_train_nothing_may_differ(models, files, stopped) -> None:
    words = ["--logging_steps", "2", "--report_to", "none", "--eval_strategy", "no", "--per_device_eval_batch_size", "3"]
    words += ["--save_steps", "2", "--run_name", "again", "--dataloader_num_workers", "0", "--save_total_limit", "2"]
    assert main(words_of("sam", models, files, stopped, *EVERY, *RESUME, *words)) == 0


def test_every_option_is_compared_unless_it_is_known_to_train_nothing() -> None:
    """A new option of transformers' counts until somebody has looked at it."""
    names = {f.name for f in transformers.TrainingArguments.__dataclass_fields__.values() if f.init}
    known = train_checkpoints._HARMLESS - {"method"}
    assert known <= names, known - names
    compared = train_checkpoints.options_that_train(PostTrainingArguments("x", use_cpu=True), {"r3f"})
    assert {
        "learning_rate",
        "optim",
        "lr_scheduler_type",
        "seed",
        "bf16",
        "dataloader_drop_last",
        "neftune_noise_alpha",
    } <= set(compared)
    assert not {"hub_token", "output_dir", "save_steps", "sam_rho", "method", "eval_steps", "report_to"} & set(compared)


def test_with_changes_the_new_options_count_and_moments_stay(models, files, stopped, monkeypatch, capsys) -> None:
    """The rate of the next step, its decay and SAM's radius are the new ones; the moments are those of the checkpoint."""
    seen: list[dict[str, Any]] = []
    loaded = train_checkpoints.RunTrainer._load_optimizer_and_scheduler

    def look(self: Any, checkpoint: Any) -> None:
        loaded(self, checkpoint)
        inner = self.optimizer.optimizer
        seen.append({**inner.param_groups[0], "moments": next(iter(inner.state.values()))["exp_avg"].clone()})

    monkeypatch.setattr(train_checkpoints.RunTrainer, "_load_optimizer_and_scheduler", look)
    words = ["--learning_rate", "0.5", "--sam_rho", "0.7", "--weight_decay", "0.3", "--adam_beta1", "0.8"]
    words += ["--lr_scheduler_type", "linear", "--max_steps", "6", "--resume_with_changes", "True"]
    given = words_of("sam", models, files, stopped, *EVERY, *RESUME, *words)
    assert main(given) == 0
    (group,) = seen
    assert group["lr"] == pytest.approx(0.5 * (1 - 3 / 6))
    assert (group["initial_lr"], group["rho"], group["weight_decay"], group["betas"]) == (0.5, 0.7, 0.3, (0.8, 0.999))
    stored = torch.load(stopped / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert torch.equal(group["moments"], stored["state"][0]["exp_avg"])
    rates = [float(row["learning_rate"]) for row in table(stopped) if row["step"] in "456"]
    assert rates == pytest.approx([0.25, 0.5 / 3, 0.5 / 6])
    facts = Page.of(stopped).tables["facts"]
    assert ["changed on resuming", "learning_rate: 0.01 then, 0.5 now"] in facts
    assert dict(facts)["a step"].endswith("learning rate 0.5")
    assert "checkpoint-3: sam_rho: 0.2 then, 0.7 now" in capsys.readouterr().out


def test_with_changes_another_method_keeps_the_rows_of_the_old_one(models, files, stopped) -> None:
    with_changes = [*RESUME, "--resume_with_changes", "True"]
    assert main(words_of("r3f", models, files, stopped, *EVERY, *with_changes)) == 0
    rows = table(stopped)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [bool(row["sam/seen_cosine"]) for row in rows] == [True, True, True, False]
    assert [bool(row["r3f/symm_kl"]) for row in rows] == [False, False, False, True]
    assert rows[-1]["r3f/symm_kl"]
    assert "SAM" not in " ".join(Page.of(stopped).seen[:60])
    assert main(words_of("r3f", models, files, stopped, *EVERY, *RESUME)) == 0  # of which the checkpoints are now


def test_with_changes_another_optimizer_begins_with_fresh_moments(models, files, stopped) -> None:
    words = ["--optim", "sgd", "--resume_with_changes", "True"]
    assert main(words_of("sam", models, files, stopped, *EVERY, *RESUME, *words)) == 0
    assert table(stopped)[-1]["step"] == "4"


def test_changes_that_cannot_be_resumed_are_one_line(models, files, stopped, tmp_path, capsys) -> None:
    config = transformers.AutoConfig.from_pretrained(models["encoder"])
    config.hidden_size = 8
    transformers.BertModel(config).save_pretrained(tmp_path / "small")
    transformers.AutoTokenizer.from_pretrained(models["encoder"]).save_pretrained(tmp_path / "small")
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    for extra, message in (
        (["--model", str(tmp_path / "small")], "cannot be resumed: the model has no weight bert."),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "--resume_with_changes: reduce_lr_on_plateau follows losses"),
    ):
        assert main(words_of("sam", models, files, stopped, *EVERY, *RESUME, "--resume_with_changes", "True", *extra)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert main(words_of("r4f", models, files, stopped, *EVERY, *RESUME, "--resume_with_changes", "True")) == 2
    assert "checkpoint-3 cannot be resumed: it has no weights of R4F's head" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_program_is_taken_on_demand_only(models, files, tmp_path, capsys) -> None:
    words = words_of("none", models, files, tmp_path / "out", *EVERY)
    job = train_run.prepare(train_options.parse(words[1:]))
    arguments = job.run.arguments
    arguments.max_steps = 2
    collate = transformers.DataCollatorWithPadding(job.tokenizer)
    PostTrainer(job.model, arguments, data_collator=collate, train_dataset=job.train, eval_dataset=job.validation).train()
    assert main([*words, *RESUME]) == 2
    assert "checkpoint-2 does not say what made it" in capsys.readouterr().err
    assert main([*words, *RESUME, "--resume_with_changes", "True"]) == 0
    assert table(tmp_path / "out")[-1]["step"] == "4"


# -- incomplete checkpoints -------------------------------------------------------------------------------------------------


def halved(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no state": (lambda folder: (folder / "trainer_state.json").unlink(), "no trainer_state.json"),
    "half a state": (lambda folder: halved(folder / "trainer_state.json"), "half of trainer_state.json"),
    "empty": (lambda folder: [path.unlink() for path in folder.iterdir()], "no trainer_state.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    "half the weights": (lambda folder: halved(folder / "model.safetensors"), "bytes of model.safetensors"),
    "no optimizer": (lambda folder: (folder / "optimizer.pt").unlink(), "no optimizer.pt"),
    "half an optimizer": (lambda folder: halved(folder / "optimizer.pt"), "bytes of optimizer.pt"),
    "no schedule": (lambda folder: (folder / "scheduler.pt").unlink(), "no scheduler.pt"),
    "no generators": (lambda folder: (folder / "rng_state.pth").unlink(), "no rng_state.pth"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_whole_checkpoint_is_taken_and_the_incomplete_one_named(models, files, stopped, damage, capsys) -> None:
    harm, told = DAMAGES[damage]
    harm(stopped / "checkpoint-3")
    run = train_options.parse(words_of("sam", models, files, stopped, *EVERY, *RESUME)[1:])
    start = train_checkpoints.asked_for(run)
    assert start.checkpoint == str(stopped / "checkpoint-2")
    (note,) = start.notes
    assert note.startswith("checkpoint-3 is incomplete (")
    assert told in note
    run.arguments.resume_from_checkpoint = str(stopped / "checkpoint-3")
    with pytest.raises(ValueError, match=f"checkpoint-3 is incomplete: .*{told}"):
        train_checkpoints.asked_for(run)


def test_it_goes_on_from_there_to_the_same_weights(models, files, stopped, run_of_four, capsys) -> None:
    halved(stopped / "checkpoint-3" / "optimizer.pt")
    assert main(words_of("sam", models, files, stopped, *EVERY, *RESUME)) == 0
    assert "resuming from" in (said := capsys.readouterr().out)
    assert "made anew" not in said  # all weights are the checkpoint's
    assert "checkpoint-3 is incomplete" in said
    assert_same(saved(stopped), saved(run_of_four))
    assert (stopped / "metrics.csv").read_text() == (run_of_four / "metrics.csv").read_text()
    assert train_checkpoints.flaw_of(stopped / "checkpoint-3") is None
    assert table(stopped) == table(run_of_four)


def test_a_batch_size_that_was_found_is_that_of_the_run_that_goes_on(models, files, tmp_path, monkeypatch) -> None:
    """A machine that holds three rows: 20 rows make 7 steps, not the two that were asked for."""
    steps = []
    step = train_checkpoints.RunTrainer.training_step

    def on_a_small_machine(self, model, inputs, *args):
        if len(inputs["input_ids"]) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 rows")
        steps.append(self.state.global_step)
        if stop in steps:
            raise KeyboardInterrupt
        return step(self, model, inputs, *args)

    monkeypatch.setattr(train_checkpoints.RunTrainer, "training_step", on_a_small_machine)
    saved = ["--save_strategy", "steps", "--save_steps", "3"]
    found = ["--per_device_train_batch_size", "10", "--auto_find_batch_size", "True"]
    words = words_of("sam", models, files, tmp_path, *saved, *found, "--max_steps", "-1", "--num_train_epochs", "1")
    stop = 3
    assert main(words) == 130
    stop = None
    for made in ([3, 4, 5, 6], []):  # the rest, and then nothing
        steps.clear()
        assert main([*words, *RESUME]) == 0
        assert steps == made
    assert table(tmp_path)[-1]["step"] == "7"


def test_where_none_is_whole_that_is_said(models, files, stopped, capsys) -> None:
    for number in (1, 2, 3):
        (stopped / f"checkpoint-{number}" / "rng_state.pth").unlink()
    assert main(words_of("sam", models, files, stopped, *EVERY, *RESUME)) == 2
    error = capsys.readouterr().err
    assert "no checkpoint in" in error
    assert all(f"checkpoint-{k} is incomplete (no rng_state.pth)" in error for k in (1, 2, 3))
    assert "give its folder as --model" in error
    assert main(words_of("sam", models, files, stopped, *EVERY)) == 2
    assert "holds checkpoint-3 of an earlier run, which is incomplete (no rng_state.pth)" in capsys.readouterr().err


def test_a_run_that_saves_weights_alone_cannot_be_resumed(models, files, tmp_path, capsys) -> None:
    words = words_of("sam", models, files, tmp_path / "out", *EVERY, "--save_only_model", "True", "--max_steps", "2")
    assert main(words) == 0
    assert main([*words, *RESUME, "--max_steps", "4"]) == 2
    assert "checkpoint-2 is incomplete (no optimizer state)" in capsys.readouterr().err


def test_what_is_left_of_a_checkpoint_is_removed_before_it_is_written_again(models, files, stopped, run_of_four) -> None:
    (stopped / "checkpoint-4").mkdir()
    (stopped / "checkpoint-4" / "left.txt").write_text("from before")
    assert main(words_of("sam", models, files, stopped, *EVERY, *RESUME)) == 0
    assert not (stopped / "checkpoint-4" / "left.txt").exists()
    assert_same(saved(stopped / "checkpoint-4"), saved(run_of_four / "checkpoint-4"))


@pytest.mark.parametrize("best", [False, True])
def test_r4f_resumes_with_the_weights_that_it_trains(models, files, tmp_path, best) -> None:
    extra = [*EVERY, "--lr_scheduler_type", "linear"]
    if best:
        extra += ["--load_best_model_at_end", "True", "--metric_for_best_model", "mcc"]
        extra += ["--eval_strategy", "steps", "--eval_steps", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(words_of("r4f", models, files, whole, *extra)) == 0
    shutil.copytree(whole, cut)
    for number in (3, 4):
        shutil.rmtree(cut / f"checkpoint-{number}")
    (cut / "model.safetensors").unlink()
    assert main(words_of("r4f", models, files, cut, *extra, *RESUME)) == 0
    assert_same(saved(whole), saved(cut))
    trained = "classifier.parametrizations.weight.original"  # in checkpoints, beside the weight that it computes with
    assert (trained in saved(whole / "checkpoint-4"), trained in saved(whole)) == (True, False)
    for folder in (whole, whole / "checkpoint-4"):
        weight = saved(folder)["classifier.weight"]
        assert float(torch.linalg.matrix_norm(weight, 2)) == pytest.approx(1, abs=1e-5)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        assert torch.equal(model.classifier.weight.detach(), weight)


# -- killed -----------------------------------------------------------------------------------------------------------------

SERVER = """
import gc, json, os, sys
import fastpost.cli, fastpost.cli.train, fastpost.cli.train_run, fastpost.cli.train_gap, fastpost.cli.train_report
import matplotlib.pyplot, sklearn.metrics, rich.progress, accelerate, transformers, datasets
from transformers import (AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification,
                          DataCollatorWithPadding, PreTrainedTokenizerFast)
gc.freeze()
for line in sys.stdin:
    words = json.loads(line)
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os._exit(fastpost.cli.main(words))
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has imported everything and runs a command line in a fork of its own for each line that it reads."""
    with (tmp_path / "stderr.txt").open("w") as errors, subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"},
    ) as process:  # fmt: skip
        yield process
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def begin(server: subprocess.Popen[str], words: list[str]) -> int:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(words) + "\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def end(server: subprocess.Popen[str]) -> int:
    assert server.stdout is not None
    return int(server.stdout.readline())


KILLS = int(os.environ.get("FASTPOST_KILLS", "16"))


def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_weights(models, files, tmp_path, server) -> None:
    """SIGKILL at random times, from the start of the process to the middle of saving, until so many have hit."""
    steps = "40"
    extra = f"--max_steps {steps} --save_total_limit 3 --lr_scheduler_type linear --eval_strategy no".split()
    extra += EVERY
    whole, out = tmp_path / "whole", tmp_path / "out"
    begin(server, words_of("sam", models, files, whole, *extra))
    assert end(server) == 0
    words = words_of("sam", models, files, out, *extra)
    draw = random.Random(5)
    kills = incomplete = 0
    while kills < KILLS:
        there = train_checkpoints.checkpoints_of(out)
        resume = RESUME if train_checkpoints.newest_whole(out) else []
        if there and not resume:
            shutil.rmtree(out)
        child = begin(server, [*words, *resume])
        newest = there[0] if there else None
        if draw.random() < 0.8:  # in the loop of steps and checkpoints
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and (train_checkpoints.checkpoints_of(out) or [None])[0] in (newest, None):
                if select.select([server.stdout], [], [], 1e-3)[0]:  # it has come to its end
                    break
            time.sleep(draw.uniform(0, 0.06))
        else:
            time.sleep(draw.uniform(0, 0.5))
        with contextlib.suppress(ProcessLookupError):  # it had come to its end, and the server has taken note of it
            os.kill(child, signal.SIGKILL)
        status = end(server)
        assert status in (-signal.SIGKILL, 0)
        kills += status != 0
        incomplete += any(train_checkpoints.flaw_of(path) for path in train_checkpoints.checkpoints_of(out)[:1])
        if status == 0 or (out / "report.html").exists():
            shutil.rmtree(out)  # it had come to its end; from the beginning
    print(f"{kills} kills, after {incomplete} of which a checkpoint was incomplete")
    child = begin(server, [*words, *(RESUME if train_checkpoints.newest_whole(out) else [])])
    assert end(server) == 0
    assert_same(saved(whole), saved(out))
    assert_same(saved(whole / f"checkpoint-{steps}"), saved(out / f"checkpoint-{steps}"))
    assert [row["loss"] for row in table(whole)] == [row["loss"] for row in table(out)]
