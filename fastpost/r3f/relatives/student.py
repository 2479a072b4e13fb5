"""NoisedStudent: the clean outputs teach the noised ones, which carry the task too."""

from __future__ import annotations

from typing import Any

import torch

from fastpost.ops.noise import check_noise
from fastpost.r3f.model import R3FOutput
from fastpost.r3f.noise import Noise
from fastpost.r3f.relatives.base import DROPOUTS, Call, Method, replayed


class NoisedStudent(Method):
    """CE(noised) + r3f_lambda * symmetric KL(clean as constant, noised).

    The one-branch relative of R3F: two forward passes, of which the clean one has no graph, and one backward pass, so four
    units where R3F takes six (a backward pass counted as two). It is another method and so has its own name: the gradient of
    the KL falls as eps where that of R3F, whose branches cancel to first order, falls as eps^2, and its direction is that of
    R3F only at large eps. As in virtual adversarial training (1704.03976) the clean outputs are a fixed teacher; as in
    NEFTune the task is learnt on noised embeddings.

        student = NoisedStudent(eps=0.05)
        student(model, **batch).loss.backward()

    `out.logits` are the clean pass's, detached; `out.task_loss` is the noised pass's cross-entropy. With eps = 0 and dropout
    shared or off, the KL is exactly 0.

    Args:
        eps: scale of the noise in the units of the embeddings, >= 0. It should be large enough to change outputs.
        r3f_lambda: weight of the KL, >= 0; at 0 there is no clean pass, and `out.logits` are the noised pass's.
        noise_type: "uniform" on (-eps, eps), or "normal" with standard deviation eps.
        dropout: "independent" masks in teacher and student, or "shared".
        options: `embedding`, `seed`, ...: as in `Method`.

    Raises:
        ValueError: an option out of range.
    """

    def __init__(
        self,
        eps: float = 1e-2,
        r3f_lambda: float = 1.0,
        noise_type: str = "uniform",
        *,
        dropout: str = "independent",
        **options: Any,
    ) -> None:
        self.eps, self.r3f_lambda, self.noise_type, self.dropout = eps, r3f_lambda, noise_type, dropout
        super().__init__(**options)

    def _check(self) -> None:
        check_noise("NoisedStudent", self.eps, self.noise_type)
        self._at_least_zero("r3f_lambda")
        self._one_of("dropout", DROPOUTS)

    def _train(self, call: Call) -> R3FOutput:
        noise = Noise(self.eps, self.noise_type, self._seed(call), detach=False, measured=self._measured)
        if self.r3f_lambda == 0:
            return self._plain(call, self._noised(call, noise))
        # The pass with a graph comes first: under autocast, weights cached by a pass without one would have none either.
        with replayed(call, self.dropout == "shared"):
            noised = self._noised(call, noise)
        with torch.no_grad():
            clean = self._clean(call)
        loss, task, kl = self._with_kl(call, noised, clean, self.r3f_lambda)
        return R3FOutput(loss=loss, task_loss=task, symm_kl=kl, logits=clean)
