"""SAM over the micro-batches of one optimizer step (gradient accumulation)."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpost.rng import RandomState
from fastpost.sam.optimizer import SAM
from fastpost.sam.options import check_dropout_rng, check_fraction
from fastpost.sam.variants import Variant
from fastpost.sam.wrapped import find_sam

ForwardBackward = Callable[[Any], Any]
NoSync = Callable[[], contextlib.AbstractContextManager[Any]]


class SAMWindow:
    """Both passes of a SAM step over a window of n micro-batches, up to the optimizer's step, which stays the caller's.

    The ascent gradient is that of the first ceil(ascent_fraction * n) micro-batches; the descent gradient is that of all n,
    at the one perturbed point (2110.08529 takes a quarter). Micro-batches of the ascent are run twice and kept until then,
    later ones run once, at w + e. After the last one w is back and the gradients are the second pass's, ready for
    `unscale_`, clipping and `step()`::

        window = SAMWindow(opt, lambda batch: backward_of(loss_fn(model, batch) / 4))   # forward and backward of one
        for batches in windows_of_four:
            losses = window.run(batches)
            opt.step()

        window.open(4)                        # or one by one, as trainers get them
        loss = window.feed(batch)             # four times; the fourth closes the window
        opt.step()

    Args:
        optimizer: a SAM, or a wrapper that keeps one as `.optimizer` (Accelerate, Lightning, Fabric).
        forward_backward: takes a micro-batch, computes its loss, calls backward (on the scaled loss, where there is a
            GradScaler) and returns what should be handed back, usually the loss. It divides by the number of micro-batches,
            as in any accumulation.
        ascent_fraction: overrides the optimizer's.
        per_micro_batch: m-SAM (2302.09693): every micro-batch is perturbed by its own gradient; the second gradients add up.
        dropout_rng: overrides the optimizer's. "same": each micro-batch draws in its second pass what it drew in its first,
            and the generators go on as they would have without SAM.
        no_sync: opens a context without gradient synchronisation, such as `model.no_sync` of DDP. It is entered around
            forward and backward of all micro-batches but the last of each pass; with `sync_ascent=False` around the whole
            ascent, which then uses each replica's own gradient.
        model: the model, where the optimizer was not given it: so that each micro-batch moves the running statistics of norm
            layers once, in its first pass, as the optimizer's `norm_stats` says.

    Attributes:
        size: micro-batches announced for the open window.
        perturbed_losses: what `forward_backward` returned at w + e, in the order of the micro-batches.

    Raises:
        TypeError: `optimizer` is no SAM.
        ValueError: options that contradict each other or lie outside their range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        forward_backward: ForwardBackward,
        *,
        ascent_fraction: float | None = None,
        per_micro_batch: bool = False,
        dropout_rng: str | None = None,
        no_sync: NoSync | None = None,
        model: nn.Module | None = None,
    ) -> None:
        found = find_sam(optimizer)
        if not isinstance(found, SAM):
            raise TypeError(f"SAMWindow: optimizer must be a fastpost.SAM, not {type(optimizer).__name__}")
        self.optimizer = found
        self.ascent_fraction = found.ascent_fraction if ascent_fraction is None else ascent_fraction
        self.dropout_rng = found.dropout_rng if dropout_rng is None else dropout_rng
        self.per_micro_batch = per_micro_batch
        check_fraction("SAMWindow", self.ascent_fraction)
        check_dropout_rng(self.dropout_rng)
        if per_micro_batch and self.ascent_fraction != 1:
            raise ValueError(
                f"SAMWindow: per_micro_batch perturbs by every micro-batch, which leaves no ascent_fraction of "
                f"{self.ascent_fraction}; pass ascent_fraction=1.0"
            )
        if per_micro_batch and (found.variant.keeps_gradient or _rewrites(found.variant)):
            raise ValueError(
                f"SAMWindow: {type(found.variant).__name__} combines the gradients of two whole passes; use it without "
                "per_micro_batch"
            )
        if found.sync_ascent is False and no_sync is None:
            raise ValueError(
                "SAMWindow: sync_ascent=False lets each replica ascend by its own gradient, which takes a backward pass "
                "that does not synchronise: pass no_sync (model.no_sync, fastpost.distributed.no_sync)"
            )
        if model is not None:
            found.set_model(model)
        self._forward_backward = forward_backward
        self._no_sync = no_sync
        self.size = 0
        self.perturbed_losses: list[Any] = []
        self._fed = self._ascending = 0
        self._kept: list[tuple[Any, RandomState]] = []

    def run(self, micro_batches: Iterable[Any]) -> list[Any]:
        """A whole window; returns what `forward_backward` returned for each micro-batch the first time it ran."""
        window = list(micro_batches)
        self.open(len(window))
        return [self.feed(micro_batch) for micro_batch in window]

    def open(self, size: int) -> None:
        """Begins a window of `size` micro-batches and drops the gradients.

        Raises:
            ValueError: size < 1.
            RuntimeError: a window is open, or the optimizer is perturbed.
        """
        if size < 1:
            raise ValueError(f"SAMWindow: a window has at least one micro-batch, not {size}")
        if self.is_open:
            raise RuntimeError(f"SAMWindow: a window is open with {self._fed} of {self.size} micro-batches; close() it")
        if self.optimizer.is_perturbed:
            raise RuntimeError("SAMWindow: the optimizer is perturbed; finish its step first")
        self.optimizer.zero_grad()
        self.optimizer.in_window = True
        self.size, self._fed = size, 0
        self.perturbed_losses = []
        ascends = self.optimizer.ascends and self.optimizer.variant.ascent_pass
        # 0.07 * 100 is 7.000000000000001
        self._ascending = math.ceil(self.ascent_fraction * size * (1 - 1e-12)) if ascends else 0

    @property
    def is_open(self) -> bool:
        """Whether micro-batches are still expected."""
        return self.size > 0

    def feed(self, micro_batch: Any) -> Any:
        """Runs one micro-batch; the last one closes the window.

        Args:
            micro_batch: passed to `forward_backward`, a second time where it takes part in the ascent: lists and mappings
                as a shallow copy, so that a pass may take entries out.

        Returns:
            What `forward_backward` returned the first time it ran: at w for a micro-batch of the ascent, else at w + e.

        Raises:
            RuntimeError: no window is open.
        """
        if not self.is_open:
            raise RuntimeError("SAMWindow: no window is open; open() one with the number of micro-batches to come")
        self._fed += 1
        last = self._fed == self.size
        try:
            if self._fed > self._ascending:
                if self._fed == 1 and self.optimizer.ascends:  # a variant that needs no ascent pass
                    self.optimizer.first_step(zero_grad=True)
                result = self._pass(micro_batch, sync=last)
                if self.optimizer.is_perturbed:
                    self.perturbed_losses.append(result)
            elif self.per_micro_batch:
                result = self._ascend_alone(micro_batch, last)
            else:
                result = self._ascend(micro_batch)
            if last:
                self.close()
        except BaseException:
            self.abort()
            raise
        return result

    def shorten(self) -> None:
        """Makes the micro-batch that is fed next the last one, as where the data end."""
        self.size = self._fed + 1
        self._ascending = min(self._ascending, self.size)

    def close(self) -> None:
        """Ends the window early, as at the end of an epoch: ascent and descent are over what has been fed.

        Does nothing where no window is open; a window that was fed nothing leaves nothing to step with.

        Raises:
            RuntimeError: with `no_sync`, after some but not all micro-batches: only the last one announced synchronises, and
                without it ranks would step apart. The window is then given up.
        """
        if not self.is_open:
            return
        if self._no_sync is not None and 0 < self._fed < self.size:
            fed, size = self._fed, self.size
            self.abort()
            raise RuntimeError(
                f"SAMWindow: closed after {fed} of {size} micro-batches, before the one that synchronises gradients; open() "
                "a short window with its own number, or leave no_sync out"
            )
        try:
            if self._kept:
                self._turn()
            self.optimizer.end_ascent()
        except BaseException:
            self.abort()
            raise
        self._over()

    def abort(self) -> None:
        """Gives the window up: w is back, the micro-batches are let go, no gradient is left."""
        self._kept = []
        self._over()
        self.optimizer.abandon()

    def _over(self) -> None:
        self.size = 0
        self.optimizer.in_window = False

    def _ascend(self, micro_batch: Any) -> Any:
        kept = _copied(micro_batch)
        self._kept.append((kept, RandomState(self.optimizer.accelerators())))
        last = self._fed == self._ascending
        result = self._pass(micro_batch, sync=last and self.optimizer.sync_ascent is not False)
        if last:
            self._turn()
        return result

    def _turn(self) -> None:
        """Perturbs, and runs the micro-batches of the ascent again."""
        self.optimizer.first_step(zero_grad=True)
        replayed, self._kept = self._kept, []
        after = RandomState(self.optimizer.accelerators())
        for i, (micro_batch, before) in enumerate(replayed, start=1):
            if self.dropout_rng == "same":
                before.put()
            sync = i == len(replayed) and self._fed == self.size
            self.perturbed_losses.append(self._pass(micro_batch, sync=sync))
        if self.dropout_rng == "same":
            after.put()
        self.optimizer.settle_norm_stats()  # later micro-batches have one pass only, which counts

    def _ascend_alone(self, micro_batch: Any, last: bool) -> Any:
        """One micro-batch up and down (m-SAM); what the earlier ones left as gradients is set aside and added to."""
        kept = _copied(micro_batch)
        before = RandomState(self.optimizer.accelerators())
        aside = [(p, *_set_aside(p)) for p in self.optimizer.tensors()]
        result = self._pass(micro_batch, sync=self.optimizer.sync_ascent is True)
        self.optimizer.first_step(zero_grad=True)
        for p, gradient, values in aside:
            if gradient is not None and values is not None:
                gradient.copy_(values)
            p.grad = gradient
        if self.dropout_rng == "same":
            before.put()
        self.perturbed_losses.append(self._pass(kept, sync=last))
        self.optimizer.end_ascent()
        return result

    def _pass(self, micro_batch: Any, sync: bool) -> Any:
        with contextlib.nullcontext() if sync or self._no_sync is None else self._no_sync():
            return self._forward_backward(micro_batch)


def _copied(micro_batch: Any) -> Any:
    return copy.copy(micro_batch) if isinstance(micro_batch, (Mapping, list)) else micro_batch


def _rewrites(variant: Variant) -> bool:
    return variant.rewrites and type(variant).descend is not Variant.descend


def _set_aside(p: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradient, taken away; and a copy of it where others may write to its memory (flattened parameters, DDP)."""
    gradient, p.grad = p.grad, None
    if gradient is None or gradient.layout != torch.strided:
        return gradient, None
    shared = gradient.untyped_storage().nbytes() != gradient.numel() * gradient.element_size()
    return gradient, gradient.clone() if shared else None
