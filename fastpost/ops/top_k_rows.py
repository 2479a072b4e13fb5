"""A teacher of whom k classes of every row are known, beside a student's output head, as torch.library sees them.

The divergence is one over k + 1 classes at most: the known ones, and the rest of the vocabulary as one. So a row of the
student's logits is read for the rest's sum alone, and the divergence and its gradient are made of k + 1 numbers, in float64.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastpost.ops.distillation_walk import Stream, walk_chunks
from fastpost.ops.head import grad_dtype
from fastpost.ops.reductions import out_dtype
from fastpost.ops.registry import define
from fastpost.ops.vocab_parallel import check_labels, group_named


class Settings(NamedTuple):
    """A call but for its tensors, as the operation takes it.

    has_rest: the rest of the vocabulary is a class of its own. softcap: 0: none. chunk: the most rows of a chunk. dtype: of
    the products' operands. smoothing: of the labels. group: the name of the ranks' that share the vocabulary; "": all here.
    """

    ignore_index: int
    divergence: str
    beta: float
    temperature: float
    has_rest: bool
    softcap: float
    chunk: int
    dtype: torch.dtype
    smoothing: float = 0.0
    group: str = ""


class Columns:
    """Which classes this process has logits of: all of them, or one slice of a vocabulary that is cut across ranks.

    Attributes:
        first: the first of them; vocab: how many classes there are on all ranks, float64. On the device.
    """

    def __init__(self, weight: Tensor, group: dist.ProcessGroup | None) -> None:
        self.count, self.group = weight.shape[0], group
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        sizes = torch.zeros(ranks, dtype=torch.float64, device=weight.device)
        sizes[rank] = self.count
        self.sum(sizes)
        self.first, self.vocab = sizes[:rank].sum().long(), sizes.sum()

    def places(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which classes are here, and the column of each (some column where it is not)."""
        at = ids - self.first
        return (at >= 0) & (at < self.count), at.clamp(0, self.count - 1)

    def sum(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def logsumexp(self, logits: Tensor) -> Tensor:
        """Over all ranks' columns of each row, float64 (rows, 1)."""
        here = logits.logsumexp(1, keepdim=True).double()
        if self.group is None:
            return here
        most = here.clone()
        dist.all_reduce(most, dist.ReduceOp.MAX, group=self.group)
        most = torch.where(most > -torch.inf, most, 0.0)
        return most + self.sum((here - most).exp()).log()


def _linear_top_k_distillation(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ids: Tensor,
    log_probs: Tensor,
    labels: Tensor | None,
    weights: Tensor,
    ignore_index: int,
    divergence: str,
    beta: float,
    temperature: float,
    has_rest: bool,
    softcap: float,
    chunk: int,
    dtype: torch.dtype,
    smoothing: float,
    group: str,
    want: list[bool],
) -> tuple[Tensor, ...]:
    how = Settings(ignore_index, divergence, beta, temperature, has_rest, softcap, chunk, dtype, smoothing, group)
    with torch.autocast(hidden.device.type, enabled=False):
        student = Stream(hidden, weight, bias, softcap, dtype, want[:3])
        columns = Columns(weight, group_named(group) if group else None)
        if columns.group is not None:
            check_labels(labels, ignore_index, columns.vocab)
            _check_ids(ids, log_probs[:, : ids.shape[1]], weights, columns.vocab)

        def compare(made: list[Tensor], rows: slice | Tensor, here: Tensor, found: Tensor) -> None:
            targets = None if labels is None else labels[rows]
            grad = student.grad[: len(made[0])] if student.wanted else None
            _compare(made[0], ids[rows], log_probs[rows], targets, here, found, grad, columns, how)

        values = walk_chunks([student], weights, chunk, compare)
        if student.want_hidden:  # each rank's columns have given their part
            columns.sum(student.grad_hidden)
    return (
        values, student.grad_hidden, student.grad_weight, student.grad_bias,
        weights.new_empty(0), weights.new_empty(0),
    )  # fmt: skip


def _check_ids(ids: Tensor, log_probs: Tensor, weights: Tensor, vocab: Tensor) -> None:
    """Refuses ids outside the whole vocabulary; on the CPU, where looking waits for nothing."""
    if ids.device.type != "cpu":
        return
    outside = (((ids < 0) | (ids >= vocab)) & (log_probs > -torch.inf)).any(1) & (weights != 0).any(0)
    if bool(outside.any()):
        raise ValueError(f"row {int(outside.nonzero()[0])} holds an id outside of [0, {int(vocab)})")


def _compare(
    logits: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None, weights: Tensor, found: Tensor,
    grad: Tensor | None, columns: Columns, how: Settings,
) -> None:  # fmt: skip
    """Values of some rows into `found`, gradients of their weighted sum into `grad`; `logits` are overwritten."""
    known = log_probs[:, : ids.shape[1]] > -torch.inf  # what the teacher gives no probability belongs to the rest
    is_here, place = columns.places(ids)
    z = logits.gather(1, place)
    cap = 1 - (logits / how.softcap).square_() if grad is not None and how.softcap else None  # d/dx of s tanh(x / s)
    parts = [torch.where(is_here, z.double(), 0.0)]
    counts = label_place = label_here = None
    if labels is not None:
        counts = (labels != how.ignore_index).unsqueeze(1)
        label_here, label_place = columns.places(torch.where(counts, labels.unsqueeze(1), 0))
        parts.append(torch.where(label_here, logits.gather(1, label_place).double(), 0.0))
        if how.smoothing:
            parts.append(logits.sum(1, keepdim=True, dtype=torch.float64))
    z_all, *of_labels = torch.split(columns.sum(torch.cat(parts, 1)), [t.shape[1] for t in parts], 1)
    exact = torch.where(known, z_all, -torch.inf)
    at_label = of_labels[0] if of_labels else None
    if at_label is not None and how.smoothing:  # of the target, which is at the label and everywhere
        at_label = (1 - how.smoothing) * at_label + how.smoothing / columns.vocab * of_labels[1]
    # From here on `logits` are those of the rest. Where an id is there twice, as padding, the one that counts wins.
    logits.scatter_reduce_(1, place, torch.where(known & is_here, torch.full_like(z, -torch.inf), z), "amin")
    scaled = logits if how.temperature == 1 else logits / how.temperature
    rest = columns.logsumexp(scaled) if how.has_rest else None
    classes = exact / how.temperature
    log_q = (classes if rest is None else torch.cat((classes, rest), 1)).log_softmax(1)
    found[0], slopes = _divergence(_teacher(log_probs, rest, log_probs.shape[1] > ids.shape[1]), log_q, how)
    slopes = slopes * (weights[0] / how.temperature).unsqueeze(1)
    total = None
    if at_label is not None and counts is not None:
        plain = columns.logsumexp(logits) if rest is None or how.temperature != 1 else rest
        total = torch.cat((exact, plain), 1).logsumexp(1, keepdim=True)
        found[1] = torch.where(counts, total - at_label, 0.0).squeeze(1)
    dead = ~(weights != 0).any(0)  # rows that do not count may hold anything
    found.masked_fill_(dead, 0)
    if grad is None:
        return
    # d/dz of a class of the rest: its share of the rest times the rest's slope; of cross-entropy its probability.
    made = torch.zeros_like(logits) if rest is None else _shares(scaled, rest, slopes[:, -1:])
    each = slopes[:, : ids.shape[1]]
    if total is not None and counts is not None and label_place is not None and label_here is not None:
        share = weights[1].unsqueeze(1) * counts
        made.add_(_shares(logits, total, share))
        if how.smoothing:
            made.sub_((share * how.smoothing / columns.vocab).to(made.dtype))
        made.scatter_add_(1, label_place, torch.where(label_here, (how.smoothing - 1) * share, 0.0).to(made.dtype))
        each = each + (exact - total).exp() * share
    made.scatter_add_(1, place, torch.where(known & is_here, each, 0.0).to(made.dtype))
    if cap is not None:
        made.mul_(cap)
    grad.copy_(made.masked_fill_(dead.unsqueeze(1), 0))


def _shares(logits: Tensor, log_sum: Tensor, factor: Tensor) -> Tensor:
    """factor * exp(logits - log_sum), of which the second is float64: rounding it would round every share."""
    largest = logits.amax(1, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    scale = torch.where(log_sum > -torch.inf, factor * (largest.double() - log_sum).exp(), 0.0)
    return (logits - largest).exp_().mul_(scale.to(logits.dtype))


def _teacher(log_probs: Tensor, rest: Tensor | None, holds_rest: bool) -> Tensor:
    """log p of the classes, float64, that of the rest last. Probabilities whose sum rounding has brought above 1 are scaled
    to 1, and where all are known, or there is no rest, they always are.

    Args:
        rest: the student's; -inf where every class of the vocabulary is known, so that rounding leaves nothing to a rest.
        holds_rest: the last of log_probs is the rest's.
    """
    log_p = log_probs.double()
    if holds_rest and rest is not None:
        log_p[:, -1:].masked_fill_(rest == -torch.inf, -torch.inf)
        return log_p.log_softmax(1)
    total = log_p.logsumexp(1, keepdim=True)
    if rest is None:
        return log_p - total
    left = torch.where((total < 0) & (rest > -torch.inf), torch.log(-torch.expm1(total.clamp(max=0))), -torch.inf)
    return torch.cat((log_p - total.clamp(min=0), left), 1)


def _divergence(log_p: Tensor, log_q: Tensor, how: Settings) -> tuple[Tensor, Tensor]:
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


def _fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, log_probs: Tensor, labels: Tensor | None,
    weights: Tensor, *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    dtype, _, _, want = rest[-4:]
    work = out_dtype(dtype)
    return (
        hidden.new_empty(weights.shape, dtype=torch.float64),
        hidden.new_empty(hidden.shape if want[0] else 0, dtype=grad_dtype(hidden)),
        hidden.new_empty(weight.shape if want[1] else 0, dtype=work),
        hidden.new_empty(weight.shape[0] if want[2] else 0, dtype=work),
        weights.new_empty(0),
        weights.new_empty(0),
    )


linear_top_k_distillation = define(
    "linear_top_k_distillation(Tensor hidden, Tensor weight, Tensor? bias, Tensor ids, Tensor log_probs, Tensor? labels, "
    "Tensor weights, int ignore_index, str divergence, float beta, float temperature, bool has_rest, float softcap, "
    "int chunk, ScalarType dtype, float smoothing, str group, bool[] want) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_top_k_distillation,
    _fake,
)
