"""The specification: every operation in plain torch, on any device and dtype; long, as it is to be whole in one file.

Written to be read beside the equations, never to be fast. Half-precision inputs are computed in float32, as the compiled
backends do; float64 stays float64. Autograd sees nothing of it, as nothing of a kernel: every operation is under no_grad.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpost.backends.known_classes import top_k_rows as top_k_rows
from fastpost.backends.serving import coded, number_on, seed_on
from fastpost.backends.vocab_shards import shard_operands as shard_operands
from fastpost.backends.vocab_shards import shard_sums as shard_sums
from fastpost.plan import CHUNK, AdamWPart, Bucket, dense
from fastpost.row_tasks import DistillationTask, DivergenceTask, NoiseTask, OperandTask


def status() -> tuple[bool, str]:
    return True, "pure torch, any device and dtype"


def refuses(op: str, device: str, dtype: torch.dtype, walkable: bool) -> str | None:
    return None if op in globals() else "has no such operation"


def _working(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


# -- params: lists of tensors ---------------------------------------------------------------------------------------------


@torch.no_grad()
def squared_norm(bucket: Bucket, eta: float | None) -> Tensor:
    """Sum of g^2 in float64; with eta, of ((|w| + eta) g)^2 (ASAM, 2102.11600, eq. 7)."""
    total = torch.zeros((), dtype=torch.float64, device=bucket.device)
    for i, g in enumerate(bucket.grads):
        scaled = g.double()
        if eta is not None:
            scaled = scaled * (bucket.weights[i].double().abs() + eta)
        total += scaled.square().sum()
    return total


@torch.no_grad()
def chunk_squares(bucket: Bucket) -> Tensor:
    """Sums of g^2 in float64 over chunks of `plan.CHUNK` elements in memory order, tensor by tensor."""
    sums = [torch.empty(0, dtype=torch.float64, device=bucket.device)]
    for g in bucket.grads:
        squares = (_in_memory_order(g) if dense(g) else g.reshape(-1)).double().square()
        whole = squares.numel() // CHUNK * CHUNK
        sums.append(squares[:whole].view(-1, CHUNK).sum(1))
        if whole < squares.numel():
            sums.append(squares[whole:].sum().view(1))
    return torch.cat(sums)


@torch.no_grad()
def squared_distance(bucket: Bucket) -> Tensor:
    """Sum of (w - stash)^2 in float64."""
    total = torch.zeros((), dtype=torch.float64, device=bucket.device)
    for w, stash in zip(bucket.weights, bucket.stash, strict=True):
        total += (w.double() - stash.double()).square().sum()
    return total


@torch.no_grad()
def dot(bucket: Bucket) -> Tensor:
    """Sum of g * stash in float64."""
    total = torch.zeros((), dtype=torch.float64, device=bucket.device)
    for g, stash in zip(bucket.grads, bucket.stash, strict=True):
        total += (g.double() * stash.double()).sum()
    return total


@torch.no_grad()
def sam_perturb_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    """stash = w; w = w + e with e = rho g / |g| (2010.01412, eq. 2), or rho t^2 g / |t g|, t = |w| + eta for ASAM.

    Nothing moves where the norm is zero or not finite. With a seed, 16-bit weights are rounded at random. Returns the sums
    (e.e, s.s, e.s, v.v, e.v, changed) in float64: s is what was stored, v what a forward pass in `compute_dtype` sees.
    """
    for w, stash in zip(bucket.weights, bucket.stash, strict=True):
        stash.copy_(w)
    bucket.stashed = True
    return _perturb(bucket, bucket.stash, squared, rho, eta, compute_dtype, seed)


@torch.no_grad()
def sam_perturb_masters_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype
) -> Tensor:
    """w = m + e, rounded to nearest; the stash column holds the float32 masters m, of which ASAM takes its t."""
    sam_cast_(bucket)
    return _perturb(bucket, bucket.stash, squared, rho, eta, compute_dtype, None)


@torch.no_grad()
def sam_cast_(bucket: Bucket) -> None:
    """w = m, rounded to nearest."""
    for w, master in zip(bucket.weights, bucket.stash, strict=True):
        w.copy_(master)


def _perturb(
    bucket: Bucket, origins: list[Tensor], squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype,
    seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """w = origin + e, where w holds the origin rounded to its dtype; the six sums."""
    sums = torch.zeros(6, dtype=torch.float64, device=bucket.device)
    scale, seed = _scale(bucket, squared, rho), seed_on(bucket.device, seed)
    for w, g, origin, stream in zip(bucket.weights, bucket.grads, origins, bucket.streams, strict=True):
        work = _working(w.dtype)
        e = _perturbation(g, origin, scale, eta).to(work)
        before = w.clone()
        exact = origin.to(work) + e
        rounded = exact.to(w.dtype) if seed is None else round_randomly(exact, random_halves(w, seed, stream), w.dtype)
        w.copy_(torch.where(scale != 0, rounded, w))
        stored = w.to(work) - before.to(work)
        seen = w.to(compute_dtype).to(work) - before.to(compute_dtype).to(work)
        sums += _sums(e.double(), stored.double(), seen.double())
    return sums


def _block_elements(t: Tensor) -> int:
    """How many elements to work on at a time where float64 of all would be large; more where every operation is a launch."""
    return 1 << 18 if t.device.type == "cpu" else 1 << 24


@torch.no_grad()
def sam_direction_(
    bucket: Bucket, out: list[Tensor], squared: Tensor, rho: float, eta: float | None, factor: float
) -> Tensor:
    """out = e / factor, rounded to its dtype, e as in `sam_perturb_`; no weight is written.

    Returns the same six sums; what is stored and seen is factor * out.
    """
    sums = torch.zeros(6, dtype=torch.float64, device=bucket.device)
    scale = _scale(bucket, squared, rho)
    for w, g, u in (part for whole in zip(bucket.weights, bucket.grads, out, strict=True) for part in _pieces(*whole)):
        e = _perturbation(g, w, scale, eta)
        u.copy_(e / factor)
        stored = u.double() * factor
        sums += _sums(e, stored, stored)
    return sums


def _pieces(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Tensors of one shape a block of elements at a time, as what is made of them in float64 is large; whole where one has
    gaps."""
    if not all(t.is_contiguous() for t in tensors):
        return [tensors]
    flat, step = [t.view(-1) for t in tensors], _block_elements(tensors[0])
    return (tuple(t[at : at + step] for t in flat) for at in range(0, flat[0].numel(), step))


