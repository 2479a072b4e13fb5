"""TRL's trainers with SAM and R3F: a small model with random weights, a tokenizer made here, texts written here."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, RLOOTrainer, SFTTrainer
from trl.trainer.distillation_trainer import DistillationTrainer

from fastpost import R3F
from fastpost.integrations.transformers import R3FTrainerMixin
from fastpost.integrations.trl import (
    PostDPOConfig,
    PostSFTConfig,
    PostSFTTrainer,
    R3FSFTTrainer,
    SAMDPOTrainer,
    SAMSFTTrainer,
    SAMTrainerMixin,
)
from fastpost.r3f.relatives import NEFTune

from .by_hand import ascended, distance
from .trainers import CLIP, DECAY, LR, RHO, InOrder, optimizer_of

WORDS = "the a cat dog bird sat ran sang on under over mat tree house old small red . yes no".split()  # noqa: SIM905
ASKED = [f"the {w} cat sat on" for w in WORDS]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "[EOS]", *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", eos_token="[EOS]")


def model(dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        initializer_range=0.2,
        pad_token_id=1,
        eos_token_id=2,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config).double().train()


def settings(folder: Any, steps: int, **options: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "weight_decay": DECAY,
        "max_grad_norm": CLIP,
        "optim": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "sam_rho": RHO,
        **options,
    }


def recording(cls: type) -> type:
    """A trainer that keeps what it is fed, a list per step, and how much it notes for its logs."""

    class Recording(InOrder, cls):  # type: ignore[misc, valid-type]
        fed: Any = None

        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, items = super().get_batch_samples(*args, **kwargs)
            self.fed = [*(self.fed or []), [dict(batch) for batch in batches]]
            return batches, items

        def log(self, logs: Any, *args: Any, **kwargs: Any) -> None:
            self.noted = {name: len(values) for name, values in self._metrics["train"].items()}
            super().log(logs, *args, **kwargs)

    return Recording


def sft(cls: type, folder: Any, steps: int, mine: Any, **options: Any) -> Any:
    data = Dataset.from_dict({"text": [f"{text} the mat . yes" if i % 3 else f"{text} ." for i, text in enumerate(ASKED)]})
    args = PostSFTConfig(**settings(folder, steps, max_length=32, **options))
    trainer = recording(cls)(mine, args=args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    return trainer


def dpo(cls: type, folder: Any, steps: int, mine: Any, **options: Any) -> Any:
    data = Dataset.from_dict(
        {"prompt": ASKED, "chosen": [" the mat ."] * len(ASKED), "rejected": [" under a red tree ."] * len(ASKED)}
    )
    args = PostDPOConfig(**settings(folder, steps, **options))
    trainer = recording(cls)(mine, ref_model=model(), args=args, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    return trainer


def sft_loss(m: Any, batch: Any, items: float) -> torch.Tensor:
    logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:].flatten()
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") / items


def items_in(window: list[Any]) -> int:
    return int(sum((batch["labels"][:, 1:] != -100).sum() for batch in window))


def by_hand(hand: Any, steps: Any, loss: Any, items: Any, fraction: float) -> None:
    opt, params = optimizer_of(hand), list(hand.parameters())
    for window in steps:
        n = items(window)
        g = torch.autograd.grad(sum(loss(hand, batch, n) for batch in window[: math.ceil(fraction * len(window))]), params)
        with ascended(params, g, RHO):
            second = torch.autograd.grad(sum(loss(hand, batch, n) for batch in window), params)
        for p, part in zip(params, second, strict=True):
            p.grad = part.clone()
        nn.utils.clip_grad_norm_(params, CLIP)
        opt.step()


@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_sft_with_sam_is_the_loop_from_the_equations(tmp_path: Any, fraction: float) -> None:
    mine, hand = model(), model()
    trainer = sft(SAMSFTTrainer, tmp_path, 20, mine, sam_ascent_fraction=fraction)
    by_hand(hand, trainer.fed, sft_loss, items_in, fraction)
    assert distance(mine, hand) <= 1e-6  # the fused head of TRL computes in float32
    assert distance(mine, model()) > 1e-2


def test_sft_notes_each_micro_batch_once(tmp_path: Any) -> None:
    plain = sft(SFTTrainer, tmp_path, 3, model())
    sam = sft(SAMSFTTrainer, tmp_path, 3, model(), sam_ascent_fraction=0.3)
    assert sam.noted == plain.noted
    tokens = [[line["num_tokens"] for line in t.state.log_history if "num_tokens" in line] for t in (plain, sam)]
    assert tokens[0] == tokens[1]
    assert "sam/seen_cosine" in sam.state.log_history[0]


@pytest.mark.parametrize("fused", [None, False])
def test_sft_with_r3f_is_the_loop_by_hand(tmp_path: Any, fused: bool | None) -> None:
    """Through the fused head, which is SFT's way, and through logits."""
    mine, hand = model(), model()
    options = {"r3f_eps": 0.3, "r3f_lambda": 0.7, "noise_type": "normal", "r3f_seed": 5, "r3f_fused_linear": fused}
    trainer = sft(R3FSFTTrainer, tmp_path, 6, mine, **options)
    assert trainer.r3f.fused_linear == (fused is None)
    opt, r3f = optimizer_of(hand), R3F(0.3, 0.7, "normal", seed=5)
    for window in trainer.fed:
        opt.zero_grad()
        items = torch.tensor(float(items_in(window)))  # float32, as the trainer's
        with r3f.window():
            for batch in window:
                r3f(hand, num_items=items, **batch).loss.backward()
        nn.utils.clip_grad_norm_(hand.parameters(), CLIP)
        opt.step()
    assert distance(mine, hand) <= 1e-9
    assert torch.tensor([line["r3f/symm_kl"] for line in trainer.state.log_history if "loss" in line]).min() > 0.01


