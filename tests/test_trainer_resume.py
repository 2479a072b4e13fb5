"""Checkpoints of a Trainer with SAM or R3F: resuming goes on bit for bit, and what was made differently is told."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from fastpost.integrations.mixin import innermost
from fastpost.integrations.transformers import PostTrainer, R3FTrainer, SAMTrainer

from . import tiny
from .conftest import same_bits
from .trainers import arguments, rows, trainer_of, weights

SAVING = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}


def same(a: Any, b: Any) -> bool:
    return all(same_bits(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sam", {}),
        ("sam", {"sam_interval": 2, "sam_ascent_fraction": 0.5, "sam_adaptive": True}),
        ("sam", {"sam_interval": 2, "sam_variant": "looksam:alpha=0.5"}),
        ("tram", {"r3f_eps": 0.3}),
        ("sam+r4f", {"r3f_eps": 0.3, "r3f_spectral": "all"}),
        ("r3f", {"r3f_eps": 0.3}),
        ("r3f", {"r3f_eps": 0.3, "r3f_seed": 5}),
        ("sam+r3f", {"r3f_eps": 0.3}),
    ],
)
def test_resuming_equals_not_having_stopped(tmp_path: Path, method: str, options: dict) -> None:
    """With dropout, in the middle of an epoch (six steps of five), off SAM's interval."""
    options = {"method": method, "lr_scheduler_type": "linear", **SAVING, **options}
    kind, data = ("roberta", rows("sequence")) if "r4f" in method else ("causal", rows())
    whole = tiny.build(kind, 0.2)
    trainer = trainer_of(PostTrainer, whole, arguments(tmp_path / "a", 7, **options), data)
    trainer.train()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["checkpoint-3", "checkpoint-6", "checkpoint-7"]
    resumed = tiny.build(kind, 0.2)
    again = trainer_of(PostTrainer, resumed, arguments(tmp_path / "a", 7, **options), data)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    assert same(whole, resumed)
    pairs = [(innermost(t.optimizer).state_dict()["state"] for t in (trainer, again))]
    for first, second in pairs:
        assert all(same_bits(m, second[k][n]) for k, s in first.items() for n, m in s.items() if torch.is_tensor(m))
    if "sam" in method:
        assert again.sam.param_groups[0]["sam_steps"] == 7


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    model = tiny.build("causal")
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True, "learning_rate": 0.1, **SAVING}
    trainer = trainer_of(SAMTrainer, model, arguments(tmp_path, 9, **options), eval_dataset=rows())
    kept = {}

    class Keep(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            kept[metrics["eval_loss"]] = weights(model)

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_metric == min(kept)
    assert all(same_bits(p, q) for p, q in zip(weights(model), kept[min(kept)], strict=True))


def test_a_checkpoint_of_another_method_or_rho_is_told(tmp_path: Path) -> None:
    trainer_of(Trainer, tiny.build("causal"), arguments(tmp_path / "plain", 3, **SAVING)).train()
    sam = trainer_of(SAMTrainer, tiny.build("causal"), arguments(tmp_path / "plain", 4, **SAVING))
    with pytest.warns(UserWarning, match=r"method: no method of fastpost then, \['sam'\] now"):
        sam.train(resume_from_checkpoint=True)
    assert sam.sam.param_groups[0]["rho"] == sam.args.sam_rho

    trainer_of(SAMTrainer, tiny.build("causal"), arguments(tmp_path / "sam", 3, **SAVING)).train()
    state = json.loads((tmp_path / "sam" / "checkpoint-3" / "trainer_state.json").read_text())
    record = state["stateful_callbacks"]["PostTrainingRecord"]["args"]
    assert record["methods"] == ["sam"]
    assert record["options"]["sam_rho"] == 0.2
    other = trainer_of(SAMTrainer, tiny.build("causal"), arguments(tmp_path / "sam", 4, **{**SAVING, "sam_rho": 0.7}))
    with pytest.warns(UserWarning, match=r"sam_rho: 0\.2 then, 0\.7 now"):
        other.train(resume_from_checkpoint=True)
    assert other.sam.param_groups[0]["rho"] == 0.2  # like a learning rate, it is the optimizer's
    r3f = trainer_of(R3FTrainer, tiny.build("causal"), arguments(tmp_path / "sam", 5, **SAVING))
    with pytest.warns(UserWarning, match=r"method: \['sam'\] then, \['r3f'\] now"):
        r3f.train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_number_of_processes_is_told(tmp_path: Path) -> None:
    trainer_of(SAMTrainer, tiny.build("causal"), arguments(tmp_path, 3, **SAVING)).train()
    path = tmp_path / "checkpoint-3" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["stateful_callbacks"]["PostTrainingRecord"]["args"]["world_size"] = 4
    path.write_text(json.dumps(state))
    again = trainer_of(SAMTrainer, tiny.build("causal"), arguments(tmp_path, 4, **SAVING))
    with pytest.warns(UserWarning, match="processes: 4 then, 1 now"):
        again.train(resume_from_checkpoint=True)


def test_a_plain_trainer_goes_on_from_sams_checkpoint(tmp_path: Path) -> None:
    trainer_of(SAMTrainer, tiny.build("causal"), arguments(tmp_path, 3, **SAVING)).train()
    plain = trainer_of(Trainer, tiny.build("causal"), arguments(tmp_path, 4, **SAVING))
    plain.train(resume_from_checkpoint=True)
    assert plain.state.global_step == 4


def test_training_twice_and_a_model_made_anew(tmp_path: Path) -> None:
    """The second run has another optimizer, or another model; nothing of the first is left in its SAM."""
    model = tiny.build("causal")
    trainer = trainer_of(SAMTrainer, model, arguments(tmp_path, 2, gradient_accumulation_steps=2))
    trainer.train()
    first, before = trainer.sam, weights(model)
    trainer.train()
    assert trainer.sam is not first
    assert not all(same_bits(p, q) for p, q in zip(weights(model), before, strict=True))
    args = arguments(tmp_path, 2, gradient_accumulation_steps=2)
    made = trainer_of(SAMTrainer, None, args, model_init=lambda: tiny.build("causal"))
    made.train()
    runs = [weights(made.model)]
    made.train()
    assert all(same_bits(p, q) for p, q in zip(runs[0], weights(made.model), strict=True))
