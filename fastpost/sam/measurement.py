"""Sharpness as a measurement: how far the loss rises around the weights, and how it curves, with standard errors.

Worst-case rise to first order and m-sharpness: 2010.01412 (eq. 2, section 4.1); ASAM's scale: 2102.11600; average-case rise
along random directions: 2302.07011.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastpost import distributed
from fastpost.modes import frozen_norm_stats, kept_modes
from fastpost.ops import params as ops
from fastpost.rng import RandomState, accelerators
from fastpost.sam.buckets import BucketCache, ParameterBucket, ShardReducer, total_squared_norm
from fastpost.sam.options import Scope, resolve_scope
from fastpost.sam.perturbation import Perturbation, PerturbParams
from fastpost.sam.stash import Stash
from fastpost.sam.step import Gradients

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Estimate:
    """A mean over batches.

    Attributes:
        mean: of the batches' values.
        error: its standard error, from the scatter between batches; NaN for a single batch.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """From one value per batch."""
        count = len(values)
        mean = math.fsum(values) / count
        if count == 1:
            return cls(mean, math.nan)
        return cls(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count))

    def __str__(self) -> str:
        return f"{self.mean:.4g}" if math.isnan(self.error) else f"{self.mean:.4g} ± {self.error:.2g}"


@dataclass(frozen=True)
class Around:
    """The loss around w along one kind of direction.

    Attributes:
        rise: L(w + e) - L(w), in the units of the loss. For random directions (L(w + e) + L(w - e)) / 2 - L(w): the slope,
            whose mean over directions is 0, cancels.
        curvature: e^T H e / rho^2, H the Hessian; None for random directions, or where it was not asked for. Without ASAM it
            is the second derivative along g. To second order the rise is rho gradient_norm + rho^2 curvature / 2.
        gradient_norm: |g| of the gradient that was followed, for ASAM |t g|; None for random directions.
        seen: the part of e that reaches the forward pass after rounding, as `PerturbationReport.seen_gain`: 1 is all of it.
    """

    rise: Estimate
    curvature: Estimate | None
    gradient_norm: Estimate | None
    seen: Estimate


_KINDS = {"own": "its own gradient", "full": "gradient of all", "random": "random"}


@dataclass(frozen=True)
class Sharpness:
    """What `fastpost.sharpness` has measured.

    Attributes:
        rho, adaptive, eta: as given.
        batches, micro_batches: how many were measured; errors are over batches.
        loss: at w.
        own: every micro-batch along its own gradient (m-sharpness).
        full: every batch along the gradient of all batches together; None where it was not asked for.
        random: along random directions of the same length; None where it was not asked for.
        resolution: half a unit in the last place of the loss: differences of this size are rounding.
    """

    rho: float
    adaptive: bool
    eta: float
    batches: int
    micro_batches: int
    loss: Estimate
    own: Around
    full: Around | None
    random: Around | None
    resolution: float

    def as_dict(self) -> dict[str, float]:
        """Every number under one name, such as `own_rise` and `own_rise_se`; what was not measured is left out."""
        found = {name: float(getattr(self, name)) for name in ("rho", "batches", "micro_batches", "resolution")}
        estimates = {"loss": self.loss}
        for kind in _KINDS:
            around = getattr(self, kind)
            for field in fields(Around) if around is not None else ():
                estimates[f"{kind}_{field.name}"] = getattr(around, field.name)
        for name, estimate in estimates.items():
            if estimate is not None:
                found |= {name: estimate.mean, f"{name}_se": estimate.error}
        return found

    def __str__(self) -> str:
        kind = f"ASAM, eta {self.eta:g}, " if self.adaptive else ""
        parts = "" if self.micro_batches == self.batches else f", {self.micro_batches} micro-batches"
        lines = [
            f"sharpness: {kind}rho {self.rho:g}, {self.batches} batches{parts}, ± standard error over batches",
            f"loss {self.loss}; rises of {self.resolution:.1g} are rounding",
        ]
        table: list[tuple[str, ...]] = [("along", "rise", "curvature", "|t g|" if self.adaptive else "|g|", "seen")]
        for name, title in _KINDS.items():
            around: Around | None = getattr(self, name)
            if around is not None:
                cells = (around.rise, around.curvature, around.gradient_norm)
                row = ("-" if cell is None else str(cell) for cell in cells)
                table.append((title, *row, f"{around.seen.mean:.3g}"))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
        return "\n".join(lines)


