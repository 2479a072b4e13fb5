// Arithmetic of one row of logits in two streams: clean logits a, noised logits b, p = softmax(a), q = softmax(b).
//
//   J  = KL(p|q) + KL(q|p) = sum (p - q) r          with r = log p - log q
//   dJ/da = p (r - KL(p|q)) + (p - q)               dJ/db = -(q (r + KL(q|p)) + (p - q))
//
// R3F's streams differ by as little as 1e-6, where the textbook form loses every digit. So nothing here subtracts two nearby
// probabilities: r comes from the difference of the logits, delta = a - b - centre, and p - q = q expm1(r).
#pragma once

#include <math.h>

#include "core/numerics.h"

namespace fastpost {
inline namespace FASTPOST_ISA {

// Up to this |delta| a row is "close": p - q is q expm1(r) throughout, one exp per pair.
constexpr float kCloseSpread = 0.25f;

// What the first pass finds. Pairs that are -inf in both streams leave the difference alone.
struct RowExtent {
  float clean_max, noised_max, difference_min, difference_max;
};

// centre = clean_max - noised_max: any constant would do, this one lies inside the row's differences and makes
// e^(a - clean_max) = e^(b - noised_max) e^delta. Real is the type of differences and sums: float, or double in narrow rows,
// where a sum has too few terms for its rounding errors to average out.
template <class Real>
struct RowShift;

template <>
struct RowShift<float> {
  float clean_max, noised_max, centre, centre_error;
};
template <>
struct RowShift<double> {
  double clean_max, noised_max, centre;
};

// first - second = difference + error, exactly (Knuth).
FASTPOST_HD float difference_error(float first, float second, float difference) {
  const float back = difference - first;
  return (first - (difference - back)) - (second + back);
}

FASTPOST_HD RowShift<float> row_shift(const RowExtent& extent, float) {
  const float centre = extent.clean_max - extent.noised_max;
  return {extent.clean_max, extent.noised_max, centre, difference_error(extent.clean_max, extent.noised_max, centre)};
}

FASTPOST_HD RowShift<double> row_shift(const RowExtent& extent, double) {
  return {extent.clean_max, extent.noised_max, static_cast<double>(extent.clean_max) - extent.noised_max};
}

// delta, right to its last bit even where a large constant lies between the streams. 0 where both are -inf: the pair has
// probability 0 in both, and whatever is finite drops out.
FASTPOST_HD float centred(float a, float b, const RowShift<float>& shift) {
  const float difference = a - b;
  const float delta = (difference - shift.centre) + (difference_error(a, b, difference) - shift.centre_error);
  return bits_float(float_bits(delta) & ~mask_of(a + b == -INFINITY));
}

FASTPOST_HD double centred(float a, float b, const RowShift<double>& shift) {
  const double delta = (static_cast<double>(a) - b) - shift.centre;
  return a + b == -INFINITY ? 0.0 : delta;
}

// The sums of the second pass, over e_a = e^(a - clean_max) and e_b = e^(b - noised_max).
template <class Real>
struct RowSums {
  Real clean, noised;              // e_a, e_b
  Real excess;                     // e_a - e_b
  Real clean_delta, noised_delta;  // e_a delta, e_b delta
};

// e_a - e_b, or p - q with r in place of delta: never a difference of nearby numbers, and of the sign of its first argument.
FASTPOST_HD float close_excess(float delta, float noised) { return noised * expm1_small(delta); }

FASTPOST_HD float far_excess(float delta, float clean, float noised) {
  return select(fabsf(delta) < 0.5f, noised * expm1_small(delta), clean - noised);
}

// What the third pass needs of a row.
template <class Real>
struct RowMoments {
  Real log_ratio;                   // r = delta - log_ratio
  float clean_scale, noised_scale;  // 1 / sum
  float clean_kl, noised_kl;        // KL(p|q), KL(q|p)
};

template <class Real>
FASTPOST_HD RowMoments<Real> row_moments(const RowSums<double>& sums) {
  const double log_ratio =
      fabs(sums.excess) < 0.5 * sums.noised ? log1p(sums.excess / sums.noised) : log(sums.clean / sums.noised);
  RowMoments<Real> moments;
  moments.log_ratio = static_cast<Real>(log_ratio);
  moments.clean_scale = static_cast<float>(1.0 / sums.clean);
  moments.noised_scale = static_cast<float>(1.0 / sums.noised);
  moments.clean_kl = static_cast<float>(sums.clean_delta / sums.clean - log_ratio);
  moments.noised_kl = static_cast<float>(log_ratio - sums.noised_delta / sums.noised);
  return moments;
}

// The gradients of kl_weight * J + ce_weight * cross-entropy, short of the -ce_weight at the label.
FASTPOST_HD float clean_gradient(float p, float r, float excess, float clean_kl, float kl_weight, float ce_weight) {
  return kl_weight * (p * (r - clean_kl) + excess) + ce_weight * p;
}

FASTPOST_HD float noised_gradient(float q, float r, float excess, float noised_kl, float kl_weight) {
  return -kl_weight * (q * (r + noised_kl) + excess);
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
