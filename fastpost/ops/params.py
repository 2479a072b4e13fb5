"""Operations on lists of tensors: sums, SAM's perturb and restore, sign flips; long, as one family is one file.

Lists may mix devices, dtypes and layouts and hold tensors without elements; they are sorted
into buckets, one kernel call each. Everything is checked before anything is written. Lists that belong together (weights,
gradients, stash) agree element by element in shape, dtype and device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral

import torch
from torch import Tensor

from fastpost.ops.lists import ListOperation
from fastpost.ops.lists import Selection as Selection
from fastpost.ops.lists import check_lists as check_lists
from fastpost.ops.lists import check_memory as check_memory
from fastpost.ops.lists import follow as follow
from fastpost.ops.lists import gradients_of as gradients_of
from fastpost.ops.lists import make_buckets as make_buckets
from fastpost.ops.lists import mark_modified as mark_modified
from fastpost.ops.lists import plus as plus
from fastpost.ops.lists import run as run
from fastpost.ops.lists import served_alike as served_alike
from fastpost.ops.registry import without_grad as without_grad
from fastpost.ops.scalars import check_number as check_number
from fastpost.ops.scalars import check_real as check_real
from fastpost.ops.scalars import check_whole as check_whole
from fastpost.plan import CHUNK, Bucket, dense

NAMES_OF_SUMS = ("intended_sq", "stored_sq", "stored_dot", "seen_sq", "seen_dot", "changed")


# -- bodies: what an operation does with its buckets ----------------------------------------------------------------------


def _squared_norm(buckets: Sequence[Bucket], eta: float) -> Tensor | None:
    known = eta if "weights" in buckets[0].columns else None
    total = None
    for b in buckets:
        total = plus(total, run("squared_norm", b, known))
    return total


def _chunk_squares(buckets: Sequence[Bucket]) -> Tensor:
    parts = [run("chunk_squares", b) for b in buckets]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _squared_distance(buckets: Sequence[Bucket]) -> Tensor | None:
    total = None
    for b in buckets:
        total = plus(total, run("squared_distance", b))
    return total


def _dot(buckets: Sequence[Bucket]) -> Tensor | None:
    total = None
    for b in buckets:
        total = plus(total, run("dot", b))
    return total


def _sam_perturb_(
    buckets: Sequence[Bucket],
    squared: Tensor,
    rho: float,
    adaptive: bool,
    eta: float,
    compute_dtype: torch.dtype | None,
    seed: Tensor | None = None,
) -> Tensor | None:
    known = eta if adaptive else None
    total = None
    for b in buckets:
        total = plus(total, run("sam_perturb_", b, squared, rho, known, compute_dtype or b.dtype, seed))
    return total


def _sam_restore_(buckets: Sequence[Bucket]) -> None:
    for b in buckets:
        run("sam_restore_", b)


def _sam_restore_adamw_(
    buckets: Sequence[Bucket],
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
    check_steps(buckets, steps)
    for b in buckets:
        flags = [None if t is None else t.to(b.device) for t in (grad_scale, found_inf)]
        counts = [steps[i] for i in b.streams]
        run("sam_restore_adamw_", b, counts, lr, (beta1, beta2), eps, weight_decay, maximize, *flags)


def check_steps(buckets: Sequence[Bucket], steps: Sequence[Tensor]) -> None:
    """Raises unless every tensor has a step count that its kernel can read."""
    op, weights = "sam_restore_adamw_", sum(len(b.streams) for b in buckets)
    if len(steps) != weights:
        raise ValueError(f"{op}: {weights} weights but {len(steps)} steps")
    for b in buckets:
        for i in b.streams:
            step = steps[i]
            if step.numel() != 1 or step.dtype != torch.float32:
                raise TypeError(f"{op}: steps[{i}] must be one float32, not {step.numel()} of {step.dtype}")
            if b.device.type != "cpu" and step.device != b.device:
                raise ValueError(
                    f"{op}: steps[{i}] is on {step.device}, its weights on {b.device}; AdamW(fused=True) or "
                    "capturable=True keeps them together"
                )


def _negate_(buckets: Sequence[Bucket]) -> None:
    for b in buckets:
        run("negate_", b)


def _flip_signs_(buckets: Sequence[Bucket], seed: Tensor) -> None:
    for b in buckets:
        run("flip_signs_", b, seed)


def _negate_clip_(buckets: Sequence[Bucket], max_norm: float) -> Tensor | None:
    clips, squared = math.isfinite(max_norm), None
    for b in buckets:
        squared = plus(squared, run("squared_norm", b, None) if clips else run("negate_norm_", b))
    for b in buckets if clips else ():
        run("negate_clip_", b, squared, max_norm)
    return squared


def _scalar(lists: Sequence[Tensor], *_: object) -> Tensor:
    return torch.empty((), dtype=torch.float64, device=lists[0].device)


_OP_SQUARED_NORM = ListOperation(
    "squared_norm(Tensor[] grads, Tensor[]? weights, float eta) -> Tensor",
    _squared_norm,
    _scalar,
    {"grads": "grads", "weights": "weights"},
)
_OP_CHUNK_SQUARES = ListOperation(
    "chunk_squares(Tensor[] grads) -> Tensor",
    _chunk_squares,
    lambda grads: torch.empty(sum(map(_chunks, grads)), dtype=torch.float64, device=grads[0].device),
    {"grads": "grads"},
)
_OP_SQUARED_DISTANCE = ListOperation(
    "squared_distance(Tensor[] weights, Tensor[] stash) -> Tensor",
    _squared_distance,
    _scalar,
    {"weights": "weights", "stash": "stash"},
)
_OP_DOT = ListOperation(
    "dot(Tensor[] tensors, Tensor[] others) -> Tensor", _dot, _scalar, {"tensors": "grads", "others": "stash"}
)
_OP_SAM_PERTURB_ = ListOperation(
    "sam_perturb_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] stash, Tensor squared_norm, float rho, bool adaptive, "
    "float eta, ScalarType? compute_dtype, Tensor? seed=None) -> Tensor",
    _sam_perturb_,
    lambda weights, *_: torch.empty(6, dtype=torch.float64, device=weights[0].device),
    {"weights": "weights", "grads": "grads", "stash": "stash"},
)
_OP_SAM_RESTORE_ = ListOperation(
    "sam_restore_(Tensor(a!)[] weights, Tensor[] stash) -> ()",
    _sam_restore_,
    None,
    {"weights": "weights", "stash": "stash"},
)
_OP_SAM_RESTORE_ADAMW_ = ListOperation(
    "sam_restore_adamw_(Tensor(a!)[] weights, Tensor[] grads, Tensor[] stash, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
    "bool maximize, Tensor? grad_scale, Tensor? found_inf) -> ()",
    _sam_restore_adamw_,
    None,
    {"weights": "weights", "grads": "grads", "stash": "stash", "exp_avgs": "first", "exp_avg_sqs": "second"},
)
_OP_NEGATE_ = ListOperation("negate_(Tensor(a!)[] tensors) -> ()", _negate_, None, {"tensors": "grads"})
_OP_FLIP_SIGNS_ = ListOperation(
    "flip_signs_(Tensor(a!)[] tensors, Tensor seed) -> ()", _flip_signs_, None, {"tensors": "grads"}
)
_OP_NEGATE_CLIP_ = ListOperation(
    "negate_clip_(Tensor(a!)[] tensors, float max_norm) -> Tensor", _negate_clip_, _scalar, {"tensors": "grads"}
)


# -- the public face ------------------------------------------------------------------------------------------------------


def check_radius(op: str, rho: float, eta: float) -> None:
    """Raises unless rho and eta are numbers (TypeError), finite and not negative (ValueError)."""
    if type(rho) is type(eta) is float and 0 <= rho < math.inf and 0 <= eta < math.inf:
        return  # as nearly always, and the rest takes as long as a small kernel
    for name, value in (("rho", rho), ("eta", eta)):
        check_number(op, name, value)


_COMPUTED_IN = (torch.float32, torch.bfloat16, torch.float16)


def check_compute_dtype(op: str, compute_dtype: torch.dtype, weights: Iterable[torch.dtype]) -> None:
    """Raises TypeError unless every backend can say what a forward pass in this dtype sees.

    Args:
        op: what to name.
        compute_dtype: what was given.
        weights: the dtypes of the weights, as far as they are known.
    """
    if compute_dtype in _COMPUTED_IN:
        return
    if compute_dtype is torch.float64 and all(dtype is torch.float64 for dtype in weights):
        return
    raise TypeError(
        f"{op}: compute_dtype must be torch.float32, torch.bfloat16 or torch.float16, and torch.float64 only where all "
        f"weights are, not {compute_dtype}; leave it out for the weights' own"
    )


def squared_norm(grads: Sequence[Tensor], weights: Sequence[Tensor] | None = None, *, eta: float = 0.0) -> Tensor:
    """Sum of squares over a whole list of tensors.

    Args:
        grads: tensors of any shapes; float16, bfloat16, float32 or float64, on any devices.
        weights: when given, ASAM's scaled norm: the sum of ((abs(w) + eta) * g)^2 (Kwon et al. 2102.11600).
        eta: the constant beside abs(w); needs `weights`.

    Returns:
        float64 scalar on the first tensor's device. Accumulated in float64 over chunks cut per tensor and element, so the
        bits do not depend on threads, addresses or list layout. Not finite if and only if an element (of the scaled
        gradient) is not, or float64 is squared beyond its range. Not differentiable.
    """
    check_radius("squared_norm", 0.0, eta)
    total: Tensor = _OP_SQUARED_NORM.call((list(grads), None if weights is None else list(weights)), eta)
    return total


def _chunks(tensor: Tensor) -> int:
    return -(-tensor.numel() // CHUNK)


def chunk_squares(grads: Sequence[Tensor]) -> list[Tensor]:
    """What `squared_norm` adds up: the sums of squares of each tensor's chunks of 65,536 elements, in memory order.

    Args:
        grads: tensors of any shapes; float16, bfloat16, float32 or float64, on any devices.

    Returns:
        For each tensor a float64 vector on its device, of one sum per chunk. They do not depend on the list that a tensor is
        in. On the CPU `squared_norm` of a list of one dtype is their sum from the first to the last: bit for bit, but for
        float64, of which it keeps more digits.
    """
    if len(grads) == 1:
        sums: Tensor = _OP_CHUNK_SQUARES.call((list(grads),))
        return [sums]
    alike: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for i, g in enumerate(grads):
        alike.setdefault((g.device, g.dtype, dense(g) and not g.is_neg()), []).append(i)
    found: dict[int, Tensor] = {}
    for rows in alike.values():  # each is one bucket, so that the sums come in the tensors' order
        tensors = [grads[i] for i in rows]
        sums = _OP_CHUNK_SQUARES.call((tensors,))
        found.update(zip(rows, torch.split(sums, list(map(_chunks, tensors))), strict=True))
    return [found[i] for i in range(len(found))]


def squared_distance(weights: Sequence[Tensor], stash: Sequence[Tensor]) -> Tensor:
    """How far a whole list of tensors is from another, squared: the sum of (weights - stash)^2.

    Args:
        weights: tensors of any shapes; float16, bfloat16, float32 or float64, on any devices.
        stash: as many, each of its weight's shape, dtype and device. Neither list is written.

    Returns:
        float64 scalar on the first tensor's device; differences, squares and sums in float64, in the order of
        `squared_norm`. NaN where both lists hold the same infinity. Not differentiable.
    """
    total: Tensor = _OP_SQUARED_DISTANCE.call((list(weights), list(stash)))
    return total


def dot(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """The dot product of a whole list of tensors with another: the sum of tensors * others.

    Args:
        tensors: of any shapes; float16, bfloat16, float32 or float64, on any devices.
        others: as many, each of its tensor's shape, dtype and device. Neither list is written.

    Returns:
        float64 scalar on the first tensor's device; products and sums in float64, in the order of `squared_norm`. Not
        differentiable.
    """
    total: Tensor = _OP_DOT.call((list(tensors), list(others)))
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
    compute_dtype: torch.dtype | None = None,
    seed: int | Tensor | None = None,
) -> Tensor:
    """stash = w, w = w + e with e = rho * g / norm (SAM, 2010.01412 eq. 2) or rho * t^2 * g / norm, t = abs(w) + eta (ASAM).

    Args:
        weights, grads, stash: lists of equal length; shapes, dtypes and devices agree row by row. `stash` may hold anything.
        squared_norm: float64 scalar as `ops.squared_norm` returns it (with `weights` for ASAM); a step over several lists
            passes their total.
        rho: radius, >= 0.
        adaptive, eta: ASAM and its constant.
        compute_dtype: dtype that the forward pass computes in (default: the weights' own): float32, bfloat16 or float16;
            float64 where all weights are.
        seed: round 16-bit weights at random, away from zero with the probability that keeps the mean; None is to nearest.
            Element e (in memory order) of tensor t takes half e % 2 of word e % 8 // 2 of Philox4x32-10(seed, e // 8, t).
            Wider weights are rounded to nearest all the same.

    Returns:
        float64 tensor of six sums over all elements: e.e, s.s, e.s, v.v, e.v, and how many elements changed; s is what was
        stored after rounding w + e to the weights' dtype, v what the forward pass sees after both are cast to
        `compute_dtype`. All zero, and the weights untouched bit for bit, where rho is 0 or the norm is zero or not finite;
        the stash is written in every case.
    """
    check_radius("sam_perturb_", rho, eta)
    lists = (list(weights), list(grads), list(stash))
    if compute_dtype is not None:
        check_compute_dtype("sam_perturb_", compute_dtype, (w.dtype for w in lists[0]))
    key = None if seed is None else seed_tensor(seed, squared_norm.device)
    sums: Tensor = _OP_SAM_PERTURB_.call(lists, squared_norm, rho, adaptive, eta, compute_dtype, key)
    return sums


def sam_restore_(weights: Sequence[Tensor], stash: Sequence[Tensor]) -> None:
    """w = stash, bit for bit (NaN payloads, signed zeros and subnormals included), into the same storage."""
    _OP_SAM_RESTORE_.call((list(weights), list(stash)))


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
    lists = (list(weights), list(grads), list(stash), list(exp_avgs), list(exp_avg_sqs))
    _OP_SAM_RESTORE_ADAMW_.call(lists, list(steps), float(lr), *betas, eps, weight_decay, maximize, grad_scale, found_inf)


def negate_(tensors: Sequence[Tensor]) -> None:
    """Negates every tensor in place by its sign bit: exact for zeros, infinities and NaNs."""
    _OP_NEGATE_.call((list(tensors),))


def flip_signs_(tensors: Sequence[Tensor], seed: int | Tensor) -> None:
    """Flips the sign of about half of all elements, in place; the same call again undoes it, bit for bit.

    Element e (in memory order) of tensor t flips where bit e of Philox4x32-10(seed, t) is one: the same in every backend.

    Args:
        tensors: floating-point tensors.
        seed: integer in [-2^63, 2^64), or an int64 tensor with one element.
    """
    tensors = list(tensors)
    # Where there is no first tensor the check that follows says so.
    device = tensors[0].device if tensors and isinstance(tensors[0], Tensor) else torch.device("cpu")
    _OP_FLIP_SIGNS_.call((tensors,), seed_tensor(seed, device))


def negate_clip_(tensors: Sequence[Tensor], max_norm: float | None = None) -> Tensor:
    """g = -g * min(1, max_norm / norm) over the whole list, and the norm as the gradients came.

    Args:
        tensors: gradients, negated in place. Without `max_norm` negation and norm share one pass over memory.
        max_norm: bound on the global norm, > 0; None does not clip.

    Returns:
        float64 scalar: the norm before clipping. Not finite if and only if a gradient is not; then nothing was clipped,
        the signs were flipped all the same, and the caller skips its step.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"negate_clip_: max_norm must be > 0, not {max_norm}")
    squared: Tensor = _OP_NEGATE_CLIP_.call((list(tensors),), math.inf if max_norm is None else max_norm)
    return squared.sqrt()


def negate_grads_(params: Iterable[Tensor], *, max_norm: float | None = None) -> Tensor | None:
    """Turns the next optimizer step uphill: negates the gradients of `params` in place, in one pass.

    Args:
        params: parameters; those without a gradient are passed over.
        max_norm: clip the global gradient norm to this in the same call.

    Returns:
        The gradient norm before clipping (float64 scalar), or None when no parameter has a gradient.
    """
    grads = gradients_of(list(params))
    return negate_clip_(grads, max_norm) if grads else None


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """An int64 tensor with one element on `device`; integers of [2^63, 2^64) wrap to their bit pattern."""
    if isinstance(seed, Tensor):
        if seed.numel() != 1 or seed.dtype != torch.int64:
            raise ValueError(f"seed must be one int64, not {seed.numel()} values of {seed.dtype}")
        return seed.reshape(()).to(device)
    given: object = seed
    if isinstance(given, bool) or not isinstance(given, Integral):
        raise TypeError(f"seed must be a whole number or an int64 tensor with one, not {seed!r}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must lie in [-2^63, 2^64), not {seed}")
    # A fill, not a copy from the host: it waits for nothing and can be captured.
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
