"""What a backend is asked for rows of activations and of logits: one value for each argument list."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class NoiseTask(NamedTuple):
    """Noise on activations, drawn from (seed, element).

    Attributes:
        eps: scale of the noise. noise_type: "uniform" on (-eps, eps), or "normal" with standard deviation eps.
        seed: int64 scalar.
        rows: int64, a number for each row of the activations, which it draws by, negative: no noise; None: 0, 1, 2, ...
        scales: floating point, what eps is multiplied by in each row; None: 1.
        out_dtype: of the result.
    """

    eps: float
    noise_type: str
    seed: Tensor
    rows: Tensor | None
    scales: Tensor | None
    out_dtype: torch.dtype


class DivergenceTask(NamedTuple):
    """Symmetric KL and cross-entropy of rows, and the gradients of their weighted sum.

    Attributes:
        clean, noised: (rows, classes) logits; rows at one distance, classes contiguous.
        labels: int64 (rows,); None: no cross-entropy.
        ignore_index: the label of rows without a cross-entropy.
        kl_weights, ce_weights: float64 (rows,); None: 1 for each row. Rows of weight 0 give exactly 0.
        grad_clean, grad_noised: where gradients go, which may be the logits themselves; None: not wanted.
    """

    clean: Tensor
    noised: Tensor
    labels: Tensor | None = None
    ignore_index: int = -100
    kl_weights: Tensor | None = None
    ce_weights: Tensor | None = None
    grad_clean: Tensor | None = None
    grad_noised: Tensor | None = None


class OperandTask(NamedTuple):
    """The same, the gradients being operands of an output head's products.

    Attributes:
        clean, noised: (rows, classes) logits, float32 or float64.
        labels, ignore_index: as in `DivergenceTask`.
        kl_weights, ce_weights: float64 (rows,); ce_weights None: no cross-entropy.
        kl_out, ce_out: float64 (rows,), where the values go.
        first, second: where gradients go, of the logits' or of a narrower dtype; may be the logits themselves, None: not
            wanted. `first` gets the clean stream's, and the noised one's added where `second` gets that.
        smoothing: label smoothing in torch's convention, of the gradient alone: `ce_out` gets the plain cross-entropy.
        cap: logits are cap * tanh(z / cap), and the gradients are those of z; 0: logits as they are.
        teaches: whether the divergence sends a gradient to the clean stream.
        noised_classifies: in rows that have a divergence the noised stream has a cross-entropy as well, of the same label
            and weight; `ce_out` is then the sum of both.

    A row whose divergence is infinite (a class that is -inf in one stream only) or meaningless (NaN, +inf, no class at all)
    has no gradient of it: NaN goes where the divergence sends one, so to `second`, and to `first` where it teaches or
    `second` is added. A `first` that gets nothing of the divergence is the cross-entropy's gradient, as if there were none.
    `ce_out` never depends on the divergence: it is right wherever the stream's own logits have a cross-entropy. What has no
    weight is not looked at.
    """

    clean: Tensor
    noised: Tensor
    labels: Tensor | None
    ignore_index: int
    kl_weights: Tensor
    ce_weights: Tensor | None
    kl_out: Tensor
    ce_out: Tensor | None
    first: Tensor | None = None
    second: Tensor | None = None
    smoothing: float = 0.0
    cap: float = 0.0
    teaches: bool = True
    noised_classifies: bool = False


class ShardTask(NamedTuple):
    """An `OperandTask` whose classes are cut across ranks, each with some columns of every row.

    A backend has two functions for it. `shard_sums(shard, before)` gives what a rank's columns add up to, float64, which is
    to be added over the ranks: first with None, then with these sums, since a row may have to be looked at again; None then
    says that none has. `shard_operands(shard, before, sums)` does the task with what both calls added up to.

    Attributes:
        task: of this rank's columns; `noised_classifies` is False. Labels are columns of this rank or one of the numbers
            below, the last of which is its ignore_index.
        top: (2, rows), both streams' largest logits over all ranks, 0 where a stream has no class; in the logits' dtype.
        vocab: how many columns all ranks have together, a float64 scalar.
    """

    task: OperandTask
    top: Tensor
    vocab: Tensor


# Labels of a ShardTask: a column of another rank, no class at all, no cross-entropy in this row. csrc/api.h has them too.
ELSEWHERE, NO_CLASS, IGNORED = -1, -2, -3


class DistillationTask(NamedTuple):
    """A divergence of a teacher's and a student's rows, the student's cross-entropy, and gradients of their weighted sum.

    With p = softmax(teacher / temperature) and q = softmax(student / temperature), `divergence` is "forward_kl", KL(p || q);
    "reverse_kl", KL(q || p); "symmetric_kl", their sum; "js", beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p +
    (1 - beta) q; or "total_variation", sum |p - q| / 2.

    Attributes:
        student, teacher: (rows, classes) logits, float32 or float64, each in rows at one distance.
        labels: int64 (rows,); None: no cross-entropy. It is of the student's logits, without a temperature.
        ignore_index: the label of rows without a cross-entropy.
        weights, ce_weights: float64 (rows,); ce_weights None: no cross-entropy. What has weight 0 is not looked at.
        value_out, ce_out: float64 (rows,), where the values go; ce_out None: not wanted.
        grad_student, grad_teacher: where gradients go, of the logits' or of a narrower dtype, both of one; may be the logits
            themselves, None: not wanted.
        divergence, beta, temperature: see above.
        student_cap, teacher_cap: as `cap` in `OperandTask`, each for its stream.
        smoothing: label smoothing in torch's convention, of the cross-entropy in `ce_out` and in the gradient.

    A class that is -inf in both streams does not exist. In one stream only it makes infinite what weighs it: the forward KL
    where the student lacks it, the reverse KL where the teacher does, the symmetric KL either way; such a row and one that
    is meaningless (NaN, +inf, no class at all) have NaN in place of gradients. `ce_out` never depends on the divergence.
    """

    student: Tensor
    teacher: Tensor
    labels: Tensor | None
    ignore_index: int
    weights: Tensor
    ce_weights: Tensor | None
    value_out: Tensor
    ce_out: Tensor | None
    grad_student: Tensor | None = None
    grad_teacher: Tensor | None = None
    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    student_cap: float = 0.0
    teacher_cap: float = 0.0
    smoothing: float = 0.0


class TopKTask(NamedTuple):
    """A divergence of a teacher, of whom k classes of every row are known, and a student's rows; the student's
    cross-entropy, and the gradient of their weighted sum.

    The classes of the divergence are the known ones and, with `has_rest`, all others as one more; `divergence`, `beta` and
    `temperature` are as in `DistillationTask`.

    Attributes:
        logits: (rows, classes) of the student, float32 or float64, in rows at one distance. They are overwritten.
        ids: int64 (rows, k), contiguous: the known classes, each once in a row.
        log_probs: float64 (rows, k) or, with the rest's last, (rows, k + 1), contiguous; of a teacher whose logits were
            divided by the temperature. -inf: the place is not used, whatever its id.
        labels, ignore_index: as in `DistillationTask`.
        weights, ce_weights: float64 (rows,); ce_weights None: no cross-entropy. Where both are 0 the row may hold anything
            and gives exactly 0; else both values are made.
        value_out, ce_out: float64 (rows,), where the values go; ce_out is None where ce_weights is.
        grad: where the gradient goes, of the logits' or of a narrower dtype; may be the logits themselves, None: not wanted.
        has_rest: False: both models are taken over the k classes.
        cap, smoothing: as `student_cap` and `smoothing` in `DistillationTask`.

    Known probabilities whose sum rounding has brought above 1 are scaled to 1; without a rest, and where all classes are
    known, they always are. An infinite value (a class that the other side lacks) has NaN in place of the gradient. A row of
    NaN, +inf or no class is NaN, and so is one of whose classes the teacher knows none, or names one that is none or is
    there twice. A label that is no class makes the cross-entropy NaN. Without a rest and a label, only the known classes'
    logits are read.
    """

    logits: Tensor
    ids: Tensor
    log_probs: Tensor
    labels: Tensor | None
    ignore_index: int
    weights: Tensor
    ce_weights: Tensor | None
    value_out: Tensor
    ce_out: Tensor | None
    grad: Tensor | None = None
    divergence: str = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    has_rest: bool = True
    cap: float = 0.0
    smoothing: float = 0.0


class LossTask(NamedTuple):
    """Losses of rows, summed up, of plain tensors; a row counts unless labels or mask leave it out.

    Attributes:
        jensen_shannon: the divergence is that one, not the symmetric KL.
        clean, noised: (..., classes) logits.
        labels: int64 (...); None: no cross-entropy. mask: bool (...); None: every row counts.
        ignore_index: the label of rows that do not count.
        kl_scale, ce_scale: what the sums of both terms are multiplied by.
        averaged: whether both sums are also divided by the number of rows that count (by 1 where none does).
        kl_everywhere: whether the divergence counts in every row, and its sum is not divided.
        kl_weight: of the divergence in the loss.
        items: what both sums are divided by, in place of the number of rows (0 gives 0): a real scalar on a device where
            reading it would wait. None: the scales say it all.
    """

    jensen_shannon: bool
    clean: Tensor
    noised: Tensor
    labels: Tensor | None = None
    mask: Tensor | None = None
    ignore_index: int = -100
    kl_scale: float = 1.0
    ce_scale: float = 1.0
    averaged: bool = False
    kl_everywhere: bool = False
    kl_weight: float = 1.0
    items: Tensor | None = None
