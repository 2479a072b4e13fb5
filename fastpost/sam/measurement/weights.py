"""The weights that sharpness is measured around: their gradients, and the way to w + e and back, without an optimizer."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastpost import distributed
from fastpost.ops import params as ops
from fastpost.sam.buckets import BucketCache, ParameterBucket, ShardReducer, total_dot, total_squared_norm
from fastpost.sam.perturbation import Perturbation, PerturbParams
from fastpost.sam.perturbation.stash import Stash
from fastpost.sam.scopes import Scope, resolve_scope
from fastpost.sam.step import Gradients


class Moved:
    """Weights at w + e.

    Attributes:
        intended, seen: e e, and e v with v what the forward pass sees of e.
    """

    def __init__(self, weights: Weights, direction: Gradients, factor: float, sums: Tensor, origin: Gradients) -> None:
        values: list[float] = sums.tolist()
        self.intended, self.seen = values[0], values[4]
        self._weights, self._direction, self._factor, self._origin = weights, direction, factor, origin

    def along(self, gradients: Gradients) -> float:
        """e g for a gradient g, summed up in float64."""
        return self._factor * float(self._weights.dot(gradients, self._direction, self._origin))


class Weights:
    """The weights in scope: gradients there, and the way to w + e and back."""

    def __init__(
        self, model: nn.Module, scope: Scope, rho: float, eta: float | None, compute_dtype: torch.dtype | None
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        group: dict[str, Any] = {"params": [p for _, p in named], "param_names": [name for name, _ in named]}
        self._ids = resolve_scope(scope, [group])
        self._groups = [group]
        self._all = group["params"]
        self.params = [p for _, p in named if self._ids is None or id(p) in self._ids]
        if not self.params:
            raise ValueError("sharpness: the model has no weights that require gradients")
        if compute_dtype is not None:
            ops.check_compute_dtype("sharpness", compute_dtype, (p.dtype for p in self.params))
        if any(hasattr(p, "ds_id") for p in self.params):
            raise ValueError("sharpness: DeepSpeed's ZeRO-3 keeps weights out of sight; use FSDP2, DDP or one process")
        sharded = [distributed.is_sharded(p) for p in self.params]
        self.sharded = any(sharded)
        if self.sharded and not all(sharded):
            raise ValueError(
                "sharpness: some weights are sharded, and others are not, whose gradients nobody averages here; leave those "
                "out with scope="
            )
        if self.sharded and distributed.waiting_gradients(self.params):
            raise ValueError(
                "sharpness: FSDP2 holds gradients that it has not reduced yet; measure after a window's last micro-batch. "
                "Where that does not come, fastpost.distributed.drop_waiting_gradients(model.parameters()) drops them"
            )
        self.rho, self.eta, self._compute_dtype = rho, eta, compute_dtype
        self._reducer = ShardReducer()
        stash = Stash()
        self._cache = BucketCache(stash.room, self._reducer)
        self._perturbation = Perturbation(self._reducer, stash)

    def gradients(self, value: Tensor) -> Gradients:
        """Of a loss, each in its weight's dtype; this rank's parts. `.grad` and the hooks on it are left alone, but that
        sharded weights get theirs through them and have it exchanged afterwards."""
        if not self.sharded:
            found: Sequence[Tensor | None] = torch.autograd.grad(value, self.params, allow_unused=True)
            return {p: g for p, g in zip(self.params, found, strict=True) if g is not None}
        before = [p.grad for p in self._all]
        try:
            for p in self._all:
                p.grad = None
            value.backward()  # type: ignore[no-untyped-call]
            parts = [(p, distributed.local_gradient(p)) for p in self.params]
            return {p: g for p, g in parts if g is not None}
        finally:
            for p, g in zip(self._all, before, strict=True):
                p.grad = g

    @torch.no_grad()
    def dot(self, a: Gradients, b: Gradients, origin: Gradients) -> Tensor:
        """Sum of t^2 a b (t = 1 without ASAM) over all weights that both hold, in float64."""
        if self.eta is None:
            return total_dot(a, b, self._reducer)
        parts = []
        for p, x in a.items():
            if p in b:
                product = x.double() * b[p].double() * (origin[p].double().abs() + self.eta).square()
                parts.append((self._reducer.key(p), product.sum()))
        return self._reducer.total(parts)

    def squared_norm(self, direction: Gradients) -> float:
        """|g|^2, or |t g|^2."""
        with torch.no_grad(), self._buckets(direction) as buckets:
            return float(total_squared_norm(buckets, [self.eta] * len(buckets), self._reducer)) if buckets else 0.0

    @contextlib.contextmanager
    def moved(self, direction: Gradients, squared: float, sign: int, random: bool = False) -> Iterator[Moved]:
        """The weights at w + sign e inside of the block.

        Args:
            direction: gradients; or, where `random`, what is followed as it is.
            squared: their `squared_norm`; or that of the random numbers before they were scaled.
        """
        rho, eta = sign * self.rho, None if random else self.eta
        try:
            with torch.no_grad(), self._buckets(direction) as buckets:
                settings = [PerturbParams(rho, eta, self._compute_dtype or b.compute_dtype()) for b in buckets]
                sums = self._perturbation.apply(buckets, settings, torch.tensor(squared, dtype=torch.float64)).sums
                origin = {p: w for b in buckets for p, w in zip(b.params, b.bucket.stash, strict=True)}
            yield Moved(self, direction, rho / math.sqrt(squared) if squared else 0.0, sums, origin)
        finally:
            self.put_back()

    @torch.no_grad()
    def put_back(self) -> None:
        """w again, bit for bit. Where an interrupt has ended a call of it, the next one does what is left."""
        self._perturbation.undo()

    def random(self, like: Gradients, seed: int) -> tuple[Gradients, float]:
        """Normal numbers for all weights that `like` holds, for ASAM scaled by t, and their squared norm before that.

        Every part of a sharded weight draws numbers of its own, and replicas draw the same.
        """
        found: Gradients = {}
        parts = []
        streams: dict[tuple[torch.device, int], torch.Generator] = {}
        with torch.no_grad():
            for p in like:
                w, part = distributed.local(p), distributed.part_number(p)
                stream = streams.get((w.device, part))
                if stream is None:
                    stream = streams[w.device, part] = torch.Generator(w.device)
                    stream.manual_seed((seed * 0x9E3779B97F4A7C15 + part * 0xD1B54A32D192ED03) % 2**63)
                z = torch.empty_like(w).normal_(generator=stream)
                parts.append((self._reducer.key(p), ops.squared_norm([z])))
                found[p] = z if self.eta is None else z.mul_(w.abs().add_(self.eta))
            return found, float(self._reducer.total(parts))

    @contextlib.contextmanager
    def _buckets(self, direction: Gradients) -> Iterator[list[ParameterBucket]]:
        try:
            yield self._cache.take(self._groups, self._ids, direction.get)
        finally:
            self._cache.release()
