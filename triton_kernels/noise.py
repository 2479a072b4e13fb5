"""Noise on activations and at the embedding: drawn from (seed, number of the element), never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launches
from .numerics import philox_words, round_to, uniform_from_word

_QUADS = 256  # Philox calls of a program, four elements each


@triton.jit
def _radius(word):
    """sqrt(-2 ln u) for u = (word + 1) / 2^32, rounded to float32 first."""
    u = (word.to(tl.float32) + 1.0) * 2.3283064365386963e-10
    shifted = u.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = shifted >> 23
    m = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True)
    f = m - 1.0
    s = tl.div_rn(f, m + 1.0)
    z = s * s
    tail = z * (0.666666687 + z * (0.400000006 + z * (0.285714269 + z * 0.227783203)))
    half = 0.5 * f * f
    ln_m = f - (half - s * (half + tail))
    e = exponent.to(tl.float32)
    return tl.sqrt_rn(-2.0 * (e * 0.693145752 + (e * 1.42860677e-06 + ln_m)))


@triton.jit
def _circle(word):
    """(cos 2 pi u, sin 2 pi u) for u = (word >> 8) / 2^24; the quadrant comes off exactly, in integers."""
    turn = word >> 8
    quadrant = (turn + 2097152) >> 22
    rest = turn.to(tl.int32) - (quadrant << 22).to(tl.int32)
    x = rest.to(tl.float32) * 5.9604644775390625e-08 * 6.28318548
    y = x * x
    s = x + x * y * (-0.166666552 + y * (0.00833215564 + y * -0.000195152956))
    c = 1.0 + y * (-0.5 + y * (0.0416666456 + y * (-0.00138873153 + y * 2.44331568e-05)))
    odd = (quadrant & 1) != 0
    sine = tl.where(odd, c, s)
    cosine = tl.where(odd, s, c)
    return tl.where(((quadrant + 1) & 2) != 0, -cosine, cosine), tl.where((quadrant & 2) != 0, -sine, sine)


@triton.jit
def _add(source, clean, noised, column, inside, known, z, eps, number, dtype: tl.constexpr, has_ids: tl.constexpr):
    """One stretch of a row; inside: None for whole ones."""
    if inside is None:
        raw = tl.load(source + column)
    else:
        raw = tl.load(source + column, mask=inside & known, other=float("nan"))
    if has_ids:
        tl.store(clean + column, raw, mask=inside)
    x = raw.to(tl.float32)
    x = tl.where(number >= 0, x + eps * z, x)
    tl.store(noised + column, round_to(x, dtype), mask=inside)


@triton.jit
def _noise_kernel(
    source,
    ids,
    rows,
    scales,
    seed,
    clean,
    noised,
    skipped,
    parts,
    lines,
    width,
    stride,
    eps,
    dtype: tl.constexpr,
    normal: tl.constexpr,
    has_ids: tl.constexpr,
    has_rows: tl.constexpr,
    has_scales: tl.constexpr,
    QUADS: tl.constexpr,
):
    # One program: one of a row's `parts`. Element c of the row takes number (row's number) * width + c, four to a quad, so a
    # row may begin and end inside a quad. Earlier launches have taken the first `skipped` programs.
    program = tl.program_id(0).to(tl.int64) + skipped
    row = program // parts
    part = program % parts
    line = tl.load(ids + row) if has_ids else row
    number = tl.load(rows + row) if has_rows else row
    width_of_noise = eps * tl.load(scales + row) if has_scales else eps
    first = tl.maximum(number, 0) * width
    quad = first // 4 + part * QUADS + tl.arange(0, QUADS)
    w0, w1, w2, w3 = philox_words(tl.load(seed), quad, part * 0)
    if normal:
        r0 = _radius(w0)
        r2 = _radius(w2)
        cosine0, sine0 = _circle(w1)
        cosine2, sine2 = _circle(w3)
        z = tl.interleave(tl.interleave(r0 * cosine0, r2 * cosine2), tl.interleave(r0 * sine0, r2 * sine2))
    else:
        words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
        z = uniform_from_word(words)
    start = part * (4 * QUADS)
    inside_table = (line >= 0) & (line < lines)
    if inside_table & (first % 4 == 0) & (start + 4 * QUADS <= width):  # without a mask the accesses stay wide
        _add(source + line * stride, clean + row * width, noised + row * width, start + tl.arange(0, 4 * QUADS), None, None,
             z, width_of_noise, number, dtype, has_ids)  # fmt: skip
    else:
        column = start - first % 4 + tl.arange(0, 4 * QUADS)
        inside = (column >= 0) & (column < width)
        at = line + 0 * column
        known = (at >= 0) & (at < lines)  # an index outside the table gives NaN, and reads nothing
        _add(source + line * stride, clean + row * width, noised + row * width, column, inside, known, z,
             width_of_noise, number, dtype, has_ids)  # fmt: skip


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _launch(
    source: Tensor, ids: Tensor | None, rows: Tensor | None, scales: Tensor | None, seed: Tensor,
    clean: Tensor | None, noised: Tensor, n_rows: int, lines: int, width: int, stride: int, eps: float, noise_type: str,
) -> None:  # fmt: skip
    # Rows may start three elements into a quad.
    parts = triton.cdiv(width + 3, 4 * _QUADS) if width else 0
    for skipped, programs in launches(n_rows * parts):
        # Without FMA fusion fl(x + fl(eps z)) is the same bits everywhere.
        _noise_kernel[(programs,)](
            source, ids if ids is not None else seed, rows if rows is not None else seed,
            scales if scales is not None else seed, seed,
            clean if clean is not None else noised, noised, skipped, parts, lines, width, stride, eps, _TYPES[noised.dtype],
            noise_type == "normal", ids is not None, rows is not None, scales is not None, QUADS=_QUADS, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip


def add_noise(
    x: Tensor, out: Tensor, eps: float, noise_type: str, seed: Tensor, rows: Tensor | None, scales: Tensor | None
) -> None:
    """out = x + eps z, or x + (eps scale) z with a float32 scale per row.

    x and out are contiguous; rows: int64 numbers of x's rows (negative: no noise), or None.
    """
    if rows is None and scales is None:
        _launch(x, None, None, None, seed, None, out, 1, 1, x.numel(), x.numel(), eps, noise_type)
    else:
        width = x.shape[-1]
        n_rows = x.numel() // max(1, width)
        _launch(x, None, rows, scales, seed, None, out, n_rows, n_rows, width, width, eps, noise_type)


def embedding_noise(
    table: Tensor, ids: Tensor, clean: Tensor, noised: Tensor, eps: float, noise_type: str, seed: Tensor,
    rows: Tensor | None, scales: Tensor | None,
) -> None:  # fmt: skip
    """clean = table[ids], noised = clean + eps z, scaled as in `add_noise`; each row of the table is read once."""
    _launch(table, ids, rows, scales, seed, clean, noised, ids.numel(), *table.shape, table.stride(0), eps, noise_type)