def test_sft_by_method_with_a_relative_and_with_a_fused_head(tmp_path: Any) -> None:
    mine, hand = model(), model()
    options = {"method": "r3f", "r3f_relative": "neftune:alpha=9", "r3f_seed": 5}
    trainer = sft(PostSFTTrainer, tmp_path, 4, mine, **options)
    opt, neftune = optimizer_of(hand), NEFTune(9.0, seed=5)
    for window in trainer.fed:
        opt.zero_grad()
        items = torch.tensor(float(items_in(window)))
        with neftune.window():
            for batch in window:
                neftune(hand, num_items=items, **batch).loss.backward()
        nn.utils.clip_grad_norm_(hand.parameters(), CLIP)
        opt.step()
    assert distance(mine, hand) <= 1e-9
    with pytest.raises(ValueError, match=r"states by lm_head\.weight itself.*take sam_perturb='stored'"):
        sft(SAMSFTTrainer, tmp_path, 1, model(), sam_perturb="functional")
    both = {"method": "sam+r3f", "sam_perturb": "functional", "r3f_fused_linear": True}
    with pytest.raises(ValueError, match="say r3f_fused_linear=False"):
        sft(PostSFTTrainer, tmp_path, 1, model(), **both)
    found = []
    for perturb in ("stored", "functional"):
        found.append(model())
        both = {"method": "sam+r3f", "sam_variant": "gsam", "r3f_eps": 0.3, "r3f_seed": 5, "r3f_fused_linear": False}
        trainer = sft(PostSFTTrainer, tmp_path, 3, found[-1], sam_perturb=perturb, **both)
        assert not trainer.r3f.fused_linear
    assert distance(*found) <= 1e-9
    assert distance(found[0], model()) > 1e-2


def test_dpo_with_sam_is_the_loop_from_the_equations(tmp_path: Any) -> None:
    mine, hand, reference = model(), model(), model()
    trainer = dpo(SAMDPOTrainer, tmp_path, 6, mine, beta=0.5)

    def logps(m: Any, batch: Any) -> torch.Tensor:
        logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
        picked = logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        return (picked * batch["completion_mask"][:, 1:]).sum(1)

    def loss(m: Any, batch: Any, n: float) -> torch.Tensor:
        with torch.no_grad():
            base = logps(reference, batch)
        chosen, rejected = (logps(m, batch) - base).chunk(2)
        return -nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean() / n

    by_hand(hand, trainer.fed, loss, len, 1.0)
    assert distance(mine, hand) <= 1e-6
    assert distance(mine, model()) > 1e-2
    plain = dpo(DPOTrainer, tmp_path, 2, model())
    assert trainer.noted == plain.noted


def test_what_r3f_does_not_mean_is_refused(tmp_path: Any) -> None:
    class Dpo(R3FTrainerMixin, DPOTrainer):
        pass

    with pytest.raises(TypeError, match="a preference loss compares whole answers"):
        dpo(Dpo, tmp_path, 1, model())

    class Sft(R3FTrainerMixin, SFTTrainer):
        pass

    with pytest.raises(TypeError, match="R3FSFTTrainer"):
        sft(Sft, tmp_path, 1, model())
    with pytest.raises(ValueError, match="loss_type='dft'"):
        sft(R3FSFTTrainer, tmp_path, 1, model(), loss_type="dft")


@pytest.mark.parametrize("trainer", [GRPOTrainer, RLOOTrainer, DistillationTrainer])
def test_trainers_that_generate_as_they_train_are_refused(tmp_path: Any, trainer: type) -> None:
    class Sam(SAMTrainerMixin, trainer):  # type: ignore[misc, valid-type]
        pass

    with pytest.raises(TypeError, match=f"{trainer.__name__} makes its batches as it trains"):
        Sam(model(), args=GRPOConfig(str(tmp_path), use_cpu=True, bf16=False), train_dataset=None)


@pytest.mark.parametrize("name", ["SFT", "DPO"])
def test_configs_refuse_bad_options(tmp_path: Any, name: str) -> None:
    config = {"SFT": PostSFTConfig, "DPO": PostDPOConfig}[name]
    with pytest.raises(ValueError, match="sam_rho must be finite"):
        config(str(tmp_path), use_cpu=True, bf16=False, sam_rho=-1.0)
