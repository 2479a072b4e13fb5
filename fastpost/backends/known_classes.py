"""Rows of a student's logits beside k classes of a teacher, in torch operations: the reference, and what a vocabulary that
is cut across ranks is served by.

The divergence is one over k + 1 classes at most: the known ones, and the rest of the vocabulary as one. So a row of the
student's logits is read for the rest's sum alone, and the divergence and its gradient are made of k + 1 numbers, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpost.row_tasks import TopKTask


class Columns:
    """Which classes logits are of: here all of them.

    Attributes:
        count: how many are here; first: the first of them; vocab: how many there are in all.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.first: Tensor | int = 0
        self.vocab: Tensor | int = count

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which classes are here, and the column of each (some column where it is not)."""
        at = ids - self.first
        return (at >= 0) & (at < self.count), at.clamp(0, self.count - 1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all columns of what is summed over those here, in place."""
        return x

    def logsumexp(self, logits: Tensor, centre: Tensor, temperature: float = 1.0) -> Tensor:
        """Of (logits - centre) / temperature over all columns of each row; centre and result float64 (rows, 1)."""
        most = _largest(logits)  # which may be large
        total = _exponentials(logits, most, temperature).sum(1, keepdim=True, dtype=torch.float64)
        return (most.double() - centre) / temperature + total.log()


@torch.no_grad()
def top_k_rows(how: TopKTask, columns: Columns | None = None) -> None:
    """What the task asks for. columns: those of `how.logits`, where they are not all."""
    logits, ids, log_probs, labels, grad = how.logits, how.ids, how.log_probs, how.labels, how.grad
    columns = Columns(logits.shape[1]) if columns is None else columns
    known = log_probs[:, : ids.shape[1]] > -torch.inf  # what the teacher gives no probability belongs to the rest
    bad = _are_no_classes(ids, known, columns)
    is_here, place = columns.places(ids)
    z = logits.gather(1, place)
    cap = 1 - (logits / how.cap).square_() if grad is not None and how.cap else None  # d/dx of s tanh(x / s)
    parts = [torch.where(is_here, z.double(), 0.0)]
    counts = bad_label = label_place = label_here = None
    if labels is not None:
        counts = (labels != how.ignore_index).unsqueeze(1)
        bad_label = counts & ((labels < 0) | (labels >= columns.vocab)).unsqueeze(1)
        counts = counts & ~bad_label
        label_here, label_place = columns.places(torch.where(counts, labels.unsqueeze(1), 0))
        parts.append(torch.where(label_here, logits.gather(1, label_place).double(), 0.0))
        if how.smoothing:
            parts.append(logits.sum(1, keepdim=True, dtype=torch.float64))
    z_all, *of_labels = torch.split(columns.sum(torch.cat(parts, 1)), [t.shape[1] for t in parts], 1)
    exact = torch.where(known, z_all, -torch.inf)
    # Logits are counted from the largest known one, as a temperature would round large ones.
    centre = exact.amax(1, keepdim=True)
    centre = torch.where(centre.isfinite(), centre, 0.0)
    exact = exact - centre
    at_label = of_labels[0] - centre if of_labels else None
    if at_label is not None and how.smoothing:  # of the target, which is at the label and everywhere
        at_label = (1 - how.smoothing) * at_label + how.smoothing * (of_labels[1] / columns.vocab - centre)
    # From here on `logits` are those of the rest. Where an id is there twice, as padding, the one that counts wins.
    logits.scatter_reduce_(1, place, torch.where(known & is_here, torch.full_like(z, -torch.inf), z), "amin")
    rest = columns.logsumexp(logits, centre, how.temperature) if how.has_rest else None
    classes = exact / how.temperature
    log_q = (classes if rest is None else torch.cat((classes, rest), 1)).log_softmax(1)
    said = log_probs if how.has_rest else log_probs[:, : ids.shape[1]]
    log_p = _teacher(said, rest, log_probs.shape[1] > ids.shape[1])
    value, slopes = _divergence(log_p, log_q, how)
    no_value = bad | ~known.any(1) | (log_p.isnan() | log_q.isnan()).any(1)
    value = torch.where(no_value, torch.nan, value)
    taught = how.weights != 0
    slopes = torch.where(taught.unsqueeze(1), slopes * (how.weights / how.temperature).unsqueeze(1), 0.0)
    total, ce = None, torch.zeros_like(value)
    lost = taught & ~value.isfinite()  # rows without a gradient
    if at_label is not None and counts is not None and bad_label is not None:
        plain = columns.logsumexp(logits, centre) if rest is None or how.temperature != 1 else rest
        total = torch.cat((exact, plain), 1).logsumexp(1, keepdim=True)
        no_ce = counts & (bad.unsqueeze(1) | ~total.isfinite())
        ce = torch.where(counts, total - at_label, 0.0).masked_fill(no_ce | bad_label, torch.nan).squeeze(1)
        assert how.ce_weights is not None
        lost = lost | (no_ce.squeeze(1) & (how.ce_weights != 0))
    dead = ~taught  # rows that do not count may hold anything
    if how.ce_weights is not None:
        dead &= how.ce_weights == 0
    for out, found in ((how.value_out, value), (how.ce_out, ce)):
        if out is not None:
            out.copy_(found.masked_fill(dead, 0))
    if grad is None:
        return
    # d/dz of a class of the rest: its share of the rest times the rest's slope; of cross-entropy its probability.
    made = torch.zeros_like(logits) if rest is None else _shares(logits, centre, rest, slopes[:, -1:], how.temperature)
    each = slopes[:, : ids.shape[1]]
    if total is not None and counts is not None and label_place is not None and label_here is not None:
        assert how.ce_weights is not None
        share = how.ce_weights.unsqueeze(1) * counts
        made.add_(_shares(logits, centre, total, share))
        if how.smoothing:
            made.sub_((share * how.smoothing / columns.vocab).to(made.dtype))
        made.scatter_add_(1, label_place, torch.where(label_here, (how.smoothing - 1) * share, 0.0).to(made.dtype))
        each = each + (exact - total).exp() * share
    made.scatter_add_(1, place, torch.where(known & is_here, each, 0.0).to(made.dtype))
    if cap is not None:
        made.mul_(cap)
    made.masked_fill_(lost.unsqueeze(1), torch.nan)
    grad.copy_(made.masked_fill_(dead.unsqueeze(1), 0))


