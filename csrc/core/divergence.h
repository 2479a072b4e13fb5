// Arithmetic of one row of logits in two streams: clean logits a, noised logits b, p = softmax(a), q = softmax(b).
//
//   J  = KL(p|q) + KL(q|p) = sum (p - q) r          with r = log p - log q
//   dJ/da = p (r - KL(p|q)) + (p - q)               dJ/db = -(q (r + KL(q|p)) + (p - q))
//
// R3F's streams differ by as little as 1e-6, where the textbook form loses every digit. So nothing here subtracts two nearby
// probabilities: r comes from the differences of the logits, delta = a - b - centre, and p - q = q expm1(r).
#pragma once

#include <math.h>

#include "core/numerics.h"

namespace fastpost {
inline namespace FASTPOST_ISA {

// Up to this |delta|, and |r|, a row is near: p - q is q (e^r - 1) throughout.
constexpr float kNearRow = 1.0f;

// (e^x - 1) / x for |x| <= kNearRow, within 2.5e-8 and rounding. (pair_sums.h asks for a fused multiply-add, which SSE would
// call a function for.)
FASTPOST_HD float expm1_ratio_near(float x) {
  const float c1 = 0x1.000002p-1f, c2 = 0x1.555594p-3f, c3 = 0x1.555462p-5f, c4 = 0x1.10f826p-7f, c5 = 0x1.6c47fep-10f,
              c6 = 0x1.ab1f52p-13f, c7 = 0x1.9ed3d4p-16f;
  return 1.0f + x * (c1 + x * (c2 + x * (c3 + x * (c4 + x * (c5 + x * (c6 + x * c7))))));
}

// The same for |x| <= 1/4, within 1e-7 and rounding.
FASTPOST_HD float expm1_ratio_quarter(float x) {
  const float c1 = 0x1.ffff92p-2f, c2 = 0x1.555590p-3f, c3 = 0x1.5636c6p-5f, c4 = 0x1.11270ep-7f;
  return 1.0f + x * (c1 + x * (c2 + x * (c3 + x * c4)));
}

// What the first pass finds. Pairs that are -inf in both streams are left out of the differences.
struct RowExtent {
  float clean_max, noised_max, clean_min, difference_min, difference_max;
};

// centre = clean_max - noised_max: any constant would do, this one lies inside the row's differences and makes
// e^(a - clean_max) = e^(b - noised_max) e^delta. A row gets the cheapest of three ways to its deltas that is exact enough;
// Real is the type of deltas and of sums.

// The centre is no larger than the deltas, and no logit is -inf.
struct PlainShift {
  using Real = float;
  float clean_max, noised_max, centre;
};

// A large constant lies between the streams, or classes are -inf in both. clean_max may be another number than the maximum,
// so that centre = clean_max - noised_max is that of most of the row.
struct ExactShift {
  using Real = float;
  float clean_max, noised_max, centre, centre_error;
};

// Narrow rows: sums of so few terms that their rounding errors do not average out.
struct NarrowShift {
  using Real = double;
  double clean_max, noised_max, centre;
};

// first - second = difference + error, exactly (Knuth).
FASTPOST_HD float difference_error(float first, float second, float difference) {
  const float back = difference - first;
  return (first - (difference - back)) - (second + back);
}

FASTPOST_HD PlainShift plain_shift(const RowExtent& extent) {
  return {extent.clean_max, extent.noised_max, extent.clean_max - extent.noised_max};
}

FASTPOST_HD ExactShift exact_shift(float clean_max, float noised_max) {
  const float centre = clean_max - noised_max;
  return {clean_max, noised_max, centre, difference_error(clean_max, noised_max, centre)};
}

FASTPOST_HD NarrowShift narrow_shift(const RowExtent& extent) {
  return {extent.clean_max, extent.noised_max, static_cast<double>(extent.clean_max) - extent.noised_max};
}

FASTPOST_HD float centred(float a, float b, const PlainShift& shift) { return (a - b) - shift.centre; }

// Right to the last bit. 0 where both are -inf: the pair has probability 0 in both, and whatever is finite drops out.
FASTPOST_HD float centred(float a, float b, const ExactShift& shift) {
  const float difference = a - b;
  const float delta = (difference - shift.centre) + (difference_error(a, b, difference) - shift.centre_error);
  return bits_float(float_bits(delta) & ~mask_of(a + b == -INFINITY));
}

FASTPOST_HD double centred(float a, float b, const NarrowShift& shift) {
  const double delta = (static_cast<double>(a) - b) - shift.centre;
  return a + b == -INFINITY ? 0.0 : delta;
}

// The largest |delta|; NaN for a row that has no finite logits in one stream.
FASTPOST_HD float row_spread(const RowExtent& extent) {
  const float centre = extent.clean_max - extent.noised_max;
  const float above = extent.difference_max - centre, below = centre - extent.difference_min;
  return above > below ? above : below;
}

FASTPOST_HD bool plain_suffices(const RowExtent& extent, float spread) {
  return fabsf(extent.clean_max - extent.noised_max) <= spread && extent.clean_min > -INFINITY;
}

// e_a - e_b, or p - q with r in place of delta: never a difference of nearby numbers, and of the sign of its first argument.
FASTPOST_HD float far_excess(float delta, float clean, float noised) {
  return select(fabsf(delta) < 0.5f, noised * expm1_small(delta), clean - noised);
}

// Sums of the second pass, over e_a = e^(a - clean_max) and e_b = e^(b - noised_max).
struct RowSums {
  double clean, noised;              // e_a, e_b
  double excess;                     // e_a - e_b
  double clean_delta, noised_delta;  // e_a delta, e_b delta
};

// J, and how far from the centre most of the row lies: 0 where that is near enough. Otherwise J and the gradients have lost
// digits. A class that the clean stream all but rules out draws the noised mean alone away, and a centre there would not be
// better.
struct RowDivergence {
  double value, off_centre;
};

FASTPOST_HD RowDivergence divergence_of(const RowSums& sums) {
  const double noised_mean = sums.noised_delta / sums.noised, clean_mean = sums.clean_delta / sums.clean;
  const double value = ((sums.clean_delta - sums.noised_delta) - noised_mean * sums.excess) / sums.clean;
  const bool off = noised_mean * noised_mean > 8 * value && 2 * fabs(clean_mean) > fabs(noised_mean);
  return {value, off ? noised_mean : 0};
}

// What the third pass needs of them.
template <class Real>
struct RowMoments {
  Real log_ratio;                   // r = delta - log_ratio
  float clean_scale, noised_scale;  // p = e_a clean_scale, q = e_b noised_scale
  float clean_kl, noised_kl;        // KL(p|q), KL(q|p)
};

template <class Real>
FASTPOST_HD RowMoments<Real> row_moments(const RowSums& sums) {
  const bool near = fabs(sums.excess) < 0.5 * sums.noised;
  const double log_ratio = near ? log1p(sums.excess / sums.noised) : log(sums.clean / sums.noised);
  return {static_cast<Real>(log_ratio), static_cast<float>(1.0 / sums.clean), static_cast<float>(1.0 / sums.noised),
          static_cast<float>(sums.clean_delta / sums.clean - log_ratio),
          static_cast<float>(log_ratio - sums.noised_delta / sums.noised)};
}

// The gradients of kl_weight * J + ce_weight * cross-entropy, short of the -ce_weight at the label.
template <class Real>
FASTPOST_HD Real clean_gradient(Real p, Real r, Real excess, Real clean_kl, Real kl_weight) {
  return kl_weight * (p * (r - clean_kl) + excess);
}

template <class Real>
FASTPOST_HD Real clean_gradient(Real p, Real r, Real excess, Real clean_kl, Real kl_weight, Real ce_weight) {
  return clean_gradient(p, r, excess, clean_kl, kl_weight) + ce_weight * p;
}

template <class Real>
FASTPOST_HD Real noised_gradient(Real q, Real r, Real excess, Real noised_kl, Real kl_weight) {
  return -kl_weight * (q * (r + noised_kl) + excess);
}

// The gradient of z from that of cap * tanh(z / cap), u being tanh(z / cap).
template <class Real>
FASTPOST_HD Real before_cap(Real gradient, Real u) {
  return gradient * (1 - u * u);
}

// -- Jensen-Shannon: m = (p + q) / 2, t = (p - q) / (p + q) = tanh(r / 2), so p = m (1 + t) and q = m (1 - t)
//
//   JSD = sum m ((1 + t) ln(1 + t) + (1 - t) ln(1 - t)) / 2       dJSD/da = p (ln(p / m) - KL(p|m)) / 2
//
// Every term is >= 0 and even in t, so nothing cancels between classes.

// Differences in double; where a class is -inf in one stream only they are infinite.
struct MixtureShift {
  using Real = double;
  double clean_max, noised_max, centre;
};

FASTPOST_HD MixtureShift mixture_shift(const RowExtent& extent) {
  return {extent.clean_max, extent.noised_max, static_cast<double>(extent.clean_max) - extent.noised_max};
}

FASTPOST_HD double centred(float a, float b, const MixtureShift& shift) {
  const double delta = (static_cast<double>(a) - b) - shift.centre;
  return ((a == -INFINITY) & (b == -INFINITY)) ? 0.0 : delta;
}

// ln(p / m) and ln(q / m), and what the class adds to JSD / m. The logarithms keep their digits near 0 and, where a class
// belongs to one stream, near ln 2. r may be infinite.
FASTPOST_HD void mixture_logs(float r, double* clean_log, double* noised_log, float* term) {
  const float size = select(fabsf(r) > 200.0f, 200.0f, fabsf(r));  // beyond, the lesser probability is 0 in float
  const bool far = size > 1.0f;
  const float u = exp_nonpositive(-size);  // the lesser over the greater
  const float less = select(size < 0.5f, -expm1_small(-size), 1.0f - u);
  // ln(1 + t) = 2 atanh(t / (2 + t)), far out ln 2 - ln(1 + u) with ln(1 + u) = 2 atanh(u / (2 + u)).
  const float s = select(far, u, less) / select(far, 2.0f + u, 3.0f + u);
  const float z = s * s;
  const float half = s + s * (z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9)))));
  const float over = 1.0f / (1.0f + u);
  const float t = less * over;
  const float y = t * t;
  const float tail = y * (1.0f / 90 + y * (1.0f / 132 + y * (1.0f / 182 + y * (1.0f / 240))));
  const float series = y * (1.0f / 2 + y * (1.0f / 12 + y * (1.0f / 30 + y * (1.0f / 56 + tail))));
  *term = select(far, 0x1.62e43p-1f - (2.0f * half + u * over * size), series);
  const double greater = 0x1.62e42fefa39efp-1 * select(far, 1.0f, 0.0f) + select(far, -2.0f, 2.0f) * half;
  *clean_log = greater - select(r < 0.0f, size, 0.0f);
  *noised_log = greater - select(r > 0.0f, size, 0.0f);
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
