"""SAM's variants around whole steps on the CPU: each beside two passes and AdamW, since that is what they change."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpost import SAM
from fastpost.bench.registry import Case, Contender, Goal, Skipped, Work, case, peer
from fastpost.sam import (
    GSAM,
    WSAM,
    DecoupledWSAM,
    FriendlySAM,
    FunctionalSAM,
    LookSAM,
    MomentumSAM,
    PreconditionedSAM,
    SampledLayers,
    StableSAM,
    ZerothOrderSAM,
    norm_layers,
)

STEPS = 5  # of LookSAM one ascends
TWO_PASSES = "two passes and AdamW"


def variants(model: Any) -> dict[str, dict[str, Any]]:
    """SAM's options, by the name in the table."""
    return {
        "SAM": {},
        "SAM, interval=5": {"interval": STEPS},
        "LookSAM, interval=5": {"variant": LookSAM(), "interval": STEPS},
        "MomentumSAM": {"variant": MomentumSAM()},
        "ZerothOrderSAM": {"variant": ZerothOrderSAM()},
        "GSAM": {"variant": GSAM(0.2)},
        "WSAM": {"variant": WSAM(0.9)},
        "DecoupledWSAM": {"variant": DecoupledWSAM(0.9)},
        "FriendlySAM": {"variant": FriendlySAM()},
        "StableSAM": {"variant": StableSAM()},
        "PreconditionedSAM": {"variant": PreconditionedSAM()},
        "FunctionalSAM": {},
        "SampledLayers, a quarter": {"scope": SampledLayers(model, 0.25)},
        "norm_layers": {"scope": norm_layers(model)},
    }


@case
def sam_variants() -> Case:
    """Five steps of each variant on a small GPT-2, beside as many of two passes and AdamW."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise Skipped(f"needs transformers: {error}") from error
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=256, n_head=4, vocab_size=8192, n_positions=128, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()  # eval: no dropout to draw
    ids = torch.randint(0, config.vocab_size, (2, 128))

    def loss() -> Tensor:
        found: Tensor = model(input_ids=ids, labels=ids).loss
        return found

    def plain(passes: int) -> Work:
        opt = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

        def run() -> None:
            for _ in range(STEPS):
                for _ in range(passes):
                    opt.zero_grad()
                    loss().backward()
                opt.step()

        return run

    def varied(name: str, options: dict[str, Any]) -> Work:
        opt = SAM(model.parameters(), torch.optim.AdamW, 0.05, lr=1e-6, fused=True, **options)
        variant = options.get("variant")
        if isinstance(variant, DecoupledWSAM):
            variant.attach(opt)
        functional = FunctionalSAM(opt) if name == "FunctionalSAM" else None

        def closure() -> Tensor:
            opt.zero_grad()
            if functional is None:
                value = loss()
            else:
                logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
                value = functional(logits, lambda z: F.cross_entropy(z, ids[:, 1:].flatten()))
            value.backward()
            return value

        def run() -> None:
            for _ in range(STEPS):
                if isinstance(variant, ZerothOrderSAM):
                    variant.estimate(opt, loss)
                opt.step(closure)

        return run

    named = variants(model)
    return Case(
        "five steps of SAM's variants",
        "GPT-2 of 5.3M, 2 x 128 tokens",
        "float32",
        [
            peer("one pass and AdamW", plain(1)),
            peer(TWO_PASSES, plain(2)),
            *(Contender(name, varied(name, options)) for name, options in named.items()),
        ],
        [Goal(name, TWO_PASSES, {}) for name in named],
    )
