"""After an ascent: a delta scaled in place, beside one pass over as many bytes."""

from __future__ import annotations

import torch
from torch import nn

from fastpost.bench.params import gpt2_shapes
from fastpost.bench.registry import Case, Contender, Goal, case
from fastpost.gap import Delta


@case
def delta_scale() -> Case:
    """Half of a delta over GPT-2's tensors: weights and base read, weights written."""
    torch.manual_seed(0)
    model = nn.Module()
    base = {}
    for k, shape in enumerate(gpt2_shapes()):
        w = torch.randn(shape) * 0.02
        model.register_parameter(f"w{k}", nn.Parameter(w))
        base[f"w{k}"] = w + 1e-3 * torch.randn(shape)
    delta = Delta(model, base)
    size = 4 * sum(p.numel() for p in model.parameters())
    pairs = [(p.detach(), base[name]) for name, p in model.named_parameters()]

    def add() -> None:
        for w, b in pairs:
            torch.add(w, b, out=w)

    three, ours = "torch.add, two reads and one write", "Delta.scale_"
    return Case(
        "scaling a delta in place",
        "GPT-2, 148 tensors, 124M",
        "float32",
        [Contender(three, add, 3 * size), Contender(ours, lambda: delta.scale_(0.5), 3 * size)],
        [Goal(ours, three, dict.fromkeys(("avx512", "avx2"), 1.2))],
    )
