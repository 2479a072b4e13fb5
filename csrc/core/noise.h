// Noise from Philox words: four words, four numbers.
#pragma once

#include "core/dtype.h"
#include "core/philox.h"

namespace fastpost {
inline namespace FASTPOST_ISA {

// Uniform on (-1, 1): the odd multiples of 2^-24, so exact in float, symmetric and never zero. In 2^-31, a number that float
// holds: the word's first 24 bits, one half further, less 2^31.
constexpr uint32_t kUniformCentre = 0x80000080u;
FASTPOST_HD float uniform_numerator(uint32_t word, uint32_t centre = kUniformCentre) {
  return static_cast<float>(static_cast<int32_t>((word & 0xffffff00u) ^ centre));
}

FASTPOST_HD float uniform_from_word(uint32_t word) { return uniform_numerator(word) * 0x1p-31f; }

// sqrt(-2 ln u) for u = (word + 1) / 2^32, rounded to float first: up to 6.66 standard deviations.
FASTPOST_HD float normal_radius(uint32_t word) {
  const float u = (static_cast<float>(word) + 1.0f) * 0x1p-32f;
  // u = m * 2^e with m in [sqrt(1/2), sqrt(2)); ln m by the atanh series in s = (m - 1) / (m + 1).
  const uint32_t shifted = float_bits(u) - 0x3f3504f3u;
  const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
  const float m = bits_float((shifted & 0x7fffffu) + 0x3f3504f3u);
  const float f = m - 1.0f;
  const float s = f / (m + 1.0f);
  const float z = s * s;
  const float tail = z * (0x1.555556p-1f + z * (0x1.99999ap-2f + z * (0x1.249248p-2f + z * 0x1.d28p-3f)));
  const float half = 0.5f * f * f;
  const float ln_m = f - (half - s * (half + tail));
  const float e = static_cast<float>(exponent);
  const float ln_u = e * 0x1.62e4p-1f + (e * 0x1.7f7d1cp-20f + ln_m);
  return __builtin_sqrtf(-2.0f * ln_u);
}

// (cos 2 pi u, sin 2 pi u) for u = (word >> 8) / 2^24. The quadrant comes off exactly, in integers.
FASTPOST_HD void unit_circle(uint32_t word, float* cosine, float* sine) {
  const uint32_t turn = word >> 8;                                       // 24 bits of a full turn
  const uint32_t quadrant = (turn + (1u << 21)) >> 22;                   // nearest multiple of a quarter, 0 ... 4
  const int32_t rest = static_cast<int32_t>(turn - (quadrant << 22));    // +- 2^21
  const float x = static_cast<float>(rest) * 0x1p-24f * 0x1.921fb6p+2f;  // |x| <= pi / 4
  const float y = x * x;
  const float s = x + x * y * (-0x1.555546p-3f + y * (0x1.11073p-7f + y * -0x1.9943f2p-13f));
  const float c = 1.0f + y * (-0.5f + y * (0x1.55554ap-5f + y * (-0x1.6c0c32p-10f + y * 0x1.99eb9cp-16f)));
  const bool odd = (turn + (1u << 21)) & (1u << 22);  // GCC 14 leaves a loop scalar that asks for quadrant & 1
  const uint32_t sine_sign = (quadrant & 2u) << 30;
  const uint32_t cosine_sign = ((quadrant + 1u) & 2u) << 30;
  *sine = bits_float(float_bits(select(odd, c, s)) ^ sine_sign);
  *cosine = bits_float(float_bits(select(odd, s, c)) ^ cosine_sign);
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
