"""An anchored step on the CPU: beside a plain one, beside a plain one and a forward pass, and beside logits held whole."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpost.anchor import Anchor, Frozen, InContext
from fastpost.bench.registry import Case, Contender, Goal, PeakShare, Skipped, Work, case, peer

ROWS, TOKENS, CONTEXT, KL = 2, 128, 128, 0.1


class Tuned:
    """A language model of SmolLM2-135M's sizes with random weights, its start as the reference, and a batch."""

    def __init__(self) -> None:
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            raise Skipped(f"needs transformers: {error}") from error
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        self.model: Any = LlamaForCausalLM(config).train()
        self.reference = Frozen.copy_of(self.model)
        with torch.no_grad():
            for p in self.model.parameters():
                p.mul_(1.01)  # some steps later
        ids = torch.randint(config.vocab_size, (ROWS, TOKENS))
        self.inputs = {"input_ids": ids, "labels": ids}
        self.context = torch.randint(config.vocab_size, (ROWS, CONTEXT))

    def step(self, loss: Any) -> Work:
        def run() -> None:
            self.model.zero_grad()
            loss().backward()

        return run

    def plain(self) -> Tensor:
        found: Tensor = self.model(**self.inputs, use_cache=False).loss
        return found

    def and_a_forward(self) -> Tensor:
        """What any anchor costs at least: the reference's layers, without a head."""
        with torch.no_grad():
            self.reference.model.model(input_ids=self.inputs["input_ids"], use_cache=False)
        return self.plain()

    def whole(self) -> Tensor:
        """The usual way: both models' logits, and torch's divergence of them."""
        with torch.no_grad():
            target = self.reference.model(input_ids=self.inputs["input_ids"], use_cache=False).logits[:, :-1]
        out = self.model(**self.inputs, use_cache=False)
        logs = [z.flatten(0, 1).log_softmax(-1) for z in (out.logits[:, :-1], target)]
        found: Tensor = out.loss + KL * F.kl_div(*logs, reduction="batchmean", log_target=True)
        return found


@case
def anchored_step() -> Case:
    """Gradients of all weights of a step held to the model's start, and of one whose teacher reads a context."""
    tuned = Tuned()
    anchor, teacher = Anchor(tuned.reference, KL), Anchor(InContext(tuned.reference), 1.0, ce_weight=0.0)
    plain, least, whole = "plain", "plain, and the reference's layers", "whole logits and F.kl_div"
    ours, taught = "anchored", "taught from a context"
    return Case(
        "gradients of an anchored step",
        f"SmolLM2-135M's sizes, {ROWS} x {TOKENS} tokens",
        "float32",
        [
            peer(plain, tuned.step(tuned.plain), slow=True, peak=True),
            peer(least, tuned.step(tuned.and_a_forward), slow=True),
            Contender(ours, tuned.step(lambda: anchor(tuned.model, **tuned.inputs).loss), slow=True, peak=True),
            peer(whole, tuned.step(tuned.whole), slow=True, peak=True),
            Contender(
                taught,
                tuned.step(lambda: teacher(tuned.model, **tuned.inputs, context_input_ids=tuned.context).loss),
                slow=True,
            ),
        ],
        [
            Goal(ours, plain, {}),
            Goal(ours, least, {}),
            Goal(ours, whole, {}, faster=True),
            PeakShare(ours, whole, {}),
            Goal(taught, plain, {}),
        ],
    )
