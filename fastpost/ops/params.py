"""Operations on lists of tensors: norm, distance, SAM's perturb and restore, sign flips; long, as one family is one file.

Lists may mix devices, dtypes and layouts and hold tensors without elements; they are sorted into buckets, one kernel call
each. Everything is checked before anything is written. Lists that belong together (weights, gradients, stash) agree element
by element in shape, dtype and device.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fastpost import plan
from fastpost.dispatch import select
from fastpost.ops.registry import define

NAMES_OF_SUMS = ("intended_sq", "stored_sq", "stored_dot", "seen_sq", "seen_dot", "changed")


def check_lists(op: str, columns: Mapping[str, Sequence[Tensor]], *, written: Sequence[str]) -> None:
    """Raises one clear error when the lists cannot be worked on; touches no data.

    Raises:
        TypeError: an element is no tensor, or its dtype is not a real floating-point one.
        ValueError: lengths, shapes, dtypes or devices do not match, the lists are empty, a layout cannot be walked, or a
            tensor that is to be written appears twice.
    """
    (first_name, first), *others = columns.items()
    for name, tensors in others:
        if len(tensors) != len(first):
            raise ValueError(f"{op}: {len(first)} {first_name} but {len(tensors)} {name}")
    if not first:
        raise ValueError(f"{op}: the list of {first_name} is empty")
    for name, tensors in columns.items():
        for i, t in enumerate(tensors):
            where = f"{op}: {name}[{i}]"
            if not isinstance(t, Tensor):
                raise TypeError(f"{where} is a {type(t).__name__}, not a tensor")
            if not t.dtype.is_floating_point or t.dtype.itemsize < 2:
                raise TypeError(f"{where} has dtype {t.dtype}; only float16, bfloat16, float32 and float64 are served")
            if t.layout != torch.strided or t.is_quantized:
                raise ValueError(f"{where} has layout {t.layout}, which cannot be walked; use a dense (strided) tensor")
            like = first[i]
            if t.shape != like.shape:
                raise ValueError(f"{where} has shape {tuple(t.shape)}, but {first_name}[{i}] has {tuple(like.shape)}")
            if t.dtype != like.dtype:
                raise ValueError(f"{where} has dtype {t.dtype}, but {first_name}[{i}] has {like.dtype}")
            if t.device != like.device:
                raise ValueError(f"{where} is on {t.device}, but {first_name}[{i}] is on {like.device}")
        if name in written:
            check_memory(op, name, tensors)


def check_memory(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Raises ValueError where writing one element would change another, of the same tensor or of another."""
    if torch.compiler.is_compiling():
        return
    rows = [i for i, t in enumerate(tensors) if t.device.type != "meta"]
    for i in rows:
        if not plan.distinct(tensors[i]):
            raise ValueError(f"{op}: {name}[{i}] is expanded (elements share memory); it cannot be written in place")
    shared = plan.overlap([tensors[i] for i in rows])
    if shared is not None:
        i, earlier = (rows[k] for k in shared)
        raise ValueError(f"{op}: {name}[{i}] and {name}[{earlier}] are the same memory; pass tied tensors once")


def make_buckets(
    *,
    weights: Sequence[Tensor] | None = None,
    grads: Sequence[Tensor] | None = None,
    stash: Sequence[Tensor] | None = None,
    first: Sequence[Tensor] | None = None,
    second: Sequence[Tensor] | None = None,
    streams: Sequence[int] | None = None,
) -> list[plan.Bucket]:
    """Sorts checked lists into buckets that one kernel call can serve, in order of first appearance."""
    given = {"weights": weights, "grads": grads, "stash": stash, "first": first, "second": second}
    columns = {k: v for k, v in given.items() if v is not None}
    lists = list(columns.values())
    rows: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for i, t in enumerate(lists[0]):
        walkable = plan.dense(t) and all(other[i].stride() == t.stride() for other in lists[1:])
        rows.setdefault((t.device, t.dtype, walkable), []).append(i)
    return [
        plan.Bucket(
            [streams[i] if streams is not None else i for i in row],
            walkable=walkable,
            **{name: [tensors[i] for i in row] for name, tensors in columns.items()},
        )
        for (_, _, walkable), row in rows.items()
    ]


def run(op: str, bucket: plan.Bucket, *args: object) -> Tensor:
    """Runs one operation on one bucket through the backend that serves it."""
    function = select(op, bucket.device, bucket.dtype, walkable=bucket.walkable)
    result: Tensor = function(bucket, *args)
    return result


def total_squared_norm(buckets: Sequence[plan.Bucket], etas: Sequence[float | None] | None = None) -> Tensor:
    """Squared norm over all buckets, float64, on the first bucket's device."""
    return _added([run("squared_norm", b, etas[i] if etas else None) for i, b in enumerate(buckets)])


