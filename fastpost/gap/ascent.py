"""Adam uphill on one text, step by step: gradients, norm, sign and update, in float32 whatever the weights are."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastpost import plan
from fastpost.gap.later import Later
from fastpost.gap.rows import EmbeddedText, plain_embedding
from fastpost.gap.text import CausalLoss
from fastpost.ops.params import negate_clip_, squared_norm


class Ascent:
    """One run's optimizer and gradients.

    Args:
        model, weights: what is moved; all in eval mode.
        ids: the text, (1, n).
        lr, betas, eps: Adam's.
        fused: its one-kernel form, where the devices have it.
        loss: "negative" goes uphill, "mle" downhill.
        master_weights: step 16-bit weights in float32 copies, of which they are the casts.
        max_norm: clip to this global norm. max_grad_norm: make no step above it. None: neither.
        waits: whether to find out at once if a step has to be skipped. False leaves that to Adam's kernel where it can
            (its one-kernel form, on one device), so that no step waits for the device.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Sequence[nn.Parameter],
        ids: Tensor,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        fused: bool,
        loss: str,
        master_weights: bool,
        max_norm: float | None,
        max_grad_norm: float | None,
        waits: bool,
    ) -> None:
        self._loss_of = CausalLoss(model)
        self._weights = list(weights)
        self._ids = ids
        # torch's kernel walks memory from a weight's first element on: past a view with gaps, over its neighbours.
        self._fused = fused and all(p.device.type in ("cpu", "cuda") and plan.dense(p) for p in weights)
        uphill = loss == "negative"
        # Clipping flips signs in its own pass. Otherwise Adam does as it reads the gradients; its default form would copy
        # them all for that.
        self._flips = max_norm is not None or (uphill and not self._fused)
        self._maximize = uphill != self._flips
        self._waits = waits or not self._fused or len({p.device for p in weights}) > 1
        self._lr, self._betas, self._eps = lr, betas, eps
        self._master_weights = master_weights
        self._max_norm, self._max_grad_norm = max_norm, max_grad_norm
        embedding = plain_embedding(model)
        self._text = None if embedding is None else EmbeddedText(embedding)
        self._gradients: list[Tensor | None] = []
        self._adam: torch.optim.Adam | None = None
        self._stepped: list[Tensor] = []  # what Adam moves: each weight, its float32 master, or the text's rows of it
        self._only_rows = False

    @torch.no_grad()
    def loss(self) -> Later:
        """The text's loss now, nats per token."""
        return Later(self._loss_of(self._ids))

    def differentiate(self) -> Later:
        """Takes the gradients at the weights as they are; returns the loss, nats per token."""
        watching = self._text.watching() if self._text is not None else contextlib.nullcontext()
        with torch.enable_grad(), watching:
            loss = self._loss_of(self._ids)
            leaves = [] if self._text is None else self._text.leaves
            gradients = torch.autograd.grad(loss, [*self._weights, *leaves], allow_unused=True)
        count = len(self._weights)
        self._gradients = _own(gradients[:count], self._weights)
        if self._text is not None:
            self._add_rows(self._text, gradients[count:])
        return Later(loss)

    def _add_rows(self, text: EmbeddedText, of_leaves: tuple[Tensor | None, ...]) -> None:
        rows = text.gradient(of_leaves)
        k = next(k for k, p in enumerate(self._weights) if p is text.weight)
        whole = self._gradients[k]
        if self._adam is None:
            self._only_rows = whole is None
        elif self._only_rows != (whole is None):
            raise RuntimeError("GAP: the model uses its embedding's weight in some steps elsewhere too, in others not")
        if whole is None:
            self._gradients[k] = rows
        else:
            # index_add_ of rows that are all different: one addition each, as autograd would make it.
            whole.index_add_(0, text.rows, rows)

    def step(self) -> Later | None:
        """Moves the weights along the gradients taken last, unless one of them is not finite: then nothing changes.

        Returns:
            1 if the step was skipped, else 0. None: the gradients' norm is above `max_grad_norm`; nothing was written.
        """
        present = [g for g in self._gradients if g is not None]
        norm = negate_clip_(present, self._max_norm) if self._flips else squared_norm(present).sqrt()
        skipped = (norm * 0).ne_(0).float()  # infinity times 0 is NaN, which is not 0
        verdict = Later(skipped)
        if self._waits and verdict.value():
            return verdict
        if self._max_grad_norm is not None and float(norm) > self._max_grad_norm:
            return None
        if self._adam is None:
            self._stepped = [self._moved_by_adam(p) for p in self._weights]
            self._adam = torch.optim.Adam(
                self._stepped, lr=self._lr, betas=self._betas, eps=self._eps, maximize=self._maximize,
                fused=self._fused or None,
            )  # fmt: skip
        if not self._waits:
            self._adam.found_inf = skipped  # type: ignore[attr-defined]  # as GradScaler tells it
        for stepped, g in zip(self._stepped, self._gradients, strict=True):
            stepped.grad = None if g is None else g.to(stepped.dtype)
        self._adam.step()
        with torch.no_grad():
            for p, stepped in zip(self._weights, self._stepped, strict=True):
                stepped.grad = None
                if self._is_rows(p):
                    assert self._text is not None
                    p.index_copy_(0, self._text.rows, stepped.to(p.dtype))
                elif stepped is not p:
                    p.copy_(stepped)
        torch.clear_autocast_cache()  # or an enclosing autocast region would go on with its casts of the old weights
        return verdict

    def gradients(self) -> dict[int, Tensor]:
        """The gradients taken last, each as large as its weight, by the weight's id."""
        found: dict[int, Tensor] = {}
        for p, g in zip(self._weights, self._gradients, strict=True):
            if g is not None and self._is_rows(p):
                assert self._text is not None
                g = torch.zeros_like(p).index_copy_(0, self._text.rows, g)
            if g is not None:
                found[id(p)] = g
        return found

    def let_go(self) -> None:
        """Frees the gradients."""
        self._gradients = []

    def _is_rows(self, p: Tensor) -> bool:
        return self._only_rows and self._text is not None and p is self._text.weight

    @torch.no_grad()
    def _moved_by_adam(self, p: nn.Parameter) -> Tensor:
        wide = self._master_weights and p.dtype.itemsize == 2
        if self._is_rows(p):
            assert self._text is not None
            rows = p[self._text.rows]
            return rows.float() if wide else rows
        return p.detach().float() if wide else p


def _own(gradients: tuple[Tensor | None, ...], weights: list[nn.Parameter]) -> list[Tensor | None]:
    """Each gradient in memory of its own, laid out as its weight. Autograd promises neither outside of `.grad`, while
    `.grad` itself belongs to the caller, or to a flattened model's buffer."""
    seen: set[int] = set()
    owned: list[Tensor | None] = []
    for g, p in zip(gradients, weights, strict=True):
        if g is not None and (g.layout != torch.strided or g.stride() != p.stride() or g.data_ptr() in seen):
            g = torch.empty_like(p).copy_(g.to_dense() if g.layout != torch.strided else g)
        if g is not None and g.numel():
            seen.add(g.data_ptr())
        owned.append(g)
    return owned
