"""Anchor: cross-entropy plus a divergence from a reference, with logits never whole where the head is a plain matrix."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fastpost.anchor.context import FIELDS, InContext, Teaching, teaching, without_context
from fastpost.anchor.references import Frozen, Reference
from fastpost.distributed import unwrap
from fastpost.errors import unknown
from fastpost.ops.linear_distillation import DIVERGENCES, DistillationOptions, OutputLayer, distillation_loss_of
from fastpost.ops.scalars import check_number, check_real, check_whole
from fastpost.r3f.conventions import (
    align_labels,
    beside_virtual_tokens,
    check_rows,
    named,
    take_batch,
)
from fastpost.r3f.head import Head, find_head, fused_head, last_stream

WEIGHTINGS = ("none", "dft")


@dataclass
class AnchorOutput:
    """What one call of Anchor gives back.

    Attributes:
        loss: scalar to call backward() on: ce_weight * task_loss + anchor_kl * divergence.
        task_loss: the cross-entropy, its tokens weighted as asked, a detached scalar; 0 where ce_weight is 0.
        divergence: D(model, reference) before its weight, a detached scalar; 0 where there was no reference pass.
        logits: of the model, with their graph; None where the fused head never made them.
    """

    loss: Tensor
    task_loss: Tensor
    divergence: Tensor
    logits: Tensor | None


class Anchor:
    """Cross-entropy plus anchor_kl times a divergence from a reference, at the rows whose labels count.

        L = sum over t of  ce_weight c_t CE_t + anchor_kl D(p_t, q_t),  over the number of labels that count

    q is the model's prediction, p the reference's, whose pass is made first, in eval mode and without a graph. c_t is 1, or
    under weighting="dft" the probability that the model gives the label, without a gradient (DFT, 2508.05629). DFT with
    an anchor is ASFT (2509.23753): its text writes KL(q || p), its released code has KL(p || q) with the weight 0.1.

        anchor = Anchor(Frozen.copy_of(model), 0.1)
        anchor(model, **batch).loss.backward()         # a model in training mode, a batch with labels
        optimizer.step()
        anchor.reference.update(model)                 # for an average

    Self-distillation from a context is `Anchor(InContext(...), 1.0, ce_weight=0.0)`, on batches that `InContext` describes.

    Serves the models and batches that `fastpost.R3F` serves. In eval mode the loss is plain cross-entropy, and the reference
    is not run.

    Memory: beside a training step's own, the hidden states of the reference (rows x width) and a chunk of both streams'
    logits under `memory_budget`. Where a side has no plain head its logits are held whole; the student's gradients then take
    as much again.

    Args:
        reference: what the model is held to; a module is taken for `Frozen(module)`. None: nothing, with anchor_kl = 0.
        anchor_kl: weight of the divergence, >= 0. 0: no reference pass.
        divergence: "forward_kl", KL(p || q); "reverse_kl", KL(q || p); "symmetric_kl", "js", "total_variation", as in
            `linear_distillation_loss`.
        beta: of "js".
        weighting: "none" or "dft".
        ce_weight: weight of the cross-entropy, >= 0; 0 leaves the divergence alone.
        label_smoothing: in [0, 1), of the cross-entropy in training, in torch's convention. With "dft" the probability
            weighs the smoothed cross-entropy.
        fused_linear: hidden states and head go into `linear_distillation_loss`. None: for each of the two models whose head
            is a plain nn.Linear, and which does no more to its logits than caps and scales that its config names; the
            other's logits are held. True: an error where it is not so. False: logits.
        shift_labels, ignore_index: as in R3F.
        memory_budget: bytes for a chunk of logits.

    Raises:
        ValueError, TypeError: an option that does not exist or is out of range.
    """

    def __init__(
        self,
        reference: Reference | nn.Module | None,
        anchor_kl: float = 0.1,
        *,
        divergence: str = "forward_kl",
        beta: float = 0.5,
        weighting: str = "none",
        ce_weight: float = 1.0,
        label_smoothing: float = 0.0,
        fused_linear: bool | None = None,
        shift_labels: bool | None = None,
        ignore_index: int = -100,
        memory_budget: int = 1 << 30,
    ) -> None:
        if isinstance(reference, nn.Module):
            reference = Frozen(reference)
        if reference is not None and not isinstance(reference, Reference):
            raise TypeError(f"Anchor: reference must be a Reference, a module or None, not {type(reference).__name__}")
        self.reference = reference
        self.anchor_kl, self.divergence, self.beta, self.weighting = anchor_kl, divergence, beta, weighting
        self.ce_weight, self.label_smoothing = ce_weight, label_smoothing
        self.fused_linear, self.shift_labels, self.ignore_index = fused_linear, shift_labels, ignore_index
        self.memory_budget = memory_budget
        self._check()

    def _check(self) -> None:
        """Attributes may be changed between steps (schedules), so they are checked at every one."""
        for name in ("anchor_kl", "ce_weight"):
            check_number("Anchor", name, getattr(self, name))
        for name in ("label_smoothing", "beta"):
            check_real("Anchor", name, getattr(self, name))
        check_whole("Anchor", "ignore_index", self.ignore_index)
        for name, valid in (("divergence", DIVERGENCES), ("weighting", WEIGHTINGS)):
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), valid)
        if self.divergence == "js" and not 0 < self.beta < 1:
            raise ValueError(f"Anchor: beta must lie in (0, 1), not {self.beta}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"Anchor: label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        if not self.ce_weight and (not self.anchor_kl or self.label_smoothing or self.weighting != "none"):
            what = "anchor_kl=0 leaves no loss" if not self.anchor_kl else "weighting and label_smoothing weigh nothing"
            raise ValueError(f"Anchor: ce_weight=0 leaves the cross-entropy out, so {what}; leave one of them out")
        if self.anchor_kl and self.reference is None:
            raise ValueError(f"Anchor: anchor_kl={self.anchor_kl:g} needs a reference; give one, or anchor_kl=0")

    def __call__(self, model: Any, /, *, num_items: float | Tensor | None = None, **batch: Any) -> AnchorOutput:
        """Runs reference and model on the batch.

        Args:
            model: called as `model(**batch)` without the labels.
            num_items: what both sums are divided by, instead of the labels of this batch that count (gradient accumulation;
                transformers' `num_items_in_batch`, which is also taken from the batch).
            batch: the model's inputs and `labels`, integers of shape (batch,) or (batch, time). `shift_labels`, shifted
                already, stand in their place, as in transformers' losses. For a teacher in a context, the fields that
                `InContext` describes.

        Raises:
            ValueError: labels that are missing, out of range or of the wrong shape; a model whose loss has a part for its
                router; a reference with another vocabulary or
                other rows; what the reference refuses.
        """
        self._check()
        with named("Anchor"):
            root = unwrap(model)
            own = self._read_by_model(root, batch)
            labels, shift, inputs, num_items = take_batch(root, own, self.shift_labels, self.ignore_index, num_items)
            training = bool(getattr(model, "training", True))
            teacher, seen = self._teacher(root, inputs, labels, batch) if training and self.anchor_kl else (None, None)
            labels = labels if seen is None else seen.labels
            inputs = _without_cache(root, inputs)
            head = self._head(fused_head, model, root, inputs) if training else None
            stream = last_stream(model, root, head, inputs)
            labels = beside_virtual_tokens(root, labels, stream, self.ignore_index)
            check_rows(labels, stream, stream.shape[-1] if head is None else len(head.linear.weight), self.ignore_index)
            labels = labels.to(stream.device)
            targets = align_labels(root, labels, stream, shift, self.ignore_index)
            if seen is not None and teacher is not None:
                teacher = teacher._replace(hidden=seen.rows_for(teacher.hidden, stream, shifted=targets is not labels))
        weighting = "probability" if training and self.weighting == "dft" else "none"
        options = DistillationOptions(
            self.divergence, self.beta, divergence_weight=self.anchor_kl, ce_weight=self.ce_weight if training else 1.0,
            ce_weighting=weighting, ignore_index=self.ignore_index, num_items=num_items, memory_budget=self.memory_budget,
            label_smoothing=self.label_smoothing if training else 0.0,
        )  # fmt: skip
        loss, task, divergence = distillation_loss_of("Anchor", _output_layer(stream, head), teacher, targets, options)
        return AnchorOutput(loss, task, divergence, stream if head is None else None)

    def _read_by_model(self, root: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """What the model itself takes of a batch."""
        if isinstance(self.reference, InContext):
            return without_context(batch)
        takes = _parameters(root)
        if ignored := [name for name in FIELDS if batch.get(name) is not None and name not in takes]:
            raise ValueError(
                f"Anchor: the batch has {ignored[0]}, which neither the model nor its reference reads; wrap the reference "
                "in InContext (in trainers: anchor='context'), or leave the field out"
            )
        return batch

    def _teacher(
        self, root: Any, inputs: dict[str, Any], labels: Tensor, batch: dict[str, Any]
    ) -> tuple[OutputLayer, Teaching | None]:
        """The reference's stream and head, and of a teacher in a context what it has read."""
        assert self.reference is not None
        with self.reference.opened(root) as reference:
            inner = unwrap(reference)
            seen = None
            if isinstance(self.reference, InContext):
                seen = teaching(root, inner, batch, inputs, labels, self.ignore_index, self.shift_labels)
                inputs = seen.inputs
            inputs = _without_cache(inner, inputs)
            head = self._head(find_head, inner, inputs)
            return _output_layer(last_stream(reference, inner, head, inputs), head), seen

    def _head(self, find: Any, *of: Any) -> Head | None:
        if self.fused_linear is False:
            return None
        try:
            found: Head = find(*of)
        except ValueError:
            if self.fused_linear:
                raise
            return None
        return found


def _output_layer(stream: Tensor, head: Head | None) -> OutputLayer:
    """A stream and its head; logits that the model divides by a number are those of hidden states so divided."""
    if head is None:
        return OutputLayer(stream)
    t, bias, cap = head.temperature, head.bias, head.softcap
    if t == 1:
        return OutputLayer(stream, head.linear.weight, bias, cap)
    return OutputLayer(stream / t, head.linear.weight, None if bias is None else bias / t, None if cap is None else cap / t)


def _without_cache(root: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, and what keeps the model from filling a cache for generation, where it has one."""
    return {"use_cache": False, **inputs} if "use_cache" in _parameters(root) else inputs


def _parameters(root: Any) -> Mapping[str, Any]:
    """The parameters that a model's forward names."""
    owner = root.get_base_model() if callable(getattr(root, "get_base_model", None)) else root
    forward = getattr(owner, "forward", None)
    return inspect.signature(forward).parameters if callable(forward) else {}