def _added(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part.to(total.device)
    return total


def wrote(tensors: Iterable[Tensor]) -> None:
    """Tells autograd that these tensors were written behind its back."""
    torch.autograd.graph.increment_version(list(tensors))


# -- implementations behind torch.ops.fastpost ----------------------------------------------------------------------------


def _squared_norm(grads: list[Tensor], weights: list[Tensor] | None, eta: float) -> Tensor:
    buckets = make_buckets(grads=grads, weights=weights)
    return total_squared_norm(buckets, None if weights is None else [eta] * len(buckets))


def _squared_distance(weights: list[Tensor], stash: list[Tensor]) -> Tensor:
    return _added([run("squared_distance", b) for b in make_buckets(weights=weights, stash=stash)])


def _sam_perturb_(
    weights: list[Tensor],
    grads: list[Tensor],
    stash: list[Tensor],
    squared: Tensor,
    rho: float,
    adaptive: bool,
    eta: float,
    seen_dtype: torch.dtype | None,
    seed: Tensor | None = None,
) -> Tensor:
    sums = None
    for bucket in make_buckets(weights=weights, grads=grads, stash=stash):
        seen = seen_dtype or bucket.dtype
        key = None if seed is None else seed.to(bucket.device)
        part = run("sam_perturb_", bucket, squared.to(bucket.device), rho, eta if adaptive else None, seen, key)
        sums = part if sums is None else sums + part.to(sums.device)
    assert sums is not None
    return sums


def _sam_restore_(weights: list[Tensor], stash: list[Tensor]) -> None:
    for bucket in make_buckets(weights=weights, stash=stash):
        run("sam_restore_", bucket)


def _sam_restore_adamw_(
    weights: list[Tensor],
    grads: list[Tensor],
    stash: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    for b in make_buckets(weights=weights, grads=grads, stash=stash, first=exp_avgs, second=exp_avg_sqs):
        flags = [None if t is None else t.to(b.device) for t in (grad_scale, found_inf)]
        counts = [steps[i] for i in b.streams]
        run("sam_restore_adamw_", b, counts, lr, (beta1, beta2), eps, weight_decay, maximize, *flags)


def _negate_(tensors: list[Tensor]) -> None:
    for bucket in make_buckets(grads=tensors):
        run("negate_", bucket)


def _flip_signs_(tensors: list[Tensor], seed: Tensor) -> None:
    for bucket in make_buckets(grads=tensors):
        run("flip_signs_", bucket, seed.to(bucket.device))


def _negate_clip_(tensors: list[Tensor], max_norm: float) -> Tensor:
    buckets = make_buckets(grads=tensors)
    if math.isinf(max_norm):
        return _added([run("negate_norm_", bucket) for bucket in buckets])
    squared = total_squared_norm(buckets)
    for bucket in buckets:
        run("negate_clip_", bucket, squared.to(bucket.device), max_norm)
    return squared


def _scalar(like: Sequence[Tensor]) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=like[0].device)


_op_squared_norm = define(
    "squared_norm(Tensor[] grads, Tensor[]? weights, float eta) -> Tensor",
    _squared_norm,
    lambda grads, weights, eta: _scalar(grads),
)
_op_squared_distance = define(
    "squared_distance(Tensor[] weights, Tensor[] stash) -> Tensor",
    _squared_distance,
    lambda weights, stash: _scalar(weights),
)
_op_sam_perturb_ = define(
    "sam_perturb_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] stash, Tensor squared_norm, float rho, bool adaptive, "
    "float eta, ScalarType? seen_dtype, Tensor? seed=None) -> Tensor",
    _sam_perturb_,
    lambda weights, *_: torch.empty(6, dtype=torch.float64, device=weights[0].device),
)
_op_sam_restore_ = define("sam_restore_(Tensor(a!)[] weights, Tensor[] stash) -> ()", _sam_restore_, None)
_op_sam_restore_adamw_ = define(
    "sam_restore_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] stash, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()",
    _sam_restore_adamw_,
    None,
)
_op_negate_ = define("negate_(Tensor(a!)[] tensors) -> ()", _negate_, None)
_op_flip_signs_ = define("flip_signs_(Tensor(a!)[] tensors, Tensor seed) -> ()", _flip_signs_, None)
_op_negate_clip_ = define(
    "negate_clip_(Tensor(a!)[] tensors, float max_norm) -> Tensor",
    _negate_clip_,
    lambda tensors, max_norm: _scalar(tensors),
)


# -- the public face ------------------------------------------------------------------------------------------------------


def check_radius(op: str, rho: float, eta: float) -> None:
    """Raises unless rho and eta are numbers (TypeError), finite and not negative (ValueError)."""
    for name, value in (("rho", rho), ("eta", eta)):
        check_number(op, name, value)


def check_number(op: str, name: str, value: object) -> None:
    """Raises unless the value is a real number or a tensor of one (TypeError), finite and not negative (ValueError)."""
    one = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex() and value.dtype != torch.bool
    if not one and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, not {value!r}")
    number = float(value)  # type: ignore[arg-type]
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{op}: {name} must be finite and >= 0, not {number}")


def squared_norm(grads: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, eta: float = 0.0) -> Tensor:
    """Sum of squares over a whole list of tensors.

    Args:
        grads: tensors of any shapes; float16, bfloat16, float32 or float64, on any devices.
        weights: when given, ASAM's scaled norm: the sum of ((abs(w) + eta) * g)^2 (Kwon et al. 2102.11600).
        eta: the constant beside abs(w); needs `weights`.

    Returns:
        float64 scalar on the first tensor's device. Accumulated in float64 over chunks cut per tensor and element, so the
        bits do not depend on threads, addresses or list layout. Not finite if and only if an element (of the scaled
        gradient) is not.
    """
    grads = list(grads)
    columns = {"grads": grads} if weights is None else {"grads": grads, "weights": list(weights)}
    check_lists("squared_norm", columns, written=())
    check_radius("squared_norm", 0.0, eta)
    total: Tensor = _op_squared_norm(grads, columns.get("weights"), eta)
    return total


def squared_distance(weights: Sequence[Tensor], stash: Sequence[Tensor]) -> Tensor:
    """How far a whole list of tensors is from another, squared: the sum of (weights - stash)^2.

    Args:
        weights: tensors of any shapes; float16, bfloat16, float32 or float64, on any devices.
        stash: as many, each of its weight's shape, dtype and device. Neither list is written.

    Returns:
        float64 scalar on the first tensor's device; differences, squares and sums in float64, in the order of
        `squared_norm`. NaN where both lists hold the same infinity.
    """
    columns = {"weights": list(weights), "stash": list(stash)}
    check_lists("squared_distance", columns, written=())
    total: Tensor = _op_squared_distance(columns["weights"], columns["stash"])
    return total


def sam_perturb_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    stash: Sequence[Tensor],
    squared_norm: Tensor,
    *,
    rho: float,
    adaptive: bool = False,
    eta: float = 0.0,
    seen_dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """stash = w, w = w + e with e = rho * g / norm (SAM, 2010.01412 eq. 2) or rho * t^2 * g / norm, t = abs(w) + eta (ASAM).

    Args:
        weights, grads, stash: lists of equal length; shapes, dtypes and devices agree row by row. `stash` may hold anything.
        squared_norm: float64 scalar as `ops.squared_norm` returns it (with `weights` for ASAM); a step over several lists
            passes their total.
        rho: radius, >= 0.
        adaptive, eta: ASAM and its constant.
        seen_dtype: dtype that the forward pass computes in (default: the weights' own).
        seed: round 16-bit weights at random, away from zero with the probability that keeps the mean; None is to nearest.
            Element e (in memory order) of tensor t takes half e % 2 of word e % 8 // 2 of Philox4x32-10(seed, e // 8, t).
            Wider weights are rounded to nearest all the same.

    Returns:
        float64 tensor of six sums over all elements: e.e, s.s, e.s, v.v, e.v, and how many elements changed; s is what was
        stored after rounding w + e to the weights' dtype, v what the forward pass sees after both are cast to
        `seen_dtype`. All zero, and the weights untouched bit for bit, where rho is 0 or the norm is zero or not finite;
        the stash is written in every case.
    """
    columns = {"weights": list(weights), "grads": list(grads), "stash": list(stash)}
    check_lists("sam_perturb_", columns, written=("weights", "stash"))
    check_radius("sam_perturb_", rho, eta)
    if seen_dtype is not None and not seen_dtype.is_floating_point:
        raise TypeError(f"sam_perturb_: seen_dtype must be a floating-point dtype, not {seen_dtype}")
    key = None if seed is None else seed_tensor(seed, columns["weights"][0].device)
    sums: Tensor = _op_sam_perturb_(*columns.values(), squared_norm.double(), rho, adaptive, eta, seen_dtype, key)
    wrote(columns["weights"])
    return sums


def sam_restore_(weights: Sequence[Tensor], stash: Sequence[Tensor]) -> None:
    """w = stash, bit for bit (NaN payloads, signed zeros and subnormals included), into the same storage."""
    columns = {"weights": list(weights), "stash": list(stash)}
    check_lists("sam_restore_", columns, written=("weights",))
    _op_sam_restore_(*columns.values())
    wrote(columns["weights"])


def sam_restore_adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    stash: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    maximize: bool = False,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """SAM's restore and a step of AdamW (Loshchilov and Hutter, 1711.05101) in one pass: w = AdamW(stash, g).

    The weights need not be restored first, nor read: that saves a pass over them and over the stash. Equal to
    `sam_restore_` and then torch.optim.AdamW(fused=True) within rounding.

    Args:
        weights, grads, stash, exp_avgs, exp_avg_sqs: lists of equal length; shapes, dtypes and devices agree row by row.
            Weights and both moments are written.
        steps: one scalar per tensor, how many steps its moments have seen with this one; float32, on the tensor's device
            where that is no CPU.
        lr, betas, eps, weight_decay, maximize: as in torch.optim.AdamW.
        grad_scale: scalar that the gradients are divided by, as GradScaler's; None is 1.
        found_inf: scalar; where it is not 0 nothing but the restore is done. None is 0.
    """
    columns = {
        "weights": list(weights), "grads": list(grads), "stash": list(stash), "exp_avgs": list(exp_avgs),
        "exp_avg_sqs": list(exp_avg_sqs),
    }  # fmt: skip
    op = "sam_restore_adamw_"
    check_lists(op, columns, written=("weights", "exp_avgs", "exp_avg_sqs"))
    check_steps(op, columns["weights"], steps)
    _op_sam_restore_adamw_(
        *columns.values(), list(steps), float(lr), *betas, eps, weight_decay, maximize, grad_scale, found_inf
    )
    for name in ("weights", "exp_avgs", "exp_avg_sqs"):
        wrote(columns[name])


def check_steps(op: str, weights: Sequence[Tensor], steps: Sequence[Tensor]) -> None:
    """Raises unless every tensor has a step count that its kernel can read."""
    if len(steps) != len(weights):
        raise ValueError(f"{op}: {len(weights)} weights but {len(steps)} steps")
    for i, (w, step) in enumerate(zip(weights, steps, strict=True)):
        if step.numel() != 1 or step.dtype != torch.float32:
            raise TypeError(f"{op}: steps[{i}] must be one float32, not {step.numel()} of {step.dtype}")
        if w.device.type != "cpu" and step.device != w.device:
            raise ValueError(
                f"{op}: steps[{i}] is on {step.device}, its weights on {w.device}; AdamW(fused=True) or capturable=True "
                "keeps them together"
            )


def negate_(tensors: Sequence[Tensor]) -> None:
    """Negates every tensor in place by its sign bit: exact for zeros, infinities and NaNs."""
    tensors = list(tensors)
    check_lists("negate_", {"tensors": tensors}, written=("tensors",))
    _op_negate_(tensors)
    wrote(tensors)


def flip_signs_(tensors: Sequence[Tensor], seed: int | Tensor) -> None:
    """Flips the sign of about half of all elements, in place; the same call again undoes it, bit for bit.

    Element e (in memory order) of tensor t flips where bit e of Philox4x32-10(seed, t) is one: the same in every backend.

    Args:
        tensors: floating-point tensors.
        seed: integer in [-2^63, 2^64), or an int64 tensor with one element.
    """
    tensors = list(tensors)
    check_lists("flip_signs_", {"tensors": tensors}, written=("tensors",))
    _op_flip_signs_(tensors, seed_tensor(seed, tensors[0].device))
    wrote(tensors)


def negate_clip_(tensors: Sequence[Tensor], max_norm: float | None = None) -> Tensor:
    """g = -g * min(1, max_norm / norm) over the whole list, and the norm as the gradients came.

    Args:
        tensors: gradients, negated in place. Without `max_norm` negation and norm share one pass over memory.
        max_norm: bound on the global norm, > 0; None does not clip.

    Returns:
        float64 scalar: the norm before clipping. Not finite if and only if a gradient is not; then nothing was clipped,
        the signs were flipped all the same, and the caller skips its step.
    """
    tensors = list(tensors)
    check_lists("negate_clip_", {"tensors": tensors}, written=("tensors",))
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"negate_clip_: max_norm must be > 0, not {max_norm}")
    squared: Tensor = _op_negate_clip_(tensors, math.inf if max_norm is None else max_norm)
    wrote(tensors)
    return squared.sqrt()


def negate_grads_(params: Iterable[Tensor], *, max_norm: float | None = None) -> Tensor | None:
    """Turns the next optimizer step uphill: negates the gradients of `params` in place, in one pass.

    Args:
        params: parameters; those without a gradient are passed over.
        max_norm: clip the global gradient norm to this in the same call.

    Returns:
        The gradient norm before clipping (float64 scalar), or None when no parameter has a gradient.
    """
    grads = [p.grad for p in params if p.grad is not None]
    return negate_clip_(grads, max_norm) if grads else None


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """An int64 tensor with one element on `device`; integers of [2^63, 2^64) wrap to their bit pattern."""
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"seed must be one int64, not {seed.numel()} values of {seed.dtype}")
        return seed.reshape(()).to(device)
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must lie in [-2^63, 2^64), not {seed}")
    # A fill, not a copy from the host: it waits for nothing and can be captured.
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
