"""A small network with data and base optimizers, and comparisons of bits: what the tests of SAM share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .conftest import bits, same_bits

X = torch.randn(32, 20, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (32,), generator=torch.Generator().manual_seed(2))


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(20, 50), nn.Dropout(dropout), nn.GELU(), nn.Linear(50, 3))


def loss_of(model: nn.Module, x: Tensor = X) -> Tensor:
    return nn.functional.cross_entropy(model(x).float(), Y)


def closure_of(model: nn.Module, x: Tensor = X):
    def closure() -> Tensor:
        loss = loss_of(model, x)
        loss.backward()
        return loss

    return closure


def all_bits(model: nn.Module) -> list[Tensor]:
    return [bits(p) for p in model.parameters()]


def unchanged(model: nn.Module, before: list[Tensor]) -> bool:
    return all(torch.equal(bits(p), b) for p, b in zip(model.parameters(), before, strict=True))


def same_state(a: dict, b: dict) -> bool:
    for key, moments in a["state"].items():
        for name, value in moments.items():
            other = b["state"][key][name]
            if isinstance(value, Tensor) and not same_bits(value, other):
                return False
    return len(a["state"]) == len(b["state"])


BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw fused": (torch.optim.AdamW, {"lr": 1e-2, "fused": True}),
    "adamw foreach": (torch.optim.AdamW, {"lr": 1e-2, "foreach": True}),
    "adafactor": (torch.optim.Adafactor, {"lr": 1e-2}),
}
