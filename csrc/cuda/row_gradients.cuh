// The gradients of a wide row of logits, from its second reading.
//
//   dJ/da = p (r - KL(p|q)) + (p - q)      dJ/db = -(q (r + KL(q|p)) + (p - q))
//
// with p - q = q (e^r - 1). As in row_sums.cuh a tile goes the near way first.
#pragma once

#include <float.h>

#include "core/divergence.h"
#include "core/pair_sums.h"
#include "cuda/fast_math.cuh"
#include "cuda/row_tiles.cuh"

namespace fastpost::cuda {

// What all threads have to know of a row. With p and q times a weight that the scales bring in,
//
//   d(kl_weight kl + ce_weight ce)/da = p (share r + clean_shift) + share (p - q)    short of the -ce_weight at the label
//   d(kl_weight kl + ce_weight ce)/db = -q (share r + noised_shift) - share (p - q)    likewise
//
// The share is 1 where the weight is kl_weight. Where that is next to nothing beside ce_weight, or logits are huge, every
// tile is done with care.
struct Whole {
  bool careful;
  float unit, clean_unit, centre, log_ratio;  // r = a - b - centre - log_ratio
  float scale, clean_scale;                   // of q and p, counted in these units
  float share, clean_shift, noised_shift;
  float label_shift, noised_label_shift;  // clean_shift and noised_shift without cross-entropy
  float clean_origin, noised_origin;
  // Of operands only. The divergence's share in the clean stream's gradient; and `Finish`.
  float clean_share, flat, noised_flat, slope, sum;
};

// Of these, what the near way keeps in registers.
struct NearWhole {
  float unit, centre, log_ratio, scale, clean_shift, noised_shift;
  float clean_share, flat, noised_flat, slope, sum;
};

struct Gradient {
  float clean, noised;
};

// What operands are, given a pair and its gradients: smoothed, those of the logits before their cap, summed up.
template <class Row>
__device__ __forceinline__ Gradient finished(Gradient d, float a, float b, const Row& w) {
  // The logit of a class that does not exist is -inf, which only streams without a cap have: 0 times it has to be 0.
  const float u = fmaxf(a, -FLT_MAX) * w.slope, v = fmaxf(b, -FLT_MAX) * w.slope;
  const float clean = d.clean - w.flat, other = d.noised - w.noised_flat, noised = fmaf(-v * v, other, other);
  return {fmaf(w.sum, noised, fmaf(-u * u, clean, clean)), noised};
}

// A pack of gradients as it is stored: as it is, or rounded to 16 bits.
template <class T>
__device__ __forceinline__ void store_as(T* to, const Pack<T>& pack, bool wide) {
  store_pack(to, pack, wide);
}
__device__ __forceinline__ void store_as(bf16* to, const Pack<float>& pack, bool wide) {
  bf16 rounded[4];
  round_pair(pack.value[0], pack.value[1], rounded);
  round_pair(pack.value[2], pack.value[3], rounded + 2);
  if (wide) {
    float2 raw;
    memcpy(&raw, rounded, sizeof raw);
    *reinterpret_cast<float2*>(to) = raw;
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) to[k] = rounded[k];
  }
}

// Whether gradients of a pack of T may be stored from here in one access.
template <class T, class O>
__device__ __forceinline__ bool stored_whole(const O* to) {
  return reinterpret_cast<uintptr_t>(to) % (Pack<T>::size * sizeof(O)) == 0;
}

// classes: how many of the pack's there are.
template <class O>
__device__ __forceinline__ void store_some(O* to, int classes, const Pack<float>& pack, bool wide) {
  if (classes == pack.size)
    store_as(to, pack, wide);
  else if (classes == 1)
    to[0] = from_float<O>(pack.value[0]);
}

// All columns of a row; null: not wanted.
template <class T>
__device__ __forceinline__ void fill(T* x, int64_t cols, float value) {
  if (x == nullptr) return;
  const Cut<T> cut(x, cols);
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < cut.size; ++k) pack.value[k] = from_float<T>(value);
#pragma unroll 1
  for (int64_t v = threadIdx.x; v < cut.packs; v += kRowThreads) store_pack(x + cut.head + v * cut.size, pack, true);
  const int64_t i = threadIdx.x < kWarp ? cut.single() : -1;
  if (i >= 0) x[i] = pack.value[0];
}

