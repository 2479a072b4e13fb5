"""Arithmetic shared by all Triton kernels: the same polynomials and the same rounding as csrc/core, so that backends agree.

Everything is computed in float32 from values that were cast after loading: Triton's interpreter would otherwise calculate
on the raw bits of bfloat16. Stores round with integer operations, to nearest even, because the interpreter truncates.

Two things in a compiled kernel depend on more than its equations, and both are taken from the compiler wherever numbers are
summed. It fuses products and sums as the rest of the kernel allows: kernels are compiled without that, and what is fused is
written as `tl.fma`. So a gradient has the same bits whether or not the other one is wanted. And `tl.sum` adds what one
thread holds first: four neighbours where memory is read 16 bytes at a time, elements far apart where it is not.
`ordered_sum` adds by index. So a sum does not depend on where the tensors lie.
"""

import triton
import triton.language as tl

CHUNK = tl.constexpr(65536)  # elements; where reductions are cut, as in csrc/core/plan.h


@triton.jit
def ordered_sum(x):
    """The sum of a block of 2^n elements, at most 2^16: of neighbours first, then of neighbouring pairs, and so on up.

    Two numbers have one sum, whichever threads hold them, so the order is that of the indices.
    """
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 to a narrower type, to nearest even; NaNs stay NaNs."""
    if dtype == tl.bfloat16:
        u = x.to(tl.uint32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        quiet = (u >> 16) | 0x40
        half = tl.where((u & 0x7FFFFFFF) > 0x7F800000, quiet, rounded)
        return half.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def round_randomly(x, random, dtype: tl.constexpr):
    """float32 to 16 bits, away from zero with the probability that keeps the mean; random: uint32 below 65536."""
    u = x.to(tl.uint32, bitcast=True)
    if dtype == tl.bfloat16:
        special = round_to(x, dtype).to(tl.uint16, bitcast=True).to(tl.uint32)
        half = tl.where((u & 0x7F800000) == 0x7F800000, special, (u + random) >> 16)
        return half.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif dtype == tl.float16:
        magnitude = u & 0x7FFFFFFF
        small = magnitude < 0x38800000  # below 2^-14 the last place is 2^-24: in 2^-40 steps only whole ones can carry
        steps = (tl.where(small, tl.abs(x), 0.0) * 1099511627776.0).to(tl.int32).to(tl.uint32)
        half = tl.where(small, (steps + random) >> 16, (magnitude + 0xC8000000 + (random >> 3)) >> 13)
        half = tl.where(magnitude >= 0x47800000, 0x7C00, half)
        half = tl.where(magnitude > 0x7F800000, 0x7E00, half)
        return (half | ((u >> 16) & 0x8000)).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        return x


@triton.jit
def exp_nonpositive(x):
    """e^x for x <= 0 and NaN, within 1 ulp; 0 below -87.33, where the result leaves float's normal range."""
    shifted = tl.fma(x, 1.44269502, 12583039.0)  # 1.5 * 2^23 + 127: the last bits become an exponent field
    n = shifted - 12583039.0
    f = tl.fma(n, -1.42860677e-06, tl.fma(n, -0.693145752, x))
    tail = tl.fma(f, tl.fma(f, tl.fma(f, tl.fma(f, 0.00138143206, 0.00836885069), 0.0416684002), 0.166665196), 0.49999994)
    scale = (shifted.to(tl.uint32, bitcast=True) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.33, 0.0, (1.0 + tl.fma(f * f, tail, f)) * scale)


@triton.jit
def expm1_small(x):
    """e^x - 1 for abs(x) <= 0.5, within 1 ulp; of the sign of x, and 0 at 0."""
    tail = tl.fma(x, tl.fma(x, 0.000198498106, 0.00139961764), 0.00833357871)
    tail = tl.fma(x, tl.fma(x, tl.fma(x, tail, 0.0416653603), 0.166666642), 0.50000006)
    return tl.fma(x * x, tail, x)


@triton.jit
def philox_words(seed, counter, stream):
    """Philox4x32-10 with a 64-bit counter and the tensor's index as third word; `counter` is int64."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = (counter >> 32).to(tl.uint32)
    third = low * 0 + stream.to(tl.uint32)
    return tl.philox(seed, low, high, third, low * 0)


@triton.jit
def uniform_from_word(word):
    """An odd multiple of 2^-24 in (-1, 1), exact in float32."""
    return (((word >> 8) * 2 + 1).to(tl.int32) - 16777216).to(tl.float32) * 5.9604644775390625e-08