def _scale(bucket: Bucket, squared: Tensor, rho: float) -> Tensor:
    """rho / |g|, or 0 where nothing moves."""
    squared = number_on(bucket.device, squared)
    moves = torch.isfinite(squared) & (squared > 0)
    return torch.where(moves, rho / squared.sqrt(), torch.zeros_like(squared)) if rho else torch.zeros_like(squared)


def _perturbation(g: Tensor, origin: Tensor, scale: Tensor, eta: float | None) -> Tensor:
    """e in float64."""
    e = g.double() * scale
    if eta is not None:
        e = e * (origin.double().abs() + eta).square()
    return torch.where(scale != 0, e, torch.zeros_like(e))  # 0 * inf is not 0


def _sums(e: Tensor, stored: Tensor, seen: Tensor) -> Tensor:
    parts = (e * e, stored * stored, e * stored, seen * seen, e * seen, (stored != 0).double())
    return torch.stack([part.sum() for part in parts])


def random_halves(like: Tensor, seed: Tensor, stream: int) -> Tensor:
    """16 bits per element e, in memory order: half e % 2 of word e % 8 // 2 of philox(seed, e // 8, stream)."""
    n = like.numel()
    words = philox(seed, torch.arange(-(-n // 8), device=like.device), stream)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=-1).reshape(-1)[:n]
    placed = torch.empty_like(like, dtype=torch.int64)
    _in_memory_order(placed).copy_(halves)
    return placed


def round_randomly(x: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds to a neighbour in `dtype`, away from zero with the probability that keeps the mean.

    Args:
        x: float32, any shape.
        bits: integers in [0, 65536), uniform, of x's shape.
        dtype: bfloat16 or float16; anything else is rounded to nearest.

    Returns:
        `x` in `dtype`. Numbers that `dtype` holds stay as they are, whatever the bits; infinities and NaN too.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return x.to(dtype)
    # In units of the last place at |x| (of the smallest normal number below it) the sum is exact in float64.
    info = torch.finfo(dtype)
    smallest, digits = (-13, 11) if dtype == torch.float16 else (-125, 8)
    size = x.double().abs()
    unit = torch.exp2(torch.frexp(size).exponent.double().clamp(min=smallest) - digits)
    rounded = torch.floor(size / unit + bits.double() / 65536) * unit
    rounded = torch.where(rounded > info.max, torch.full_like(rounded, torch.inf), rounded)
    return torch.where(x.isfinite(), torch.copysign(rounded, x.double()), x.double()).to(dtype)


@torch.no_grad()
def sam_restore_(bucket: Bucket) -> None:
    """w = stash, bit for bit."""
    for w, stash in zip(bucket.weights, bucket.stash, strict=True):
        w.copy_(stash)


# A stash of codes (csrc/core/params.h). Codes that are no distances: w is in the list; +0.
_LISTED, _ZERO = 0, 2  # above the least number of the code's dtype


@torch.no_grad()
def sam_perturb_coded_(
    bucket: Bucket, squared: Tensor, rho: float, eta: float | None, compute_dtype: torch.dtype, seed: Tensor | None = None
) -> Tensor:
    """As `sam_perturb_`, with the distance of w + e from w in the stash, counted in numbers of the weights' dtype.

    A distance that does not fit into the stash's dtype goes to the list, as the bits of w.
    """
    codes = coded(bucket)
    codes.origins = origins = [w.clone() for w in bucket.weights]
    bucket.stashed = True
    sums = _perturb(bucket, origins, squared, rho, eta, compute_dtype, seed)
    entries = [torch.zeros(1, dtype=torch.int64, device=bucket.device)]
    chunk = 0
    for w, stash, origin in zip(bucket.weights, bucket.stash, origins, strict=True):
        before, after = (_bits_in_memory_order(t, stash) for t in (origin, w))
        least, bits = torch.iinfo(stash.dtype).min, 8 * w.dtype.itemsize
        distance = _signed(_ordered(after, bits) - _ordered(before, bits), bits)
        fits = (distance > least + _ZERO) & (distance < -least)
        code = torch.where(before == 0, least + _ZERO, least + _LISTED)
        code = torch.where(fits, distance, code)
        _in_memory_order(stash).copy_(code)
        (place,) = torch.nonzero(code == least + _LISTED, as_tuple=True)
        entries.append(((chunk << 16) + place << bits) + before[place] % (1 << bits))
        chunk += -(-w.numel() >> 16)
    codes.words = torch.cat(entries)
    codes.words[0] = codes.capacity
    codes.origins = None
    return sums


@torch.no_grad()
def sam_decode_(bucket: Bucket) -> None:
    """w, bit for bit, from w + e, the codes and the list."""
    codes = coded(bucket)
    codes.origins = origins = _decoded(bucket)  # before a weight is written: decoding begins with w + e
    for w, origin in zip(bucket.weights, origins, strict=True):
        w.copy_(origin)
    bucket.stashed = False
    codes.origins = None


def _decoded(bucket: Bucket) -> list[Tensor]:
    codes = coded(bucket)
    entries = codes.words[1 : 1 + int(codes.words[0])]
    bits = 8 * bucket.dtype.itemsize
    values, place = _signed(entries, bits), entries >> bits & ((1 << 64 - bits) - 1)
    origins, chunk = [], 0
    for w, stash in zip(bucket.weights, bucket.stash, strict=True):
        after, code = _bits_in_memory_order(w, stash), _in_memory_order(stash).long()
        least, chunks = torch.iinfo(stash.dtype).min, -(-w.numel() >> 16)
        before = _ordered(_signed(_ordered(after, bits) - code, bits), bits)
        before = torch.where(code > least + _ZERO, before, torch.where(code == least + _ZERO, 0, after))
        mine = (place >> 16 >= chunk) & (place >> 16 < chunk + chunks)
        before[place[mine] - (chunk << 16)] = values[mine]
        chunk += chunks
        placed = torch.empty_like(stash, dtype=torch.int32 if bits == 32 else torch.int16)
        _in_memory_order(placed).copy_(before)
        origins.append(placed.view(w.dtype))
    return origins


def _bits_in_memory_order(w: Tensor, stash: Tensor) -> Tensor:
    """Bit patterns as signed integers, in int64 and in the order in which the stash lies in memory."""
    placed = torch.empty_like(stash, dtype=torch.int64)
    placed.copy_(w.resolve_neg().view(torch.int32 if w.dtype.itemsize == 4 else torch.int16))
    return _in_memory_order(placed)


def _signed(numbers: Tensor, bits: int) -> Tensor:
    """Modulo 2^bits, in [-2^(bits - 1), 2^(bits - 1))."""
    half = 1 << bits - 1
    return (numbers + half) % (1 << bits) - half


def _ordered(patterns: Tensor, bits: int) -> Tensor:
    """Patterns as signed integers in the order of the numbers that they stand for; its own inverse."""
    return torch.where(patterns < 0, patterns ^ ((1 << bits - 1) - 1), patterns)


@torch.no_grad()
def sam_restore_adamw_(
    bucket: Bucket, steps: list[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
    maximize: bool, grad_scale: Tensor | None, found_inf: Tensor | None,
) -> None:  # fmt: skip
    """One step of AdamW (1711.05101, algorithm 2) from the stash, moments and gradients in the bucket; steps count this one.

    The gradients are divided by grad_scale; where found_inf is not 0, w = stash and the moments stay.
    """
    columns = zip(bucket.weights, bucket.grads, bucket.stash, bucket.first, bucket.second, steps, strict=True)
    for w, g, stash, first, second, step in columns:
        work = _working(w.dtype)
        count = step.double().to(w.device)
        gradient = g.to(work) if grad_scale is None else (g.double() / grad_scale.to(w.device)).to(work)
        gradient = -gradient if maximize else gradient
        m = betas[0] * first.to(work) + (1 - betas[0]) * gradient
        v = betas[1] * second.to(work) + (1 - betas[1]) * gradient.square()
        m_hat, v_hat = m / (1 - betas[0] ** count).to(work), v / (1 - betas[1] ** count).to(work)
        new = stash.to(work)
        new = new - lr * weight_decay * new - lr * m_hat / (v_hat.sqrt() + eps)
        skips = torch.zeros((), dtype=torch.bool, device=w.device) if found_inf is None else found_inf.to(w.device) != 0
        w.copy_(torch.where(skips, stash, new.to(w.dtype)))
        first.copy_(torch.where(skips, first, m.to(w.dtype)))
        second.copy_(torch.where(skips, second, v.to(w.dtype)))


@torch.no_grad()
def sam_decode_adamw_(bucket: Bucket, parts: list[AdamWPart]) -> None:
    """`sam_decode_` and then `sam_restore_adamw_` from what it finds, for each part; `bucket` is the first one's.

    Until all weights are written all of them can be put back.
    """
    decoded = [_decoded(part.bucket) for part in parts]
    for part, origins in zip(parts, decoded, strict=True):
        coded(part.bucket).origins = origins
    for part, origins in zip(parts, decoded, strict=True):
        b, counts = part.bucket, [step for step in part.steps if step is not None]
        stepped = [i for i, step in enumerate(part.steps) if step is not None]
        columns = {"weights": b.weights, "grads": b.grads, "stash": origins, "first": b.first, "second": b.second}
        rows: dict[str, Any] = {name: [column[i] for i in stepped] for name, column in columns.items()}
        if stepped:
            sam_restore_adamw_(Bucket(stepped, **rows), counts, *part[2:])
        for i in set(range(len(origins))) - set(stepped):
            b.weights[i].copy_(origins[i])
    parts[-1].bucket.stashed = False  # from here on all weights count as stepped
    for part in parts:
        part.bucket.stashed, coded(part.bucket).origins = False, None


@torch.no_grad()
def negate_(bucket: Bucket) -> None:
    for g in bucket.grads:
        g.neg_()


@torch.no_grad()
def flip_signs_(bucket: Bucket, seed: Tensor) -> None:
    """Flips element e of tensor t where bit e % 32 of word (e % 128) // 32 of philox(seed, e // 128, t) is one."""
    seed = seed.to(bucket.device)
    for g, stream in zip(bucket.grads, bucket.streams, strict=True):
        n = g.numel()
        words = philox(seed, torch.arange(-(-n // 128), device=g.device), stream)  # (calls, 4)
        bits = (words[:, :, None] >> torch.arange(32, device=g.device)) & 1
        flip = bits.reshape(-1)[:n].bool()
        flat = _in_memory_order(g)
        flat.copy_(torch.where(flip, -flat, flat))


@torch.no_grad()
def negate_norm_(bucket: Bucket) -> Tensor:
    squared = squared_norm(bucket, None)
    negate_(bucket)
    return squared


@torch.no_grad()
def negate_clip_(bucket: Bucket, squared: Tensor, max_norm: float) -> None:
    norm = number_on(bucket.device, squared).sqrt()
    factor = torch.where(torch.isfinite(norm) & (norm > max_norm), max_norm / norm, torch.ones_like(norm))
    for g in bucket.grads:
        g.copy_(torch.where(factor == 1, -g, (g.double() * -factor).to(g.dtype)))


def _in_memory_order(tensor: Tensor) -> Tensor:
    """A flat view over the elements as they lie in memory (the order that random numbers are counted in)."""
    order = sorted(range(tensor.ndim), key=lambda d: tensor.stride(d), reverse=True)
    return tensor.permute(order).view(-1)


# -- noise ------------------------------------------------------------------------------------------------------------------

_M32 = 0xFFFFFFFF


def philox(seed: Tensor, counter: Tensor, stream: int = 0) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011): four 32-bit words, as int64, for each counter.

    Args:
        seed: int64 tensor with one element, the key.
        counter: int64, any shape; counts groups of four words.
        stream: the third counter word.

    Returns:
        int64 tensor of shape (*counter.shape, 4), each value in [0, 2^32).
    """
    key = seed.to(counter.device)
    low, high = counter & _M32, (counter >> 32) & _M32
    words = (low, high, torch.full_like(low, stream & _M32), torch.zeros_like(low))
    return philox_rounds(words, (key & _M32, (key >> 32) & _M32))


def philox_rounds(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> Tensor:
    """The ten rounds, on 32-bit words held in int64."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        low0, high0 = _multiply(c0, 0xD2511F53)
        low1, high1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _M32, (k1 + 0xBB67AE85) & _M32
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Low and high 32 bits of a 32 x 32 bit product, in halves because int64 has a sign."""
    low = a * (constant & 0xFFFF)
    high = a * (constant >> 16) + (low >> 16)
    return ((high << 16) | (low & 0xFFFF)) & _M32, high >> 16


def draw(n: int, noise_type: str, seed: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The first n numbers of the sequence: uniform on (-1, 1), exact in float32, or standard normal (Box-Muller)."""
    return quads(torch.arange(-(-n // 4), device=device), noise_type, seed, dtype).reshape(-1)[:n]


def quads(counter: Tensor, noise_type: str, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers 4c to 4c + 3 of the sequence for each counter c: shape (*counter.shape, 4)."""
    words = philox(seed, counter)
    if noise_type == "uniform":
        z = ((words >> 8) * 2 + 1 - (1 << 24)).double() * 2.0**-24
    else:
        # u is a float32, as in the compiled backends: the word is rounded, then one is added.
        u = ((words[..., 0::2].float() + 1) * 2.0**-32).double()
        radius = (-2 * u.log()).sqrt()
        angle = (words[..., 1::2] >> 8).double() * (2.0**-24 * 2 * torch.pi)
        z = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).reshape(words.shape)
    return z.to(dtype)


@torch.no_grad()
def add_noise(x: Tensor, how: NoiseTask) -> Tensor:
    """fl(x + fl(eps z)), rounded once more to `out_dtype`.

    Element (r, c) takes number rows[r] * width + c of the sequence, by default r * width + c; where rows[r] is negative it
    stays as it is. With scales the noise of row r is fl(fl(eps scales[r]) z).
    """
    work, rows = _working(x.dtype), how.rows
    if rows is None:
        z = draw(x.numel(), how.noise_type, how.seed, x.device, work).reshape(x.shape)
    else:
        number = rows.clamp(min=0).unsqueeze(-1) * x.shape[-1] + torch.arange(x.shape[-1], device=x.device)
        z = quads(number // 4, how.noise_type, how.seed, work).gather(-1, (number % 4).unsqueeze(-1)).squeeze(-1)
    width = torch.tensor(how.eps, dtype=work, device=x.device)
    if how.scales is not None:
        width = (width * how.scales.to(work)).unsqueeze(-1)
    noised = x.to(work) + z * width
    if rows is not None:
        noised = torch.where((rows >= 0).unsqueeze(-1), noised, x.to(work))
    return noised.to(how.out_dtype).contiguous()


@torch.no_grad()
def embedding_noise(table: Tensor, ids: Tensor, how: NoiseTask) -> tuple[Tensor, Tensor]:
    """The rows of `table`, and the same rows with noise."""
    clean = table[ids]
    return clean, add_noise(clean, how)


# -- divergence: rows of logits in two streams ----------------------------------------------------------------------------


def divergence_of_rows(
    clean: Tensor,
    noised: Tensor,
    labels: Tensor | None,
    ignore_index: int,
    kl_weights: Tensor | None,
    ce_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per row KL(p|q) + KL(q|p) and cross-entropy of the clean logits, and the gradients of their weighted sum.

    J = sum (p - q)(log p - log q); dJ/da = p (log p - log q - KL(p|q)) + p - q, dJ/db with p and q exchanged. In float64
    whatever the logits' dtype, and differentiable. Rows of weight 0 give exactly 0, whatever their logits. Classes that are
    -inf in both streams do not exist; one that is -inf in one stream only makes the value infinite and the gradients NaN.
    """
    a, b = clean.double(), noised.double()
    ones = torch.ones(len(a), dtype=torch.float64, device=a.device)
    kl_weights = ones if kl_weights is None else kl_weights
    ce_weights = ones if ce_weights is None else ce_weights
    diverges = kl_weights != 0
    counts = torch.zeros_like(diverges) if labels is None else (labels != ignore_index) & (ce_weights != 0)
    # What does not count may be NaN, and 0 * NaN is not 0: it is replaced before anything is made of it.
    a = torch.where((diverges | counts).unsqueeze(-1), a, torch.zeros_like(a))
    b = torch.where(diverges.unsqueeze(-1), b, a)
    absent = (a == -torch.inf) & (b == -torch.inf)
    log_p, log_q = torch.log_softmax(a, dim=-1), torch.log_softmax(b, dim=-1)
    p, q = log_p.exp(), log_q.exp()
    r = torch.where(absent, torch.zeros_like(a), log_p - log_q)
    kl_pq, kl_qp = (p * r).sum(-1, keepdim=True), -(q * r).sum(-1, keepdim=True)
    kl = ((p - q) * r).sum(-1).clamp(min=0)  # rounding can leave -1e-34
    # A stream without any class has no probabilities, but the classes that the other has are missing in it.
    meaningful = ((a < torch.inf) & (b < torch.inf)).all(-1)
    kl = torch.where(meaningful & ((a == -torch.inf) != (b == -torch.inf)).any(-1), torch.full_like(kl, torch.inf), kl)
    grad_a = kl_weights.unsqueeze(-1) * (p * (r - kl_pq) + p - q)
    grad_b = kl_weights.unsqueeze(-1) * (q * (-r - kl_qp) + q - p)
    grad_a, grad_b = (torch.where(kl.isfinite().unsqueeze(-1), g, torch.full_like(g, torch.nan)) for g in (grad_a, grad_b))
    grad_a, grad_b = (torch.where(diverges.unsqueeze(-1), g, torch.zeros_like(g)) for g in (grad_a, grad_b))
    ce = torch.zeros_like(kl)
    if labels is not None:
        targets = torch.where(counts, labels, torch.zeros_like(labels)).unsqueeze(-1)
        ce = torch.where(counts, -log_p.gather(-1, targets).squeeze(-1), ce)
        one_hot = torch.zeros_like(p).scatter(-1, targets, 1.0)
        grad_a = grad_a + torch.where(counts.unsqueeze(-1), ce_weights.unsqueeze(-1) * (p - one_hot), torch.zeros_like(p))
    return torch.where(diverges, kl, torch.zeros_like(kl)), ce, grad_a, grad_b


@torch.no_grad()
def divergence_rows(task: DivergenceTask) -> tuple[Tensor, Tensor]:
    """`divergence_of_rows`, its gradients written where the task says."""
    kl, ce, *grads = divergence_of_rows(*task[:6])
    for out, grad in zip((task.grad_clean, task.grad_noised), grads, strict=True):
        if out is not None:
            out.copy_(grad)
    return kl, ce


def _cross_entropy_of_rows(
    z: Tensor, labels: Tensor | None, ignore_index: int, weights: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Per row the plain cross-entropy, and the weighted gradient of the smoothed one; 0 where the label does not count."""
    z = z.double()
    if labels is None or weights is None:
        return z.new_zeros(len(z)), torch.zeros_like(z)
    counts = (labels != ignore_index) & (weights != 0)
    targets = torch.where(counts, labels, torch.zeros_like(labels)).unsqueeze(-1)
    log_p = torch.log_softmax(z, dim=-1)
    one_hot = torch.zeros_like(z).scatter(-1, targets, 1.0)
    grad = log_p.exp() - (1 - smoothing) * one_hot - smoothing / z.shape[-1]
    ce = -log_p.gather(-1, targets).squeeze(-1)
    return (
        torch.where(counts, ce, torch.zeros_like(ce)),
        torch.where(counts.unsqueeze(-1), weights.unsqueeze(-1) * grad, torch.zeros_like(grad)),
    )


@torch.no_grad()
def operand_rows(task: OperandTask) -> None:
    """`divergence_of_rows` whose gradients are operands of the output head's products, as the task says."""
    kl, _, *grads = divergence_of_rows(task.clean, task.noised, None, task.ignore_index, task.kl_weights, None)
    _put_operands(task, kl, *grads)


def _put_operands(task: OperandTask, kl: Tensor, grad_a: Tensor, grad_b: Tensor) -> None:
    """Writes what the task asks for, given the divergence of its rows and the weighted gradients of that."""
    weights, classify = task.ce_weights, task.noised_classifies
    ce, labelled = _cross_entropy_of_rows(task.clean, task.labels, task.ignore_index, weights, task.smoothing)
    grad_a = grad_a + labelled if task.teaches else labelled
    if classify and weights is not None:
        weights = torch.where(task.kl_weights != 0, weights, torch.zeros_like(weights))
        more, labelled = _cross_entropy_of_rows(task.noised, task.labels, task.ignore_index, weights, task.smoothing)
        ce, grad_b = ce + more, grad_b + labelled
    if task.cap:
        grad_a, grad_b = (
            torch.where(g == 0, g, g * (1 - (z.double() / task.cap).square()))
            for g, z in ((grad_a, task.clean), (grad_b, task.noised))
        )
    if task.first is not None:
        task.first.copy_(grad_a if task.second is None else grad_a + grad_b)
    if task.second is not None:
        task.second.copy_(grad_b)
    task.kl_out.copy_(kl)
    if task.ce_out is not None:
        task.ce_out.copy_(ce)


# |t| below which (1 + t) ln(1 + t) + (1 - t) ln(1 - t) is a series, because its terms cancel. Of t^2 / 2, the series' first
# term, the first that is left out is t^12 / 91.
_JS_SERIES = 0.1


def jensen_shannon_of_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row KL(p|m) / 2 + KL(q|m) / 2 with m = (p + q) / 2, and its gradients, in float64 and differentiable.

    dJSD/da = p (ln(p / m) - KL(p|m)) / 2, dJSD/db with q in place of p.
    """
    log_p, log_q = torch.log_softmax(a.double(), dim=-1), torch.log_softmax(b.double(), dim=-1)
    p, q = log_p.exp(), log_q.exp()
    # In float64 the difference keeps eight digits where float32 logits are 1e-6 apart. Where a class is missing in a stream,
    # neither it nor its derivative is looked at.
    shared = (p != 0) & (q != 0)
    r = torch.where(shared, log_p - log_q, torch.zeros_like(p))
    t = torch.tanh(r / 2)  # p = m (1 + t), q = m (1 - t)
    close = t.abs() < _JS_SERIES
    t = torch.where(close, t, torch.zeros_like(t))
    square = t * t
    series = square * (1 / 2 + square * (1 / 12 + square * (1 / 30 + square * (1 / 56 + square * (1 / 90 + square / 132)))))
    softplus = torch.nn.functional.softplus
    logs = [  # ln(p / m), ln(q / m)
        torch.where(
            shared,
            torch.where(close, torch.log1p(s * t), math.log(2) - softplus(-s * r)),
            torch.full_like(p, math.log(2)),
        )
        for s in (1, -1)
    ]
    first, second = p * logs[0], q * logs[1]
    value = torch.where(close & shared, (p + q) / 2 * series, (first + second) / 2).sum(-1)
    return value, (first - p * first.sum(-1, keepdim=True)) / 2, (second - q * second.sum(-1, keepdim=True)) / 2


def _row_blocks(logits: Tensor) -> Iterator[slice]:
    rows, cols = logits.shape
    step = max(1, _block_elements(logits) // cols)
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def _weighted_jensen_shannon(a: Tensor, b: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """`jensen_shannon_of_rows` with gradients times weights; rows of weight 0 give exactly 0."""
    found, *gradients = jensen_shannon_of_rows(a, b)
    weighs, weights = weights != 0, weights.unsqueeze(-1)
    return (
        torch.where(weighs, found, torch.zeros_like(found)),
        *(torch.where(weights != 0, weights * g, torch.zeros_like(g)) for g in gradients),
    )


@torch.no_grad()
def js_rows(
    clean: Tensor, noised: Tensor, weights: Tensor | None, grad_clean: Tensor | None, grad_noised: Tensor | None
) -> Tensor:
    """`jensen_shannon_of_rows`, weighted, some rows at a time.

    Gradients are written to the tensors given; rows of weight 0 give exactly 0. Classes that are -inf in both streams do not
    exist; in one stream only they are finite.
    """
    value = torch.zeros(len(clean), dtype=torch.float64, device=clean.device)
    weights = torch.ones_like(value) if weights is None else weights
    for block in _row_blocks(clean):
        value[block], *gradients = _weighted_jensen_shannon(clean[block], noised[block], weights[block])
        for grad, g in zip((grad_clean, grad_noised), gradients, strict=True):
            if grad is not None:
                grad[block] = g.to(grad.dtype)
    return value


@torch.no_grad()
def js_operand_rows(task: OperandTask) -> None:
    """`operand_rows` with the Jensen-Shannon divergence in the place of the symmetric KL, some rows at a time."""
    for block in _row_blocks(task.clean):
        rows: dict[str, Any] = {name: t[block] for name, t in task._asdict().items() if isinstance(t, Tensor)}
        part = task._replace(**rows)
        _put_operands(part, *_weighted_jensen_shannon(part.clean, part.noised, part.kl_weights))


class DivergenceTerms(NamedTuple):
    """Of every class: its term of the divergence; p f'(u) and q h, which gradients are made of (`distillation_of_rows`);
    both probabilities; whether it makes the divergence infinite."""

    value: Tensor
    teacher_share: Tensor
    student_share: Tensor
    p: Tensor
    q: Tensor
    is_infinite: Tensor


def divergence_terms(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> DivergenceTerms:
    """What the classes add to the divergence that `DistillationTask` names, from their float64 log-probabilities."""
    p, q = log_p.exp(), log_q.exp()
    lacks_p, lacks_q = log_p == -torch.inf, log_q == -torch.inf
    r = torch.where(lacks_p & lacks_q, torch.zeros_like(p), log_p - log_q)
    excess = torch.where(r.abs() < 1, q * torch.expm1(r.clamp(-1, 1)), p - q)  # p - q
    is_infinite = torch.zeros_like(lacks_p)
    if divergence == "js":
        # ln(p / m) = -ln(beta + (1 - beta) e^-r). Where p > q its argument is at most 1, and ln(q / m) is r below it.
        ahead = r > 0
        own = torch.where(ahead, torch.full_like(r, beta), torch.full_like(r, 1 - beta))
        greater = -torch.log1p((1 - own) * torch.expm1(-r.abs()))
        lesser = torch.where(r.abs() < 1, -torch.log1p(own * torch.expm1(r.abs().clamp(max=1))), greater - r.abs())
        logs = torch.where(ahead, greater, lesser), torch.where(ahead, lesser, greater)
        m = beta * p + (1 - beta) * q
        terms = beta * _kl_terms(p, m, logs[0]) + (1 - beta) * _kl_terms(q, m, logs[1])
        teacher_share, student_share = beta * _times(p, logs[0]), (1 - beta) * _times(q, logs[1])
    elif divergence == "total_variation":
        terms = excess.abs() / 2
        teacher_share, student_share = p * r.sign() / 2, -q * r.sign() / 2
    else:
        terms = teacher_share = student_share = torch.zeros_like(p)
        if divergence != "reverse_kl":
            terms = terms + _kl_terms(p, q, r)
            teacher_share, student_share = teacher_share + _times(p, r), student_share - excess
            is_infinite = is_infinite | (lacks_q & ~lacks_p)
        if divergence != "forward_kl":
            terms = terms + _kl_terms(q, p, -r)
            teacher_share, student_share = teacher_share + excess, student_share - _times(q, r)
            is_infinite = is_infinite | (lacks_p & ~lacks_q)
    return DivergenceTerms(terms, teacher_share, student_share, p, q, is_infinite)


def distillation_of_rows(
    student: Tensor, teacher: Tensor, divergence: str, beta: float, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row the divergence that `DistillationTask` names, and its gradients with respect to both streams, in float64.

    All of them are f-divergences: D = sum q f(u) with u = p / q and f(1) = f'(1) = 0; dD/dteacher = p (f'(u) - E_p[f'(u)]),
    dD/dstudent = q (h - E_q[h]) with h = f(u) - u f'(u), both over the temperature.
    """
    a, b = teacher.double() / temperature, student.double() / temperature
    meaningful = ~torch.stack([(z.isnan() | (z == torch.inf)).any(-1) | (z == -torch.inf).all(-1) for z in (a, b)]).any(0)
    a, b = (torch.where(meaningful.unsqueeze(-1), z, torch.zeros_like(z)) for z in (a, b))
    terms = divergence_terms(torch.log_softmax(a, dim=-1), torch.log_softmax(b, dim=-1), divergence, beta)
    value = terms.value.sum(-1).clamp(min=0)
    value = torch.where(terms.is_infinite.any(-1), torch.full_like(value, torch.inf), value)
    value = torch.where(meaningful, value, torch.full_like(value, torch.nan))
    finite = value.isfinite().unsqueeze(-1)
    grads = (
        (share - x * share.sum(-1, keepdim=True)) / temperature
        for share, x in ((terms.student_share, terms.q), (terms.teacher_share, terms.p))
    )
    grad_student, grad_teacher = (torch.where(finite, g, torch.full_like(g, torch.nan)) for g in grads)
    return value, grad_student, grad_teacher


def _times(x: Tensor, log: Tensor) -> Tensor:
    """x times a logarithm, which may be infinite where x is 0."""
    return torch.where(x == 0, torch.zeros_like(x), x * log)


def _kl_terms(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """x s - x + y with s = log(x / y): what the classes add to KL(X || Y), each >= 0."""
    # x (e^-s - 1 + s), as a series where its terms cancel. Of s^2 / 2 the first that is left out is s^8 / 1.8 million.
    t = torch.where(s.abs() < 0.02, -s, torch.zeros_like(s))
    series = t * t * (1 / 2 + t * (1 / 6 + t * (1 / 24 + t * (1 / 120 + t * (1 / 720 + t * (1 / 5040 + t / 40320))))))
    near = s.abs() < 0.5
    exact = x * (torch.expm1(torch.where(near, -s, torch.zeros_like(s))) + torch.where(near, s, torch.zeros_like(s)))
    return torch.where(s.abs() < 0.02, x * series, torch.where(near, exact, (y - x) + _times(x, s)))


@torch.no_grad()
def distillation_rows(task: DistillationTask) -> None:
    """`distillation_of_rows` and the student's cross-entropy, as the task says, some rows at a time."""
    for block in _row_blocks(task.student):
        rows: dict[str, Any] = {name: t[block] for name, t in task._asdict().items() if isinstance(t, Tensor)}
        part = task._replace(**rows)
        value, *grads = distillation_of_rows(part.student, part.teacher, part.divergence, part.beta, part.temperature)
        weighs, weights = part.weights != 0, part.weights.unsqueeze(-1)
        part.value_out.copy_(torch.where(weighs, value, torch.zeros_like(value)))
        ce, labelled = _cross_entropy_of_rows(part.student, part.labels, part.ignore_index, part.ce_weights, part.smoothing)
        if part.ce_out is not None:
            if part.smoothing and part.labels is not None:
                counts = (part.labels != part.ignore_index) & (part.ce_weights != 0)
                z = part.student.double()
                own = z.gather(-1, torch.where(counts, part.labels, torch.zeros_like(part.labels)).unsqueeze(-1)).squeeze(-1)
                ce = torch.where(counts, ce + part.smoothing * (own - z.mean(-1)), ce)
            part.ce_out.copy_(ce)
        grads = [torch.where(weights != 0, weights * g, torch.zeros_like(g)) for g in grads]
        grads[0] = grads[0] + labelled
        caps = ((part.grad_student, part.student, part.student_cap), (part.grad_teacher, part.teacher, part.teacher_cap))
        for grad, (out, logits, cap) in zip(grads, caps, strict=True):
            if out is not None:
                slope = 1 - (logits.double() / cap).square() if cap else 1
                out.copy_(torch.where(grad == 0, grad, grad * slope))


@torch.no_grad()
def scale_rows_(block: Tensor, factors: Tensor) -> None:
    """block[row] *= factors[row]; one factor serves all rows."""
    block.copy_(block.double() * factors.reshape(-1, 1))


def gradient_like(logits: Tensor) -> Tensor:
    """Room for a gradient, not yet written."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
