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
| `satimp_loss` | -mean p^beta1 (1 - p)^beta2 CE, the weights constants | Yang et al. 2505.11953 |
| `undial_loss` | CE to softmax(teacher - strength at the label) | Dong et al. 2402.10052 |
| `rmu_loss` | mean (h - c u)^2 on texts to forget + alpha mean (h - h_ref)^2 on texts to keep | Li et al. 2403.03218 |

The last works on hidden states. `weighted_ascent_loss` is known as WGA.
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
        ValueError: shapes that do not fit, labels out of range (on the CPU). TypeError: labels are no integers, or one of
            them is no tensor.
    """
    _tensors("", logits=logits, labels=labels)
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
        nll = _weighed(nll, torch.exp(-beta * nll.detach()))
    return -nll.sum() / counts.sum().clamp(min=1)


def satimp_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    beta1: float = 5.0,
    beta2: float = 1.0,
    shift: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """-CE with each token weighed by p^beta1 (1 - p)^beta2, p its own probability (a constant).

    The first factor leaves alone what is forgotten already (saturation), the second what everybody would say (importance).

    Args:
        beta1, beta2: >= 0; beta2 = 0 is `weighted_ascent_loss`. The defaults are those of open-unlearning.
    """
    for name, value in (("beta1", beta1), ("beta2", beta2)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"satimp_loss: {name} must be finite and >= 0, not {value}")
    nll, counts = token_nll(logits, labels, shift=shift, ignore_index=ignore_index)
    known = nll.detach()
    nll = _weighed(nll, torch.exp(-beta1 * known) * (-torch.expm1(-known)) ** beta2)
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

    Raises:
        ValueError, TypeError: as `token_nll`; also a reference of another shape, or that is no tensor.
    """
    nll, tokens = sequence_nll(logits, labels, shift=shift, ignore_index=ignore_index)
    if isinstance(reference_nll, tuple) and reference_nll:
        reference_nll = reference_nll[0]
    _tensors("npo_loss: ", reference_nll=reference_nll)
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


def undial_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor,
    *,
    strength: float = 10.0,
    shift: bool = True,
    ignore_index: int = -100,
) -> Tensor:
    """Self-distillation from adjusted logits (UNDIAL): cross-entropy to what the untouched model would say, were its logit
    of the label lower by `strength`. Averaged over the tokens that count; bounded below, as cross-entropies are.

    Args:
        teacher_logits: of the untouched model, shaped as `logits`; no gradient flows into them.
        strength: > 0; the authors take 3 to 30.
    """
    _positive("undial_loss", strength, "strength")
    _tensors("undial_loss: ", logits=logits, teacher_logits=teacher_logits)
    if teacher_logits.shape != logits.shape:
        raise ValueError(
            f"undial_loss: teacher_logits have shape {tuple(teacher_logits.shape)}, logits {tuple(logits.shape)}"
        )
    _, counts = token_nll(logits, labels, shift=shift, ignore_index=ignore_index)  # checks them
    if shift:
        logits, teacher_logits, labels = logits[:, :-1], teacher_logits[:, :-1], labels[:, 1:]
    logits, teacher, labels = logits[counts], teacher_logits[counts].detach(), labels.to(logits.device)[counts]
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    target = teacher.to(logits.device, wide, copy=True)
    target.scatter_add_(1, labels.long().unsqueeze(1), target.new_full((len(labels), 1), -strength))
    target, known = target.softmax(-1), logits.to(wide).log_softmax(-1)
    # A class that neither gives a probability (a padded vocabulary at -inf) adds 0, the limit of p log q.
    return -(target * known.masked_fill(target == 0, 0)).sum() / counts.sum().clamp(min=1)


