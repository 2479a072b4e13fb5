// Arithmetic of f-divergences of one row of logits: teacher p = softmax(a / T), student q = softmax(b / T), r = log p - log
// q.
//
//   D = sum q f(p / q),  f convex, f(1) = f'(1) = 0
//   dD/da = p (g - E_p[g]) / T,  g = f'(p / q)        dD/db = q (h - E_q[h]) / T,  h = f(p / q) - (p / q) f'(p / q)
//
//   KL(p|q)             p r - p + q                          p g = p r                  q h = -(p - q)
//   KL(q|p)             -q r - q + p                         p g = p - q                q h = -q r
//   both                (p - q) r                            p g = p r + (p - q)        q h = -(q r + (p - q))
//   Jensen-Shannon      beta KL(p|m) + (1 - beta) KL(q|m)    p g = beta p ln(p / m)     q h = (1 - beta) q ln(q / m)
//   total variation     |p - q| / 2                          p g = p sign(r) / 2        q h = -q sign(r) / 2
//
// with m = beta p + (1 - beta) q. Every term is >= 0, and 0 where r is. As f'(1) = 0, an error common to all r enters D
// squared.
#pragma once

#include <math.h>

#include "core/divergence.h"

namespace fastpost {

enum class Divergence : int { forward_kl = 0, reverse_kl = 1, symmetric_kl = 2, js = 3, total_variation = 4 };

inline namespace FASTPOST_ISA {

// Differences in double, so that they may be divided by a temperature; where a class is -inf in one stream only, infinite.
struct TemperedShift {
  double centre, scale;  // teacher_max - student_max, 1 / T
};

FASTPOST_HD float centred(float a, float b, const TemperedShift& shift) {
  const float delta = static_cast<float>(((static_cast<double>(a) - b) - shift.centre) * shift.scale);
  return select((a == -INFINITY) & (b == -INFINITY), 0.0f, delta);
}

// x s for a probability and a logarithm, which is infinite only where it does not matter.
FASTPOST_HD float weighted_log(float x, float s) { return select(x == 0.0f, 0.0f, x * s); }

// What a class adds to KL(X|Y): x s - x + y with s = log x - log y. Up to |s| = 1/2 it is x (e^-s - 1 + s).
FASTPOST_HD float kl_term(float x, float y, float s) {
  const float t = -s;
  const float series =
      t * t *
      (1.0f / 2 +
       t * (1.0f / 6 + t * (1.0f / 24 + t * (1.0f / 120 + t * (1.0f / 720 + t * (1.0f / 5040 + t * (1.0f / 40320)))))));
  return select(fabsf(s) < 0.5f, x * series, (y - x) + weighted_log(x, s));
}

// x / y within 2 ulp, without what a GPU takes for subnormal numbers.
FASTPOST_HD float quotient(float x, float y) {
#if defined(__CUDA_ARCH__)
  return __fdividef(x, y);
#else
  return x / y;
#endif
}

// log y for y = 1 + w > 0, of which w keeps the digits near 0 and y elsewhere.
FASTPOST_HD float log_of(float w, float y) {
  const uint32_t bits = float_bits(y);
  const int32_t exponent = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;  // y = 2^exponent [sqrt(1/2), sqrt(2))
  const float mantissa = bits_float(bits - (static_cast<uint32_t>(exponent) << 23));
  const float m = select(exponent == 0, w, mantissa - 1.0f);
  const float s = quotient(m, 2.0f + m);
  const float z = s * s;
  const float half = s + s * (z * (1.0f / 3 + z * (1.0f / 5 + z * (1.0f / 7 + z * (1.0f / 9)))));
  return 0x1.62e43p-1f * static_cast<float>(exponent) + 2.0f * half;
}

// The mixture of Jensen-Shannon's divergence: beta p + rest q, and -ln beta, -ln rest.
struct Mixture {
  float beta, rest;
  double most_teacher, most_student;
};

inline Mixture mixture_of(double beta) {
  return {static_cast<float>(beta), static_cast<float>(1 - beta), -log(beta), -log1p(-beta)};
}

// The divergence of streams that have nothing in common, beyond which rounding may not go.
inline double most_of(double beta) { return -beta * log(beta) - (1 - beta) * log1p(-beta); }

// ln(p / m) and ln(q / m): of the two the greater is at most -ln of its share in m, the lesser |r| below it. They keep their
// digits near 0 and, where a class belongs to one stream, near that most.
FASTPOST_HD void share_logs(float r, const Mixture& mixture, double* teacher_log, double* student_log) {
  const float size = select(fabsf(r) > 200.0f, 200.0f, fabsf(r));  // beyond, the lesser probability is 0 in float
  const bool ahead = r > 0.0f, far = size > 1.0f;
  const float own = select(ahead, mixture.beta, mixture.rest), other = select(ahead, mixture.rest, mixture.beta);
  const float u = exp_nonpositive(-size);  // the lesser over the greater
  const float less = select(size < 0.5f, -expm1_small(-size), 1.0f - u);
  const float w = select(far, other * quotient(u, own), -other * less);  // m over own times the greater, or over it, less 1
  const float v = own * quotient(less, u);                               // m over the lesser, less 1
  const double is_far = select(far, 1.0f, 0.0f), is_ahead = select(ahead, 1.0f, 0.0f);
  const double most = is_ahead * mixture.most_teacher + (1 - is_ahead) * mixture.most_student;
  const double greater = is_far * most - log_of(w, 1.0f + w);
  const double is_direct = select(size > 16.0f, 0.0f, 1.0f);
  const float direct = log_of(select(size > 16.0f, 0.0f, v), 1.0f + select(size > 16.0f, 0.0f, v));
  const double lesser = (1 - is_direct) * (greater - size) - is_direct * direct;
  *teacher_log = is_ahead * greater + (1 - is_ahead) * lesser;
  *student_log = is_ahead * lesser + (1 - is_ahead) * greater;
}

// What differences may not go beyond where something weighs them: there one stream lacks the class, and in a row that has
// gradients only 0 weighs it. The most that a float holds would not do, as probabilities are rounded above 1.
constexpr float kMostLog = 0x1p100f;

FASTPOST_HD float clamped(float r) { return fminf(fmaxf(r, -kMostLog), kMostLog); }

// All KL divergences at once: forward KL(p|q) + reverse KL(q|p), for weights that run time knows. In the gradients r - E[r]
// is the same for r less any number: above and below are r less one near E_p[r] and one near E_q[r], both clamped.
FASTPOST_HD void kl_share(float r, float above, float below, float p, float q, float forward, float reverse, float* term,
                          float* teacher, float* student) {
  const float excess = far_excess(r, p, q), s = clamped(r);
  *term = forward * kl_term(p, q, s) + reverse * kl_term(q, p, -s);
  *teacher = forward * (p * above) + reverse * excess;
  *student = -(reverse * (q * below) + forward * excess);
}

// How the gradients' parts are kept: Jensen-Shannon's lie near a constant where classes belong to one stream.
template <Divergence kind>
struct ShareOf {
  using Type = float;
};
template <>
struct ShareOf<Divergence::js> {
  using Type = double;
};

// A class's term, and what its gradients are made of: p g and q h. above, below: r less numbers near E_p[r] and E_q[r],
// which is what the KL's gradients are made of, as above.
template <Divergence kind>
FASTPOST_HD void divergence_share(float r, float above, float below, float p, float q, const Mixture& mixture, float* term,
                                  typename ShareOf<kind>::Type* teacher, typename ShareOf<kind>::Type* student) {
  if constexpr (kind == Divergence::js) {
    double teacher_log, student_log;
    share_logs(r, mixture, &teacher_log, &student_log);
    const float m = mixture.beta * p + mixture.rest * q;
    *term = mixture.beta * kl_term(p, m, static_cast<float>(teacher_log)) +
            mixture.rest * kl_term(q, m, static_cast<float>(student_log));
    *teacher = static_cast<double>(mixture.beta) * p * teacher_log;
    *student = static_cast<double>(mixture.rest) * q * student_log;
  } else {
    const float excess = far_excess(r, p, q);
    if constexpr (kind == Divergence::forward_kl) {
      *term = kl_term(p, q, r);
      *teacher = weighted_log(p, above);
      *student = -excess;
    } else if constexpr (kind == Divergence::reverse_kl) {
      *term = kl_term(q, p, -r);
      *teacher = excess;
      *student = -weighted_log(q, below);
    } else if constexpr (kind == Divergence::symmetric_kl) {
      *term = weighted_log(excess, r);
      *teacher = weighted_log(p, above) + excess;
      *student = -weighted_log(q, below) - excess;
    } else {
      const float half = select(r > 0.0f, 0.5f, select(r < 0.0f, -0.5f, 0.0f));
      *term = 0.5f * fabsf(excess);
      *teacher = half * p;
      *student = -half * q;
    }
  }
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
