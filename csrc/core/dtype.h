// Element types and their conversion to and from float. Conversions use integer arithmetic only, so that every backend
// rounds to the same bits (to nearest, ties to even) and compilers without half-precision support vectorise them.
#pragma once

#include <cstring>

#include "core/config.h"

namespace fastpost {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }
inline int64_t code_size(DType dtype) { return element_size(dtype) / 2; }  // of Code<T> in params.h

inline namespace FASTPOST_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FASTPOST_HD uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}

FASTPOST_HD float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

// if_true where mask is all ones, if_false where it is zero. A ternary on floats keeps GCC from vectorising a loop.
FASTPOST_HD uint32_t select_bits(uint32_t mask, uint32_t if_true, uint32_t if_false) {
  return (if_true & mask) | (if_false & ~mask);
}

FASTPOST_HD uint32_t mask_of(bool condition) { return 0u - static_cast<uint32_t>(condition); }

FASTPOST_HD float select(bool condition, float if_true, float if_false) {
#if defined(__CUDA_ARCH__)
  return condition ? if_true : if_false;
#endif
  return bits_float(select_bits(mask_of(condition), float_bits(if_true), float_bits(if_false)));
}

FASTPOST_HD float to_float(float x) { return x; }

FASTPOST_HD float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }

FASTPOST_HD float to_float(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Shifting puts the half's exponent into the float's field, 112 too low; the multiplication corrects it, subnormals
  // included. Infinities and NaNs then get the full exponent.
  const uint32_t finite = float_bits(bits_float(magnitude << 13) * 0x1p112f);
  return bits_float(finite | (mask_of(magnitude >= 0x7c00u) & 0x7f800000u) | sign);
}

template <class T>
FASTPOST_HD T from_float(float x);

template <>
FASTPOST_HD float from_float<float>(float x) {
  return x;
}

template <>
FASTPOST_HD bf16 from_float<bf16>(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (u >> 16) | 0x40u;
  return bf16{static_cast<uint16_t>(select_bits(mask_of((u & 0x7fffffffu) > 0x7f800000u), quiet_nan, rounded))};
}

template <>
FASTPOST_HD f16 from_float<f16>(float x) {
  const uint32_t u = float_bits(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;  // rebias by -112, round to even
  // Adding 0.5 aligns a value below 2^-14 so that the hardware rounds it at the subnormal's last bit.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = select_bits(mask_of(magnitude > 0x7f800000u), 0x7e00u, 0x7c00u);
  uint32_t half = select_bits(mask_of(magnitude < 0x38800000u), subnormal, normal);
  half = select_bits(mask_of(magnitude >= 0x47800000u), special, half);
  return f16{static_cast<uint16_t>(half | sign)};
}

// Calls body with a value of the element type that dtype names.
template <class F>
inline void with_dtype(DType dtype, F&& body) {
  switch (dtype) {
    case DType::f32:
      return body(float{});
    case DType::bf16:
      return body(bf16{});
    case DType::f16:
      return body(f16{});
  }
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
