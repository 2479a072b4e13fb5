"""`sharpness`: which passes are made, on which ranks, and what becomes of their numbers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastpost.distributed import is_a, unwrap
from fastpost.modes import kept_modes
from fastpost.norm_stats import frozen_norm_stats
from fastpost.ops import params as ops
from fastpost.rng import RandomState, accelerators
from fastpost.sam.measurement.results import Around, Estimate, Sharpness
from fastpost.sam.measurement.study import NO_STAGES, Loss, NotFinite, Row, Study
from fastpost.sam.measurement.weights import Weights
from fastpost.sam.scopes import Scope

_LARGEST = 1e150  # radius: e e and the curvature's divisor have its square


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
        rho: radius, from 1e-150 to 1e150, in the units of the weights' global 2-norm (for ASAM of e / t).
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
        ValueError: rho, eta or a size out of range; eta without ASAM; no batch; a loss or gradient at w that is not finite;
            a batch that cannot be cut; FSDP1's or DeepSpeed's shards, plain weights among sharded ones, or gradients that
            FSDP2 has not reduced yet.
        TypeError: the loss is no scalar that depends on the weights; a size, a number of directions or the seed is no whole
            number; model and loss are swapped; no kernel computes in `compute_dtype`.
    """
    if is_a("_PipelineStageBase", "torch.distributed.pipelining.stage", model) or is_a(
        "_PipelineSchedule", "torch.distributed.pipelining.schedules", model
    ):
        raise TypeError(f"sharpness: a {type(model).__name__} is no module; {NO_STAGES}")
    if not isinstance(model, nn.Module) or not callable(loss):
        raise TypeError(
            "sharpness: it takes a torch.nn.Module, a function of (model, batch) and the batches, in this order, not "
            f"{type(model).__name__} and {type(loss).__name__}"
        )
    ops.check_whole("sharpness", "seed", seed)
    ops.check_radius("sharpness", rho, eta)
    if eta and not adaptive:
        raise ValueError(f"sharpness: eta={eta} is ASAM's constant; say adaptive=True, or leave eta out")
    if not rho > 0:
        raise ValueError("sharpness: rho must be > 0; at radius 0 there is nothing to measure")
    if not 1 / _LARGEST <= rho <= _LARGEST:
        raise ValueError(
            f"sharpness: rho must be from {1 / _LARGEST:g} to {_LARGEST:g}, whose squares are numbers, not {rho:g}"
        )
    if micro_batch_size is not None:
        _check_whole("micro_batch_size", micro_batch_size, least=1)
    _check_whole("directions", directions, least=0)
    inner, is_replica = _innermost(model)
    weights = Weights(inner, scope, float(rho), float(eta) if adaptive else None, compute_dtype)
    before = RandomState(accelerators(weights.params))
    try:
        with kept_modes(inner), frozen_norm_stats(inner), torch.enable_grad():
            if eval_mode:
                inner.eval()
            study = Study(weights, inner, loss, curvature, is_replica)
            # Replicas have batches of their own, and draw directions of their own.
            seeds = (int(seed), dist.get_rank() if is_replica else 0)
            with _raising_together(is_replica):
                found = list(batches)
                if not found:
                    raise ValueError("sharpness: there is no batch to measure")
                rows = [
                    study.measure(batch, number, micro_batch_size, directions, seeds) for number, batch in enumerate(found)
                ]
            wholes = study.measure_full(len(found)) if full_batch else []
    finally:
        before.put()
        weights.put_back()  # which an interrupt may have ended
    if is_replica:
        rows, wholes = _gathered(rows), _gathered(wholes)
    own = _around(rows, "own_", curvature)
    full = _around(wholes, "", curvature, is_one=True) if full_batch else None
    random = _around(rows, "random_", False) if directions else None
    lossy = Estimate.of([row["loss"] for row in rows])
    count = int(sum(row["count"] for row in rows))
    resolution = study.eps / 2 * abs(lossy.mean)
    return Sharpness(float(rho), adaptive, float(eta), len(rows), count, lossy, own, full, random, resolution)


def _check_whole(name: str, value: int, least: int) -> None:
    ops.check_whole("sharpness", name, value)
    if value < least:
        raise ValueError(f"sharpness: {name} must be >= {least}, not {value}")


def _around(rows: list[Row], prefix: str, curvature: bool, is_one: bool = False) -> Around:
    """`is_one`: all batches share one direction, so that its norm and what is seen of it do not scatter."""

    def estimate(name: str, is_one: bool = False) -> Estimate:
        found = Estimate.of([row[prefix + name] for row in rows])
        return Estimate(found.mean, math.nan) if is_one else found

    norm = estimate("norm", is_one) if prefix + "norm" in rows[0] else None
    return Around(estimate("rise"), estimate("curvature") if curvature else None, norm, estimate("seen", is_one))


def _gathered(rows: list[Row]) -> list[Row]:
    """Those of all ranks."""
    parts: list[list[Row]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


@contextlib.contextmanager
def _raising_together(is_replica: bool) -> Iterator[None]:
    """What raises in one replica raises in all, so that none waits for it. It is NotFinite in all, or in none."""
    mine: Exception | None = None
    try:
        yield
    except Exception as error:
        if not is_replica:
            raise
        mine = error
    if not is_replica:
        return
    told: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, None if mine is None else (isinstance(mine, NotFinite), f"{type(mine).__name__}: {mine}"))
    raised = [(rank, *found) for rank, found in enumerate(told) if found is not None]
    if not raised:
        return
    rank, only_not_finite, message = min(raised, key=lambda found: found[1])  # another error, where there is one
    if mine is not None and isinstance(mine, NotFinite) == only_not_finite:
        raise mine
    raise (NotFinite if only_not_finite else RuntimeError)(f"sharpness: rank {rank} cannot measure: {message}") from mine


def _innermost(model: nn.Module) -> tuple[nn.Module, bool]:
    """The module to compute with, and whether it is one of DDP's replicas. Gradients are taken from it, not through DDP."""
    inner = unwrap(model, compiled=True)
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        return inner.module, True
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise ValueError("sharpness: FSDP1 flattens weights out of sight; use fully_shard (FSDP2), DDP or one process")
    return model, False
