"""FreeLB: the loss on a path uphill in the embeddings (Zhu et al., ICLR 2020, 1909.11764)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fastpost.r3f.model import R3FOutput
from fastpost.r3f.relatives.base import DROPOUTS, Call, Method, replayed
from fastpost.r3f.relatives.delta import Delta


class FreeLB(Method):
    """Gradient of the mean loss over `adv_steps` points of an ascent on the embeddings (1909.11764, algorithm 1).

    delta_0 = adv_init_mag * U(-1, 1) / sqrt(L * d), L the text's length; then, `adv_steps` times, one forward and one
    backward pass: the parameters receive grad(CE(x + delta)) / adv_steps, and delta moves by adv_lr * g / ||g||_2, g its own
    gradient, back into the ball ||delta||_2 <= adv_max_norm. Norms are per text.

    **A training call runs its backward passes itself** and leaves the gradients in `.grad`, where they add up as ever:

        freelb = FreeLB(adv_steps=3)
        out = freelb(model, **batch)      # out.loss is detached: no backward() after it
        optimizer.step()

    All losses are detached and averaged over the steps, `out.logits` are the first step's, detached. In eval mode, one plain
    loss comes back with its graph and nothing runs backward.

    Args:
        adv_steps: K, >= 1. K = 1 is NEFTune with alpha = adv_init_mag, and without adv_init_mag plain fine-tuning.
        adv_lr: length of an ascent step in the 2-norm, in the units of the embeddings, >= 0.
        adv_init_mag: scale of the start, >= 0.
        adv_max_norm: radius of the ball, >= 0; 0: no projection. (Names as in the authors' code, which searched all four per
            task; the defaults are a place to begin.)
        dropout: "shared": the same masks in all steps, as in the paper, or "independent".
        backward: called with each step's loss, already divided by adv_steps; must run its backward pass. None: its
            `.backward()`. For loss scaling `lambda loss: scaler.scale(loss).backward()` (the ascent does not depend on the
            scale; a step that overflowed does not move delta), for gradient accumulation a division, for Accelerate
            `accelerator.backward`.
        options: `embedding`, `seed`, ...: as in `Method`.

    Raises:
        ValueError: an option out of range; an embedding that runs more than once in a pass. RuntimeError: `backward` left no
            gradient at the embeddings; gradients are disabled.
    """

    def __init__(
        self,
        adv_steps: int = 3,
        adv_lr: float = 1e-1,
        adv_init_mag: float = 2e-2,
        adv_max_norm: float = 0.0,
        *,
        dropout: str = "shared",
        backward: Callable[[Tensor], Any] | None = None,
        **options: Any,
    ) -> None:
        self.adv_steps, self.adv_lr = adv_steps, adv_lr
        self.adv_init_mag, self.adv_max_norm = adv_init_mag, adv_max_norm
        self.dropout, self.backward = dropout, backward
        super().__init__(**options)

    def _check(self) -> None:
        self._whole("adv_steps")
        self._at_least_zero("adv_lr", "adv_init_mag", "adv_max_norm")
        self._one_of("dropout", DROPOUTS)
        if self.backward is not None and not callable(self.backward):
            raise TypeError(f"FreeLB: backward must be callable or None, not {type(self.backward).__name__}")

    def _train(self, call: Call) -> R3FOutput:
        if not torch.is_grad_enabled():
            raise RuntimeError(
                "FreeLB: a training call runs backward passes, which torch.no_grad() forbids; use model.eval()"
            )
        start = self._by_length(call, self.adv_init_mag)
        delta = Delta(**{field.name: getattr(start, field.name) for field in fields(start)})
        losses: list[Tensor] = []
        logits: Tensor | None = None
        for step in range(1, self.adv_steps + 1):
            last = step == self.adv_steps
            with replayed(call, self.dropout == "shared" and not last):
                noised = self._noised(call, delta)
            loss = self._cross_entropy(call, noised) / self.adv_steps
            (self.backward or Tensor.backward)(loss)
            losses.append(loss.detach())
            logits = noised.detach() if logits is None else logits
            if not last:
                assert delta.value is not None
                if delta.value.grad is None:
                    raise RuntimeError("FreeLB: backward left no gradient at the embeddings; it must run loss.backward()")
                delta.ascend(delta.value.grad, self.adv_lr, 2, self.adv_max_norm)
        mean = torch.stack(losses).sum()
        return R3FOutput(loss=mean, task_loss=mean.clone(), symm_kl=torch.zeros_like(mean), logits=logits)