// furthest: the largest |r| so far, or NaN.
template <bool exact, bool operand>
__device__ __forceinline__ Gradient differentiate_near(float a, float b, const NearWhole& w, float& furthest) {
  const float r = delta_of<exact>(a, b, w.centre) - w.log_ratio;
  furthest = max_or_nan(furthest, fabsf(r));
  const float q = w.scale * exp2_fast(fmaf(b, kLog2e, -w.unit));
  const float excess = q * r * expm1_ratio(r);
  const float noised = fmaf(-q, r + w.noised_shift, -excess);
  if constexpr (operand) {
    const float clean = fmaf(q + excess, fmaf(w.clean_share, r, w.clean_shift), w.clean_share * excess);
    return finished({clean, noised}, a, b, w);
  }
  return {fmaf(q + excess, r + w.clean_shift, excess), noised};
}

template <class T, bool operand>
__device__ __forceinline__ Gradient differentiate_carefully(float a, float b, const Whole& w, float& furthest) {
  a -= w.clean_origin;
  b -= w.noised_origin;
  float r = delta_of<sizeof(T) == 4>(a, b, w.centre) - w.log_ratio;
  if (b == -INFINITY) r = 0;  // in both streams, or the row would have no gradient
  furthest = fmaxf(furthest, fabsf(r));
  const bool far = fabsf(r) > kNear;
  const float q = w.scale * exp2_fast(fmaf(b, kLog2e, -w.unit));
  const float near_excess = far ? 0.0f : q * r * expm1_ratio(r);
  const float p = far ? w.clean_scale * exp2_fast(fmaf(a, kLog2e, -w.clean_unit)) : q + near_excess;
  const float excess = far ? p - q : near_excess, clean_share = operand ? w.clean_share : w.share;
  return {fmaf(p, fmaf(clean_share, r, w.clean_shift), clean_share * excess),
          fmaf(-q, fmaf(w.share, r, w.noised_shift), -w.share * excess)};
}

// The gradients of a pack take its place.
template <class T, class Pair>
__device__ __forceinline__ void for_pairs(Pack<T>& a, Pack<T>& b, Pair&& pair) {
#pragma unroll
  for (int k = 0; k < a.size; k += 2) {
    const Gradient first = pair(widened(a.value[k]), widened(b.value[k]));
    const Gradient second = pair(widened(a.value[k + 1]), widened(b.value[k + 1]));
    round_pair(first.clean, second.clean, &a.value[k]);
    round_pair(first.noised, second.noised, &b.value[k]);
  }
}

// A tile with care, wherever it is, a pack at a time.
template <class T, class O, bool operand>
__device__ __forceinline__ void differentiate_carefully(const T* a, const T* b, O* grad_a, O* grad_b, const Cut<T>& cut,
                                                        int round, const Whole& w) {
  float furthest = 0;
#pragma unroll 1
  for (int u = 0; u < kTilePacks; ++u) {
    if (!cut.has(round, u)) continue;
    const int64_t i = cut.column(round, u);
    Pack<T> x = load_pack(a + i, true), y = load_pack(b + i, aligned(b + i));
    for_pairs(x, y, [&](float xi, float yi) {
      const Gradient d = differentiate_carefully<T, operand>(xi, yi, w, furthest);
      return operand ? finished(d, xi, yi, w) : d;
    });
    if (grad_a != nullptr) store_as(grad_a + i, x, stored_whole<T>(grad_a + i));
    if (grad_b != nullptr) store_as(grad_b + i, y, stored_whole<T>(grad_b + i));
  }
}

