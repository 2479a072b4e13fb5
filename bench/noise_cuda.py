"""Noise on a GPU beside copies, beside torch's own operations on the device, and beside noise drawn on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

import fastpost
from fastpost.bench.params_cuda import COPY, DTYPES, SHARES, also_triton, copy_of, name_of
from fastpost.bench.registry import Bandwidth, Case, Contender, Goal, Target, Work, cuda_case, peer
from fastpost.ops.noise import NOISE_TYPES
from fastpost.published import distributions_noise

EPS = 1e-2  # large enough to change a bfloat16


def eager(x: Tensor, noise_type: str) -> Tensor:
    """The same noise from torch's generator on the device, in as few operations as torch has."""
    if noise_type == "uniform":
        return torch.empty_like(x).uniform_(-EPS, EPS).add_(x)
    return torch.empty_like(x).normal_(0.0, EPS).add_(x)


@cuda_case(**DTYPES)
def add_noise(at: Target, dtype: torch.dtype) -> Case:
    """x + eps z over many activations: floor one read and one write."""
    shape = (at.size(256), 512, 1024) if at.scale == 1 else (2, 3, at.size(1024, 16))
    size = torch.Size(shape).numel() * dtype.itemsize

    def contenders() -> list[Contender]:
        x = at.randn(*shape, dtype=dtype)
        seed = torch.full((), 7, dtype=torch.int64, device=at.device)
        made = [copy_of(x)]
        for kind in NOISE_TYPES:
            work: Work = lambda kind=kind: fastpost.add_noise(x, EPS, kind, seed=seed)  # type: ignore[misc]  # noqa: E731
            made += [
                Contender(kind, work, 2 * size),
                *also_triton(at, kind, work, 2 * size),
                peer(f"torch {kind}_ + add", lambda kind=kind: eager(x, kind)),  # type: ignore[misc]
            ]
        return made

    goals: list[Goal] = []
    for kind in NOISE_TYPES:
        goals += [
            Bandwidth(kind, COPY, SHARES[name_of(dtype)]),
            Goal(kind, f"torch {kind}_ + add", {}, faster=True),
        ]
    return Case(
        "add_noise", " x ".join(map(str, shape)), name_of(dtype), contenders, goals,
        bytes=2 * size, work=9, memory=5 * size,
    )  # fmt: skip


@cuda_case()
def noise_published(at: Target) -> Case:
    """Noise as released, drawn on the CPU and moved to the device."""
    shape = (64, 512, 1024) if at.scale == 1 else (2, 3, 16)
    size = 4 * torch.Size(shape).numel()

    def contenders() -> list[Contender]:
        x = at.randn(*shape)
        made = []
        for kind in NOISE_TYPES:
            made += [
                Contender(kind, lambda kind=kind: fastpost.add_noise(x, EPS, kind), 2 * size),  # type: ignore[misc]
                peer(
                    f"torch.distributions {kind}",
                    lambda kind=kind: distributions_noise(x, EPS, kind),  # type: ignore[misc]
                    slow=True,
                ),
            ]
        return made

    goals = [Goal(kind, f"torch.distributions {kind}", {"cuda": 5.0}, faster=True) for kind in NOISE_TYPES]
    return Case(
        "add_noise, as released", " x ".join(map(str, shape)), "float32", contenders, goals, bytes=2 * size, wall=True,
        seconds=4,
    )  # fmt: skip


@cuda_case(**DTYPES)
def embedding_noise(at: Target, dtype: torch.dtype) -> Case:
    """One gather for two streams: floor one read and two writes of the rows looked up."""
    rows, width, tokens = at.size(128256, 16), at.size(4096, 16), at.size(65536, 16)
    size = tokens * width * dtype.itemsize

    def contenders() -> list[Contender]:
        table = at.randn(rows, width, dtype=dtype)
        ids = torch.randint(0, rows, (tokens,), device=at.device)
        seed = torch.full((), 7, dtype=torch.int64, device=at.device)
        work = lambda: fastpost.embedding_noise(table, ids, EPS, seed=seed)  # noqa: E731

        def separate() -> tuple[Tensor, Tensor]:
            clean = torch.nn.functional.embedding(ids, table)
            return clean, eager(clean, "uniform")

        return [
            copy_of(table),
            Contender("embedding_noise", work, 3 * size),
            *also_triton(at, "embedding_noise", work, 3 * size),
            peer("torch gather, uniform_, add", separate),
        ]

    goals: list[Goal] = [
        Bandwidth("embedding_noise", COPY, SHARES[name_of(dtype)]),
        Goal("embedding_noise", "torch gather, uniform_, add", {}, faster=True),
    ]
    return Case(
        "embedding, clean and noised", f"{tokens:,} of {rows:,} x {width:,}", name_of(dtype), contenders, goals,
        bytes=3 * size, work=5, memory=3 * rows * width * dtype.itemsize + 6 * size,
    )  # fmt: skip
