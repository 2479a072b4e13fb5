"""SymNoise: paired noise, the embeddings h + d and h - d (2312.01523, 2605.23171)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from fastpost.ops.noise import add_noise
from fastpost.r3f.model import R3FOutput
from fastpost.r3f.noise import Noise, handed_on
from fastpost.r3f.relatives.base import Call, Method

KINDS = ("sign", "uniform", "normal")


@dataclass
class _Paired(Noise):
    """side * eps * scale * z, with the same z on both sides.

    Attributes:
        side: 1 or -1.
        signs: z is 1 or -1, the sign of a uniform number.
    """

    side: int = 1
    signs: bool = True

    def add(self, x: Tensor, keep: Tensor | None, call: int = 0) -> Tensor:
        drawn = self._drawn(x, keep, call)
        scale = drawn.pop("scale")
        wide = torch.promote_types(x.dtype, torch.float32)
        z = add_noise(torch.zeros_like(x, dtype=wide).detach(), 1.0, self.noise_type, keep=keep, **drawn)
        if self.signs:
            z = z.sign()  # 0 stays 0 at padding
        moved: Tensor = x.to(wide) + self.side * self.eps * scale[..., None].to(wide) * z
        return moved.to(handed_on(x))


class SymNoise(Method):
    """Cross-entropy on h + d and on h - d: L = (CE(h + d) + CE(h - d)) / 2 + r3f_lambda * symmetric KL of the two.

    d = alpha / sqrt(L * d) * z with z = 1 or -1, each with probability one half (2312.01523, 2605.23171, whose loss is that
    of r3f_lambda = 0). What is of first order in d cancels in the mean: beside CE(h) the curvature remains. The KL is
    R3F's, between the two sides in place of the clean outputs and the noised ones: it asks for f(h + d) = f(h - d), which
    the papers give as their aim, directly. Two passes forward and back::

        symnoise = SymNoise(alpha=5)
        symnoise(model, **batch).loss.backward()

    Gradients flow into the embedding table. `out.logits` are those at h + d. With alpha = 0 and r3f_lambda = 0 there is one
    pass, no number is drawn and the loss is plain cross-entropy, bit for bit.

    Args:
        alpha: scale, >= 0, as NEFTune's. d has sqrt(3) times the norm of NEFTune's noise of the same alpha.
        r3f_lambda: weight of the KL, >= 0.
        noise_type: "sign", or "uniform" on (-1, 1) or "normal" for z.
        options: `embedding`, `seed`, ...: as in `Method`.

    Raises:
        ValueError: an option out of range; a packed batch that does not say where its sequences begin.
    """

    def __init__(self, alpha: float = 5.0, r3f_lambda: float = 0.0, noise_type: str = "sign", **options: Any) -> None:
        self.alpha, self.r3f_lambda, self.noise_type = alpha, r3f_lambda, noise_type
        super().__init__(**options)

    def _check(self) -> None:
        self._at_least_zero("alpha", "r3f_lambda")
        self._one_of("noise_type", KINDS)

    def _train(self, call: Call) -> R3FOutput:
        if self.alpha == 0 and self.r3f_lambda == 0:
            return self._plain(call, self._clean(call))
        known = self._by_length(call, self.alpha)
        noise = _Paired(**{field.name: getattr(known, field.name) for field in fields(known)})
        noise.signs = self.noise_type == "sign"
        noise.noise_type = "uniform" if noise.signs else self.noise_type
        plus = self._noised(call, noise)
        noise.side = -1
        minus = self._noised(call, noise)
        other = self._cross_entropy(call, minus)
        if self.r3f_lambda == 0:
            task = (self._cross_entropy(call, plus) + other) / 2
            return R3FOutput(loss=task, task_loss=task.detach(), symm_kl=torch.zeros_like(task), logits=plus)
        # The first cross-entropy comes out of the KL's pass over both logits.
        loss, task, kl = self._with_kl(call, plus, minus, 2 * self.r3f_lambda)
        return R3FOutput(loss=(loss + other) / 2, task_loss=(task + other.detach()) / 2, symm_kl=kl, logits=plus)