def sharpness(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    rho: float = 0.05,
    *,
    adaptive: bool = False,
    eta: float = 0.0,
    micro_batch_size: int | None = None,
    full_batch: bool = True,
    directions: int = 1,
    curvature: bool = True,
    scope: Scope = None,
    eval_mode: bool = True,
    compute_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Sharpness:
    """Measures how far the loss rises at w + e, and its curvature along e; every number with its error over batches.

    e is SAM's, rho g / |g|, or ASAM's; nothing is trained. Weights are put back bit for bit, whatever happens; gradients,
    modes, random generators and running statistics of norm layers stay as they were.

    The curvature is a central difference of gradients, (g(w + e) - g(w - e)) e / (2 rho^2), its dot products in float64. A
    second difference of losses would divide their rounding by rho^2; this divides that of gradients by rho. It takes no
    second derivatives, which fused attention does not have. What it leaves out is of the order of rho^2.

    It costs, for each micro-batch, three passes forward and backward, and two forward for each random direction; for each
    batch two more forward and backward with `full_batch`. Without `curvature` a pass at w + e is forward only, and there is
    none at w - e. Memory: a copy of the weights, and up to three of gradients' size.

    Under DDP each rank measures batches of its own, and all get the result over all of them. With sharded weights (FSDP2,
    tensor parallel) the ranks' i-th batches are one batch, and its loss is the ranks' mean. All ranks call it, sharded ones
    with the same number of batches.

    Args:
        model: any module; under DDP `loss` is given the module inside.
        loss: from (model, batch) to a scalar; a mean over the batch's rows, if micro-batches are to be comparable.
        batches: read once and kept. Each counts the same, whatever its size.
        rho: radius, > 0, in the units of the weights' global 2-norm (for ASAM of e / t).
        adaptive, eta: ASAM's e, t = abs(w) + eta. Random directions are then scaled by t.
        micro_batch_size: rows of a micro-batch, which is given an ascent of its own (m-sharpness); None is whole batches.
            Batches are tensors, or mappings and sequences of tensors, with one row per example.
        full_batch: also along the gradient of all batches together.
        directions: random directions for each micro-batch, >= 0, uniform on the sphere that e lies on.
        curvature: whether to measure it.
        scope: which tensors are perturbed, as for `SAM`; by default all that require gradients.
        eval_mode: measure in eval mode. False leaves every module in the mode that it has; the passes of a micro-batch then
            draw the same random numbers (dropout).
        compute_dtype: dtype that the forward pass computes in, for `seen`; None takes autocast's where it is on, else the
            weights' own.
        seed: of the random directions.

    Raises:
        ValueError: rho, eta or a size out of range; no batch; a loss or gradient at w that is not finite; a batch that
            cannot be cut; FSDP1's or DeepSpeed's shards, plain weights among sharded ones, or gradients that FSDP2 has not
            reduced yet.
        TypeError: the loss is no scalar that depends on the weights.
    """
    ops.check_radius("sharpness", rho, eta)
    if not rho > 0:
        raise ValueError("sharpness: rho must be > 0; at radius 0 there is nothing to measure")
    if micro_batch_size is not None and micro_batch_size < 1:
        raise ValueError(f"sharpness: micro_batch_size must be >= 1, not {micro_batch_size}")
    if directions < 0:
        raise ValueError(f"sharpness: directions must be >= 0, not {directions}")
    inner, is_replica = _innermost(model)
    weights = _Weights(inner, scope, float(rho), float(eta) if adaptive else None, compute_dtype)
    before = RandomState(accelerators(weights.params))
    try:
        with kept_modes(inner), frozen_norm_stats(inner), torch.enable_grad():
            if eval_mode:
                inner.eval()
            study = _Study(weights, inner, loss, curvature, is_replica)
            if is_replica:  # ranks have batches of their own, and draw directions of their own
                seed = seed * 4099 + dist.get_rank()
            with _raising_together(is_replica):
                found = list(batches)
                if not found:
                    raise ValueError("sharpness: there is no batch to measure")
                rows = [
                    study.measure(batch, number, micro_batch_size, directions, seed) for number, batch in enumerate(found)
                ]
            wholes = study.measure_full(len(found)) if full_batch else []
    finally:
        before.put()
    if is_replica:
        rows, wholes = _gathered(rows), _gathered(wholes)
    own = _around(rows, "own_", curvature)
    full = _around(wholes, "", curvature) if full_batch else None
    random = _around(rows, "random_", False) if directions else None
    lossy = Estimate.of([row["loss"] for row in rows])
    count = int(sum(row["count"] for row in rows))
    resolution = study.eps / 2 * abs(lossy.mean)
    return Sharpness(float(rho), adaptive, float(eta), len(rows), count, lossy, own, full, random, resolution)


Row = dict[str, float]  # of one batch


def _around(rows: list[Row], prefix: str, curvature: bool) -> Around:
    def estimate(name: str) -> Estimate:
        return Estimate.of([row[prefix + name] for row in rows])

    norm = estimate("norm") if prefix + "norm" in rows[0] else None
    return Around(estimate("rise"), estimate("curvature") if curvature else None, norm, estimate("seen"))


def _gathered(rows: list[Row]) -> list[Row]:
    """Those of all ranks."""
    parts: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


@contextlib.contextmanager
def _raising_together(is_replica: bool) -> Iterator[None]:
    """What raises in one replica raises in all, so that none waits for it."""
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        if not is_replica:
            raise
        mine = error
    if not is_replica:
        return
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if mine is None else f"{type(mine).__name__}: {mine}")
    if mine is not None:
        raise mine
    for rank, message in enumerate(told):
        if message is not None:
            raise RuntimeError(f"sharpness: rank {rank} cannot measure: {message}")


