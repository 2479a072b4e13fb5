"""The passes of a measurement of sharpness: losses and slopes at w and at w + e, as rows of numbers for each batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpost.rng import RandomState, accelerators, stream_seed
from fastpost.sam.measurement.weights import Weights
from fastpost.sam.step import Gradients

Loss = Callable[[Any, Any], Tensor]
Row = dict[str, float]  # of one batch
NO_STAGES = (
    "sharpness is not measured across pipeline stages, whose losses and gradients a schedule makes; load a checkpoint "
    "of the stages into the whole model, under fully_shard (FSDP2) if need be, and measure there"
)


class NotFinite(ValueError):
    """The loss or its gradient at w is no number, so that nothing can be measured around it."""


@dataclass(frozen=True)
class _Part:
    """A micro-batch.

    Attributes:
        number: of its batch.
        share: of the batch's rows.
        state: of the random generators, for each of its passes.
        loss: at w.
    """

    number: int
    share: float
    content: Any
    state: RandomState
    loss: float = math.nan


class Study:
    """The measurements of one call: rows of numbers, one for each batch."""

    def __init__(self, weights: Weights, model: nn.Module, loss: Loss, curvature: bool, is_replica: bool) -> None:
        self._weights, self._model, self._loss = weights, model, loss
        self._curvature, self._is_replica = curvature, is_replica
        self._devices = accelerators(weights.params)
        self._sum: Gradients = {}  # of the batches' gradients, in float32 at least
        self._parts: list[_Part] = []
        self.eps = 0.0

    def measure(self, batch: Any, number: int, size: int | None, directions: int, seed: Sequence[int]) -> Row:
        """A batch along the gradients of its micro-batches, and at random: in directions of their own for every `seed`."""
        row: Row = {"count": 0}
        for content, share in _micro_batches(batch, size):
            part = _Part(number, share, content, RandomState(self._devices))
            seeds = [stream_seed(*seed, number, int(row["count"]), k) for k in range(directions)]
            _add(row, share, self._measure_part(part, seeds))
            row["count"] += 1
        return row

    def _measure_part(self, part: _Part, seeds: Sequence[int]) -> Row:
        weights = self._weights
        at, gradients = self._slope(part)
        squared = weights.squared_norm(gradients)
        if not (math.isfinite(at) and math.isfinite(squared)):
            norm = math.sqrt(squared)
            raise NotFinite(f"sharpness: batch {part.number} has loss {at:g} and gradient norm {norm:g} at w")
        part = replace(part, loss=at)
        self._parts.append(part)
        with torch.no_grad():
            for p, g in gradients.items():
                wide = g.to(torch.promote_types(g.dtype, torch.float32))
                self._sum[p] = self._sum[p].add_(wide, alpha=part.share) if p in self._sum else wide * part.share
        (row,) = self._ascend([part], gradients, squared)
        found = {"loss": at, "own_norm": math.sqrt(squared), **{f"own_{name}": value for name, value in row.items()}}
        for seed in seeds:
            direction, length = weights.random(gradients, seed)
            for sign in (1, -1):
                with weights.moved(direction, length, sign, random=True) as moved:
                    rise, seen = self._value(part) - at, _ratio(moved.seen, moved.intended)
                _add(found, 0.5 / len(seeds), {"random_rise": rise, "random_seen": seen})
        return found

    def measure_full(self, batches: int) -> list[Row]:
        """Every batch along the mean gradient of all of them."""
        weights = self._weights
        if self._is_replica:
            for p in weights.params:
                self._sum.setdefault(p, torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)))
            total = torch.tensor(float(batches), device=weights.params[0].device)
            for tensor in (total, *(self._sum[p] for p in weights.params)):
                dist.all_reduce(tensor)
            batches = int(total)
        mean = {p: (g / batches).to(p.dtype) for p, g in self._sum.items()}
        self._sum.clear()
        squared = weights.squared_norm(mean)
        rows: dict[int, Row] = {}
        for part, row in zip(self._parts, self._ascend(self._parts, mean, squared), strict=True):
            _add(rows.setdefault(part.number, {"norm": math.sqrt(squared)}), part.share, row)
        return list(rows.values())

    def _ascend(self, parts: Sequence[_Part], direction: Gradients, squared: float) -> list[Row]:
        """Rise and curvature of every part along one direction."""
        rises, slopes = [0.0] * len(parts), [0.0] * len(parts)
        seen = intended = 0.0
        for sign in (1, -1) if self._curvature else (1,):
            with self._weights.moved(direction, squared, sign) as moved:
                seen, intended = seen + moved.seen, intended + moved.intended
                for i, part in enumerate(parts):
                    if self._curvature:
                        value, gradients = self._slope(part)
                        slopes[i] += moved.along(gradients)
                    else:
                        value = self._value(part)
                    if sign > 0:
                        rises[i] = value - part.loss
        gain = _ratio(seen, intended)
        rows = [{"rise": rise, "seen": gain} for rise in rises]
        if self._curvature:  # what differs is the gradients at w + gain e and w - gain e, and noise
            for row, slope in zip(rows, slopes, strict=True):
                row["curvature"] = _ratio(slope, gain) / (2 * self._weights.rho**2)
        return rows

    def _compute(self, part: _Part) -> Tensor:
        part.state.put()
        value: Any = self._loss(self._model, part.content)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            stages = f"; where this is a stage without a loss, {NO_STAGES}" if value is None else ""
            raise TypeError(f"sharpness: loss must return a scalar tensor, not {type(value).__name__}{stages}")
        self.eps = max(self.eps, torch.finfo(value.dtype).eps)
        return value

    def _value(self, part: _Part) -> float:
        with torch.no_grad():
            return self._read(self._compute(part))

    def _slope(self, part: _Part) -> tuple[float, Gradients]:
        value = self._compute(part)
        if not value.requires_grad:
            raise TypeError("sharpness: the loss does not depend on the weights: it was detached, or made under no_grad")
        gradients = self._weights.gradients(value)
        if not gradients:
            raise TypeError(
                "sharpness: the loss does not depend on the weights in scope: none of them gets a gradient from it"
            )
        return self._read(value), gradients

    def _read(self, value: Tensor) -> float:
        """A loss as a number; with shards the ranks' mean."""
        if not self._weights.sharded:
            return float(value.detach())
        total = value.detach().double()
        dist.all_reduce(total)
        return float(total) / dist.get_world_size()


def _add(row: Row, share: float, values: Row) -> None:
    for name, value in values.items():
        row[name] = row.get(name, 0.0) + share * value


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


def _micro_batches(batch: Any, size: int | None) -> list[tuple[Any, float]]:
    """The batch in parts of `size` rows, each with its share of the rows."""
    if size is None:
        return [(batch, 1.0)]
    lengths = {len(t) for t in _tensors(batch)}
    if len(lengths) != 1 or lengths == {0}:
        raise ValueError(
            f"sharpness: micro_batch_size={size} cuts tensors along their first dimension, and those of a batch have "
            f"{sorted(lengths) or 'no'} rows; hand over micro-batches as batches, or leave it out"
        )
    (rows,) = lengths
    starts = range(0, rows, size)
    return [(_cut(batch, slice(start, start + size)), (min(start + size, rows) - start) / rows) for start in starts]


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch] if batch.dim() else []
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else ()
    return [t for part in parts for t in _tensors(part)]


def _cut(batch: Any, rows: slice) -> Any:
    if isinstance(batch, Tensor):
        return batch[rows] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {name: _cut(part, rows) for name, part in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_cut(part, rows) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
