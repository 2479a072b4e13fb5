"""Rows of logits in two streams: symmetric KL, cross-entropy, gradients of both; long, as one family is one file.

The equations are in csrc/core/divergence.h. One program per row, three passes: extent, sums, value and gradients; the later
passes find the row in the second cache. A row is cut into an unaligned head, a body of whole blocks that needs no mask and
keeps 16-byte accesses even where the width is odd (50,257), and a tail.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launches
from .numerics import exp_nonpositive, expm1_small, round_to

_BLOCK = 4096
_NARROW = 1024  # below this many columns differences and sums are float64
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _error(first, second, difference):
    """first - second = difference + error, exactly (Knuth)."""
    back = difference - first
    return (first - (difference - back)) - (second + back)


@triton.jit
def _centred(a, b, centre, centre_error, wide: tl.constexpr):
    """a - b - centre without losing digits to a large constant; 0 where both are -inf."""
    if wide:
        delta = (a.to(tl.float64) - b.to(tl.float64)) - centre
    else:
        d = a - b
        delta = (d - centre) + (_error(a, b, d) - centre_error)
    return tl.where(a + b == -_INFINITY, 0.0, delta)


@triton.jit
def _excess(delta, clean, noised):
    """clean - noised, never as a difference of nearby numbers: delta is their logarithms' difference."""
    return tl.where(tl.abs(delta) < 0.5, noised * expm1_small(delta), clean - noised)


@triton.jit
def _block_extent(a, b, inside, clean_max, noised_max, low, high, bad):
    d = a - b
    counts = inside & (d == d)  # both -inf: the pair says nothing of the difference
    clean_max = tl.maximum(clean_max, tl.max(tl.where(inside, a, -_INFINITY), axis=0))
    noised_max = tl.maximum(noised_max, tl.max(tl.where(inside, b, -_INFINITY), axis=0))
    low = tl.minimum(low, tl.min(tl.where(counts, d, _INFINITY), axis=0))
    high = tl.maximum(high, tl.max(tl.where(counts, d, -_INFINITY), axis=0))
    meaningless = inside & ((a != a) | (b != b) | (a == _INFINITY) | (b == _INFINITY))
    return clean_max, noised_max, low, high, tl.maximum(bad, tl.max(meaningless.to(tl.int32), axis=0))


@triton.jit
def _block_sums(a, b, inside, clean_max, noised_max, centre, centre_error, wide: tl.constexpr):
    delta = _centred(a, b, centre, centre_error, wide).to(tl.float32)
    ea = tl.where(inside, exp_nonpositive(a - clean_max), 0.0)
    eb = tl.where(inside, exp_nonpositive(b - noised_max), 0.0)
    delta = tl.where(inside, delta, 0.0)
    excess = _excess(delta, ea, eb)
    noised = eb.to(tl.float64)
    difference = excess.to(tl.float64)
    weighted_noised = (eb * delta).to(tl.float64)
    # Through the excess the clean sums share the noised ones' digits.
    weighted_excess = (excess * delta).to(tl.float64)
    clean = ea.to(tl.float64)
    return (
        tl.sum(clean, axis=0),
        tl.sum(noised, axis=0),
        tl.sum(difference, axis=0),
        tl.sum(weighted_noised, axis=0),
        tl.sum(weighted_excess, axis=0),
    )


@triton.jit
def _slope_of_cap(z, slope, weighs):
    """d(cap * tanh(y / cap))/dy, given the value; 1 without a cap (slope 0) and without a weight, whatever the logit is."""
    u = tl.where((slope != 0.0) & weighs, z * slope, 0.0)
    return 1.0 - u * u