def _are_no_classes(ids: Tensor, known: Tensor, columns: Columns) -> Tensor:
    """Rows of which a known class is outside of the vocabulary, or there twice."""
    outside = ((ids < 0) | (ids >= columns.vocab)) & known
    unused = -1 - torch.arange(ids.shape[1], device=ids.device)  # each once
    ordered = torch.where(known, ids, unused).sort(1).values
    return outside.any(1) | (ordered[:, 1:] == ordered[:, :-1]).any(1)


def _largest(logits: Tensor) -> Tensor:
    return logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)


def _exponentials(logits: Tensor, most: Tensor, temperature: float) -> Tensor:
    less = logits - most
    return (less if temperature == 1 else less.div_(temperature)).exp_()


def _shares(logits: Tensor, centre: Tensor, log_sum: Tensor, factor: Tensor, temperature: float = 1.0) -> Tensor:
    """factor * exp((logits - centre) / temperature - log_sum), of which log_sum is float64: rounding it would round every
    share."""
    most = _largest(logits)
    log_scale = (most.double() - centre) / temperature - log_sum
    scale = torch.where(log_sum > -torch.inf, factor * log_scale.exp(), 0.0)
    return _exponentials(logits, most, temperature).mul_(scale.to(logits.dtype))


def _teacher(log_probs: Tensor, rest: Tensor | None, holds_rest: bool) -> Tensor:
    """log p of the classes, float64, that of the rest last. Probabilities whose sum rounding has brought above 1 are scaled
    to 1, and where all are known, or there is no rest, they always are.

    Args:
        rest: the student's; -inf where every class of the vocabulary is known, so that rounding leaves nothing to a rest.
        holds_rest: the last of log_probs is the rest's.
    """
    log_p = log_probs.double()
    if holds_rest and rest is not None:
        given = log_p[:, -1:].masked_fill(rest == -torch.inf, -torch.inf)
        return torch.cat((log_p[:, :-1], given), 1).log_softmax(1)
    total = log_p.logsumexp(1, keepdim=True)
    if rest is None:
        return log_p - total
    left = torch.where((total < 0) & (rest > -torch.inf), torch.log(-torch.expm1(total.clamp(max=0))), -torch.inf)
    return torch.cat((log_p - total.clamp(min=0), left), 1)


def _divergence(log_p: Tensor, log_q: Tensor, how: TopKTask) -> tuple[Tensor, Tensor]:
    """D(p, q) of every row and its derivative by the logits of q; float64 (n,) and (n, classes)."""
    p, q = log_p.exp(), log_q.exp()
    zero = torch.zeros_like(p)

    def times(share: Tensor, log: Tensor) -> Tensor:
        return torch.where(share > 0, share * log, zero)  # nothing is said of what has no share, whatever its logarithm

    def through_softmax(slope: Tensor) -> Tensor:  # q * slope is given
        return slope - q * slope.sum(1, keepdim=True)

    if how.divergence == "total_variation":
        return (p - q).abs().sum(1) / 2, through_softmax(q * (q - p).sign() / 2)
    if how.divergence == "js":
        log_m = (how.beta * p + (1 - how.beta) * q).log()
        of_q = times(q, log_q - log_m)
        value = how.beta * times(p, log_p - log_m).sum(1) + (1 - how.beta) * of_q.sum(1)
        return value.clamp(min=0), through_softmax((1 - how.beta) * of_q)
    value, slope = torch.zeros_like(p[:, 0]), torch.zeros_like(p)
    if how.divergence in ("forward_kl", "symmetric_kl"):
        value = value + times(p, log_p - log_q).sum(1).clamp(min=0)
        slope = slope + (q - p)
    if how.divergence in ("reverse_kl", "symmetric_kl"):
        of_q = times(q, log_q - log_p)
        value = value + of_q.sum(1).clamp(min=0)
        slope = slope + through_softmax(of_q)
    return value, slope
