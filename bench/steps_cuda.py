"""Whole steps of language models on a GPU: SAM beside two passes, R3F with a fused head, GAP beside a plain loop."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastpost import GAP, R3F, SAM
from fastpost.bench.gap import STEPS, PlainLoop
from fastpost.bench.r3f_cuda import published_step
from fastpost.bench.registry import Case, Contender, Goal, PeakMemory, Target, Work, cuda_case, peer

MB = 10**6


class CausalLM(nn.Module):
    """Pre-norm transformer decoder without dropout; its head is a linear layer of its own, as the fused head needs."""

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True, norm_first=True, bias=False
        )
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def forward(
        self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> SimpleNamespace:  # fmt: skip
        """As Hugging Face's models are called; `attention_mask` is taken to be all ones."""
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        x = x.to(self.head.weight.dtype)
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], x.device, x.dtype)
        logits: Tensor = self.head(self.layers(x, mask, is_causal=True))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return SimpleNamespace(loss=loss, logits=logits)


class Sizes:
    """A model and a batch of text for it."""

    def __init__(self, at: Target, vocabulary: int, width: int, layers: int, batch: int, length: int) -> None:
        self.vocabulary, self.width = at.size(vocabulary, 30), at.size(width // 64, 1) * 64
        self.layers, self.batch, self.length = at.size(layers), at.size(batch), at.size(length, 8)
        self.parameters = 2 * self.vocabulary * self.width + self.layers * 12 * self.width**2
        self.words = (
            f"{self.parameters / 1e6:,.0f}M parameters, {self.batch} x {self.length:,} tokens, {self.vocabulary:,} classes"
        )

    def model(self, at: Target, dtype: torch.dtype) -> CausalLM:
        torch.manual_seed(0)
        with torch.device(at.device):
            model = CausalLM(self.vocabulary, self.width, self.layers).to(dtype)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        return model

    def text(self, at: Target) -> Tensor:
        return torch.randint(0, self.vocabulary, (self.batch, self.length), device=at.device)


@cuda_case()
def steps_sam(at: Target) -> Case:
    """A step of SAM on a billion parameters in bfloat16 beside AdamW after as many passes."""
    sizes = Sizes(at, 32000, 2048, 17, 4, 1024)
    ours, twice, plain = "SAM", "two passes + AdamW", "AdamW"

    def contenders() -> list[Contender]:
        model, ids = sizes.model(at, torch.bfloat16), sizes.text(at)
        options = {"lr": 1e-6, "fused": True}

        def differentiate() -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        def adamw(passes: int) -> Work:
            opt = torch.optim.AdamW(model.parameters(), **options)  # type: ignore[arg-type]

            def step() -> None:
                for _ in range(passes):
                    opt.zero_grad()
                    differentiate()
                opt.step()

            return step

        sam = SAM(model.parameters(), torch.optim.AdamW, rho=0.05, **options)  # type: ignore[arg-type]

        def step() -> None:
            sam.zero_grad()
            differentiate()
            sam.first_step(zero_grad=True)
            differentiate()
            sam.second_step()

        return [peer(plain, adamw(1), slow=True), peer(twice, adamw(2), slow=True), Contender(ours, step, slow=True)]

    goals = [Goal(ours, twice, {"cuda": 1.01}), Goal(ours, plain, {})]
    return Case(
        "a step of SAM", sizes.words, "bfloat16", contenders, goals,
        bytes=12 * sizes.parameters, work=60, memory=26 * sizes.parameters, wall=True, seconds=3,
    )  # fmt: skip


@cuda_case()
def steps_r3f(at: Target) -> Case:
    """A step of R3F, without its optimizer, with the head fused and through logits, beside a plain one and the formulas."""
    sizes = Sizes(at, 128256, 2048, 8, 4, 1024)
    fused, logits, plain, published = "R3F, fused_linear", "R3F, logits", "plain", "published formulas"

    def contenders() -> list[Contender]:
        model, ids = sizes.model(at, torch.bfloat16), sizes.text(at)

        def plain_step() -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        def step(**options: bool) -> Work:
            r3f = R3F(eps=1e-2, r3f_lambda=1.0, **options)  # type: ignore[arg-type]
            return lambda: r3f(model, input_ids=ids, labels=ids).loss.backward()

        def logits_of(**inputs: Tensor) -> Tensor:
            made: Tensor = model(**inputs).logits
            return made

        return [
            peer(plain, plain_step, slow=True, peak=True),
            Contender(fused, step(fused_linear=True), slow=True, peak=True),
            Contender(logits, step(inplace=True), slow=True, peak=True),
            peer(published, lambda: published_step(model.embed, logits_of, ids, ids), slow=True, peak=True),
        ]

    goals: list[Goal] = [
        Goal(fused, plain, {"cuda": 1.95}),
        Goal(logits, plain, {}),
        Goal(fused, published, {}, faster=True),
        PeakMemory(fused, "", {"cuda": 4000}, per=MB),
    ]
    positions = sizes.batch * sizes.length * sizes.vocabulary
    return Case(
        "a step of R3F", sizes.words, "bfloat16", contenders, goals,
        bytes=12 * positions, work=60, memory=70 * positions + 8 * sizes.parameters, wall=True, seconds=3,
    )  # fmt: skip


@cuda_case()
def steps_gap(at: Target) -> Case:
    """GAP's steps uphill and the way back beside the loop that one writes without a library."""
    sizes = Sizes(at, 50257, 1024, 20, 1, 256)
    ours, plain = "fastpost.GAP", "loss * -1, Adam, deep-copied state"

    def contenders() -> list[Contender]:
        model, ids = sizes.model(at, torch.float32).eval(), sizes.text(at)
        gap = GAP(n_steps=STEPS)
        return [
            peer(plain, PlainLoop(model, ids), slow=True, peak=True),
            Contender(ours, lambda: gap(model, ids).rollback(), slow=True, peak=True),
        ]

    goals = [Goal(ours, plain, {"cuda": 1.0}, faster=True)]
    return Case(
        f"{STEPS} steps uphill, and back", sizes.words, "float32", contenders, goals,
        bytes=28 * STEPS * sizes.parameters, work=2, memory=32 * sizes.parameters, wall=True, seconds=3,
    )  # fmt: skip
