"""Losses whose descent makes a text less likely: gradient ascent and its bounded relatives, from their equations.

Each takes logits and labels as a causal language model has them: row t is compared with label t + 1 (`shift=True`), labels
of `ignore_index` do not count. Descend on what they return; nothing has to be maximised.

| function | loss | source |
| --- | --- | --- |
| `ascent_loss` | -CE | Jang et al. 2210.01504 |
| `weighted_ascent_loss` | -mean p^beta CE, p^beta a constant | Wang et al. 2502.19301 |
| `grad_diff_loss` | -gamma CE(forget) + alpha CE(retain) | Maini et al. 2401.06121 |
| `npo_loss` | -(2 / beta) mean log sigmoid(beta (nll - nll_ref)) | Zhang et al. 2404.05868 |
| `simnpo_loss` | -(2 / beta) mean log sigmoid(beta nll / length - delta) | Fan et al. 2410.07163 |
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def token_nll(logits: Tensor, labels: Tensor, *, shift: bool = True, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each token, and which count.

    Args:
        logits: (batch, time, vocab), any floating dtype; arithmetic is float32 or wider.
        labels: (batch, time), integers in [0, vocab) or `ignore_index`.
        shift: row t predicts label t + 1.

    Returns:
        (batch, rows) float32 or float64, 0 where a label does not count; bool of that shape. rows = time - 1 under shift.

    Raises:
        ValueError: shapes that do not fit, labels out of range (on the CPU). TypeError: labels are no integers.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"logits (batch, time, vocab) have shape {tuple(logits.shape)}, labels (batch, time) {tuple(labels.shape)}"
        )
    if labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, not {labels.dtype}")
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    labels = labels.to(device=logits.device, dtype=torch.int64)
    counts = labels != ignore_index
    if labels.device.type == "cpu":
        outside = counts & ((labels < 0) | (labels >= logits.shape[-1]))
        if bool(outside.any()):
            raise ValueError(f"label {int(labels[outside][0])} is outside [0, {logits.shape[-1]})")
    # What does not count may be NaN, and sends back nothing.
    logits = logits.masked_fill(~counts.unsqueeze(-1), 0)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    nll = F.cross_entropy(wide.transpose(1, 2), labels, ignore_index=ignore_index, reduction="none")
    return nll, counts


class SequenceNLL(NamedTuple):
    """Of each sequence, the negative log-likelihood summed over its tokens, and how many of them count: both (batch,)."""

    nll: Tensor
    tokens: Tensor


def sequence_nll(logits: Tensor, labels: Tensor, *, shift: bool = True, ignore_index: int = -100) -> SequenceNLL:
    """Of each sequence, the sum over its tokens, and how many count: (batch,) and (batch,).

    Under `torch.no_grad()` on the model before training this is what `npo_loss` takes as its reference; it may be kept from
    epoch to epoch.
    """
    nll, counts = token_nll(logits, labels, shift=shift, ignore_index=ignore_index)
    return SequenceNLL(nll.sum(-1), counts.sum(-1))


def ascent_loss(logits: Tensor, labels: Tensor, *, shift: bool = True, ignore_index: int = -100) -> Tensor:
    """-CE, averaged over the tokens that count: descending on it climbs. Unbounded below; see `fastpost.GAP` for guards."""
    nll, counts = token_nll(logits, labels, shift=shift, ignore_index=ignore_index)
    return -nll.sum() / counts.sum().clamp(min=1)


def weighted_ascent_loss(
    logits: Tensor, labels: Tensor, *, beta: float = 1.0, shift: bool = True, ignore_index: int = -100
) -> Tensor:
    """-CE with each token weighed by its own probability to the power beta (a constant): what is forgotten is left alone.

    Args:
        beta: >= 0; 0 is `ascent_loss`. Above it, a token of probability 0 gives 0, the limit of p^beta log p.
    """
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"weighted_ascent_loss: beta must be finite and >= 0, not {beta}")
    nll, counts = token_nll(logits, labels, shift=shift, ignore_index=ignore_index)
    if beta:
        possible = nll.detach() != math.inf
        weights = torch.exp(-beta * nll.detach())
        nll = torch.where(possible, weights * torch.where(possible, nll, 0), 0)
    return -nll.sum() / counts.sum().clamp(min=1)


def grad_diff_loss(
    forget_logits: Tensor,
    forget_labels: Tensor,
    retain_logits: Tensor,
    retain_labels: Tensor,
    *,
    gamma: float = 1.0,
    alpha: float = 1.0,
    shift: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """-gamma CE(forget) + alpha CE(retain), each averaged over its own tokens."""
    for name, value in (("gamma", gamma), ("alpha", alpha)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"grad_diff_loss: {name} must be finite and >= 0, not {value}")
    forget = ascent_loss(forget_logits, forget_labels, shift=shift, ignore_index=ignore_index)
    retain = ascent_loss(retain_logits, retain_labels, shift=shift, ignore_index=ignore_index)
    return gamma * forget - alpha * retain


def npo_loss(
    logits: Tensor,
    labels: Tensor,
    reference_nll: Tensor | SequenceNLL,
    *,
    beta: float = 0.1,
    shift: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """Negative preference optimisation: -(2 / beta) mean over sequences of log sigmoid(beta (nll - nll_ref)).

        with torch.no_grad():
            reference = sequence_nll(model(input_ids=ids).logits, labels)      # before training
        ...
        npo_loss(model(input_ids=ids).logits, labels, reference).backward()

    nll are sums over a sequence's tokens; sequences without a label that counts are left out of the mean. The loss tends to
    gradient ascent on nll as beta -> 0 (up to the constant 2 log(2) / beta), and saturates once a sequence is far less
    likely than before.

    Args:
        reference_nll: `sequence_nll` of the untouched model, or its `nll`, (batch,); no gradient flows into it.
        beta: > 0; 0.1 in the paper.
    """
    nll, tokens = sequence_nll(logits, labels, shift=shift, ignore_index=ignore_index)
    if isinstance(reference_nll, tuple):
        reference_nll = reference_nll[0]
    if reference_nll.shape != nll.shape:
        raise ValueError(f"npo_loss: reference_nll has shape {tuple(reference_nll.shape)}, expected {tuple(nll.shape)}")
    _positive("npo_loss", beta)
    return -2 / beta * _mean(F.logsigmoid(beta * (nll - reference_nll.detach().to(nll))), tokens)


def simnpo_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    beta: float = 2.5,
    delta: float = 0.0,
    shift: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """NPO without a reference, by length: -(2 / beta) mean over sequences of log sigmoid(beta nll / length - delta).

    Sequences without a label that counts are left out of the mean.

    Args:
        beta: > 0.
        delta: margin, in the units of beta times nats per token (gamma in the paper).
    """
    _positive("simnpo_loss", beta)
    nll, tokens = sequence_nll(logits, labels, shift=shift, ignore_index=ignore_index)
    return -2 / beta * _mean(F.logsigmoid(beta * nll / tokens.clamp(min=1) - delta), tokens)


def _mean(values: Tensor, tokens: Tensor) -> Tensor:
    """Over the sequences that have a label; 0 where none has."""
    counts = tokens > 0
    return torch.where(counts, values, torch.zeros_like(values)).sum() / counts.sum().clamp(min=1)


def _positive(op: str, beta: float) -> None:
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"{op}: beta must be finite and > 0, not {beta}")
