"""Sharpness logged by trainers and by `fastpost train`; training goes on as without it."""

from __future__ import annotations

import math
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from fastpost import sharpness
from fastpost.cli import main
from fastpost.integrations.transformers import SAMTrainer, SharpnessCallback

from . import tiny
from .conftest import same_bits
from .train_cli import table, words_of
from .trainers import arguments, rows, stacked, trainer_of, weights


class Reporter(TrainerCallback):
    """Comes before the callback, as those of transformers do."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append(dict(logs))


BATCHES = [stacked(rows()[i : i + 3]) for i in (0, 3, 6)]


def trained(folder: Any, cls: type, *callbacks: Any, **options: Any) -> Any:
    trainer = trainer_of(cls, tiny.build("causal", dropout=0.1), arguments(folder, 4, **options), callbacks=list(callbacks))
    trainer.train()
    return trainer


def test_it_is_logged_and_leaves_training_as_it_was(tmp_path: Any) -> None:
    reporter, callback = Reporter(), SharpnessCallback(iter(BATCHES), every=2, rho=0.1, micro_batch_size=2)
    trainer = trained(tmp_path, SAMTrainer, reporter, callback, gradient_accumulation_steps=2)
    alone = trained(tmp_path, SAMTrainer, gradient_accumulation_steps=2)
    assert all(same_bits(p, q) for p, q in zip(weights(trainer.model), weights(alone.model), strict=True))
    assert [step for step, _ in callback.results] == [0, 2, 4]
    history = [line for line in trainer.state.log_history if "sharpness/own_rise" in line]
    assert [line["step"] for line in history] == [0, 2, 4]
    assert [line["sharpness/own_rise"] for line in history] == [found.own.rise.mean for _, found in callback.results]
    assert sum("sharpness/full_curvature_se" in line for line in reporter.lines) == 3
    assert "sharpness/rho" not in history[0]
    model = tiny.build("causal", dropout=0.1)
    expected = sharpness(model, lambda m, b: m(**b).loss, BATCHES, 0.1, micro_batch_size=2)
    assert callback.results[0][1] == expected
    after = sharpness(trainer.model, lambda m, b: m(**b).loss, BATCHES, 0.1, micro_batch_size=2)
    assert callback.results[-1][1] == after


def test_a_plain_trainer_keeps_it_in_its_history(tmp_path: Any) -> None:
    callback = SharpnessCallback(BATCHES, every=4, loss=lambda m, b: m(**b).logits.square().mean(), full_batch=False)
    trainer = trained(tmp_path, Trainer, callback)
    history = [line for line in trainer.state.log_history if "sharpness/own_rise" in line]
    assert [line["step"] for line in history] == [0, 4]
    assert not any("sharpness/full_rise" in line for line in history)


def test_training_goes_on_where_nothing_can_be_measured(tmp_path: Any) -> None:
    seen: list[int] = []

    def loss(model: Any, batch: Any) -> Any:
        seen.append(0)
        return model(**batch).loss * (math.inf if len(seen) == 1 else 1)

    callback = SharpnessCallback(BATCHES[:1], every=4, loss=loss, full_batch=False)
    with pytest.warns(UserWarning, match="nothing is measured at step 0. sharpness: batch 0 has loss inf"):
        trainer = trained(tmp_path, Trainer, callback)
    assert trainer.state.global_step == 4
    assert [step for step, _ in callback.results] == [4]


def test_bad_input(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="every must be >= 1"):
        SharpnessCallback(BATCHES, every=0)
    with pytest.raises(ValueError, match="no batch"):
        SharpnessCallback([], every=1)
    unlabelled = [{name: value for name, value in batch.items() if name != "labels"} for batch in BATCHES]
    with pytest.raises(TypeError, match="batches need labels"):
        trained(tmp_path, SAMTrainer, SharpnessCallback(unlabelled, every=1))


def test_the_command_line_writes_and_draws_it(models: Any, files: Any, tmp_path: Any, capsys: Any) -> None:
    words = words_of("none", models, files, tmp_path / "out", "--sharpness_steps", "2")
    assert main(words) == 0
    measured = [row for row in table(tmp_path / "out") if row["sharpness/own_rise"]]
    assert [row["step"] for row in measured] == ["0", "2", "4"]
    assert all(float(row["sharpness/own_rise"]) > 0 for row in measured)
    words = [
        "train",
        "--method",
        "gap",
        "--train_file",
        files["text.txt"],
        "--model",
        models["causal"],
        "--sharpness_steps",
        "2",
    ]
    assert main(words) == 2
    assert "--sharpness_steps is an option of training runs" in capsys.readouterr().err
