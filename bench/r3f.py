"""A step of R3F on an encoder beside a plain one: two passes, or one over the batch twice."""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost import R3F
from fastpost.bench.registry import Case, Contender, Goal, Skipped, Work, case, peer
from fastpost.published import r3f_sentence_loss

EPS, LAMBDA = 1e-5, 1.0


@case
def r3f_step() -> Case:
    """Forward and backward of a six-layer encoder with a classification head."""
    try:
        from transformers import BertConfig, BertForSequenceClassification
    except ImportError as error:
        raise Skipped(f"needs transformers: {error}") from error
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    model = BertForSequenceClassification(config)
    batch: dict[str, Tensor] = {
        "input_ids": torch.randint(1, config.vocab_size, (16, 64)),
        "attention_mask": torch.ones(16, 64, dtype=torch.long),
        "labels": torch.randint(0, 2, (16,)),
    }
    for p in model.parameters():
        p.grad = torch.zeros_like(p)

    def r3f(forward: str) -> Work:
        method = R3F(EPS, LAMBDA, forward=forward)
        return lambda: method(model, **batch).loss.backward()

    def joint() -> None:
        """What holding two graphs costs, without noise and KL."""
        (model(**batch).loss + model(**batch).loss).backward()

    plain, ours, twice = "plain fine-tuning", "R3F, two_pass", "two plain passes, one backward"
    return Case(
        "a step of R3F on an encoder",
        "6 layers x 384, 16 x 64 tokens",
        "float32",
        [
            peer(plain, lambda: model(**batch).loss.backward()),
            peer(twice, joint),
            Contender(ours, r3f("two_pass")),
            Contender("R3F, double_batch", r3f("double_batch")),
            peer("published loop", lambda: r3f_sentence_loss(model, batch, EPS, LAMBDA).backward()),
        ],
        [
            Goal(ours, plain, dict.fromkeys(("avx512", "avx2"), 2.05)),
            Goal(ours, twice, {}),
            Goal("R3F, double_batch", plain, {}),
            Goal(ours, "published loop", {}, faster=True),
        ],
    )
