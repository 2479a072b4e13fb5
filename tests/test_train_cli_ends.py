"""`fastpost train`: runs that were killed at their end, that diverge, that find no room; what their reports say."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from fastpost.cli import main, train_checkpoints, train_gap, train_options, train_run
from fastpost.cli import models as lm
from fastpost.cli.files import replace_text
from fastpost.integrations.transformers import PostTrainer

from .train_cli import Page, assert_same, saved, table, words_of


def test_a_run_that_was_killed_after_its_last_step_is_not_trained_on(models, files, tmp_path, monkeypatch) -> None:
    words = words_of(
        "sam", models, files, tmp_path, "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no"
    )
    monkeypatch.setattr(PostTrainer, "evaluate", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(words) == 130
    monkeypatch.undo()
    assert main([*words, "--resume_from_checkpoint", "True"]) == 0
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert_same(saved(tmp_path), saved(tmp_path / "checkpoint-4"))
    assert table(tmp_path)[-1]["step"] == "4"
    assert table(tmp_path)[-1]["eval_accuracy"]
    assert "resumed from" in Page.of(tmp_path).tables["facts"][-1][0]


@pytest.mark.parametrize(
    ("labels", "said", "f1", "mcc"),
    [
        # tp 2, fp 1, fn 1, tn 2 of label 1
        ([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], 4 / 6, (2 * 2 - 1) / 9),
        ([0, 0, 0, 1], [0, 0, 0, 0], 0.0, 0.0),
        # F1 of the three: 1, 2/3, 0
        ([0, 0, 1, 2], [0, 0, 1, 1], (1 + 2 / 3 + 0) / 3, (4 * 3 - (2 * 2 + 1 * 2)) / ((16 - 8) * (16 - 6)) ** 0.5),
    ],
)
def test_scores_are_those_of_their_formulas(labels, said, f1, mcc) -> None:
    classes = max(labels) + 1
    logits = np.eye(classes)[said]
    found = train_run.scores(transformers.EvalPrediction(predictions=logits, label_ids=np.array(labels)))
    right = sum(a == b for a, b in zip(labels, said, strict=True)) / len(labels)
    assert found == pytest.approx({"accuracy": right, "f1": f1, "mcc": mcc})
    again = train_run.scores(transformers.EvalPrediction(predictions=(logits, None), label_ids=np.array(labels)))
    assert again == found


def test_the_report_has_f1_correlation_and_the_baseline(models, files, tmp_path, capsys) -> None:
    rows = [json.loads(line) for line in Path(files["rows.jsonl"]).read_text(encoding="utf-8").splitlines()]
    rows += [{"text": f"{row['text']} again", "label": "prose"} for row in rows[:6]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [row["label"] for row in map(json.loads, Path(files["held.jsonl"]).read_text(encoding="utf-8").splitlines())]
    given = {**files, "rows.jsonl": str(tmp_path / "rows.jsonl")}
    words = words_of(
        "none", models, given, tmp_path / "out", "--metric_for_best_model", "f1", "--load_best_model_at_end", "True"
    )
    at = words.index("--save_strategy")
    words[at : at + 2] = ["--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    assert main(words) == 0
    last = table(tmp_path / "out")[-1]
    assert 0 <= float(last["eval_f1"]) <= 1
    assert -1 <= float(last["eval_mcc"]) <= 1
    share = held.count("prose") / len(held)
    facts = dict(Page.of(tmp_path / "out").tables["facts"])
    assert facts["baseline"] == f"always 'prose', the most frequent label of training: accuracy {share:.4g}"
    assert facts["F1"] == "of the label 'prose'"
    assert f"baseline: {facts['baseline']}" in capsys.readouterr().out
    assert any(f"always the most frequent label {share:.4g}" in text for text in Page.of(tmp_path / "out").seen)


def test_a_diverged_run_says_so(models, files, tmp_path) -> None:
    assert main([*words_of("sam_lm", models, files, tmp_path), "--sam_rho", "0", "--learning_rate", "1e30"]) == 0
    assert (table(tmp_path)[-1]["loss"], table(tmp_path)[-1]["eval_perplexity"]) == ("nan", "nan")
    assert "nan" in Page.of(tmp_path).seen


def test_smoothed_losses_make_no_perplexity_and_an_ascent_on_a_part_is_told(models, files, tmp_path) -> None:
    assert main([*words_of("sam_lm", models, files, tmp_path), "--label_smoothing_factor", "0.2"]) == 0
    assert "eval_perplexity" not in table(tmp_path)[0]
    assert "training loss, past the ascent at w + e, last logged" in Page.of(tmp_path).seen
    alone = tmp_path / "alone"  # of one micro-batch a quarter is the whole
    words = words_of("sam_lm", models, files, alone, "--gradient_accumulation_steps", "1")
    assert main([*words, "--eval_do_concat_batches", "False"]) == 0  # nothing of a text is scored together
    assert "training loss, last logged" in Page.of(alone).seen
    run = train_options.parse([*words[1:], "--model", str(alone), "--output_dir", str(tmp_path / "again")])
    concatenated = train_run.assemble(train_run.prepare(run)).evaluate()["eval_loss"]
    assert float(table(alone)[-1]["eval_loss"]) == pytest.approx(concatenated, rel=1e-6)


def test_a_text_of_gap_has_the_number_of_its_row_whatever_is_held_out(models, files, tmp_path) -> None:
    words = ["train", "--method", "gap", "--model", models["causal"], "--train_file", files["texts.jsonl"], "--use_cpu"]
    words += ["--text_index", "2", "--gap_steps", "1", "--max_length", "4"]
    runs = [train_options.parse([*words[1:], *more]) for more in ([], ["--validation_file", files["held.txt"]])]
    found = [train_gap.prepare(run).ids for run in runs]
    texts = [json.loads(line)["text"] for line in Path(files["texts.jsonl"]).read_text(encoding="utf-8").splitlines()]
    expected = lm.load_lm(models["causal"]).encode(texts[2])
    assert [ids[0].tolist() for ids in found] == [expected] * 2
    out = tmp_path / "out"
    assert main([*words, "--output_dir", str(out)]) == 0
    assert "text_index: 2" in (out / "run.yaml").read_text()
    (out / "checkpoint-10").mkdir()
    with pytest.raises(ValueError, match="holds checkpoint-10 of another run"):
        train_gap.prepare(train_options.parse([*words[1:], "--output_dir", str(out)]))


def test_the_command_that_goes_on_asks_for_the_newest_checkpoint_once(models, files, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(train_checkpoints, "newest_whole", lambda folder: folder / "checkpoint-3")
    for resuming in ([], ["--resume_from_checkpoint", "True"], ["--resume_from_checkpoint", "a/checkpoint-2"]):
        train_checkpoints.tell_how(train_options.parse([*words_of("sam", models, files, tmp_path)[1:], *resuming]))
        command = capsys.readouterr().out.splitlines()[1]
        assert command.count("--resume_from_checkpoint True") == 1
        run = train_options.parse(shlex.split(command)[2:])
        assert run.arguments.resume_from_checkpoint == "True"


def test_a_full_disk_leaves_no_parts(tmp_path, monkeypatch) -> None:
    def full(self: Path, *_: object, **__: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        replace_text(tmp_path / "report.html", "x")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full_at_a_checkpoint_is_one_line(models, files, tmp_path, capsys) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (Path(models["encoder"]) / "model.safetensors").stat().st_size * 3 // 2  # Adam's state takes twice as much
    words = words_of("none", models, files, tmp_path / "out", "--save_strategy", "steps", "--save_steps", "1")
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        assert main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert "fastpost train: error: a checkpoint cannot be written; is the disk full? " in error
    assert error.count("\n") == 1
    assert train_checkpoints.newest_whole(tmp_path / "out") is None


@pytest.mark.parametrize("where", ["rehearse", "_inner_training_loop"])
def test_a_gpu_that_is_full_as_training_begins_is_told_by_its_traceback(models, files, tmp_path, monkeypatch, where) -> None:
    """And the folder is taken away once, whichever process does it."""

    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    remove = Path.rmdir
    monkeypatch.setattr(Path, "rmdir", lambda path: (remove(path), remove(path)))
    monkeypatch.setattr(train_checkpoints.RunTrainer, where, full)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        main(words_of("none", models, files, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
