"""GAP: a run beside the same loop in plain PyTorch, roll-back beside one copy, a delta scaled and faded in place."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpost import GAP
from fastpost.bench.registry import Case, Contender, Goal, case, peer
from fastpost.gap import Delta
from fastpost.gap.weights import Snapshot

STEPS = 15
SIZE = "GPT-2 of 24M parameters"
CPUS = ("avx512", "avx2")


def language_model(**sizes: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    no_dropout: dict[str, Any] = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(bos_token_id=0, eos_token_id=0, **no_dropout, **sizes)).eval()


class PlainLoop:
    """What one writes without a library: the loss times -1, torch's Adam as it comes, a deep copy to go back to."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model, self.ids = model, ids

    def __call__(self) -> None:
        base = copy.deepcopy(self.model.state_dict())
        adam = torch.optim.Adam(self.model.parameters(), lr=5e-5, betas=(0.9, 0.98))
        for _ in range(STEPS):
            adam.zero_grad()
            loss = self.model(input_ids=self.ids, labels=self.ids).loss * -1
            loss.backward()
            adam.step()
        adam.zero_grad()
        self.model.load_state_dict(base)


def run_case(tokens: int) -> Case:
    """A run beside the plain loop, times as fast; and how much memory both take."""
    plain, ours = sides(tokens)
    return Case(
        f"{STEPS} steps uphill on one text of {tokens} tokens, and back",
        SIZE,
        "float32",
        [replace(plain, peak=True), replace(ours, peak=True)],
        [Goal(ours.name, plain.name, dict.fromkeys(CPUS, 1.3), faster=True)],
    )


def sides(tokens: int) -> tuple[Contender, Contender]:
    """The plain loop and fastpost's, each on the same model and text."""
    model = language_model(vocab_size=16_384, n_positions=512, n_embd=384, n_layer=10, n_head=6)
    ids = torch.randint(0, 16_384, (1, tokens), generator=torch.Generator().manual_seed(1))
    gap = GAP(n_steps=STEPS)

    def ours() -> None:
        gap(model, ids).rollback()

    plain = peer("loss * -1, Adam, deep-copied state", PlainLoop(model, ids), slow=True)
    return plain, Contender("fastpost.GAP", ours, slow=True)


@case
def gap_run() -> Case:
    """A text as long as the authors' are: medians of 158 to 220 tokens by a BPE of this vocabulary, made from them."""
    return run_case(192)


@case
def gap_run_short() -> Case:
    """A short one, where the optimizer's share is larger."""
    return run_case(64)


@case
def gap_rollback() -> Case:
    """From one text to the next: the saved weights into the model, and the gradients' room let go."""
    model = language_model(vocab_size=16_384, n_positions=512, n_embd=384, n_layer=10, n_head=6)
    weights = list(model.parameters())
    saved = Snapshot(weights)
    size = 4 * sum(p.numel() for p in weights)
    flat = torch.empty(size // 4)
    other = torch.ones_like(flat)
    copied, ours = "copy", "GapResult.rollback"
    return Case(
        "going back to the untouched weights",
        f"GPT-2 of {size / 4e6:.0f}M parameters",
        "float32",
        [peer(copied, lambda: flat.copy_(other), 2 * size), Contender(ours, saved.restore, 2 * size)],
        [Goal(ours, copied, dict.fromkeys(CPUS, 1.2))],
    )


@case
def delta_scale() -> Case:
    """Half of a delta over GPT-2's weights, the same factor everywhere (scaled) or one per layer (LiNeS)."""
    model = language_model()
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1e-3 * torch.randn_like(p))
    delta = Delta(model, base)
    size = 4 * sum(p.numel() for p in model.parameters())
    pairs = [(p.detach(), base[name]) for name, p in model.named_parameters()]

    def add() -> None:
        for w, b in pairs:
            torch.add(w, b, alpha=1e-9, out=w)

    three, scaled, faded = "torch.add, two reads and one write", "Delta.scale_", "Delta.lines_"
    return Case(
        "scaling a delta in place",
        f"GPT-2, {len(pairs)} tensors, {size / 4e6:.0f}M",
        "float32",
        [
            peer(three, add, 3 * size),
            Contender(scaled, lambda: delta.scale_(0.999), 3 * size),
            Contender(faded, lambda: delta.lines_(0.9, 0.099), 3 * size),
        ],
        [Goal(name, three, dict.fromkeys(CPUS, 1.2)) for name in (scaled, faded)],
    )
