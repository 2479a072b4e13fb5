"""SAM over the micro-batches of one optimizer step (gradient accumulation)."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastpost import distributed
from fastpost.rng import RandomState
from fastpost.sam.frameworks import find_sam
from fastpost.sam.optimizer import SAM
from fastpost.sam.options import check_dropout_rng, check_fraction

ForwardBackward = Callable[[Any], Any]
NoSync = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True)
class PassInfo:
    """Which forward and backward pass of a window is being made.

    Attributes:
        index: of its micro-batch in the window, from 0.
        is_replay: the micro-batch ran before in this window, and this is its second pass, at w + e.
        sync: whether ranks share gradients in this pass.
        is_last: the micro-batch is the window's last one.
        share: what part of the window's loss its micro-batch's is, as `feed` was told; None in a second pass.
    """

    index: int
    is_replay: bool = False
    sync: bool = True
    is_last: bool = False
    share: float | Tensor | None = None


class SAMWindow:
    """Both passes of a SAM step over a window of n micro-batches, up to the optimizer's step, which stays the caller's.

    The ascent gradient is that of the first k = ceil(ascent_fraction * n) micro-batches; the descent gradient is that of all
    n, at the one perturbed point (2110.08529 takes a quarter). For a variant that mixes both, such as GSAM, the ascent's is
    multiplied by n / k, n being how many there were when the window closed; or, where losses are divided by the items of the
    window, by the shares that `feed` is told. Micro-batches of the ascent are run twice and kept until then, later ones run
    once, at w + e. After the last one w is back and the gradients are the second pass's, ready for `unscale_`, clipping and
    `step()`::

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
            ascent, which then uses each replica's own gradient. With `per_micro_batch` it is entered around no pass; with
            `sync_ascent=False` around first passes, and where no parameter is sharded around second ones but the last.
        model: the model, where the optimizer was not given it: so that each micro-batch moves the running statistics of norm
            layers once, in its first pass, as the optimizer's `norm_stats` says.

    A trainer that makes its passes in its own way derives a class and overrides `run_pass`.

    Attributes:
        sync_each: whether ranks share gradients in every pass; those of an ascent with `sync_ascent=False` they never share.
        size: micro-batches announced for the open window.
        fed: how many of them have been fed.
        needs_shares: whether it matters to the open window what `feed` is told of a micro-batch's share.
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
        variant = found.variant
        if per_micro_batch and variant.combines:
            raise ValueError(
                f"SAMWindow: {type(variant).__name__} combines the gradients of two whole passes; use it without "
                "per_micro_batch"
            )
        if per_micro_batch and not variant.ascent_pass:
            raise ValueError(
                f"SAMWindow: {type(variant).__name__} makes no ascent pass, which per_micro_batch is about; use it without "
                "per_micro_batch"
            )
        if found.sync_ascent is False and no_sync is None:
            raise ValueError(
                "SAMWindow: sync_ascent=False lets each replica ascend by its own gradient, which takes a backward pass "
                "that does not synchronise: pass no_sync (model.no_sync, fastpost.distributed.no_sync)"
            )
        if model is not None:
            found.set_model(model)
        self.forward_backward = forward_backward
        self._no_sync = no_sync
        self.sync_each = self._syncs_each = False
        self.size = 0
        self.perturbed_losses: list[Any] = []
        self.fed = self._ascending = self._ascended = self._announced = 0
        self.needs_shares = self._tells_shares = False
        self._of_all: float | Tensor = 0.0  # shares of what was fed; where none were told, its number
        self._of_ascent: float | Tensor = 0.0
        self._kept: list[BeforePass] = []

    def run(self, micro_batches: Iterable[Any]) -> list[Any]:
        """A whole window; returns what `forward_backward` returned for each micro-batch the first time it ran."""
        window = list(micro_batches)
        self.open(len(window))
        return [self.feed(micro_batch) for micro_batch in window]

    def open(self, size: int) -> None:
        """Begins a window of `size` micro-batches and drops the gradients.

        Raises:
            ValueError: size < 1.
            RuntimeError: a window of this optimizer is open, or the optimizer is perturbed.
        """
        if size < 1:
            raise ValueError(f"SAMWindow: a window has at least one micro-batch, not {size}")
        if self.is_open:
            raise RuntimeError(f"SAMWindow: a window is open with {self.fed} of {self.size} micro-batches; close() it")
        if self.optimizer.in_window:
            raise RuntimeError(
                "SAMWindow: another window of this optimizer is open; close() or abort() that one. Where it is gone, "
                "opt.abandon() gives it up"
            )
        if self.optimizer.is_perturbed:
            raise RuntimeError("SAMWindow: the optimizer is perturbed; finish its step first")
        self.optimizer.zero_grad()
        self.optimizer.in_window = True
        self.size, self._announced, self.fed, self._ascended = size, size, 0, 0
        self._of_all = self._of_ascent = 0.0
        self.perturbed_losses = []
        ascends = self.optimizer.ascends and self.optimizer.variant.ascent_pass
        # Of m-SAM, whose first passes synchronise, all do. FSDP2 keeps out of `.grad` what it has not reduced, so that it
        # cannot be set aside between the passes; DDP expects gradients of what an earlier pass without it has reached.
        self._syncs_each = self.sync_each or (self.per_micro_batch and ascends and self._shares_ascents())
        # 0.07 * 100 is 7.000000000000001
        self._ascending = math.ceil(self.ascent_fraction * size * (1 - 1e-12)) if ascends else 0
        in_part = self.per_micro_batch or self._ascending < size
        self.needs_shares = bool(self._ascending) and in_part and self.optimizer.variant.weighs_ascents
        self._announce()

    def _shares_ascents(self) -> bool:
        return self.optimizer.sync_ascent is not False or any(map(distributed.is_sharded, self.optimizer.tensors()))

    @property
    def is_open(self) -> bool:
        """Whether micro-batches are still expected."""
        return self.size > 0

    def run_pass(self, micro_batch: Any, info: PassInfo) -> Any:
        """Makes one forward and backward pass; a window calls it for each of them.

        Args:
            micro_batch: as it was fed.
            info: which pass it is. An override sees to it that ranks share gradients where `info.sync` says so.

        Returns:
            What `feed` returns for a first pass, and `perturbed_losses` holds for a pass at w + e.
        """
        with contextlib.nullcontext() if info.sync or self._no_sync is None else self._no_sync():
            return self.forward_backward(micro_batch)

    def before(self, micro_batch: Any) -> BeforePass:
        """For a trainer that makes first passes itself: what `feed` has to know of a micro-batch as it is before its own."""
        return BeforePass(micro_batch, self.optimizer.accelerators())

    def feed(self, micro_batch: Any, before: BeforePass | None = None, share: float | Tensor | None = None) -> Any:
        """Runs one micro-batch; the last one closes the window.

        Args:
            micro_batch: passed to `forward_backward`, a second time where it takes part in the ascent: lists and mappings
                as a shallow copy, so that a pass may take entries out.
            before: what `before(micro_batch)` returned before its first pass, for a trainer that has made that pass already.
            share: what part of the window's loss this micro-batch's is, a number or a scalar (on ranks, the mean of theirs):
                such as its labels over the window's, where losses are sums divided by the labels of the window. None: each
                counts alike. Variants that average or mix gradients of ascents over some of the micro-batches go by it.

        Returns:
            What `forward_backward` returned the first time it ran: at w for a micro-batch of the ascent, else at w + e.

        Raises:
            TypeError: `before` is something else.
            ValueError: a share for some micro-batches of the window and none for others. Nothing was done.
            RuntimeError: no window is open, or the first pass of a micro-batch has changed its tensors in place.
        """
        if not self.is_open:
            raise RuntimeError("SAMWindow: no window is open; open() one with the number of micro-batches to come")
        if before is not None and not isinstance(before, BeforePass):
            raise TypeError(
                f"SAMWindow: before must be what window.before(micro_batch) returns before the first pass, not "
                f"{type(before).__name__}"
            )
        if self.fed and (share is not None) != self._tells_shares:
            raise ValueError(
                "SAMWindow: some micro-batches of the window come with a share and some without; say all or none"
            )
        self._tells_shares = share is not None
        amount = 1.0 if share is None else share
        self._of_all = self._of_all + amount
        self.fed += 1
        last = self.fed == self.size
        try:
            if self.fed > self._ascending:
                if self.fed == 1 and self.optimizer.ascends:  # a variant that needs no ascent pass
                    self.optimizer.first_step(zero_grad=True)
                result = self.run_pass(micro_batch, self._first_pass(self._syncs(last), amount))
                if self.optimizer.is_perturbed:
                    self.perturbed_losses.append(result)
            else:
                before = self.before(micro_batch) if before is None else before
                ascend = self._ascend_alone if self.per_micro_batch else self._ascend
                result = ascend(micro_batch, before, amount)
            if last:
                self.close()
            else:
                self._announce()
        except BaseException:
            self.abort()
            raise
        return result

    def _announce(self) -> None:
        """Says whether the next micro-batch is the ascent's last, or has an ascent of its own."""
        number = self.fed + 1
        self.optimizer.await_ascent(number <= self._ascending if self.per_micro_batch else number == self._ascending)

    def shorten(self) -> None:
        """Makes the micro-batch that is fed next the last one, as where the data end."""
        self.size = self.fed + 1
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
        if self._no_sync is not None and 0 < self.fed < self.size:
            fed, size = self.fed, self.size
            self.abort()
            raise RuntimeError(
                f"SAMWindow: closed after {fed} of {size} micro-batches, before the one that synchronises gradients; open() "
                "a short window with its own number, or leave no_sync out"
            )
        try:
            if self._kept:
                self._replay()
            if self._ascended:
                self.optimizer.weigh_ascent(_ratio(self._of_all, self._of_ascent))
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

    def _syncs(self, last: bool, ascends: bool = False) -> bool:
        """Whether ranks share gradients in a pass. `last`: somebody takes the gradients after it. `ascends`: that is SAM."""
        if ascends and self.optimizer.sync_ascent is False:
            return False
        return last or self._syncs_each

    @property
    def _whole(self) -> float:
        """What all that was announced counts."""
        return 1.0 if self._tells_shares else float(self._announced)

    def _first_pass(self, sync: bool, amount: float | Tensor) -> PassInfo:
        return PassInfo(self.fed - 1, sync=sync, is_last=self.fed == self.size, share=amount / self._whole)

    def _ascend(self, micro_batch: Any, before: BeforePass, amount: float | Tensor) -> Any:
        self._kept.append(before)
        self._of_ascent = self._of_ascent + amount
        last = self.fed == self._ascending
        result = self.run_pass(micro_batch, self._first_pass(self._syncs(last, ascends=True), amount))
        if last:
            self._replay()
        return result

    def _replay(self) -> None:
        """Perturbs, and runs the micro-batches of the ascent again."""
        self._ascended = len(self._kept)
        self.optimizer.weigh_ascent(_ratio(self._whole, self._of_ascent))
        self.optimizer.first_step(zero_grad=True)
        replayed, self._kept = self._kept, []
        after = RandomState(self.optimizer.accelerators())
        for i, before in enumerate(replayed):
            self._run_again(i, before, is_last=i + 1 == self.size)
        if self.dropout_rng == "same":
            after.put()
        self.optimizer.settle_norm_stats()  # later micro-batches have one pass only, which counts

    def _run_again(self, index: int, before: BeforePass, is_last: bool) -> None:
        micro_batch = before.again(index)
        if self.dropout_rng == "same":
            before.random.put()
        info = PassInfo(index, is_replay=True, sync=self._syncs(is_last), is_last=is_last)
        self.perturbed_losses.append(self.run_pass(micro_batch, info))

    def _ascend_alone(self, micro_batch: Any, before: BeforePass, amount: float | Tensor) -> Any:
        """One micro-batch up and down (m-SAM); what the earlier ones left as gradients is set aside and added to."""
        aside = [(p, *_set_aside(p)) for p in self.optimizer.tensors()]
        result = self.run_pass(micro_batch, self._first_pass(self._syncs(True, ascends=True), amount))
        self.optimizer.weigh_ascent(_ratio(self._whole, amount))
        self.optimizer.first_step(zero_grad=True)
        for p, gradient, values in aside:
            if gradient is not None and values is not None:
                gradient.copy_(values)
            p.grad = gradient
        self._run_again(self.fed - 1, before, is_last=self.fed == self.size)
        self.optimizer.end_ascent()
        return result


