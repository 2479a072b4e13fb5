// Arithmetic of a row of which a teacher has given k classes: a divergence over those and, as one more class, the rest of
// the vocabulary. All of it in double: it is k + 1 numbers.
//
//   q = softmax(z / T)          dD/dz = (s - q sum s) / T, s = q dD/dq         forward KL: s - q sum s = q - p
#pragma once

#include <math.h>

#include "core/distillation.h"

namespace fastpost {

// What is asked of top_k_rows beside its rows: as in DistillationOptions (csrc/api.h), and whether the rest of the
// vocabulary is one more class; else both models are taken over the k classes.
struct TopKOptions {
  Divergence divergence;
  double beta, temperature, cap, smoothing;
  bool has_rest;
};

inline namespace FASTPOST_ISA {

// log of a sum of exponentials that were taken less their maximum. Without a class, and for NaN and +inf, what it should be.
FASTPOST_HD double log_sum(double most, double sum) { return most == -INFINITY ? most : most + log(sum); }
FASTPOST_HD double exp_less(double x, double most) { return most == -INFINITY ? 0.0 : exp(x - most); }

// The same of two sums.
FASTPOST_HD double log_sum_of_two(double x, double y) {
  const double most = x > y ? x : y;
  return log_sum(most, exp_less(x, most) + exp_less(y, most));
}

// What is subtracted from the known log-probabilities, and that of the rest.
struct KnownTeacher {
  double shift, rest;
};

// known: log of the known probabilities' sum. given_rest: the rest's log-probability, null where nobody knows it; then it is
// what the known ones leave to 1. Sums that rounding has brought above 1 are scaled to 1, and so is one without a rest or
// with a rest that was given. student_rest: -inf where all classes are known, so that rounding leaves nothing to a rest.
FASTPOST_HD KnownTeacher known_teacher(double known, bool has_rest, const double* given_rest, double student_rest) {
  if (!has_rest) return {known, -INFINITY};
  if (given_rest != nullptr) {
    const double rest = student_rest == -INFINITY ? student_rest : *given_rest, all = log_sum_of_two(known, rest);
    return {all, rest - all};
  }
  const double left = known < 0 && student_rest > -INFINITY ? log(-expm1(known)) : -INFINITY;
  return {known > 0 ? known : known < 0 ? 0.0 : known, left};  // NaN stays NaN
}

// Whether a log of a sum says that its row means something: no NaN, no +inf, some class.
FASTPOST_HD bool is_meaningful(double log_of_sum) { return log_of_sum > -INFINITY && log_of_sum < INFINITY; }

// What is subtracted from a row's logits before they are divided by the temperature: the largest. A logit of 1e4 at
// T = 0.3 would cost five of a logarithm's digits.
FASTPOST_HD double centre_of(double known, double rest) {
  const double most = known > rest ? known : rest;
  return is_meaningful(most) ? most : 0.0;
}

FASTPOST_HD double share_log(double share, double log) { return share > 0 ? share * log : 0.0; }

// A class's term, and s. Nothing is said of what has no share, whatever its logarithm.
FASTPOST_HD void class_share(Divergence kind, double beta, double log_p, double log_q, double* term, double* slope) {
  const double p = exp(log_p), q = exp(log_q);
  if (kind == Divergence::total_variation) {
    *term = fabs(p - q) / 2;
    *slope = p > q ? -q / 2 : p < q ? q / 2 : 0.0;
  } else if (kind == Divergence::js) {
    const double log_m = log(beta * p + (1 - beta) * q), own = (1 - beta) * share_log(q, log_q - log_m);
    *term = beta * share_log(p, log_p - log_m) + own;
    *slope = own;
  } else {
    const double reverse = kind == Divergence::forward_kl ? 0.0 : share_log(q, log_q - log_p);
    *term = reverse + (kind == Divergence::reverse_kl ? 0.0 : share_log(p, log_p - log_q));
    *slope = reverse;
  }
}

// dD/d(z / T) of a class.
FASTPOST_HD double class_gradient(Divergence kind, double beta, double log_p, double log_q, double slopes) {
  double term, slope;
  class_share(kind, beta, log_p, log_q, &term, &slope);
  const double q = exp(log_q), through = slope - q * slopes;
  return kind == Divergence::forward_kl || kind == Divergence::symmetric_kl ? through + (q - exp(log_p)) : through;
}

}  // namespace FASTPOST_ISA
}  // namespace fastpost
