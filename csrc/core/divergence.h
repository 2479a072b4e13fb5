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

// One pair's addends.
FASTPOST_HD void close_terms(float delta, float noised, float* excess, float* excess_delta) {
  *excess = noised * expm1_small(delta);
  *excess_delta = *excess * delta;
}

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

// One pair in the third pass.
struct Pair {
  float p, q, r, excess;  // excess = p - q, with the sign of r
};

FASTPOST_HD Pair close_pair(float r, float noised, float noised_scale) {
  Pair pair;
  pair.r = r;
  pair.q = noised * noised_scale;
  pair.excess = pair.q * expm1_small(r);
  pair.p = pair.q + pair.excess;
  return pair;
}

FASTPOST_HD Pair far_pair(float r, float clean, float noised, float clean_scale, float noised_scale) {
  Pair pair;
  pair.r = r;
  pair.p = clean * clean_scale;
  pair.q = noised * noised_scale;
  pair.excess = select(fabsf(r) < 0.5f, pair.q * expm1_small(r), pair.p - pair.q);
  return pair;
}

FASTPOST_HD float divergence_term(const Pair& pair) { return pair.excess * pair.r; }

FASTPOST_HD float clean_gradient(const Pair& pair, float clean_kl, float kl_weight, float ce_weight) {
  return kl_weight * (pair.p * (pair.r - clean_kl) + pair.excess) + ce_weight * pair.p;
}

FASTPOST_HD float noised_gradient(const Pair& pair, float noised_kl, float kl_weight) {
  return -kl_weight * (pair.q * (pair.r + noised_kl) + pair.excess);
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
