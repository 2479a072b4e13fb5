"""SAM in transformers' Trainer on the CPU: what the mixin costs beyond its second forward and backward pass."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from fastpost.bench.registry import Case, Contender, Goal, Skipped, Work, case, peer

ROWS, TOKENS, MICRO_BATCHES = 8, 64, 2


@case
def trainer_step() -> Case:
    """A step of the demo's encoder (all-MiniLM-L6-v2's sizes) by the Trainer's own methods."""
    try:
        from transformers import BertConfig, BertForSequenceClassification, Trainer

        from fastpost.integrations.transformers import PostTrainingArguments, R3FTrainer, SAMTrainer
    except ImportError as error:
        raise Skipped(f"needs transformers and accelerate: {error}") from error
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        num_labels=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForSequenceClassification(config)
    batches = [
        {
            "input_ids": torch.randint(1000, 30000, (ROWS, TOKENS)),
            "attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long),
            "labels": torch.randint(0, 8, (ROWS,)),
        }
        for _ in range(MICRO_BATCHES)
    ]
    items = torch.tensor(float(MICRO_BATCHES * ROWS))

    def step(cls: Any, passes: int, **options: Any) -> Work:
        folder = tempfile.mkdtemp(prefix="fastpost-bench-")
        args = PostTrainingArguments(
            folder, use_cpu=True, report_to="none", learning_rate=1e-6, optim="adamw_torch_fused", max_steps=1, **options
        )
        trainer = cls(model, args)
        trainer.create_optimizer()
        prepared, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.current_gradient_accumulation_steps = MICRO_BATCHES
        state = trainer.accelerator.gradient_state

        def run() -> None:
            for _ in range(passes):
                prepared.zero_grad()
                for i, batch in enumerate(batches):
                    state._set_sync_gradients(i == MICRO_BATCHES - 1)
                    trainer.training_step(prepared, batch, items)
            trainer._clip_grad_norm(prepared)
            trainer.optimizer.step()

        return run

    return Case(
        "a step in the Trainer",
        f"encoder of 22.7M, {MICRO_BATCHES} x {ROWS} x {TOKENS} tokens",
        "float32",
        [
            peer("Trainer", step(Trainer, 1)),
            peer("Trainer, two passes", step(Trainer, 2)),
            Contender("SAMTrainer", step(SAMTrainer, 1)),
            Contender("R3FTrainer", step(R3FTrainer, 1, r3f_eps=0.1)),
        ],
        [Goal("SAMTrainer", "Trainer, two passes", {"avx512": 1.03, "avx2": 1.03})],
    )
