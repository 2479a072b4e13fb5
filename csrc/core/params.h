// Element functors of the parameter-list operations.
#pragma once

#include <math.h>

#include "core/dtype.h"

namespace fastpost {
inline namespace FASTPOST_ISA {

// scale = high * low with low a power of two, 1 unless scale leaves float's normal range. So an element's perturbation
// loses no digits where gradients are as small as 1e-40 or as large as 1e38.
struct SplitScale {
  float high, low;
};

FASTPOST_HD SplitScale split_scale(double scale) {
  const int exponent = scale == 0 ? 0 : ilogb(scale);
  const int kept = exponent < -100 ? -100 : exponent > 100 ? 100 : exponent;
  return {static_cast<float>(ldexp(scale, kept - exponent)), static_cast<float>(ldexp(1.0, exponent - kept))};
}

FASTPOST_HD float perturbation(float g, SplitScale scale) { return g * scale.low * scale.high; }

// ASAM: t = |w| + eta.
FASTPOST_HD float perturbation(float g, SplitScale scale, float w, float eta) {
  const float t = bits_float(float_bits(w) & 0x7fffffffu) + eta;
  return g * scale.low * scale.high * t * t;
}

template <class T>
struct SignBits;  // the element as an integer, and its sign bit
template <>
struct SignBits<float> {
  using type = uint32_t;
  static constexpr uint32_t sign = 0x80000000u;
};
template <>
struct SignBits<bf16> {
  using type = uint16_t;
  static constexpr uint16_t sign = 0x8000u;
};
template <>
struct SignBits<f16> : SignBits<bf16> {};

}  // namespace FASTPOST_ISA
}  // namespace fastpost