@triton.jit
def _block_finish(
    a, b, inside, grad_clean, grad_noised, at,
    clean_max, noised_max, centre, centre_error, log_ratio, clean_scale, noised_scale, clean_kl, noised_kl,
    kl_weight, ce_weight, noised_ce_weight, teaching, flat, noised_flat, slope, dtype: tl.constexpr,
    want_clean: tl.constexpr, want_noised: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr,
):  # fmt: skip
    r = (_centred(a, b, centre, centre_error, wide) - log_ratio).to(tl.float32)
    p = exp_nonpositive(a - clean_max) * clean_scale
    q = exp_nonpositive(b - noised_max) * noised_scale
    excess = _excess(r, p, q)
    # A weight of 0 gives exactly 0, whatever the logits hold.
    noised_gradient = tl.where(kl_weight != 0.0, -kl_weight * tl.fma(q, r + noised_kl, excess), 0.0)
    if operand:
        noised_gradient += tl.where(noised_ce_weight != 0.0, noised_ce_weight * q, 0.0) - noised_flat
        noised_gradient *= _slope_of_cap(b, slope, kl_weight != 0.0)
    if want_clean:
        gradient = tl.where(teaching != 0.0, teaching * tl.fma(p, r - clean_kl, excess), 0.0)
        gradient += tl.where(ce_weight != 0.0, ce_weight * p, 0.0)
        if operand:
            gradient = (gradient - flat) * _slope_of_cap(a, slope, (teaching != 0.0) | (ce_weight != 0.0))
            if want_noised:
                gradient += noised_gradient
        tl.store(grad_clean + at, round_to(gradient, dtype), mask=inside)
    if want_noised:
        tl.store(grad_noised + at, round_to(noised_gradient, dtype), mask=inside)
    term = excess * r
    if inside is not None:
        term = tl.where(inside, term, 0.0)
    return tl.sum(term.to(tl.float64), axis=0)


