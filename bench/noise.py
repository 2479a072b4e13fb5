"""Noise on activations and at the embedding."""

from __future__ import annotations

import torch

import fastpost
from fastpost.bench.registry import Case, Contender, Goal, case, peer
from fastpost.published import distributions_noise


@case
def noise() -> Case:
    """x + eps z for a batch of embeddings: floor one read and one write."""
    x = torch.randn(64, 512, 1024)
    size = 4 * x.numel()
    y = torch.zeros_like(x)
    return Case(
        "add_noise",
        "64 x 512 x 1024",
        "float32",
        [
            peer("copy", lambda: y.copy_(x), 2 * size),
            Contender("fastpost uniform", lambda: fastpost.add_noise(x, 1e-5, "uniform", seed=1), 2 * size),
            peer("torch.distributions uniform + add", lambda: distributions_noise(x, 1e-5, "uniform")),
            Contender("fastpost normal", lambda: fastpost.add_noise(x, 1e-5, "normal", seed=1), 2 * size),
            peer("torch.distributions normal + add", lambda: distributions_noise(x, 1e-5, "normal")),
        ],
        [
            Goal("fastpost uniform", "torch.distributions uniform + add", {"avx512": 5.0, "avx2": 5.0}, faster=True),
            Goal("fastpost normal", "torch.distributions normal + add", {"avx512": 5.0, "avx2": 5.0}, faster=True),
        ],
    )


@case
def embedding() -> Case:
    """One gather for R3F's two streams: each table row is read once."""
    table = torch.randn(50257, 768)
    ids = torch.randint(0, 50257, (32, 256))

    def separate() -> tuple[torch.Tensor, torch.Tensor]:
        clean = torch.nn.functional.embedding(ids, table)
        return clean, distributions_noise(clean, 1e-5, "uniform")

    return Case(
        "embedding, clean and noised",
        "32 x 256 of 50,257 x 768",
        "float32",
        [
            Contender("fastpost embedding_noise", lambda: fastpost.embedding_noise(table, ids, seed=1)),
            peer("gather, torch.distributions, add", separate),
        ],
    )
