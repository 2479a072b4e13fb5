"""Answers from the equations alone, in wider arithmetic: nothing here calls the library or copies its formulas' order."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def divergence(a: Tensor, b: Tensor) -> tuple[Array, Array, Array]:
    """Rows of KL(p|q) + KL(q|p) for p = softmax(a), q = softmax(b), and its gradients (2008.03156 eq. 4, differentiated).

    In extended precision, so that streams 1e-6 apart still leave nine digits; classes that are -inf in both do not exist.
    """
    x, y = (t.detach().double().numpy().astype(np.longdouble) for t in (a, b))
    absent = np.isneginf(x) & np.isneginf(y)
    x, y = np.where(absent, 0, x), np.where(absent, 0, y)

    def log_softmax(z: Array) -> Array:
        top = np.where(absent, -np.inf, z).max(-1, keepdims=True)
        e = np.where(absent, 0, np.exp(z - top))
        return z - top - np.log(e.sum(-1, keepdims=True))

    log_p, log_q = log_softmax(x), log_softmax(y)
    p, q = (np.where(absent, 0, np.exp(z)) for z in (log_p, log_q))
    r = log_p - log_q
    kl_pq, kl_qp = (p * r).sum(-1, keepdims=True), -(q * r).sum(-1, keepdims=True)
    value = ((p - q) * r).sum(-1)
    return (
        value.astype(np.float64),
        (p * (r - kl_pq) + p - q).astype(np.float64),
        (q * (-r - kl_qp) + q - p).astype(np.float64),
    )


def cross_entropy(a: Tensor, labels: Tensor) -> tuple[Array, Array]:
    """Rows of -log softmax(a)[label], and softmax(a) - one_hot(label)."""
    x = a.detach().double().numpy().astype(np.longdouble)
    e = np.exp(x - x.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    at = (np.arange(len(x)), labels.numpy())
    grad = p.copy()
    grad[at] -= 1
    return (-np.log(p[at])).astype(np.float64), grad.astype(np.float64)


# -- fairseq's criteria, as losses per sample, in float64; differentiated by torch -----------------------------------------


def _log_softmax(z: Tensor) -> Tensor:
    return z - torch.logsumexp(z, dim=-1, keepdim=True)


def _fairseq_kl(noised_logits: Tensor, logits: Tensor) -> Tensor:
    """Both directions summed over every element, over the first dimension of the logits."""
    log_q, log_p = _log_softmax(noised_logits), _log_softmax(logits)
    both = (log_p.exp() * (log_p - log_q)).sum() + (log_q.exp() * (log_q - log_p)).sum()
    return both / noised_logits.shape[0]


def sentence_prediction_r3f(logits: Tensor, noised_logits: Tensor, labels: Tensor, r3f_lambda: float) -> Tensor:
    """fairseq's classification criterion: (summed CE + lambda * sample_size * KL) / sample_size, one sample per row."""
    sample_size = labels.numel()
    task = -_log_softmax(logits).gather(-1, labels.unsqueeze(-1)).sum()
    return (task + r3f_lambda * sample_size * _fairseq_kl(noised_logits, logits)) / sample_size


def label_smoothed_cross_entropy_r3f(
    logits: Tensor, noised_logits: Tensor, labels: Tensor, r3f_lambda: float, padding: int
) -> Tensor:
    """fairseq's sequence criterion with label_smoothing = 0; sample_size counts tokens, the KL counts padding too."""
    counts = labels != padding
    sample_size = counts.sum()
    picked = -_log_softmax(logits).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (picked[counts].sum() + r3f_lambda * sample_size * _fairseq_kl(noised_logits, logits)) / sample_size