@triton.jit
def _load(pointer, at, inside):
    return tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _divergence_kernel(
    clean, noised, grad_clean, grad_noised, labels, kl_weights, ce_weights, kl_out, ce_out,
    cols, clean_stride, noised_stride, grad_clean_stride, grad_noised_stride, smoothing, slope, teaches, noised_classifies,
    dtype: tl.constexpr, vector: tl.constexpr, has_labels: tl.constexpr, want_clean: tl.constexpr,
    want_noised: tl.constexpr, wide: tl.constexpr, operand: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    a_row = clean + row * clean_stride
    b_row = noised + row * noised_stride
    ga_row = grad_clean + row * grad_clean_stride
    gb_row = grad_noised + row * grad_noised_stride
    kl_weight = tl.load(kl_weights + row).to(tl.float32)
    ce_weight = tl.load(ce_weights + row).to(tl.float32)
    # The head ends where the row reaches a 16-byte boundary (the same in every tensor, the launcher has checked); from there
    # whole blocks need no mask, so their accesses stay wide.
    head = 0
    body = 0
    if vector:
        head = ((HEAD - (row * clean_stride) % HEAD) % HEAD).to(tl.int32)
        head = tl.minimum(head, cols)
        body = (cols - head) // BLOCK
    edge = tl.arange(0, HEAD)
    full = tl.arange(0, BLOCK)
    all_in = full >= 0
    tail = head + body * BLOCK

    clean_max = -_INFINITY
    noised_max = -_INFINITY
    low = _INFINITY
    high = -_INFINITY
    bad = 0
    if vector:
        on_edge = edge < head
        clean_max, noised_max, low, high, bad = _block_extent(
            _load(a_row, edge, on_edge), _load(b_row, edge, on_edge), on_edge, clean_max, noised_max, low, high, bad
        )
        a_body = tl.multiple_of(a_row + head, 16)
        b_body = tl.multiple_of(b_row + head, 16)
        for block in range(body):
            at = block * BLOCK + full
            clean_max, noised_max, low, high, bad = _block_extent(
                tl.load(a_body + at).to(tl.float32), tl.load(b_body + at).to(tl.float32), all_in,
                clean_max, noised_max, low, high, bad,
            )  # fmt: skip
    for begin in range(tail, cols, BLOCK):
        at = begin + full
        inside = at < cols
        clean_max, noised_max, low, high, bad = _block_extent(
            _load(a_row, at, inside), _load(b_row, at, inside), inside, clean_max, noised_max, low, high, bad
        )

    infinite = (high == _INFINITY) | (low == -_INFINITY)
    if wide:
        centre = clean_max.to(tl.float64) - noised_max.to(tl.float64)
        centre_error = centre * 0
    else:
        centre = clean_max - noised_max
        centre_error = _error(clean_max, noised_max, centre)

    zero = tl.full((), 0.0, tl.float64)
    sa = zero
    sb = zero
    sd = zero
    swb = zero
    swd = zero
    if vector:
        on_edge = edge < head
        s0, s1, s2, s3, s4 = _block_sums(
            _load(a_row, edge, on_edge),
            _load(b_row, edge, on_edge),
            on_edge,
            clean_max,
            noised_max,
            centre,
            centre_error,
            wide,
        )
        sa += s0
        sb += s1
        sd += s2
        swb += s3
        swd += s4
        for block in range(body):
            at = block * BLOCK + full
            s0, s1, s2, s3, s4 = _block_sums(
                tl.load(a_body + at).to(tl.float32), tl.load(b_body + at).to(tl.float32), all_in,
                clean_max, noised_max, centre, centre_error, wide,
            )  # fmt: skip
            sa += s0
            sb += s1
            sd += s2
            swb += s3
            swd += s4
    for begin in range(tail, cols, BLOCK):
        at = begin + full
        inside = at < cols
        s0, s1, s2, s3, s4 = _block_sums(
            _load(a_row, at, inside), _load(b_row, at, inside), inside, clean_max, noised_max, centre, centre_error, wide
        )
        sa += s0
        sb += s1
        sd += s2
        swb += s3
        swd += s4

    ratio = sd / sb
    one_more = 1.0 + ratio
    near = tl.log(one_more) - ((one_more - 1.0) - ratio) / one_more  # log1p in float64
    log_ratio64 = tl.where(tl.abs(ratio) < 0.5, near, tl.log(sa / sb))
    clean_kl = ((swb + swd) / sa - log_ratio64).to(tl.float32)
    noised_kl = (log_ratio64 - swb / sb).to(tl.float32)
    clean_scale = (1.0 / sa).to(tl.float32)
    noised_scale = (1.0 / sb).to(tl.float32)
    log_ratio = log_ratio64 if wide else log_ratio64.to(tl.float32)

    # Infinite and meaningless rows have no gradient.
    kl_scale = tl.where((kl_weight != 0.0) & (infinite | (bad != 0)), float("nan"), kl_weight)
    teaching = kl_scale
    flat = ce_weight * 0.0
    noised_ce_weight = flat
    noised_flat = flat
    if operand:
        teaching = tl.where(teaches != 0.0, kl_scale, 0.0)
    # What the label needs is read before gradients may overwrite the logits.
    ce = zero
    noised_ce = zero
    label = zero.to(tl.int64)
    label_clean = zero.to(tl.float32)
    label_noised = zero.to(tl.float32)
    if has_labels:
        label = tl.load(labels + row)
        if (ce_weight != 0.0) & ((label < 0) | (label >= cols)):
            ce += float("nan")
            ce_weight = ce_weight * 0.0
        if ce_weight != 0.0:
            label_clean += tl.load(a_row + label).to(tl.float32)
            label_noised += tl.load(b_row + label).to(tl.float32)
            ce += (clean_max.to(tl.float64) - label_clean.to(tl.float64)) + tl.log(sa)
        if operand:
            noised_ce_weight = tl.where(kl_weight != 0.0, noised_classifies * ce_weight, 0.0)
            if noised_ce_weight != 0.0:
                noised_ce += (noised_max.to(tl.float64) - label_noised.to(tl.float64)) + tl.log(sb)
            flat = smoothing * ce_weight / cols
            noised_flat = smoothing * noised_ce_weight / cols
    tl.debug_barrier()

    value = zero
    if vector:
        on_edge = edge < head
        value += _block_finish(
            _load(a_row, edge, on_edge), _load(b_row, edge, on_edge), on_edge, ga_row, gb_row, edge,
            clean_max, noised_max, centre, centre_error, log_ratio, clean_scale, noised_scale, clean_kl, noised_kl,
            kl_scale, ce_weight, noised_ce_weight, teaching, flat, noised_flat, slope, dtype, want_clean, want_noised, wide,
            operand,
        )  # fmt: skip
        ga_body = tl.multiple_of(ga_row + head, 16)
        gb_body = tl.multiple_of(gb_row + head, 16)
        for block in range(body):
            at = block * BLOCK + full
            value += _block_finish(
                tl.load(a_body + at).to(tl.float32), tl.load(b_body + at).to(tl.float32), None, ga_body, gb_body, at,
                clean_max, noised_max, centre, centre_error, log_ratio, clean_scale, noised_scale, clean_kl, noised_kl,
                kl_scale, ce_weight, noised_ce_weight, teaching, flat, noised_flat, slope, dtype, want_clean, want_noised,
                wide, operand,
            )  # fmt: skip
    for begin in range(tail, cols, BLOCK):
        at = begin + full
        inside = at < cols
        value += _block_finish(
            _load(a_row, at, inside), _load(b_row, at, inside), inside, ga_row, gb_row, at,
            clean_max, noised_max, centre, centre_error, log_ratio, clean_scale, noised_scale, clean_kl, noised_kl,
            kl_scale, ce_weight, noised_ce_weight, teaching, flat, noised_flat, slope, dtype, want_clean, want_noised, wide,
            operand,
        )  # fmt: skip
    if has_labels and (want_clean or (operand and want_noised)):
        tl.debug_barrier()
        if ce_weight != 0.0:
            # p - 1 at the label, from the logarithm so that a confident row keeps its digits.
            r = (_centred(label_clean, label_noised, centre, centre_error, wide) - log_ratio).to(tl.float32)
            p = exp_nonpositive(label_clean - clean_max) * clean_scale
            q = exp_nonpositive(label_noised - noised_max) * noised_scale
            excess = _excess(r, p, q)
            gradient = tl.where(teaching != 0.0, teaching * tl.fma(p, r - clean_kl, excess), 0.0)
            gradient += (ce_weight.to(tl.float64) * (tl.exp(-ce) - 1.0)).to(tl.float32)
            if operand:
                gradient = (gradient + (smoothing * ce_weight - flat)) * _slope_of_cap(label_clean, slope, label >= 0)
                if want_noised:
                    noised_gradient = -kl_scale * tl.fma(q, r + noised_kl, excess)
                    noised_gradient += (noised_ce_weight.to(tl.float64) * (tl.exp(-noised_ce) - 1.0)).to(tl.float32)
                    noised_gradient += smoothing * noised_ce_weight - noised_flat
                    noised_gradient *= _slope_of_cap(label_noised, slope, kl_weight != 0.0)
                    noised_gradient = tl.where(kl_weight != 0.0, noised_gradient, 0.0)
                    gradient += noised_gradient
                    tl.store(gb_row + label, round_to(noised_gradient, dtype))
            if want_clean:
                tl.store(ga_row + label, round_to(gradient, dtype))
    value = tl.where(value < 0.0, 0.0, value)
    value = tl.where(bad != 0, float("nan"), tl.where(infinite, _INFINITY, value))
    tl.store(kl_out + row, tl.where(kl_weight != 0.0, value, 0.0))
    tl.store(ce_out + row, ce + noised_ce)


@triton.jit
def _mixture_delta(a, b, centre, centre_error, wide: tl.constexpr):
    """As _centred, and infinite where a class is -inf in one stream only."""
    d = a - b
    if wide:
        delta = (a.to(tl.float64) - b.to(tl.float64)) - centre
    else:
        delta = tl.where(tl.abs(d) == _INFINITY, d, (d - centre) + (_error(a, b, d) - centre_error))
    return tl.where((a == -_INFINITY) & (b == -_INFINITY), 0.0, delta)


@triton.jit
def _mixture(
    a, b, clean_max, noised_max, centre, centre_error, log_ratio, clean_scale, noised_scale, wide: tl.constexpr
):  # fmt: skip
    """p, q, ln(p / m), ln(q / m) and what each class adds to JSD: mixture_logs of csrc/core/divergence.h."""
    r = (_mixture_delta(a, b, centre, centre_error, wide) - log_ratio).to(tl.float32)
    p = exp_nonpositive(a - clean_max) * clean_scale
    q = exp_nonpositive(b - noised_max) * noised_scale
    size = tl.where(tl.abs(r) > 200.0, 200.0, tl.abs(r))  # beyond, the lesser probability is 0 in float
    far = size > 1.0
    u = exp_nonpositive(-size)
    less = tl.where(size < 0.5, -expm1_small(-size), 1.0 - u)
    s = tl.where(far, u, less) / tl.where(far, 2.0 + u, 3.0 + u)
    z = s * s
    arctanh = z * tl.fma(z, tl.fma(z, tl.fma(z, 0.111111111, 0.142857143), 0.2), 0.333333333)
    half = tl.fma(s, arctanh, s)
    over = 1.0 / (1.0 + u)
    t = less * over
    y = t * t
    tail = y * tl.fma(y, tl.fma(y, tl.fma(y, 0.00416666667, 0.00549450549), 0.00757575758), 0.0111111111)
    tail = tl.fma(y, tl.fma(y, 0.0178571429 + tail, 0.0333333333), 0.0833333333)
    series = y * tl.fma(y, tail, 0.5)
    term = tl.where(far, 0.693147182 - tl.fma(u * over, size, 2.0 * half), series)
    ln_2 = tl.full((), 0.6931471805599453, tl.float64)
    signed = tl.where(far, -2.0, 2.0) * half
    greater = tl.where(far, ln_2, 0.0) + signed.to(tl.float64)
    clean_log = greater - tl.where(r < 0.0, size, 0.0).to(tl.float64)
    noised_log = greater - tl.where(r > 0.0, size, 0.0).to(tl.float64)
    return p, q, clean_log, noised_log, 0.5 * (p + q) * term


@triton.jit
def _js_kernel(
    clean, noised, grad_clean, grad_noised, weights, out,
    cols, clean_stride, noised_stride, grad_clean_stride, grad_noised_stride,
    dtype: tl.constexpr, want_clean: tl.constexpr, want_noised: tl.constexpr, wide: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Four passes: extent, sums, value and KL to the mixture, gradients. Masked throughout: accesses are wide where the width
    # and the strides are multiples of 16.
    row = tl.program_id(0).to(tl.int64)
    a_row = clean + row * clean_stride
    b_row = noised + row * noised_stride
    ga_row = grad_clean + row * grad_clean_stride
    gb_row = grad_noised + row * grad_noised_stride
    full = tl.arange(0, BLOCK)
    clean_max = -_INFINITY
    noised_max = -_INFINITY
    low = _INFINITY
    high = -_INFINITY
    bad = 0
    for begin in range(0, cols, BLOCK):
        at = begin + full
        inside = at < cols
        clean_max, noised_max, low, high, bad = _block_extent(
            _load(a_row, at, inside), _load(b_row, at, inside), inside, clean_max, noised_max, low, high, bad
        )
    if wide:
        centre = clean_max.to(tl.float64) - noised_max.to(tl.float64)
        centre_error = centre * 0
    else:
        centre = clean_max - noised_max
        centre_error = _error(clean_max, noised_max, centre)
    zero = tl.full((), 0.0, tl.float64)
    sa = zero
    sb = zero
    sd = zero
    for begin in range(0, cols, BLOCK):
        at = begin + full
        inside = at < cols
        a = _load(a_row, at, inside)
        b = _load(b_row, at, inside)
        ea = tl.where(inside, exp_nonpositive(a - clean_max), 0.0)
        eb = tl.where(inside, exp_nonpositive(b - noised_max), 0.0)
        delta = _mixture_delta(a, b, centre, centre_error, wide).to(tl.float32)
        excess = tl.where(inside, _excess(delta, ea, eb), 0.0)
        sa += tl.sum(ea.to(tl.float64), axis=0)
        sb += tl.sum(eb.to(tl.float64), axis=0)
        sd += tl.sum(excess.to(tl.float64), axis=0)
    ratio = sd / sb
    one_more = 1.0 + ratio
    near = tl.log(one_more) - ((one_more - 1.0) - ratio) / one_more  # log1p in float64
    log_ratio64 = tl.where(tl.abs(ratio) < 0.5, near, tl.log(sa / sb))
    log_ratio = log_ratio64 if wide else log_ratio64.to(tl.float32)
    clean_scale = (1.0 / sa).to(tl.float32)
    noised_scale = (1.0 / sb).to(tl.float32)

    value = zero
    # Where one class has nearly all of p its logarithm is nearly KL(p|m): so that is a mean of these very floats, under
    # weights that sum to 1.
    clean_kl = zero
    noised_kl = zero
    clean_mass = zero
    noised_mass = zero
    for begin in range(0, cols, BLOCK):
        at = begin + full
        inside = at < cols
        p, q, clean_log, noised_log, term = _mixture(
            _load(a_row, at, inside), _load(b_row, at, inside), clean_max, noised_max, centre, centre_error, log_ratio,
            clean_scale, noised_scale, wide,
        )  # fmt: skip
        value += tl.sum(tl.where(inside, term, 0.0).to(tl.float64), axis=0)
        p = tl.where(inside, p, 0.0).to(tl.float64)
        q = tl.where(inside, q, 0.0).to(tl.float64)
        clean_kl += tl.sum(p * clean_log, axis=0)
        noised_kl += tl.sum(q * noised_log, axis=0)
        clean_mass += tl.sum(p, axis=0)
        noised_mass += tl.sum(q, axis=0)
    ln_2 = tl.full((), 0.6931471805599453, tl.float64)
    value = tl.where(value > ln_2, ln_2, value)  # rounding can go beyond
    weight = tl.load(weights + row).to(tl.float32)
    tl.store(out + row, tl.where(weight != 0.0, value, 0.0))
    if want_clean or want_noised:
        clean_kl /= clean_mass
        noised_kl /= noised_mass
        for begin in range(0, cols, BLOCK):
            at = begin + full
            inside = at < cols
            p, q, clean_log, noised_log, term = _mixture(
                _load(a_row, at, inside), _load(b_row, at, inside), clean_max, noised_max, centre, centre_error, log_ratio,
                clean_scale, noised_scale, wide,
            )  # fmt: skip
            if want_clean:
                gradient = tl.where(weight != 0.0, 0.5 * weight * (p * (clean_log - clean_kl).to(tl.float32)), 0.0)
                tl.store(ga_row + at, round_to(gradient, dtype), mask=inside)
            if want_noised:
                gradient = tl.where(weight != 0.0, 0.5 * weight * (q * (noised_log - noised_kl).to(tl.float32)), 0.0)
                tl.store(gb_row + at, round_to(gradient, dtype), mask=inside)


@triton.jit
def _scaled(x, factor, dtype: tl.constexpr):
    return round_to((x.to(tl.float32).to(tl.float64) * factor).to(tl.float32), dtype)


@triton.jit
def _scale_rows_kernel(
    block, factors, cols, stride, factor_stride, dtype: tl.constexpr, vector: tl.constexpr, HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factors + row * factor_stride).to(tl.float64)
    if factor != 1.0:
        x = block + row * stride
        head = 0
        body = 0
        if vector:  # as in the divergence: whole blocks from a 16-byte boundary on
            head = tl.minimum(((HEAD - (row * stride) % HEAD) % HEAD).to(tl.int32), cols)
            body = (cols - head) // BLOCK
            edge = tl.arange(0, HEAD)
            tl.store(x + edge, _scaled(tl.load(x + edge, mask=edge < head, other=0.0), factor, dtype), mask=edge < head)
            aligned = tl.multiple_of(x + head, 16)
            for part in range(body):
                at = part * BLOCK + tl.arange(0, BLOCK)
                tl.store(aligned + at, _scaled(tl.load(aligned + at), factor, dtype))
        for begin in range(head + body * BLOCK, cols, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            tl.store(x + at, _scaled(tl.load(x + at, mask=at < cols, other=0.0), factor, dtype), mask=at < cols)


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _block(cols: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(cols))


def _launched(rows: int, tensors: list[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    """For each launch how many rows it serves, and those rows of the tensors. (A number of rows to skip, handed to the
    kernel, would be the one register too many.)"""
    for before, count in launches(rows):
        yield count, tensors if count == rows else [t[before : before + count] for t in tensors]


def divergence_rows(
    clean: Tensor,
    noised: Tensor,
    labels: Tensor | None,
    kl_weights: Tensor,
    ce_weights: Tensor,
    grad_clean: Tensor | None,
    grad_noised: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Per row (float64): symmetric KL and cross-entropy; gradients go to the tensors given, which may be the logits.

    Rows whose label is not to count have ce_weights 0. Rows are strided, columns contiguous.
    """
    rows = clean.shape[0]
    kl, ce = (torch.empty(rows, dtype=torch.float64, device=clean.device) for _ in range(2))
    _launch_divergence(clean, noised, labels, kl_weights, ce_weights, grad_clean, grad_noised, kl, ce, None)
    return kl, ce


def operand_rows(
    clean: Tensor,
    noised: Tensor,
    labels: Tensor | None,
    kl_weights: Tensor,
    ce_weights: Tensor,
    smoothing: float,
    cap: float,
    teaches: bool,
    noised_classifies: bool,
    first: Tensor | None,
    second: Tensor | None,
    kl: Tensor,
    ce: Tensor,
) -> None:
    """`divergence_rows` into kl and ce, the gradients being operands of an output head's products: of their own dtype, label
    smoothing in them, before a cap, the noised stream's added to the clean one's."""
    rule = (smoothing, 1 / cap if cap else 0.0, float(teaches), float(noised_classifies))
    _launch_divergence(clean, noised, labels, kl_weights, ce_weights, first, second, kl, ce, rule)


def _launch_divergence(
    clean: Tensor,
    noised: Tensor,
    labels: Tensor | None,
    kl_weights: Tensor,
    ce_weights: Tensor,
    grad_clean: Tensor | None,
    grad_noised: Tensor | None,
    kl: Tensor,
    ce: Tensor,
    rule: tuple[float, float, float, float] | None,
) -> None:
    rows, cols = clean.shape
    if not rows:
        return
    blocks = [
        clean,
        noised,
        grad_clean if grad_clean is not None else clean,
        grad_noised if grad_noised is not None else noised,
    ]
    dtype = next((g.dtype for g in (grad_clean, grad_noised) if g is not None), clean.dtype)
    elements = 16 // clean.element_size()
    vector = cols >= _BLOCK and all(b.data_ptr() % 16 == 0 for b in blocks)
    vector = vector and len({b.stride(0) % elements for b in blocks}) == 1
    if dtype != clean.dtype:  # then boundaries agree only where every row starts at one
        vector = vector and all(b.stride(0) % (16 // dtype.itemsize) == 0 for b in blocks)
    block = _block(cols)
    rowwise = [*blocks, labels if labels is not None else clean, kl_weights, ce_weights, kl, ce]
    for programs, part in _launched(rows, rowwise):
        _divergence_kernel[(programs,)](
            *part, cols, *(b.stride(0) for b in blocks), *(rule or (0.0, 0.0, 1.0, 0.0)), _TYPES[dtype], vector,
            labels is not None, grad_clean is not None, grad_noised is not None, cols < _NARROW, rule is not None,
            HEAD=elements, BLOCK=block, num_warps=16 if block >= 4096 else 4, enable_fp_fusion=False,
        )  # fmt: skip


# Two blocks of 256 threads on a multiprocessor. Left to itself ptxas aims for more, and keeps a register in memory.
JS_REGISTERS = 128


def js_block(itemsize: int) -> int:
    """One access of 16 bytes per thread: two of float32 are more than the registers hold."""
    return 4096 // itemsize


def js_rows(clean: Tensor, noised: Tensor, weights: Tensor, grad_clean: Tensor | None, grad_noised: Tensor | None) -> Tensor:
    """Per row (float64): the Jensen-Shannon divergence; gradients of weights * values go to the tensors given."""
    rows, cols = clean.shape
    value = torch.empty(rows, dtype=torch.float64, device=clean.device)
    blocks = [
        clean,
        noised,
        grad_clean if grad_clean is not None else clean,
        grad_noised if grad_noised is not None else noised,
    ]
    whole = js_block(clean.element_size())
    size = min(whole, triton.next_power_of_2(cols))
    limit = {"maxnreg": JS_REGISTERS} if clean.device.type == "cuda" and torch.version.hip is None else {}
    for programs, part in _launched(rows, [*blocks, weights, value]):
        _js_kernel[(programs,)](
            *part, cols, *(b.stride(0) for b in blocks), _TYPES[clean.dtype], grad_clean is not None,
            grad_noised is not None, cols < _NARROW, BLOCK=size, num_warps=8 if size == whole else 4,
            enable_fp_fusion=False, **limit,
        )  # fmt: skip
    return value


def scale_rows_(block: Tensor, factors: Tensor) -> None:
    """block[row] *= factors[row]; a single factor serves all rows."""
    rows, cols = block.shape
    size = min(2048, triton.next_power_of_2(cols))
    several, aligned = factors.numel() > 1, cols >= size and block.data_ptr() % 16 == 0
    for programs, part in _launched(rows, [block, factors] if several else [block]):
        _scale_rows_kernel[(programs,)](
            part[0], part[-1] if several else factors, cols, block.stride(0), int(several), _TYPES[block.dtype], aligned,
            HEAD=16 // block.element_size(), BLOCK=size, num_warps=8,
        )  # fmt: skip
