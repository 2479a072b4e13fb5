"""R-Drop: two dropout masks, one answer (Liang et al. 2106.14448)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
        forward: "two_pass", or "double_batch": one pass over the batch twice, as in the paper's code; tensors whose first
            dimension is the batch size are doubled. Same loss in distribution; the same bits without dropout only up to
            rounding.
        options: `shift_labels`, `ignore_index`, ...: as in `Method`.

    Raises:
        ValueError: an option out of range; in a double batch, a model that gives another number of rows.
    """

    def __init__(self, alpha: float = 1.0, *, forward: str = "two_pass", **options: Any) -> None:
        self.alpha, self.forward = alpha, forward
        super().__init__(**options)

    def _check(self) -> None:
        self._at_least_zero("alpha")
        self._one_of("forward", FORWARDS)

    def _train(self, call: Call) -> R3FOutput:
        first, second = self._double(call) if self.forward == "double_batch" else (self._clean(call), self._clean(call))
        # The first cross-entropy comes out of the KL's pass over both logits.
        loss, task, kl = self._with_kl(call, first, second, self.alpha)
        other = self._cross_entropy(call, second)
        return R3FOutput(loss=(loss + other) / 2, task_loss=(task + other.detach()) / 2, symm_kl=kl / 2, logits=first)

    def _double(self, call: Call) -> tuple[Tensor, Tensor]:
        rows = call.labels.shape[0]
        inputs = {
            name: torch.cat((value, value)) if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
            for name, value in call.inputs.items()
        }
        twice = Call(call.model, call.root, inputs, torch.cat((call.labels, call.labels)), call.num_items)
        first, second = self._clean(twice).chunk(2)
        return first, second
