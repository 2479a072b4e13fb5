"""NEFTune: uniform noise on the embeddings, scaled by the text's length (Jain et al. 2310.05914)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastpost.r3f.model import R3FOutput
from fastpost.r3f.noise import Noise
from fastpost.r3f.relatives.base import Call, Method

LENGTHS = ("true", "padded")


@dataclass
class _PaddedLength(Noise):
    """eps / sqrt(L * d) with the width of the batch for L."""

    def _scales(self, x: Tensor, keep: Tensor | None) -> Tensor | None:
        return x.new_full(x.shape[:-1], 1 / math.sqrt(x.shape[-2] * x.shape[-1]))


class NEFTune(Method):
    """Cross-entropy on embeddings + alpha / sqrt(L * d) * U(-1, 1): one pass, no KL (2310.05914, algorithm 1).

        neftune = NEFTune(alpha=5)
        neftune(model, **batch).loss.backward()

    Gradients flow into the embedding table. `out.logits` are the noised pass's, `out.symm_kl` is 0. With alpha = 0 no number
    is drawn and the loss is plain cross-entropy, bit for bit.

    Args:
        alpha: scale, >= 0; 5, 10 and 15 in the paper.
        length: what L counts. "true": the tokens of each text, as in the paper, so that padding changes nothing, and in
            packed rows those of each sequence; "padded": the width of the batch, as in common code (transformers, TRL),
            where short texts in wide batches get less. Noise stays off padding either way.
        options: `embedding`, `seed`, ...: as in `Method`.

    Raises:
        ValueError: an option out of range; a packed batch that does not say where its sequences begin.
    """

    def __init__(self, alpha: float = 5.0, *, length: str = "true", **options: Any) -> None:
        self.alpha, self.length = alpha, length
        super().__init__(**options)

    def _check(self) -> None:
        self._at_least_zero("alpha")
        self._one_of("length", LENGTHS)

    def _train(self, call: Call) -> R3FOutput:
        if self.alpha == 0:
            return self._plain(call, self._clean(call))
        noise: Noise
        if self.length == "padded":
            noise = _PaddedLength(self.alpha, "uniform", self._seed(call), False, self._measured)
        else:
            noise = self._by_length(call, self.alpha)
        return self._plain(call, self._noised(call, noise))
