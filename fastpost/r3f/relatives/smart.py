"""SMART: the worst nearby embedding instead of a random one (Jiang et al. 1911.03437)."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastpost.ops.divergence import symmetric_kl
from fastpost.r3f.model import R3FOutput
from fastpost.r3f.relatives.base import DROPOUTS, Call, Method, replayed
from fastpost.r3f.relatives.delta import Delta


class SMART(Method):
    """CE(clean) + smart_lambda * symmetric KL(clean, adversarial), SMART's smoothness-inducing regulariser (1911.03437).

    The perturbation starts at N(0, sigma^2) and takes `steps` steps of step_size * g / ||g||_inf uphill on the symmetric KL,
    each followed by a projection into the ball ||.||_inf <= eps (algorithm 1). It then counts as a constant: the
    KL sends gradients into both branches, the adversarial one's embeddings included. Norms are taken per text, so that a
    text's perturbation does not depend on its batch; public code takes them per token.

    What is left out: the Bregman proximal term, which holds the outputs near those of a moving average of the weights.

        smart = SMART()
        smart(model, **batch).loss.backward()

    Per step 2 + `steps` forward and as many backward passes. With smart_lambda = 0 it is plain cross-entropy, bit for bit.

    Args:
        smart_lambda: weight of the KL, >= 0.
        eps, step_size, sigma: radius, step and start, in the units of the embeddings, >= 0 (defaults as in the paper).
        steps: ascent steps, >= 1.
        dropout: "independent" masks in every pass, as in public code: the ascent then climbs a difference that is mostly
            dropout's. "shared": one set of masks for all passes of a step.
        options: `embedding`, `seed`, ...: as in `Method`.

    Raises:
        ValueError: an option out of range; an embedding that runs more than once in a pass.
    """

    def __init__(
        self,
        smart_lambda: float = 1.0,
        eps: float = 1e-5,
        *,
        step_size: float = 1e-3,
        sigma: float = 1e-5,
        steps: int = 1,
        dropout: str = "independent",
        **options: Any,
    ) -> None:
        self.smart_lambda, self.eps = smart_lambda, eps
        self.step_size, self.sigma, self.steps, self.dropout = step_size, sigma, steps, dropout
        super().__init__(**options)

    def _check(self) -> None:
        self._at_least_zero("smart_lambda", "eps", "step_size", "sigma")
        self._whole("steps")
        self._one_of("dropout", DROPOUTS)

    def _train(self, call: Call) -> R3FOutput:
        if self.smart_lambda == 0:
            return self._plain(call, self._clean(call))
        delta = Delta(self.sigma, "normal", self._seed(call), detach=False)
        shared = self.dropout == "shared"
        with replayed(call, shared):
            clean = self._clean(call)
        counts = self._targets(call, clean) != self.ignore_index
        for _ in range(self.steps):
            with replayed(call, shared), torch.enable_grad():
                noised = self._noised(call, delta)
            assert delta.value is not None
            kl = symmetric_kl(clean.detach(), noised, mask=counts, reduction="sum")
            (gradient,) = torch.autograd.grad(kl, delta.value)
            delta.ascend(gradient, self.step_size, math.inf, self.eps)
        assert delta.value is not None
        delta.value = delta.value.detach()
        loss, task, kl = self._with_kl(call, clean, self._noised(call, delta), self.smart_lambda)
        return R3FOutput(loss=loss, task_loss=task, symm_kl=kl, logits=clean)
