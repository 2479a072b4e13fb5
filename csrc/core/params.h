// Element functors of the parameter-list operations.
#pragma once

#include <math.h>

#include "core/dtype.h"

namespace fastpost {

// Decoupled weight decay (Loshchilov and Hutter, 1711.05101), with torch's names.
struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

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

// What one step of AdamW multiplies with; bias corrections in double, as the count of steps may be large.
struct AdamWStep {
  float sign, decay, first_share, second_kept, second_share, second_scale, eps, size;
};

FASTPOST_HD AdamWStep adamw_step(const AdamW& how, double steps) {
  return {how.maximize ? -1.0f : 1.0f,         static_cast<float>(how.lr * how.weight_decay),
          static_cast<float>(1.0 - how.beta1), static_cast<float>(how.beta2),
          static_cast<float>(1.0 - how.beta2), static_cast<float>(1.0 / sqrt(1.0 - pow(how.beta2, steps))),
          static_cast<float>(how.eps),         static_cast<float>(how.lr / (1.0 - pow(how.beta1, steps)))};
}

FASTPOST_HD void adamw_update(const AdamWStep& step, float gradient, float& w, float& first, float& second) {
  const float g = step.sign * gradient;
  first += step.first_share * (g - first);
  second = step.second_kept * second + step.second_share * g * g;
  const float denominator = __builtin_sqrtf(second) * step.second_scale + step.eps;
  w -= step.decay * w;
  w -= step.size * (first / denominator);
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
