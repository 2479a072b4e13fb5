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

// What is summed over two lists: squares of x (gradients), of (|y| + eta) x (ASAM's norm, y the weights) or of x - y (how
// far weights have moved); products x y.
enum class Terms : int { squares, scaled, differences, products };

// The list beside the codes of a plan: word 0 counts the elements that wanted a place, of which the first `capacity` have
// one in the words that follow.
struct CodeList {
  uint64_t* words;
  int64_t capacity;
};

inline namespace FASTPOST_ISA {

// scale = high * low with low a power of two, 1 unless scale leaves float's normal range. So an element's perturbation
// loses no digits where gradients are as small as 1e-40 or as large as 1e38.
struct SplitScale {
  float high, low;
};

// Whether a perturbation of radius rho along a gradient of this squared norm moves anything.
FASTPOST_HD bool moves(double rho, double squared) {
  using std::isfinite;
  return rho != 0 && squared > 0 && isfinite(squared);
}

// Whether a gradient of this norm is clipped.
FASTPOST_HD bool clips(double norm, double most) { return norm > most && norm < INFINITY; }

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

// Stochastic rounding: away from zero with the probability that keeps the mean. `random` has 16 bits; numbers that T holds
// stay as they are, whatever the bits, as do infinities and NaNs.
template <class T>
FASTPOST_HD T round_randomly(float x, uint32_t random);

template <>
FASTPOST_HD float round_randomly<float>(float x, uint32_t) {
  return x;
}

template <>
FASTPOST_HD bf16 round_randomly<bf16>(float x, uint32_t random) {
  const uint32_t u = float_bits(x);
  const uint32_t up = (u + random) >> 16;
  const uint32_t special = from_float<bf16>(x).bits;
  return bf16{static_cast<uint16_t>(select_bits(mask_of((u & 0x7f800000u) == 0x7f800000u), special, up))};
}

template <>
FASTPOST_HD f16 round_randomly<f16>(float x, uint32_t random) {
  const uint32_t u = float_bits(x);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t normal = (magnitude + 0xc8000000u + (random >> 3)) >> 13;  // rebias by -112; 13 bits are to go
  // Below 2^-14 the last place is 2^-24: in 2^-40 steps only whole ones can carry.
  const float small = select(magnitude < 0x38800000u, bits_float(magnitude), 0.0f);
  const uint32_t subnormal = (static_cast<uint32_t>(static_cast<int32_t>(small * 0x1p40f)) + random) >> 16;
  uint32_t half = select_bits(mask_of(magnitude < 0x38800000u), subnormal, normal);
  half = select_bits(mask_of(magnitude >= 0x477fffffu + 1u), 0x7c00u, half);
  half = select_bits(mask_of(magnitude > 0x7f800000u), 0x7e00u, half);
  return f16{static_cast<uint16_t>(half | sign)};
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
struct SignBits;  // the element as an integer, with and without a sign of its own, and its sign bit
template <>
struct SignBits<float> {
  using type = uint32_t;
  using number = int32_t;
  static constexpr uint32_t sign = 0x80000000u;
};
template <>
struct SignBits<bf16> {
  using type = uint16_t;
  using number = int16_t;
  static constexpr uint16_t sign = 0x8000u;
};
template <>
struct SignBits<f16> : SignBits<bf16> {};

FASTPOST_HD uint32_t bits_of(float x) { return float_bits(x); }
FASTPOST_HD uint16_t bits_of(bf16 x) { return x.bits; }
FASTPOST_HD uint16_t bits_of(f16 x) { return x.bits; }

template <class T>
FASTPOST_HD T of_bits(typename SignBits<T>::type bits) {
  T x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// -- codes: w told by its distance from w + e ------------------------------------------------------------------------------
//
// Bit patterns in the order of the numbers they stand for (-0 is just below +0), counted modulo 2^16 or 2^32, so that a
// distance is exact whatever the two are. A distance that does not fit into its code goes to a list with the bits of w.
// Three codes are no distances.

template <class T>
struct CodeOf {
  using type = int8_t;
};
template <>
struct CodeOf<float> {
  using type = int16_t;
};
template <class T>
using Code = typename CodeOf<T>::type;

template <class T>
constexpr Code<T> kListed = static_cast<Code<T>>(1u << (8 * sizeof(Code<T>) - 1));  // the list has w
template <class T>
constexpr Code<T> kPending = kListed<T> + 1;  // the list was full: w has not been moved yet
template <class T>
constexpr Code<T> kZero = kListed<T> + 2;  // w is +0, as of layers that start at zero

// The place of a bit pattern in that order; its own inverse.
template <class T>
FASTPOST_HD typename SignBits<T>::type ordered(typename SignBits<T>::type bits) {
  using Bits = typename SignBits<T>::type;
  const Bits negative = static_cast<Bits>(static_cast<typename SignBits<T>::number>(bits) >> (8 * sizeof(T) - 1));
  return static_cast<Bits>(bits ^ (negative & static_cast<Bits>(~SignBits<T>::sign)));
}

// The distance, or kListed where it does not fit.
template <class T>
FASTPOST_HD Code<T> distance_code(typename SignBits<T>::type before, typename SignBits<T>::type after) {
  using Bits = typename SignBits<T>::type;
  const Bits distance = static_cast<Bits>(ordered<T>(after) - ordered<T>(before));
  // Compared at the width of T: for a comparison of codes GCC converts to and fro.
  constexpr Bits least = static_cast<Bits>(kZero<T> + 1), count = static_cast<Bits>((Bits{1} << (4 * sizeof(T))) - 3);
  return static_cast<Code<T>>(static_cast<Bits>(distance - least) < count ? distance : static_cast<Bits>(kListed<T>));
}

template <class T>
FASTPOST_HD Code<T> encoded(typename SignBits<T>::type before, typename SignBits<T>::type after) {
  const Code<T> code = distance_code<T>(before, after);
  return code == kListed<T> && before == 0 ? kZero<T> : code;
}

// w; of what is listed or pending, `after` itself.
template <class T>
FASTPOST_HD typename SignBits<T>::type decoded(Code<T> code, typename SignBits<T>::type after) {
  using Bits = typename SignBits<T>::type;
  const Bits near = ordered<T>(static_cast<Bits>(ordered<T>(after) - static_cast<Bits>(code)));
  const Bits other = code == kZero<T> ? Bits{0} : after;
  return code > kZero<T> ? near : other;
}

// An entry of the list: where the element stands (its chunk, of 16 bits for float and 32 for others, and its place in that),
// and the bits of w.
template <class T>
FASTPOST_HD uint64_t listed(int64_t chunk, int64_t place, typename SignBits<T>::type bits) {
  return (static_cast<uint64_t>(chunk) << 16 | static_cast<uint64_t>(place)) << (8 * sizeof(T)) | bits;
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
