"""SAM written out by hand over windows of micro-batches, on real text: what trainers with fastpost have to reproduce."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from fastpost.cli.stdlib import root
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
        kept = [p.detach().clone() for p in params]
        gradients = [None if p.grad is None else p.grad.clone() for p in params]
        norm = torch.stack([g.norm() for g in gradients if g is not None]).norm()
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                if g is not None:
                    p.add_(g, alpha=rho / float(norm))
        optimizer.zero_grad()
        for batch in window:
            (loss(model, batch) / parts).backward()
        with torch.no_grad():
            for p, w in zip(params, kept, strict=True):
                p.copy_(w)
        if clip is not None:
            nn.utils.clip_grad_norm_(params, clip)
        optimizer.step()
    return losses


def largest_difference(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Over all elements of all pairs of tensors. NaN where there is one: Python's max() can drop it."""
    return float(torch.stack([(p.detach() - q.detach()).abs().max().double() for p, q in pairs]).max())


def distance(a: nn.Module, b: nn.Module) -> float:
    """The largest difference of two models' parameters."""
    return largest_difference(zip(a.parameters(), b.parameters(), strict=True))