def rmu_direction(width: int, coefficient: float = 20.0, *, seed: int = 0) -> Tensor:
    """c u for `rmu_loss`: a vector of length c, its direction drawn uniformly from [0, 1)^width and kept for a whole run.

    Args:
        width: of the hidden states.
        coefficient: c, > 0; to be chosen for model and layer (the authors: 6.5 for Zephyr-7B, 20 in their code).

    Returns:
        (width,) float32 on the CPU.
    """
    _positive("rmu_direction", coefficient, "coefficient")
    if width < 1:
        raise ValueError(f"rmu_direction: width must be >= 1, not {width}")
    u = torch.rand(width, generator=torch.Generator().manual_seed(seed))
    return u * (coefficient / float(u.norm()))


def rmu_loss(
    forget: Tensor,
    direction: Tensor,
    retain: Tensor | None = None,
    reference: Tensor | None = None,
    *,
    alpha: float = 1.0,
    forget_mask: Tensor | None = None,
    retain_mask: Tensor | None = None,
) -> Tensor:
    """Misdirected representations (RMU): one layer's hidden states are pulled to a fixed vector on texts to forget, and to
    those of the untouched model on texts to keep. Squares are averaged over tokens and width, as in the authors' code.

    Use it with few weights that learn: the authors train the down projections of that layer and the two below.

    Args:
        forget: (batch, time, width), the layer's output on texts to forget.
        direction: (width,), `rmu_direction`.
        retain, reference: (batch, time, width), its outputs on texts to keep, by the model and by the untouched one (no
            gradient flows into these). None: the first term alone.
        alpha: weight of the second term, >= 0.
        forget_mask, retain_mask: (batch, time), nonzero where a token counts; None: all.
    """
    if (retain is None) != (reference is None):
        raise ValueError("rmu_loss: retain and reference come together, or neither")
    if retain is None and retain_mask is not None:
        raise ValueError("rmu_loss: retain_mask is for retain, which is missing")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"rmu_loss: alpha must be finite and >= 0, not {alpha}")
    given = {"retain": retain, "reference": reference, "forget_mask": forget_mask, "retain_mask": retain_mask}
    given = {name: t for name, t in given.items() if t is not None}
    _tensors("rmu_loss: ", forget=forget, direction=direction, **given)
    if direction.shape != forget.shape[-1:]:
        raise ValueError(f"rmu_loss: direction has shape {tuple(direction.shape)}, expected ({forget.shape[-1]},)")
    loss = _mean_square(forget, direction.expand_as(forget), forget_mask)
    if retain is None or reference is None:
        return loss
    if retain.shape != reference.shape:
        raise ValueError(f"rmu_loss: retain has shape {tuple(retain.shape)}, reference {tuple(reference.shape)}")
    return loss + alpha * _mean_square(retain, reference, retain_mask)


def _tensors(where: str, **given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}{name} must be a tensor, not a {type(value).__name__}; torch.tensor(...) makes one")


def _mean_square(hidden: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Over the width, and over the tokens that count; 0 where none does."""
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if mask is not None:
        if mask.shape != hidden.shape[:-1]:
            raise ValueError(f"rmu_loss: a mask has shape {tuple(mask.shape)}, expected {tuple(hidden.shape[:-1])}")
        counts = mask.to(hidden.device) != 0
        hidden, target = hidden[counts], target.to(hidden.device)[counts]
    squares: Tensor = (hidden.to(wide) - target.detach().to(hidden.device, wide)).square()
    return squares.sum() / max(squares.numel(), 1)


def _weighed(nll: Tensor, weights: Tensor) -> Tensor:
    """weights * nll, and 0 where a token has probability 0: the limit of p^beta log p."""
    possible = nll.detach() != math.inf
    return torch.where(possible, weights * torch.where(possible, nll, 0), 0)


def _mean(values: Tensor, tokens: Tensor) -> Tensor:
    """Over the sequences that have a label; 0 where none has."""
    counts = tokens > 0
    return torch.where(counts, values, torch.zeros_like(values)).sum() / counts.sum().clamp(min=1)


def _positive(op: str, value: float, name: str = "beta") -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{op}: {name} must be finite and > 0, not {value}")
