// A teacher's and a student's row once its sums are known (row_sums.cuh): the terms of its divergence, and its gradients,
// from the equations of core/distillation.h. A tile of either has one way, with exact differences and both exponentials.
#pragma once

#include <cfloat>
#include <type_traits>

#include "core/distillation.h"
#include "core/pair_sums.h"
#include "cuda/fast_math.cuh"
#include "cuda/row_gradients.cuh"
#include "cuda/row_tiles.cuh"

namespace fastpost::cuda {

// Divergences that share their loops.
enum class Family : int { kl, js, total_variation };

// What is asked of all rows. forward, reverse: how much of each KL.
struct FDivergence {
  Family family;
  float forward, reverse;
  Mixture mixture;
  double most;  // what its value may not go beyond
  float sums;   // Jensen-Shannon's: 1 where the student's gradient has the teacher's added, else 0
};

template <Family family>
using ShareIn = std::conditional_t<family == Family::js, double, float>;

// A class: r = log p - log q, less what it is on average where classes weigh p (above) and q (below).
struct Pair {
  float r, above, below, p, q;
};

// A class's term, and what its gradients are made of.
template <Family family>
__device__ __forceinline__ void share_of(const Pair& pair, const FDivergence& how, float* term, ShareIn<family>* teacher,
                                         ShareIn<family>* student) {
  const auto [r, above, below, p, q] = pair;
  if constexpr (family == Family::js)
    divergence_share<Divergence::js>(r, above, below, p, q, how.mixture, term, teacher, student);
  else if constexpr (family == Family::total_variation)
    divergence_share<Divergence::total_variation>(r, above, below, p, q, how.mixture, term, teacher, student);
  else
    kl_share(r, above, below, p, q, how.forward, how.reverse, term, teacher, student);
}

// run(std::integral_constant<Family, ...>{}); all threads take the same branch.
template <class Run>
__device__ __forceinline__ void with_family(Family family, Run&& run) {
  if (family == Family::kl)
    run(std::integral_constant<Family, Family::kl>{});
  else if (family == Family::js)
    run(std::integral_constant<Family, Family::js>{});
  else
    run(std::integral_constant<Family, Family::total_variation>{});
}

// A number with more digits than a float has.
struct TwoFloats {
  float high, low;

