"""Bi-LoRA against its equations in float64; in transformers' Trainer, resumed, on classifiers; what it refuses."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from fastpost.integrations.peft import BiLoRA
from tests.by_hand import distance, language_loss, largest_difference, rows_of_text
from tests.test_peft import RHO, dense, lora, trained, windows
from tests.tiny import build


@pytest.mark.parametrize("kind", ["llama", "causal"])
def test_bi_lora_is_its_equations(kind: str) -> None:
    model = lora(kind, live=False)
    base = build(kind, dtype=torch.float64)
    bi = BiLoRA(model, rho=RHO, rank=2)
    opt = torch.optim.SGD(bi.param_groups(lr=0.5, ascent_lr=0.3))
    bi.attach(opt)
    losses = []
    for [rows] in windows(12):
        leaves, weights = dense(model, base)
        loss = torch.func.functional_call(base, weights, (), {"input_ids": rows, "labels": rows}).loss
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        up = {name: ".bilora." in name for name in leaves}
        after = {name: p.detach() + (0.3 if up[name] else -0.5) * gradients[name] for name, p in leaves.items()}
        products = [
            6 / 3 * after[name.replace("lora_A", "lora_B")] @ after[name] for name in after if up[name] and "lora_A" in name
        ]
        norm = math.sqrt(sum(float(product.square().sum()) for product in products))
        expected = {name: p * math.sqrt(RHO / norm) if up[name] else p for name, p in after.items()}

        ours = language_loss(model, rows)
        assert float(ours.detach()) == pytest.approx(float(loss.detach()), rel=1e-12)
        ours.backward()
        opt.step()
        opt.zero_grad()
        losses.append(float(ours.detach()))
        found = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters()}
        assert largest_difference((found[name], p) for name, p in expected.items()) <= 1e-12
        assert float(bi.norm()) == pytest.approx(RHO, rel=1e-12)
    assert losses[-1] < losses[0]


def test_bi_lora_ascends_is_off_in_eval_mode_and_goes_away(tmp_path: Path) -> None:
    model = lora(live=False)
    before = [name for name, p in model.named_parameters() if p.requires_grad]
    bi = BiLoRA(model, rho=0.5)
    opt = torch.optim.AdamW(bi.param_groups(lr=0.0, ascent_lr=1e-2))  # only the perturbation moves
    bi.attach(opt)
    rows = rows_of_text(4)
    start = float(language_loss(model, rows).detach())
    for _ in range(10):
        language_loss(model, rows).backward()
        opt.step()
        opt.zero_grad()
    risen = float(language_loss(model, rows).detach())
    assert risen > start + 0.02
    model.eval()
    with torch.no_grad():
        seen = float(language_loss(model, rows))
        assert seen == pytest.approx(start, abs=1e-12)
    model.train()
    assert float(language_loss(model, rows).detach()) == risen
    bi.remove()
    assert float(language_loss(model, rows).detach()) == pytest.approx(start, abs=1e-12)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == before
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build("llama", dtype=torch.float64), tmp_path)
    assert list(again.peft_config) == ["default"]
    opt.step()  # a hook that is left would find no adapter


def test_bi_lora_in_transformers_trainer(tmp_path: Path) -> None:
    """Nothing but the optimizer is handed over; evaluation in between sees the first adapter alone."""
    rows = rows_of_text(16)
    found, evaluated = [], []
    for with_trainer in (False, True):
        model = lora(live=False)
        bi = BiLoRA(model, rho=RHO)
        opt = torch.optim.AdamW(bi.param_groups(lr=1e-2))
        bi.attach(opt)
        if with_trainer:
            args = TrainingArguments(
                str(tmp_path), max_steps=4, per_device_train_batch_size=4, lr_scheduler_type="constant", use_cpu=True,
                train_sampling_strategy="sequential", report_to=[], save_strategy="no", disable_tqdm=True, max_grad_norm=0.0,
                eval_strategy="steps", eval_steps=4,
            )  # fmt: skip
            data: Any = [{"input_ids": row, "labels": row} for row in rows]
            trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:4], optimizers=(opt, None))
            trainer.train()
            evaluated.append(trainer.state.log_history[-2]["eval_loss"])
        else:
            for batch in rows.split(4):
                language_loss(model, batch).backward()
                opt.step()
                opt.zero_grad()
        assert float(bi.norm()) == pytest.approx(RHO, rel=1e-9)
        bi.remove()
        found.append(model)
    assert distance(*found) <= 1e-9
    with torch.no_grad():
        assert evaluated == pytest.approx([float(language_loss(found[0], rows[:4]))], rel=1e-6)


def test_bi_lora_refusals() -> None:
    with pytest.raises(TypeError, match="PeftModel"):
        BiLoRA(build("llama"))
    with pytest.raises(ValueError, match="rho"):
        BiLoRA(lora(), rho=-1)
    with pytest.raises(ValueError, match="no adapter 'other'"):
        BiLoRA(lora(), adapter="other")
    with pytest.raises(TypeError, match="no plain LoRA"):
        BiLoRA(lora(use_dora=True))
    model = lora()
    bi = BiLoRA(model)
    with pytest.raises(ValueError, match="already"):
        BiLoRA(model)
    with pytest.raises(ValueError, match="maximize"):
        bi.attach(torch.optim.SGD(trained(model), lr=0.1))
    with pytest.raises(ValueError, match="lacks"):
        bi.attach(torch.optim.SGD(bi.param_groups(lr=0.1)[:1]))


def test_bi_lora_goes_on_after_a_checkpoint(tmp_path: Path) -> None:
    """Loading one, PEFT leaves the first adapter alone active."""
    data = [{"input_ids": row, "labels": row} for row in rows_of_text(16)]

    def states(steps: int, resume: bool) -> list[Tensor]:
        model = lora(dtype=torch.float32)
        bi = BiLoRA(model, rho=RHO)
        optimizer = torch.optim.AdamW(bi.param_groups(lr=1e-2))
        bi.attach(optimizer)
        options: dict[str, Any] = {"lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "save_steps": 2}
        settings = TrainingArguments(
            str(tmp_path), max_steps=steps, use_cpu=True, report_to="none", disable_tqdm=True, **options
        )
        Trainer(model, settings, train_dataset=data, optimizers=(optimizer, None)).train(resume_from_checkpoint=resume)
        return [p.detach().clone() for p in trained(model)]

    expected = states(4, resume=False)
    states(2, resume=False)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = states(4, resume=True)
    assert len(resumed) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))


def test_bi_lora_on_a_classifier_leaves_its_head_alone() -> None:
    config = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(build("sequence"), config)
    before = {name for name, p in model.named_parameters() if p.requires_grad}
    bi = BiLoRA(model, rho=RHO)
    now = {name for name, p in model.named_parameters() if p.requires_grad}
    assert before < now
    assert all("bilora" in name and "lora_" in name for name in now - before)
    bi.remove()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == before
    BiLoRA(model, rho=RHO).remove()  # and again


@pytest.mark.filterwarnings("error:You have requested `ensure_weight_tying`")
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("causal", {"lora_bias": True}),
        ("causal", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
        ("llama", {"layer_replication": [(0, 1), (0, 1)]}),
    ],
)
def test_the_second_adapter_is_two_matrices_a_layer(kind: str, options: dict[str, Any]) -> None:
    """What else it trained would be gone in eval mode and in the end."""
    model = lora(kind, **options)
    before = dict(model.named_parameters())
    bi = BiLoRA(model, rho=RHO)
    added = dict(model.named_parameters()).keys() - before.keys()
    assert added == {n.replace(".default.", ".bilora.") for n in before if "lora_" in n and n.endswith("weight")}
    opt = torch.optim.SGD(bi.param_groups(lr=0.5))
    bi.attach(opt)
    for [rows] in windows(2):
        language_loss(model, rows).backward()
        opt.step()
        opt.zero_grad()
    with torch.no_grad():
        switched_off = language_loss(model.eval(), rows)
        bi.remove()
        assert torch.equal(language_loss(model, rows), switched_off)


def test_trainable_tokens_have_no_second_adapter() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3, 4]})
    model = peft.get_peft_model(build("llama"), config)
    with pytest.raises(TypeError, match="no second adapter beside trainable_token_indices"):
        BiLoRA(model)
    assert list(model.peft_config) == ["default"]
