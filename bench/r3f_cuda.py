"""A whole R3F step of a language model on a GPU beside the published formulas: time, and memory at its highest."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpost import R3F
from fastpost.bench.params_cuda import DTYPES, name_of
from fastpost.bench.registry import Case, Contender, Goal, PeakMemory, Target, cuda_case, peer
from fastpost.published import distributions_noise, fairseq_symmetric_kl

EPS, LAMBDA = 1e-2, 1.0


class LanguageModel(nn.Module):
    """An embedding, two encoder layers without dropout, and a head as wide as the vocabulary."""

    def __init__(self, vocabulary: int, width: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        embedded = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        logits: Tensor = self.head(self.layers(embedded.to(self.head.weight.dtype)))
        return logits


def published_step(embed: nn.Module, logits_of: Callable[..., Tensor], ids: Tensor, labels: Tensor) -> None:
    """Cross-entropy plus KL from two passes, as fairseq's sequence criterion puts them together, per token."""
    embedded = embed(ids)
    noised = logits_of(inputs_embeds=distributions_noise(embedded.detach().clone(), EPS, "uniform"))
    logits = logits_of(input_ids=ids)
    task = F.nll_loss(F.log_softmax(logits, dim=-1, dtype=torch.float32).flatten(0, 1), labels.flatten())
    (task + LAMBDA * fairseq_symmetric_kl(noised.flatten(0, 1), logits.flatten(0, 1))).backward()


@cuda_case(**DTYPES)
def r3f_step(at: Target, dtype: torch.dtype) -> Case:
    """Forward and backward of one step; gradients of the weights are there before, so that only activations count."""
    batch, time = at.size(4), at.size(512, 8)
    vocabulary, width = at.size(50257, 30), at.size(512, 16) // 16 * 16
    positions = batch * time * vocabulary

    def contenders() -> list[Contender]:
        torch.manual_seed(0)
        model = LanguageModel(vocabulary, width, heads=max(1, width // 64)).to(at.device, dtype)
        ids, labels = (torch.randint(0, vocabulary, (batch, time), device=at.device) for _ in range(2))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

        def steps(forward: str) -> Contender:
            r3f = R3F(
                eps=EPS, r3f_lambda=LAMBDA, forward=forward, reduction="token", embedding="embed", shift_labels=False,
                inplace=True,
            )  # fmt: skip
            run = lambda: r3f(model, input_ids=ids, labels=labels).loss.backward()  # noqa: E731
            return Contender(f"R3F, {forward}", run, peak=True)

        return [
            steps("double_batch"),
            steps("two_pass"),
            peer("published formulas", lambda: published_step(model.embed, model, ids, labels), peak=True),
        ]

    goals: list[Goal] = [
        Goal("R3F, double_batch", "published formulas", {"cuda": 1.0}, faster=True),
        Goal("R3F, two_pass", "published formulas", {}, faster=True),
        PeakMemory("R3F, double_batch", "published formulas", {"cuda": 30.0}, faster=True, per=positions),
    ]
    return Case(
        "R3F step", f"{batch} x {time} x {vocabulary:,}", name_of(dtype), contenders, goals,
        bytes=4 * positions * dtype.itemsize, work=40, memory=80 * positions, seconds=1,
    )  # fmt: skip
