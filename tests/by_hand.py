"""SAM written out by hand over windows of micro-batches, on real text: what trainers with fastpost have to reproduce."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fastpost.bench.studies.stdlib import root
from tests.tiny import VOCABULARY

Loss = Callable[[nn.Module, Tensor], Tensor]
LENGTH = 12


@functools.cache
def _text() -> str:
    return (root() / "argparse.py").read_text(encoding="utf-8")


def rows_of_text(rows: int, length: int = LENGTH) -> Tensor:
    """Characters of a source file of Python's library as int64 (rows, length) below the tiny models' vocabulary."""
    return torch.tensor([3 + ord(c) % (VOCABULARY - 3) for c in _text()[: rows * length]]).view(rows, length)


def language_loss(model: nn.Module, rows: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=rows, labels=rows).loss
    return loss


@contextmanager
def ascended(params: Sequence[Tensor], gradients: Sequence[Tensor | None], rho: float) -> Iterator[None]:
    """Inside, the parameters are w + rho g / |g| (2010.01412, eq. 2), |g| over those that have one; then w again."""
    kept = [p.detach().clone() for p in params]
    norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
    with torch.no_grad():
        for p, g in zip(params, gradients, strict=True):
            if g is not None:
                p.add_(rho * g / norm)
    yield
    with torch.no_grad():
        for p, w in zip(params, kept, strict=True):
            p.copy_(w)


def sam_by_hand(
    model: nn.Module,
    windows: Iterable[Sequence[Tensor]],
    optimizer: torch.optim.Optimizer,
    rho: float,
    *,
    loss: Loss = language_loss,
    fraction: float = 1.0,
    clip: float | None = None,
    divide_by: int | None = None,
) -> list[float]:
    """Steps of 2010.01412, eq. 2, over windows; returns the mean loss of each, at w.

    Args:
        divide_by: what each loss is divided by; None: the window's number of micro-batches.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    losses = []
    for window in windows:
        parts = divide_by or len(window)
        optimizer.zero_grad()
        ascent = window[: math.ceil(fraction * len(window))]
        values = []
        for batch in ascent:
            value = loss(model, batch) / parts
            value.backward()
            values.append(float(value.detach()) * parts)
        losses.append(sum(values) / len(values))
        with ascended(params, [p.grad for p in params], rho):
            optimizer.zero_grad()
            for batch in window:
                (loss(model, batch) / parts).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
    return losses


# What variants step with, from g at w and h at w + e, as vectors.


def gsam(g: Tensor, h: Tensor, alpha: float) -> Tensor:
    """2203.08065: without alpha times the part of g that is orthogonal to h."""
    return h - alpha * (g - (g @ h) / (h @ h) * h)


def stable_sam(g: Tensor, h: Tensor) -> Tensor:
    """2401.07250: h as long as g."""
    return h * g.norm() / h.norm()


def look_sam_kept(g: Tensor, h: Tensor) -> Tensor:
    """2203.02714: the part of h that is orthogonal to g, kept until the next ascent."""
    return h - (h @ g) / (g @ g) * g


def look_sam_between(g: Tensor, kept: Tensor, alpha: float = 0.7) -> Tensor:
    """2203.02714: a step without an ascent."""
    return g + alpha * g.norm() / kept.norm() * kept


def largest_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Over all elements of all pairs of tensors. NaN where there is one: Python's max() can drop it."""
    return float(torch.stack([(p.detach() - q.detach()).abs().max().double() for p, q in pairs]).max())


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two models' parameters."""
    return largest_difference(zip(a.parameters(), b.parameters(), strict=True))
