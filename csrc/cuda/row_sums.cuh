// All sums of a wide row of logits in one reading: the equations of core/divergence.h.
//
// The sums want the row's maxima and a centre of its differences, which nobody knows before the end. So every warp keeps its
// own, the difference at the largest noised logit so far, and moves its sums along when a larger one comes: with
// s = old centre - new centre,
//
//   sum e_b (e^(delta + s) - 1) = e^s sum e_b (e^delta - 1) + (e^s - 1) sum e_b
//
// and so on, exactly. A centre where the weight lies is what keeps confident rows exact.
#pragma once

#include <cfloat>

#include "core/divergence.h"
#include "cuda/warp.cuh"

namespace fastpost::cuda {

constexpr int kRowThreads = 256;  // two blocks of them leave each thread the 128 registers that a row wants
constexpr int kWarps = kRowThreads / kWarp;

// a - b - centre, or 0 where the class does not exist in the noised stream: it has no weight there, and NaN times 0 is NaN.
// 16-bit logits leave no rounding error in their difference.
template <class T>
__device__ __forceinline__ float difference(float a, float b, float centre) {
  const float d = a - b;
  float delta = d - centre;
  if constexpr (sizeof(T) == 4) delta += difference_error(a, b, d);
  return b == -INFINITY ? 0.0f : delta;
}

// Sums over pairs, with e_b = e^(b - noised_max) and delta = a - b - centre.
struct NoisedSums {
  double noised, noised_delta;  // e_b, e_b delta
  double excess, excess_delta;  // e_b (e^delta - 1), the same times delta
};

// Sums over the clean stream alone, with e_a = e^(a - clean_max).
struct CleanSums {
  double clean, clean_delta;
};

// A larger maximum and another centre; every sum stays what it is, in new units.
__device__ __forceinline__ NoisedSums moved(const NoisedSums& s, double shrink, double shift) {
  if (s.noised == 0) return {};  // nothing to move, and the factors may be infinite
  const double growth = expm1(shift);
  const double excess = s.excess + growth * (s.excess + s.noised);
  const double excess_delta = s.excess_delta + growth * (s.excess_delta + s.noised_delta) + shift * excess;
  return {shrink * s.noised, shrink * (s.noised_delta + shift * s.noised), shrink * excess, shrink * excess_delta};
}

__device__ __forceinline__ CleanSums moved(const CleanSums& s, double shrink, double shift) {
  if (s.clean == 0) return {};
  return {shrink * s.clean, shrink * (s.clean_delta + shift * s.clean)};
}

// One warp's part of a row. Maxima, centre and `far` are the same on all lanes, the sums are each lane's own.
struct Part {
  float noised_max, centre;
  float low, high;  // of a - b, over this lane's pairs
  // The clean stream's own sums are kept only once a difference was far from the centre; before that they follow from the
  // others.
  bool far;
  float clean_max;
  NoisedSums sums;
  CleanSums clean;
};

__device__ __forceinline__ Part nothing() {
  return {-FLT_MAX, 0.0f, INFINITY, -INFINITY, false, -FLT_MAX, {0, 0, 0, 0}, {0, 0}};
}

__device__ __forceinline__ void keep_clean_sums(Part& part) {
  const double shift = static_cast<double>(part.noised_max) + part.centre;
  part.clean_max = static_cast<float>(shift);
  const double factor = exp(shift - part.clean_max);
  part.clean = {factor * (part.sums.noised + part.sums.excess), factor * (part.sums.noised_delta + part.sums.excess_delta)};
  part.far = true;
}

__device__ __forceinline__ void raise(Part& part, float noised_max, float centre) {
  const double shift = static_cast<double>(part.centre) - centre;
  if (!part.far && fabs(shift) > 2 * kCloseSpread && part.noised_max > -FLT_MAX) keep_clean_sums(part);
  part.sums = moved(part.sums, exp(static_cast<double>(part.noised_max) - noised_max), shift);
  if (part.far) part.clean = moved(part.clean, 1.0, shift);
  part.noised_max = noised_max;
  part.centre = centre;
}

// Adds n pairs per lane; absent ones are -inf in both. All lanes of a warp call it together.
template <class T, int n>
__device__ __forceinline__ void add(Part& part, const float (&a)[n], const float (&b)[n]) {
  float top = b[0];
#pragma unroll
  for (int k = 0; k < n; ++k) {
    const float d = a[k] - b[k];
    part.low = fminf(part.low, d);  // NaN where both are -inf, which leaves the bounds alone
    part.high = fmaxf(part.high, d);
    top = fmaxf(top, b[k]);
  }
  const float warp_top = warp_max(top);
  if (warp_top > part.noised_max) {
    float there = 0;
#pragma unroll
    for (int k = 0; k < n; ++k) there = b[k] == warp_top ? a[k] - b[k] : there;
    const float d = value_of_first(top == warp_top, there);
    raise(part, warp_top, fabsf(d) < INFINITY ? d : 0.0f);
  }
  float delta[n];
  float furthest = 0;
#pragma unroll
  for (int k = 0; k < n; ++k) {
    delta[k] = difference<T>(a[k], b[k], part.centre);
    furthest = fmaxf(furthest, fabsf((a[k] - b[k]) - part.centre));
  }
  const bool far = furthest > kCloseSpread;
  if (!part.far && __any_sync(0xffffffffu, far)) keep_clean_sums(part);
  float noised = 0, noised_delta = 0, excess = 0, excess_delta = 0;
  if (!part.far) {
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float e = exp_nonpositive(b[k] - part.noised_max);
      const float more = close_excess(delta[k], e);
      noised += e;
      noised_delta += e * delta[k];
      excess += more;
      excess_delta += more * delta[k];
    }
  } else {
    float clean_top = a[0];
#pragma unroll
    for (int k = 1; k < n; ++k) clean_top = fmaxf(clean_top, a[k]);
    clean_top = warp_max(clean_top);
    if (clean_top > part.clean_max) {
      part.clean = moved(part.clean, exp(static_cast<double>(part.clean_max) - clean_top), 0.0);
      part.clean_max = clean_top;
    }
    // The unit of e_a over that of e_b e^delta.
    const float ratio = static_cast<float>(exp(static_cast<double>(part.clean_max) - part.centre - part.noised_max));
    float clean = 0, clean_delta = 0;
#pragma unroll
    for (int k = 0; k < n; ++k) {
      const float ea = exp_nonpositive(a[k] - part.clean_max);
      const float eb = exp_nonpositive(b[k] - part.noised_max);
      const float more = far_excess(delta[k], ea * ratio, eb);
      clean += ea;
      clean_delta += ea * delta[k];
      noised += eb;
      noised_delta += eb * delta[k];
      excess += more;
      excess_delta += more * delta[k];
    }
    part.clean.clean += clean;
    part.clean.clean_delta += clean_delta;
  }
  part.sums.noised += noised;
  part.sums.noised_delta += noised_delta;
  part.sums.excess += excess;
  part.sums.excess_delta += excess_delta;
}

