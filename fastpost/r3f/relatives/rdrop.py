"""R-Drop: two dropout masks, one answer (Liang et al. 2106.14448)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastpost.ops.linear_divergence import linear_r_drop_loss
from fastpost.ops.scalars import POSITIVE, check_number
from fastpost.r3f.conventions import doubled
from fastpost.r3f.head import Head, fused_head, last_stream
from fastpost.r3f.model import OPTIONS, R3FOutput
from fastpost.r3f.relatives.base import Call, Method

FORWARDS = OPTIONS["forward"]


class RDrop(Method):
    """L = (CE1 + CE2) / 2 + alpha * (KL(p1 || p2) + KL(p2 || p1)) / 2 over two passes that differ in dropout alone.

    2106.14448, section 2; the paper's formula sums the two cross-entropies, its code averages them, which is what is done
    here. Without dropout in the model the KL is exactly 0 and the loss plain cross-entropy, at twice the price.

        rdrop = RDrop(alpha=1.0)
        rdrop(model, **batch).loss.backward()

    `out.symm_kl` is half the symmetric KL, so that loss = task_loss + alpha * symm_kl; `out.logits` are the first pass's. No
    noise is drawn, so that `embedding` and `seed` change nothing.

    Args:
        alpha: weight of the KL, >= 0. At 0 the cross-entropies of both passes remain.
        forward: "two_pass", or "double_batch": one pass over the batch twice, as in the paper's code; tensors are doubled as
            in R3F. Same loss in distribution; the same bits without dropout only up to rounding.
        fused_linear: for models with a vocabulary: hidden states and the output head's weight go into `linear_r_drop_loss`,
            and logits are never held whole. The head must be a plain nn.Linear, tied or not; `out.logits` is None in
            training. What models may do to their logits: as in R3F.
        memory_budget: bytes for a chunk of logits under `fused_linear`.
        options: `shift_labels`, `ignore_index`, ...: as in `Method`.

    Raises:
        ValueError: an option out of range; in a double batch, a model that gives another number of rows; under
            `fused_linear`, a model whose head cannot be taken out.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        forward: str = "two_pass",
        fused_linear: bool = False,
        memory_budget: int = 1 << 30,
        **options: Any,
    ) -> None:
        self.alpha, self.forward = alpha, forward
        self.fused_linear, self.memory_budget = fused_linear, memory_budget
        super().__init__(**options)

    def _check(self) -> None:
        self._at_least_zero("alpha")
        self._one_of("forward", FORWARDS)
        check_number("RDrop", "memory_budget", self.memory_budget, POSITIVE)

    def _train(self, call: Call) -> R3FOutput:
        head = self._head(call) if self.fused_linear else None
        if self.forward == "double_batch":
            first, second = self._pass(self._twice(call), head).chunk(2)
        else:
            first, second = self._pass(call, head), self._pass(call, head)
        if head is not None:
            loss, task, kl = linear_r_drop_loss(
                first, second, head.linear.weight, self._targets(call, first), bias=head.bias, alpha=self.alpha,
                ignore_index=self.ignore_index, num_items=call.num_items, softcap=head.softcap, temperature=head.temperature,
                memory_budget=self.memory_budget,
            )  # fmt: skip
            return R3FOutput(loss=loss, task_loss=task, symm_kl=kl, logits=None)
        # The first cross-entropy comes out of the KL's pass over both logits.
        loss, task, kl = self._with_kl(call, first, second, self.alpha)
        other = self._cross_entropy(call, second)
        return R3FOutput(loss=(loss + other) / 2, task_loss=(task + other.detach()) / 2, symm_kl=kl / 2, logits=first)

    def _head(self, call: Call) -> Head:
        with self._named():
            return fused_head(call.model, call.root, call.inputs)

    def _pass(self, call: Call, head: Head | None) -> Tensor:
        """Logits of one forward pass, or the hidden states before a head that is taken out."""
        if head is None:
            return self._clean(call)
        with self._named():
            states = last_stream(call.model, call.root, head, call.inputs)
            self._fits(call, states, head.linear.weight.shape[0])
        return states

    def _twice(self, call: Call) -> Call:
        with self._named():
            inputs = doubled(call.root, call.inputs, call.labels.shape[0])
        return replace(call, inputs=inputs, labels=torch.cat((call.labels, call.labels)))
