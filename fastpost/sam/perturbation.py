"""How w + e comes about, and how w comes back."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpost.ops import params as ops
from fastpost.sam.buckets import ParameterBucket
from fastpost.sam.reduction import Reduction, add_part


class Term(NamedTuple):
    """What one bucket's perturbation is made with.

    Attributes:
        rho: radius.
        eta: ASAM's constant; None for SAM.
        seen: dtype that the forward pass computes in.
    """

    rho: float
    eta: float | None
    seen: torch.dtype


class Perturbation:
    """w + e written over w, with w kept aside in a buffer that is allocated once."""

    stash = True
    number = 0  # of the ascent, counted over steps: a key for random numbers

    def __init__(self) -> None:
        self._done: list[ParameterBucket] = []

    def check(self, params: Sequence[Tensor]) -> None:
        """Raises ValueError where these parameters cannot be perturbed this way."""

    @property
    def active(self) -> bool:
        """Whether weights are perturbed."""
        return bool(self._done)

    def apply(
        self, buckets: Sequence[ParameterBucket], terms: Sequence[Term], squared: Tensor, reduction: Reduction
    ) -> Tensor:
        """Perturbs every bucket, or none when one fails; returns the six sums of `ops.sam_perturb_`, over all of them."""
        parts: dict[Hashable, Tensor] = {}
        try:
            for b, term in zip(buckets, terms, strict=True):
                with uninterrupted():
                    part = self.write(b, term, squared.to(b.bucket.device))
                    self._done.append(b)
                add_part(parts, b.key, part)
        except BaseException:  # a later bucket failed: the earlier ones must not stay perturbed
            self.undo(reduction)
            raise
        reduction.wrote([p for b in buckets for p in b.params])
        torch.clear_autocast_cache()  # or an enclosing autocast region would go on with its casts of the old weights
        return reduction.total(parts)

    def undo(self, reduction: Reduction) -> None:
        """Puts w back, bit for bit; without a perturbation nothing happens."""
        if not self._done:
            return
        with uninterrupted():
            for b in self._done:
                self.put_back(b)
            reduction.wrote([p for b in self._done for p in b.params])
            torch.clear_autocast_cache()
            self._done = []

    @contextlib.contextmanager
    def settled(self, reduction: Reduction) -> Iterator[list[ParameterBucket]]:
        """Hands the perturbed buckets to a block that writes all their weights itself."""
        with uninterrupted():
            yield self._done
            reduction.wrote([p for b in self._done for p in b.params])
            torch.clear_autocast_cache()
            self._done = []

    def write(self, b: ParameterBucket, term: Term, squared: Tensor) -> Tensor:
        """Perturbs one bucket and returns its six sums."""
        sums = ops.run("sam_perturb_", b.bucket, squared, term.rho, term.eta, term.seen)
        ops.wrote(b.bucket.weights)
        return sums

    def put_back(self, b: ParameterBucket) -> None:
        ops.run("sam_restore_", b.bucket)
        ops.wrote(b.bucket.weights)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_done": []}  # copies and pickles are refused while perturbed


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C, and a SIGTERM that Python handles, back until the block is left: a kernel that has run must be noted.

    Python delivers a signal as soon as the call into the kernel returns, that is before the next line.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    held = {number: handler for number, handler in handlers.items() if callable(handler)}
    if threading.current_thread() is not threading.main_thread():
        held = {}  # signals are the main thread's
    pending: list[tuple[int, Any]] = []
    for number in held:
        signal.signal(number, lambda *arrived: pending.append(arrived))
    try:
        yield
    finally:
        for number, handler in held.items():
            signal.signal(number, handler)
        if pending:
            held[signal.Signals(pending[0][0])](*pending[0])