// Rounds in one way, from `round` down. Returns the first that was not done, with the way it asks for.
template <Way here, class T, class O, bool operand>
__device__ __forceinline__ int differentiate_rounds(const T* a, const T* b, O* grad_a, O* grad_b, const Cut<T>& cut,
                                                    int round, const Whole& whole, Way& way, Ahead& ahead) {
  const NearWhole w = {whole.unit,        whole.centre,       whole.log_ratio,   whole.scale,
                       whole.clean_shift, whole.noised_shift, whole.clean_share, whole.flat,
                       whole.noised_flat, whole.slope,        whole.sum};
  const float least = sizeof(T) == 4 && here == Way::near ? kCoarse * fabsf(w.centre) : -1.0f;
  ahead.ask(cut, round, a, b);
  ahead.ask(cut, round - 1, a, b);
#pragma unroll 1
  while (way == here && round >= 0) {
    Pack<T> x[kTilePacks], y[kTilePacks];
    ahead.wait();
    float furthest = 0;
#pragma unroll
    for (int u = 0; u < kTilePacks; ++u) {
      x[u] = ahead.get<T>(round, u);
      y[u] = ahead.get<T>(round, kTilePacks + u);
      for_pairs(x[u], y[u], [&](float xi, float yi) {
        if constexpr (here == Way::far) {
          const Gradient d = differentiate_carefully<T, operand>(xi, yi, whole, furthest);
          return operand ? finished(d, xi, yi, whole) : d;
        } else {
          return differentiate_near<here == Way::exact, operand>(xi, yi, w, furthest);
        }
      });
    }
    const bool coarse = furthest < least || (least > 0 && round == cut.whole_rounds());
    if (here != Way::far && __any_sync(0xffffffffu, !(furthest <= kNear) || coarse)) {
      way = __any_sync(0xffffffffu, coarse) ? Way::exact : Way::far;
      break;
    }
    ahead.ask(cut, round - 2, a, b);
    const int64_t at = cut.column(round, 0);
    const bool whole_tile = round < cut.whole_rounds();
    if (whole_tile) {
      if (grad_a != nullptr)
#pragma unroll
        for (int u = 0; u < kTilePacks; ++u) store_as(grad_a + at + u * kRowThreads * cut.size, x[u], true);
      if (grad_b != nullptr)
#pragma unroll
        for (int u = 0; u < kTilePacks; ++u) store_as(grad_b + at + u * kRowThreads * cut.size, y[u], true);
    } else {
#pragma unroll
      for (int u = 0; u < kTilePacks; ++u) {
        if (!cut.has(round, u)) continue;
        if (grad_a != nullptr) store_as(grad_a + at + u * kRowThreads * cut.size, x[u], true);
        if (grad_b != nullptr) store_as(grad_b + at + u * kRowThreads * cut.size, y[u], true);
      }
    }
    --round;
    if ((here == Way::far && !__any_sync(0xffffffffu, furthest > kNear)) || (here == Way::exact && !whole_tile))
      way = Way::near;
  }
  ahead.stop();
  return round;
}

// From the end to the beginning: what was read last may still be in a cache. Each thread writes only what it has read, so
// the gradients may take the logits' place. A null gradient is not wanted.
template <class T, class O, bool operand>
__device__ __forceinline__ void write_gradients(const T* a, const T* b, O* grad_a, O* grad_b, int64_t cols,
                                                const Whole& whole, Ahead& ahead) {
  constexpr bool can_be_exact = sizeof(T) == 4;
  const Cut<T> cut(a, cols);
  const bool wide = aligned(b + cut.head) && (grad_a == nullptr || stored_whole<T>(grad_a + cut.head)) &&
                    (grad_b == nullptr || stored_whole<T>(grad_b + cut.head));
  const int64_t i = threadIdx.x < kWarp ? cut.single() : -1;
  if (i >= 0) {
    float furthest = 0;
    Gradient d = differentiate_carefully<T, operand>(widened(a[i]), widened(b[i]), whole, furthest);
    if constexpr (operand) d = finished(d, widened(a[i]), widened(b[i]), whole);
    if (grad_a != nullptr) grad_a[i] = from_float<O>(d.clean);
    if (grad_b != nullptr) grad_b[i] = from_float<O>(d.noised);
  }
  const bool careful = uniform(whole.careful);
  Way way = Way::near;
  int round = cut.rounds() - 1;
#pragma unroll 1
  while (round >= 0) {
    if (!wide || careful) {
      differentiate_carefully<T, O, operand>(a, b, grad_a, grad_b, cut, round--, whole);
      continue;
    }
    if (way == Way::near)
      round = differentiate_rounds<Way::near, T, O, operand>(a, b, grad_a, grad_b, cut, round, whole, way, ahead);
    if (can_be_exact && way == Way::exact)
      round = differentiate_rounds<can_be_exact ? Way::exact : Way::near, T, O, operand>(a, b, grad_a, grad_b, cut, round,
                                                                                         whole, way, ahead);
    if (way == Way::far)
      round = differentiate_rounds<Way::far, T, O, operand>(a, b, grad_a, grad_b, cut, round, whole, way, ahead);
  }
}

}  // namespace fastpost::cuda