class BeforePass:
    """A micro-batch before its first pass, for its second: lists and mappings as a shallow copy, tensors as they are.

    Args:
        micro_batch: as the first pass will get it.
        devices: accelerators that the pass draws from.

    Attributes:
        micro_batch: the same, or its copy.
        random: the generators as they stand.
    """

    def __init__(self, micro_batch: Any, devices: Iterable[torch.device] = ()) -> None:
        self.micro_batch = copy.copy(micro_batch) if isinstance(micro_batch, (Mapping, list)) else micro_batch
        self.random = RandomState(devices)
        self._versions = [(t, t._version) for t in _tensors(micro_batch)]

    def again(self, index: int) -> Any:
        """The micro-batch.

        Raises:
            RuntimeError: its first pass has written to one of its tensors, and the second would see other data.
        """
        if any(t._version != version for t, version in self._versions):
            raise RuntimeError(
                f"SAMWindow: micro-batch {index} was changed in place in its first pass (masking, mixup, scaling; torch's "
                "context_parallel cuts its buffers), and its second pass would change it again; change a copy, or do it "
                "where batches are made"
            )
        return self.micro_batch


def _tensors(micro_batch: Any) -> Iterator[Tensor]:
    """The tensors of a micro-batch that count their changes, through lists, tuples and mappings."""
    if isinstance(micro_batch, Tensor):
        if not micro_batch.is_inference():
            yield micro_batch
    elif isinstance(micro_batch, Mapping):
        for value in micro_batch.values():
            yield from _tensors(value)
    elif isinstance(micro_batch, (list, tuple)):
        for value in micro_batch:
            yield from _tensors(value)


def _ratio(whole: float | Tensor, part: float | Tensor) -> float | Tensor:
    """whole / part; 1 where the part is 0, whose gradients are 0 as well."""
    if isinstance(part, Tensor):
        return torch.where(part == 0, 1.0, whole / part)
    return whole / part if part else 1.0


def _set_aside(p: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradient, taken away; and a copy of it where later passes may write to its memory."""
    gradient, p.grad = p.grad, None
    if gradient is None or not distributed.has_other_writers(gradient):
        return gradient, None
    return gradient, gradient.clone()