  __device__ __forceinline__ void set(double x) {
    high = static_cast<float>(x);
    low = static_cast<float>(x - high);
  }
  // What d + error is away from it.
  __device__ __forceinline__ float from(float d, float error) const { return (d - high) + (error - low); }
};

// share - probability * mean, with its digits where a class has nearly all of a row.
__device__ __forceinline__ float less_mean(float share, float probability, const TwoFloats& mean) {
  return fmaf(-probability, mean.low, fmaf(-probability, mean.high, share));
}
__device__ __forceinline__ float less_mean(double share, float probability, const TwoFloats& mean) {
  return static_cast<float>(share - static_cast<double>(probability) * (static_cast<double>(mean.high) + mean.low));
}

// What all threads have to know of a row.
struct Comparison {
  float inverse, log2e;                                            // of the temperature, see Scale
  float teacher_origin, student_origin;                            // subtracted from all logits first
  TwoFloats equal, above, below;                                   // the differences where these of a pair are 0
  float teacher_unit, student_unit, teacher_scale, student_scale;  // of probabilities
  TwoFloats teacher_mean, student_mean;                            // E_p[g], E_q[h]
  float weight, student_weight;  // of the divergence in the teacher's and the student's gradient, over the temperature
  // The student's cross-entropy: its weight is in the scale. flat: what label smoothing takes from each class.
  float task_origin, task_unit, task_scale, flat;
  int64_t label;                       // -1: none
  float label_task;                    // its part of the gradient
  float teacher_slope, student_slope;  // 1 / cap, or 0
};

// The lowest number stands in for -inf: a class that neither stream has gets any difference, but no probability.
__device__ __forceinline__ Pair compare(float a, float b, const Comparison& c) {
  a = fmaxf(a - c.teacher_origin, -FLT_MAX);
  b = fmaxf(b - c.student_origin, -FLT_MAX);
  const float d = a - b, error = difference_error(a, b, d);
  return {c.equal.from(d, error) * c.inverse, clamped(c.above.from(d, error) * c.inverse),
          clamped(c.below.from(d, error) * c.inverse), c.teacher_scale * exp2_fast(fmaf(a, c.log2e, -c.teacher_unit)),
          c.student_scale * exp2_fast(fmaf(b, c.log2e, -c.student_unit))};
}

// With respect to the logit before its cap, whose derivative is 1 - (logit / cap)^2.
__device__ __forceinline__ float uncapped(float gradient, float logit, float slope) {
  const float u = fmaxf(logit, -FLT_MAX) * slope;  // 0 times -inf has to be 0
  return fmaf(-u * u, gradient, gradient);
}

// What the cross-entropy adds to a student's class.
__device__ __forceinline__ float task_gradient(float b, const Comparison& c) {
  return fmaf(c.task_scale, exp2_fast(fmaf(b - c.task_origin, kLog2e, -c.task_unit)), -c.flat);
}

// Of a pair whose shares are known. task: the cross-entropy's part.
template <class Share>
__device__ __forceinline__ float teacher_gradient(float a, Share share, const Pair& pair, const Comparison& c) {
  return uncapped(c.weight * less_mean(share, pair.p, c.teacher_mean), a, c.teacher_slope);
}
template <class Share>
__device__ __forceinline__ float student_gradient(float b, Share share, const Pair& pair, const Comparison& c, float task) {
  return uncapped(fmaf(c.student_weight, less_mean(share, pair.q, c.student_mean), task), b, c.student_slope);
}

// visit(i, classes, x, y) for this thread's packs, round by round: the last first, whose columns may still be in a cache, or
// the first; single columns come last. i: its first column; classes: how many it has. What is missing has no weight.
template <class Visit>
__device__ __forceinline__ void for_packs(const float* a, const float* b, const Cut<float>& cut, bool backwards,
                                          Ahead& ahead, Visit&& visit) {
  const int rounds = cut.rounds(), all = cut.rounds_with_singles();
  const bool wide = aligned(b + cut.head);
  const auto round_of = [&](int k) { return backwards && k < rounds ? rounds - 1 - k : k; };
  const auto ask = [&](int k) {
    if (wide && k < rounds)
      ahead.ask(cut, round_of(k), a, b);
    else
      end_group();
  };
  ask(0);
  ask(1);
#pragma unroll 1
  for (int k = 0; k < all; ++k) {
    const int round = round_of(k);
    ahead.wait();
    if (!wide || round == rounds) {
#pragma unroll 1
      for (int u = 0; u < kTilePacks; ++u) {
        ahead.put(round, u, load_some(a, cut, round, u, true));
        ahead.put(round, kTilePacks + u, load_some(b, cut, round, u, wide));
      }
    }
    const int64_t single = round == rounds ? cut.single() : -1;
#pragma unroll 1
    for (int u = 0; u < kTilePacks; ++u) {
      const int64_t i = round < rounds ? cut.column(round, u) : single;
      const int classes = round < rounds ? (cut.has(round, u) ? cut.size : 0) : (u == 0 && single >= 0 ? 1 : 0);
      visit(i, classes, ahead.get<float>(round, u), ahead.get<float>(round, kTilePacks + u));
    }
    ask(k + 2);
  }
  ahead.stop();
}

// The divergence's sum, those of both streams' shares, and of their probabilities: means of the very floats that gradients
// are made of.
struct TermSums {
  double value, teacher, student, teacher_mass, student_mass;
};

template <Family family>
__device__ __forceinline__ TermSums sum_terms(const float* a, const float* b, int64_t cols, const Comparison& c,
                                              const FDivergence& how, Ahead& ahead) {
  const Cut<float> cut(a, cols);
  TermSums sums = {};
  const auto add = [&](float x, float y) {
    const Pair pair = compare(x, y, c);
    float term;
    ShareIn<family> teacher, student;
    share_of<family>(pair, how, &term, &teacher, &student);
    sums.value += term;
    sums.teacher += teacher;
    sums.student += student;
    sums.teacher_mass += pair.p;
    sums.student_mass += pair.q;
  };
  for_packs(a, b, cut, true, ahead, [&](int64_t, int, const Pack<float>& x, const Pack<float>& y) {
#pragma unroll
    for (int k = 0; k < x.size; ++k) add(x.value[k], y.value[k]);
  });
  return sums;
}

// Each thread writes only what it has read, so gradients may take the logits' place. A null gradient is not wanted.
template <Family family, class O>
__device__ __forceinline__ void write_gradients(const float* a, const float* b, O* grad_a, O* grad_b, int64_t cols,
                                                const Comparison& c, const FDivergence& how, bool backwards, Ahead& ahead) {
  const Cut<float> cut(a, cols);
  const bool wide_a = stored_whole<float>(grad_a + cut.head), wide_b = stored_whole<float>(grad_b + cut.head);
  for_packs(a, b, cut, backwards, ahead, [&](int64_t i, int classes, const Pack<float>& x, const Pack<float>& y) {
    Pack<float> to_teacher, to_student;
    const int64_t from = c.label - i;
    const int label = from >= 0 && from < x.size ? static_cast<int>(from) : -1;
    const auto gradients = [&](int k, float* teacher, float* student) {
      const Pair pair = compare(x.value[k], y.value[k], c);
      float term;
      ShareIn<family> own, other;
      share_of<family>(pair, how, &term, &own, &other);
      if (teacher != nullptr) *teacher = teacher_gradient(x.value[k], own, pair, c);
      const float task = k == label ? c.label_task : task_gradient(y.value[k], c);
      if (student != nullptr) *student = student_gradient(y.value[k], other, pair, c, task);
    };
    if constexpr (family == Family::js) {  // its logarithms are dear, and serve both
#pragma unroll
      for (int k = 0; k < x.size; ++k) {
        gradients(k, &to_teacher.value[k], &to_student.value[k]);
        to_student.value[k] = fmaf(how.sums, to_teacher.value[k], to_student.value[k]);
      }
      if (grad_b != nullptr) store_some(grad_b + i, classes, to_student, wide_b);
      if (grad_a != nullptr) store_some(grad_a + i, classes, to_teacher, wide_a);
    } else {
      if (grad_b != nullptr) {
#pragma unroll
        for (int k = 0; k < x.size; ++k) gradients(k, nullptr, &to_student.value[k]);
        store_some(grad_b + i, classes, to_student, wide_b);
      }
      if (grad_a != nullptr) {
#pragma unroll
        for (int k = 0; k < x.size; ++k) gradients(k, &to_teacher.value[k], nullptr);
        store_some(grad_a + i, classes, to_teacher, wide_a);
      }
    }
  });
}

}  // namespace fastpost::cuda
