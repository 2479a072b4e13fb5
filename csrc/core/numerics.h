// exp and expm1 as polynomials, for loops of the host, which calls of libm would keep scalar.
#pragma once

#include "core/dtype.h"

namespace fastpost {
inline namespace FASTPOST_ISA {

// x - n ln 2. Where products are fused, one float for ln 2 suffices: it is 1.9e-9 off, so that e^x is off by 2.7e-9 |x|, an
// ulp more at -22, where what a row adds up has no weight left.
FASTPOST_HD float less_ln2(float x, float n) {
#ifdef __FP_FAST_FMAF
  return fmaf(-n, 0x1.62e43p-1f, x);
#else
  return (x - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;  // the first product is exact
#endif
}

// e^x for x <= 0 and NaN, within 1.5 ulp and what less_ln2 adds: 2^n times a polynomial (minimax, 3e-9) on |f| <= ln 2 / 2.
// Zero below -87.33, where the result would leave float's normal range, -inf included.
FASTPOST_HD float exp_nonpositive(float x) {
  // 1.5 * 2^23 makes the sum round to an integer; the 127 on top leaves n + 127 in its last bits, an exponent field.
  constexpr float rounder = 12582912.0f + 127.0f;
  const float shifted = x * 0x1.715476p+0f + rounder;
  const float n = shifted - rounder;
  const float f = less_ln2(x, n);
  const float c2 = 0x1.fffffcp-2f, c3 = 0x1.55549p-3f, c4 = 0x1.5558f8p-5f, c5 = 0x1.123b02p-7f, c6 = 0x1.6a2256p-10f;
  const float y = 1.0f + f * (1.0f + f * (c2 + f * (c3 + f * (c4 + f * (c5 + f * c6)))));
  const float scaled = y * bits_float(float_bits(shifted) << 23);  // an addition of exponents would let a NaN's payload in
  return bits_float(float_bits(scaled) & ~mask_of(x < -87.33f));
}

// Narrowing a double argument loses what exp turns into a relative error; this puts it back.
FASTPOST_HD float exp_nonpositive(double x) {
  const double floor = -100.0;
  const double clamped = x < floor ? floor : x;
  const float high = static_cast<float>(clamped);
  const float low = static_cast<float>(clamped - static_cast<double>(high));
  const float y = exp_nonpositive(high);
  return y + y * low;
}

// e^x - 1 for |x| <= 0.5, within 1.5 ulp; finite for |x| < 1e4. It has the sign of x, and is 0 at 0.
FASTPOST_HD float expm1_small(float x) {
  const float c2 = 0x1.000002p-1f, c3 = 0x1.555552p-3f, c4 = 0x1.555298p-5f, c5 = 0x1.11132p-7f, c6 = 0x1.6ee6cp-10f,
              c7 = 0x1.a047dcp-13f;
  return x + x * x * (c2 + x * (c3 + x * (c4 + x * (c5 + x * (c6 + x * c7)))));
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