def _innermost(model: nn.Module) -> tuple[nn.Module, bool]:
    """The module to compute with, and whether it is one of DDP's replicas. Gradients are taken from it, not through DDP."""
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        return inner.module, True
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError("sharpness: FSDP1 flattens weights out of sight; use fully_shard (FSDP2), DDP or one process")
    return model, False


class _Moved:
    """Weights at w + e.

    Attributes:
        intended, seen: e e, and e v with v what the forward pass sees of e.
    """

    def __init__(self, weights: _Weights, direction: Gradients, factor: float, sums: Tensor, origin: Gradients) -> None:
        values: list[float] = sums.tolist()
        self.intended, self.seen = values[0], values[4]
        self._weights, self._direction, self._factor, self._origin = weights, direction, factor, origin

    def along(self, gradients: Gradients) -> float:
        """e g for a gradient g, summed up in float64."""
        return self._factor * float(self._weights.dot(gradients, self._direction, self._origin))


class _Weights:
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
                "sharpness: FSDP2 holds gradients that it has not reduced yet; measure after a window's last micro-batch"
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
        parts = []
        for p, x in a.items():
            if p in b:
                product = x.double() * b[p].double()
                if self.eta is not None:
                    product *= (origin[p].double().abs() + self.eta).square()
                parts.append((self._reducer.key(p), product.sum()))
        return self._reducer.total(parts) if parts else torch.zeros((), dtype=torch.float64)

    def squared_norm(self, direction: Gradients) -> float:
        """|g|^2, or |t g|^2."""
        with torch.no_grad(), self._buckets(direction) as buckets:
            return float(total_squared_norm(buckets, [self.eta] * len(buckets), self._reducer)) if buckets else 0.0

    @contextlib.contextmanager
    def moved(self, direction: Gradients, squared: float, sign: int, random: bool = False) -> Iterator[_Moved]:
        """The weights at w + sign e inside of the block.

        Args:
            direction: gradients; or, where `random`, what is followed as it is.
            squared: their `squared_norm`; or that of the random numbers before they were scaled.
        """
        rho, eta = sign * self.rho, None if random else self.eta
        try:
            with torch.no_grad(), self._buckets(direction) as buckets:
                settings = [PerturbParams(rho, eta, self._compute_dtype or b.compute_dtype()) for b in buckets]
                sums = self._perturbation.apply(buckets, settings, torch.tensor(squared, dtype=torch.float64))
                origin = {p: w for b in buckets for p, w in zip(b.params, b.bucket.stash, strict=True)}
            yield _Moved(self, direction, rho / math.sqrt(squared) if squared else 0.0, sums, origin)
        finally:
            with torch.no_grad():
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

    def _buckets(self, direction: Gradients) -> contextlib.AbstractContextManager[list[ParameterBucket]]:
        return self._cache.of(self._groups, self._ids, direction.get)


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


class _Study:
    """The measurements of one call: rows of numbers, one for each batch."""

    def __init__(self, weights: _Weights, model: nn.Module, loss: Loss, curvature: bool, is_replica: bool) -> None:
        self._weights, self._model, self._loss = weights, model, loss
        self._curvature, self._is_replica = curvature, is_replica
        self._devices = accelerators(weights.params)
        self._sum: Gradients = {}  # of the batches' gradients, in float32 at least
        self._parts: list[_Part] = []
        self.eps = 0.0

    def measure(self, batch: Any, number: int, size: int | None, directions: int, seed: int) -> Row:
        """A batch along the gradients of its micro-batches, and at random."""
        row: Row = {"count": 0}
        for content, share in _micro_batches(batch, size):
            part = _Part(number, share, content, RandomState(self._devices))
            index = seed * 1_000_003 + number * 1009 + int(row["count"])
            _add(row, share, self._measure_part(part, directions, index))
            row["count"] += 1
        return row

    def _measure_part(self, part: _Part, directions: int, index: int) -> Row:
        weights = self._weights
        at, gradients = self._slope(part)
        squared = weights.squared_norm(gradients)
        if not (math.isfinite(at) and math.isfinite(squared)):
            norm = math.sqrt(squared)
            raise ValueError(f"sharpness: batch {part.number} has loss {at:g} and gradient norm {norm:g} at w")
        part = replace(part, loss=at)
        self._parts.append(part)
        with torch.no_grad():
            for p, g in gradients.items():
                wide = g.to(torch.promote_types(g.dtype, torch.float32))
                self._sum[p] = self._sum[p].add_(wide, alpha=part.share) if p in self._sum else wide * part.share
        (row,) = self._ascend([part], gradients, squared)
        found = {"loss": at, "own_norm": math.sqrt(squared), **{f"own_{name}": value for name, value in row.items()}}
        for k in range(directions):
            direction, length = weights.random(gradients, index * 101 + k)
            for sign in (1, -1):
                with weights.moved(direction, length, sign, random=True) as moved:
                    rise, seen = self._value(part) - at, _ratio(moved.seen, moved.intended)
                _add(found, 0.5 / directions, {"random_rise": rise, "random_seen": seen})
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
            raise TypeError(f"sharpness: loss must return a scalar tensor, not {type(value).__name__}")
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
