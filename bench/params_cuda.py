"""Passes over one large tensor on a GPU beside copies of it: norm, perturb, restore, sign flips."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastpost
from fastpost.bench.registry import Bandwidth, Case, Contender, Goal, Target, Work, cuda_case, imported, peer
from fastpost.ops import params as ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SHARES = {"float32": {"cuda": 0.94}, "bfloat16": {"cuda": 0.92}}  # of the rate of a copy that a pass over a list reaches
RHO = 0.05
COPY = "copy"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def has_triton(at: Target) -> bool:
    return at.device.type == "cuda" and fastpost.backends()["triton"].available


def on_triton(work: Work) -> Work:
    def run() -> None:
        with fastpost.use_backend("triton"):
            work()

    return run


def also_triton(at: Target, name: str, work: Work, bytes: int) -> list[Contender]:
    """The same call through Triton where that is not the default; nothing where there is no Triton for the device."""
    return [Contender(f"{name}, triton", on_triton(work), bytes, backend="triton")] if has_triton(at) else []


def only_triton(at: Target, name: str, work: Work, bytes: int, **more: Any) -> Contender:
    """A call that the CUDA core has no kernel for, whatever backend the run is about."""
    if not has_triton(at):
        return Contender(name, work, bytes, **more)
    return Contender(name, on_triton(work), bytes, backend="triton", **more)


def from_liger(at: Target, name: str, make: Callable[[Any], Work], before: Work | None = None) -> list[Contender]:
    """A contender of liger-kernel's, made from its module `liger_kernel.transformers`; it says so where there is none."""
    by, module = "liger-kernel", "liger_kernel.transformers"
    why = imported(module) if at.device.type == "cuda" else "runs on GPUs alone"
    if why:
        return [Contender.absent(name, by, why)]
    return [peer(name, make(importlib.import_module(module)), 0, before, by=by, slow=True, peak=True)]


def copy_of(source: Tensor) -> Contender:
    target = torch.empty_like(source)
    return peer(COPY, lambda: target.copy_(source), 2 * source.nbytes)


@cuda_case(**DTYPES)
def norm_flat(at: Target, dtype: torch.dtype) -> Case:
    """Squared norm of one large tensor: floor one read."""
    n = at.size((1 << 30) // dtype.itemsize)
    size = n * dtype.itemsize

    def contenders() -> list[Contender]:
        x = at.randn(n, dtype=dtype)
        words = x.view(torch.float32) if n % 2 == 0 else x
        work = lambda: ops.squared_norm([x])  # noqa: E731
        return [
            copy_of(x),
            peer("read (torch.sum)", lambda: words.sum(), size),
            Contender("squared_norm", work, size),
            *also_triton(at, "squared_norm", work, size),
        ]

    goals = [Bandwidth("squared_norm", "read (torch.sum)", SHARES[name_of(dtype)], other=COPY)]
    return Case("norm, flat", f"{n:,}", name_of(dtype), contenders, goals, bytes=size, work=6, memory=2 * size)


@cuda_case(**DTYPES)
def distance_flat(at: Target, dtype: torch.dtype) -> Case:
    """Squared distance and dot product of two large tensors: floor two reads each."""
    n = at.size((1 << 30) // dtype.itemsize)
    size = n * dtype.itemsize

    def contenders() -> list[Contender]:
        x, y = at.randn(n, dtype=dtype), at.randn(n, dtype=dtype)
        work, product = partial(ops.squared_distance, [x], [y]), partial(ops.dot, [x], [y])
        return [
            copy_of(x),
            Contender("squared_distance", work, 2 * size),
            *also_triton(at, "squared_distance", work, 2 * size),
            Contender("dot", product, 2 * size),
            *also_triton(at, "dot", product, 2 * size),
            peer("torch sub + vector_norm", lambda: torch.linalg.vector_norm(x - y), 4 * size),
        ]

    goals = [Bandwidth(name, COPY, SHARES[name_of(dtype)]) for name in ("squared_distance", "dot")]
    return Case("distance, flat", f"{n:,}", name_of(dtype), contenders, goals, bytes=2 * size, work=5, memory=4 * size)


@cuda_case(**DTYPES)
def perturb_flat(at: Target, dtype: torch.dtype) -> Case:
    """The perturbing pass over one large tensor: floor two reads and two writes; and the way back, one of each."""
    n = at.size((1 << 30) // dtype.itemsize)
    size = n * dtype.itemsize

    def contenders() -> list[Contender]:
        w, g = at.randn(n, dtype=dtype, std=0.02), at.randn(n, dtype=dtype, std=1e-3)
        stash = [torch.empty_like(w)]
        norm = ops.squared_norm([g])
        perturb = lambda: ops.sam_perturb_([w], [g], stash, norm, rho=RHO)  # noqa: E731
        perturb()
        restore = lambda: ops.sam_restore_([w], stash)  # noqa: E731
        return [
            copy_of(g),
            Contender("sam_perturb_", perturb, 4 * size, before=restore),
            *also_triton(at, "sam_perturb_", perturb, 4 * size),
            Contender("sam_restore_", restore, 2 * size),
            *also_triton(at, "sam_restore_", restore, 2 * size),
        ]

    goals: list[Goal] = [
        Bandwidth("sam_perturb_", COPY, SHARES[name_of(dtype)]),
        Bandwidth("sam_restore_", COPY, SHARES[name_of(dtype)]),
    ]
    return Case("perturb, flat", f"{n:,}", name_of(dtype), contenders, goals, bytes=4 * size, work=4, memory=4 * size)


@cuda_case(**DTYPES)
def negate(at: Target, dtype: torch.dtype) -> Case:
    """Sign flips in place: floor one read and one write."""
    n = at.size((1 << 30) // dtype.itemsize)
    size = n * dtype.itemsize

    def contenders() -> list[Contender]:
        x = at.randn(n, dtype=dtype)
        works: dict[str, tuple[Work, int]] = {
            "negate_": (lambda: ops.negate_([x]), 2),
            "flip_signs_": (lambda: ops.flip_signs_([x], seed), 2),
            "negate_clip_, no bound (negate + norm)": (lambda: ops.negate_clip_([x]), 2),
            "negate_clip_ (norm, then scale)": (lambda: ops.negate_clip_([x], 1e30), 3),
        }
        seed = torch.full((), 7, dtype=torch.int64, device=at.device)
        made = [copy_of(x), peer("torch neg_", lambda: x.neg_(), 2 * size)]
        for name, (work, times) in works.items():
            made += [Contender(name, work, times * size), *also_triton(at, name, work, times * size)]
        return made

    goals = [
        Bandwidth("negate_", COPY, SHARES[name_of(dtype)]),
        Bandwidth("flip_signs_", COPY, SHARES[name_of(dtype)]),
        Bandwidth("negate_clip_, no bound (negate + norm)", COPY, {}),
        Bandwidth("negate_clip_ (norm, then scale)", COPY, {}),
    ]
    return Case("sign flips", f"{n:,}", name_of(dtype), contenders, goals, bytes=2 * size, work=11, memory=2 * size)