// A row that all warps agree on.
struct Whole {
  float noised_max, clean_max, centre;
  float log_ratio;                  // r = delta - log_ratio
  float clean_scale, noised_scale;  // p = e_a clean_scale, q = e_b noised_scale
  float clean_kl, noised_kl;        // KL(p|q), KL(q|p)
  bool close;
  bool infinite;                 // a class that one stream rules out and the other does not; or +inf
  double divergence, log_clean;  // J; log of the sum of e^a
};

// Puts the warps' parts together: each lane moves one of them into common units. Every warp does the same work.
__device__ __forceinline__ Whole whole_of(Part part, Part (&shared)[kWarps]) {
  part.sums = {warp_sum(part.sums.noised), warp_sum(part.sums.noised_delta), warp_sum(part.sums.excess),
               warp_sum(part.sums.excess_delta)};
  part.clean = {warp_sum(part.clean.clean), warp_sum(part.clean.clean_delta)};
  part.high = warp_max(part.high);
  part.low = -warp_max(-part.low);
  if (!part.far) keep_clean_sums(part);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = part;
  __syncthreads();

  const int lane = threadIdx.x % kWarp;
  const Part mine = lane < kWarps ? shared[lane] : nothing();
  Whole whole;
  whole.noised_max = warp_max(mine.noised_max);
  whole.clean_max = warp_max(mine.clean_max);
  whole.centre = value_of_first(mine.noised_max == whole.noised_max, mine.centre);
  const float high = warp_max(mine.high), low = -warp_max(-mine.low);
  whole.infinite = high == INFINITY || low == -INFINITY;
  whole.close = high - whole.centre <= kCloseSpread && whole.centre - low <= kCloseSpread;

  const double shift = static_cast<double>(mine.centre) - whole.centre;
  NoisedSums noised = moved(mine.sums, exp(static_cast<double>(mine.noised_max) - whole.noised_max), shift);
  CleanSums clean = moved(mine.clean, exp(static_cast<double>(mine.clean_max) - whole.clean_max), shift);
  noised = {warp_sum(noised.noised), warp_sum(noised.noised_delta), warp_sum(noised.excess), warp_sum(noised.excess_delta)};
  clean = {warp_sum(clean.clean), warp_sum(clean.clean_delta)};

  const double growth = noised.excess / noised.noised;
  const bool near = fabs(growth) < 0.5;
  const double log_ratio =
      near ? log1p(growth)
           : log(clean.clean / noised.noised) + (static_cast<double>(whole.clean_max) - whole.noised_max - whole.centre);
  const double clean_mean = clean.clean_delta / clean.clean, noised_mean = noised.noised_delta / noised.noised;
  whole.log_ratio = static_cast<float>(log_ratio);
  whole.clean_scale = static_cast<float>(1.0 / clean.clean);
  whole.noised_scale = static_cast<float>(1.0 / noised.noised);
  whole.clean_kl = static_cast<float>(clean_mean - log_ratio);
  whole.noised_kl = static_cast<float>(log_ratio - noised_mean);
  // J = E_p[delta] - E_q[delta]; near each other, without subtracting them.
  const double divergence = near ? (noised.excess_delta - noised_mean * noised.excess) / (noised.noised + noised.excess)
                                 : clean_mean - noised_mean;
  whole.divergence = divergence < 0 ? 0 : divergence;
  whole.log_clean = log(clean.clean) + whole.clean_max;
  return whole;
}

}  // namespace fastpost::cuda
