// All sums of a wide row of logits in one reading: the equations of core/pair_sums.h.
//
// The sums want the row's largest logits and a centre of its differences, which nobody knows before the end. So the block
// begins with those of its first tiles; a thread that meets a pair heavier than all it has seen goes on from there by
// itself, and at the end all of them are brought to the units of the heaviest.
//
// A tile goes the near way first, some 25 instructions a pair. One test at its end shows whether anything was out of the
// ordinary. Differences whose rounding errors count are taken exactly from there on. For anything else the tile is done
// again, with care: classes that do not exist, NaN, a pair far from the centre, a new largest logit. Where pairs are far
// apart the tiles that follow go the far way, with both exponentials of a pair.
#pragma once

#include "core/divergence.h"
#include "core/pair_sums.h"
#include "cuda/fast_math.cuh"
#include "cuda/row_tiles.cuh"

namespace fastpost::cuda {

// Where a row's sums begin. given: neither units nor centre are to be looked for. careful: no tile goes the near way. The
// origins are subtracted from all logits where these are too large for units (huge, which is careful as well).
struct Start {
  bool given, careful, huge;
  float unit, clean_unit, centre;
  float clean_origin, noised_origin;
};

struct Seed {
  float noised, clean;  // the largest noised logit, and the clean one of the same class
};

struct FirstTiles {
  float weight, mean;  // in sums; of the differences
};

// What the threads of a block share.
struct Room {
  Seed seed[kWarps];
  FirstTiles first[kWarps];
  RowPart part[kWarps];
  double far[4][kRowThreads];  // rarely used, so not in registers
  float clean_unit[kRowThreads];
  Ahead ahead;
  bool undefined, huge;            // a NaN or +inf; see Start
  bool clean_lacks, noised_lacks;  // a class that the other stream has

  __device__ __forceinline__ void clear() { undefined = huge = clean_lacks = noised_lacks = false; }
};

// The weight that a tile may have before its thread moves its centre: in sums of the block's first tiles, and then of the
// tile that it last moved for.
constexpr float kMoreThanFirst = 0.5f, kMoreThanOwn = 64.0f;

struct TileSums {
  float noised, second, noised_delta, excess_delta;

  // Adds a pair. e: its noised exponential.
  __device__ __forceinline__ void add(float e, float delta) {
    const float weighted = e * delta, squared = weighted * delta, rest = expm1_rest(delta);
    noised += e;
    noised_delta += weighted;
    second = fmaf(squared, rest, second);
    excess_delta = fmaf(squared, fmaf(rest, delta, 1.0f), excess_delta);
  }
};

// Adds a near pair. furthest: the largest |delta| so far, or NaN.
template <bool exact, class S>
__device__ __forceinline__ void add_near(float a, float b, float unit, float centre, const S& scale, TileSums& sums,
                                         float& furthest) {
  const float delta = delta_of<exact>(a, b, centre) * scale.inverse;
  furthest = max_or_nan(furthest, fabsf(delta));
  sums.add(exp2_fast(fmaf(b, scale.log2e, -unit)), delta);
}

// A tile's sums where pairs may be near or far.
struct MixedSums {
  TileSums near = {0, 0, 0, 0};
  float clean = 0, noised = 0, clean_delta = 0, noised_delta = 0, furthest = 0;  // of far pairs; the largest |delta|, or NaN

  // Adds a pair. e_a, e_b: its exponentials, of which the clean stream's counts for a far pair alone.
  __device__ __forceinline__ void add(float delta, float e_a, float e_b) {
    furthest = max_or_nan(furthest, fabsf(delta));
    const bool far = fabsf(delta) > kNear;
    near.add(far ? 0.0f : e_b, far ? 0.0f : delta);
    e_a = far ? e_a : 0.0f;
    e_b = far ? e_b : 0.0f;
    clean += e_a;
    noised += e_b;
    clean_delta = fmaf(e_a, delta, clean_delta);
    noised_delta = fmaf(e_b, delta, noised_delta);
  }
  // Adds a pair of which one exponential is 0: what its delta is does not matter to a divergence that is finite.
  __device__ __forceinline__ void add_single(float e_a, float e_b) {
    furthest = max_or_nan(furthest, 2 * kNear);
    clean += e_a;
    noised += e_b;
  }
};

// A thread's sums while it walks the row.
struct Walk {
  float unit, centre;
  float limit;  // of the weight of a tile
  NearSums near;

  __device__ __forceinline__ void add(const TileSums& sums) {
    near.noised += sums.noised;
    near.second += sums.second;
    near.noised_delta += sums.noised_delta;
    near.excess_delta += sums.excess_delta;
  }
  __device__ __forceinline__ void add(const MixedSums& sums, Room& room) {
    add(sums.near);
    if (sums.furthest > kNear) {
      const int t = threadIdx.x;
      room.far[0][t] += sums.clean;
      room.far[1][t] += sums.noised;
      room.far[2][t] += sums.clean_delta;
      room.far[3][t] += sums.noised_delta;
    }
  }
  __device__ __forceinline__ RowPart part(const Room& room) const {
    const int t = threadIdx.x;
    return {unit, room.clean_unit[t], centre, near, {room.far[0][t], room.far[1][t], room.far[2][t], room.far[3][t]}};
  }
  __device__ __forceinline__ void keep(const RowPart& part, Room& room) {
    const int t = threadIdx.x;
    unit = part.unit;
    centre = part.centre;
    near = part.near;
    room.clean_unit[t] = part.clean_unit;
    room.far[0][t] = part.far.clean;
    room.far[1][t] = part.far.noised;
    room.far[2][t] = part.far.clean_delta;
    room.far[3][t] = part.far.noised_delta;
  }
};

// x - origin, finite where x is.
__device__ __forceinline__ float less(float x, float origin) {
  const float difference = x - origin;
  return difference < -FLT_MAX && x > -INFINITY ? -FLT_MAX : difference;
}

// A tile's pairs, wherever it is, a pack at a time: registers are for the near way.
template <class T, class Pair>
__device__ __forceinline__ void for_pairs(const T* row_a, const T* row_b, const Cut<T>& cut, int round, bool wide,
                                          const Start& start, Pair&& pair) {
#pragma unroll 1
  for (int u = 0; u < kTilePacks; ++u) {
    const Pack<T> a = load_some(row_a, cut, round, u, true), b = load_some(row_b, cut, round, u, wide);
#pragma unroll
    for (int k = 0; k < cut.size; ++k)
      pair(less(widened(a.value[k]), start.clean_origin), less(widened(b.value[k]), start.noised_origin));
  }
}

// The largest logits of a tile: the noised one, the clean one of the same class, the clean one.
struct Top {
  float noised, clean_there, clean;

  __device__ __forceinline__ void see(float a, float b) {
    clean_there = b > noised ? a : clean_there;
    noised = fmaxf(noised, b);
    clean = fmaxf(clean, a);
  }
};

// Takes the units and the centre that a heavy tile asks for; the unit alone where only one stream has its heaviest class.
// Returns whether it did. Until one has, the clean stream's unit is any number.
template <class T, class S>
__device__ __forceinline__ bool recentre(const Top& top, Walk& walk, Room& room, const Start& start, const S& scale) {
  const float largest = top.noised * scale.log2e, clean_largest = top.clean * scale.log2e;
  const float clean_unit = room.clean_unit[threadIdx.x], difference = top.clean_there - top.noised;
  const bool heavy = exp2_fast(largest - walk.unit) * (kTilePacks * Pack<T>::size) > walk.limit &&
                     (top.noised * scale.inverse < kHuge<T> || start.huge);
  const bool clean_heavy = (clean_largest - clean_unit > 4 || (walk.limit == 0 && clean_largest > -FLT_MAX)) &&
                           (top.clean * scale.inverse < kHuge<T> || start.huge);
  if (heavy || clean_heavy)
    walk.keep(moved(walk.part(room), heavy ? rintf(largest) : walk.unit, clean_heavy ? rintf(clean_largest) : clean_unit,
                    heavy && fabsf(difference * scale.inverse) < kFurthestCentre ? difference : walk.centre, scale),
              room);
  return heavy;
}

// e^x / 2^unit to within 2^-22 and a rounding, however small: the near way's exponent has fewer bits after the point the
// further below its unit it lies.
template <class S>
__device__ __forceinline__ float exp_in_units(float x, float unit, const S& scale) {
  const float exponent = fmaxf(rintf(fmaf(x, scale.log2e, -unit)), -126.0f);
  return exp2_fast(fmaf(x, scale.log2e, -(unit + exponent))) * exp2_fast(exponent);
}

// A tile with care. furthest: the largest |delta|.
template <class T, class S>
__device__ __forceinline__ void sum_carefully(const T* row_a, const T* row_b, const Cut<T>& cut, int round, bool wide,
                                              const S& scale, Walk& walk, Room& room, const Start& start, float& furthest) {
  Top top{-INFINITY, -INFINITY, -INFINITY};
  for_pairs(row_a, row_b, cut, round, wide, start, [&](float a, float b) { top.see(a, b); });
  const bool moves = recentre<T>(top, walk, room, start, scale);

  const float clean_unit = room.clean_unit[threadIdx.x];
  MixedSums sums;
  for_pairs(row_a, row_b, cut, round, wide, start, [&](float a, float b) {
    if (!(fabsf(a - b) < INFINITY)) {
      const bool defined = a < INFINITY && b < INFINITY;
      if (!defined) room.undefined = true;
      if (!defined || a == b) a = b = -FLT_MAX;  // no weight
    }
    if (fmaxf(a, b) * scale.inverse >= kHuge<T> && !start.huge) {
      room.huge = true;
      a = b = -FLT_MAX;
    }
    const float delta = delta_of<sizeof(T) == 4>(a, b, walk.centre) * scale.inverse;
    const bool single = !(fabsf(delta) < INFINITY), far = single || fabsf(delta) > kNear;
    const float e_a = far ? exp_in_units(a, clean_unit, scale) : 0.0f, e_b = exp_in_units(b, walk.unit, scale);
    if (single) {
      (a < b ? room.clean_lacks : room.noised_lacks) = true;
      sums.add_single(e_a, e_b);
    } else {
      sums.add(delta, e_a, e_b);
    }
  });
  walk.add(sums, room);
  if (moves) walk.limit = kMoreThanOwn * (sums.near.noised + sums.noised);
  furthest = sums.furthest;
}

// From the heaviest pair's difference. What one stream all but rules out has no part in the first centre.
constexpr float kFurthestMean = 64;

// Begins where the block's first tiles, which are there, have their weight: in units of their heaviest pair, at the mean of
// their differences.
template <class T, class S>
__device__ __forceinline__ void survey(Walk& walk, Room& room, const S& scale) {
  const int warp = threadIdx.x / kWarp;
  const auto for_pairs = [&](auto&& pair) {
#pragma unroll
    for (int u = 0; u < kTilePacks; ++u) {
      const Pack<T> x = room.ahead.get<T>(0, u), y = room.ahead.get<T>(0, kTilePacks + u);
#pragma unroll
      for (int k = 0; k < x.size; ++k) pair(widened(x.value[k]), widened(y.value[k]));
    }
  };
  Top top{-INFINITY, -INFINITY, -INFINITY};
  for_pairs([&](float a, float b) { top.see(a, b); });
  const float warp_top = warp_max(top.noised);
  const float clean_there = value_of_first(top.noised == warp_top, top.clean_there);
  if (threadIdx.x % kWarp == 0) room.seed[warp] = {warp_top, clean_there};
  __syncthreads();
  Seed best = room.seed[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w)
    if (room.seed[w].noised > best.noised) best = room.seed[w];
  const float unit = rintf(best.noised * scale.log2e), difference = best.clean - best.noised;
  walk.limit = 0;
  if (!(fabsf(best.noised * scale.inverse) < kHuge<T> && fabsf(difference * scale.inverse) < kHuge<T>))
    return;  // a later tile may know better

  float weight = 0, mean = 0;
  for_pairs([&](float a, float b) {
    const float e = exp2_fast(fmaf(b, scale.log2e, -unit)), delta = a - b - difference;
    if (fabsf(delta * scale.inverse) < kFurthestMean) {
      weight += e;
      mean = fmaf(e, delta, mean);
    }
  });
  weight = warp_sum(weight);
  mean = warp_sum(mean);
  if (threadIdx.x % kWarp == 0) room.first[warp] = {weight, mean};
  __syncthreads();
  weight = mean = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    weight += room.first[w].weight;
    mean += room.first[w].mean;
  }
  walk.unit = unit;
  walk.centre = difference + mean / weight;
  walk.limit = kMoreThanFirst * weight;
  room.clean_unit[threadIdx.x] = rintf(best.clean * scale.log2e);
}

// Rounds of whole packs the near way, from `round` on. Returns the first that was not done, with the way it asks for. asked:
// its tile and the next are on their way already.
template <class T, bool exact, class S>
__device__ __forceinline__ int sum_near(const T* a, const T* b, const Cut<T>& cut, int round, int wide_rounds,
                                        const S& scale, Walk& walk, Way& way, Ahead& ahead, bool asked) {
  if (round >= wide_rounds) return round;
  const float least = sizeof(T) == 4 && !exact ? kCoarse * fabsf(walk.centre) * scale.inverse : -1.0f;
  if (!asked) {
    ahead.ask(cut, round, a, b);
    ahead.ask(cut, round + 1, a, b);
  }
#pragma unroll 1
  for (; round < wide_rounds; ++round) {
    ahead.wait();
    TileSums sums = {0, 0, 0, 0};
    float furthest = 0;
#pragma unroll
    for (int u = 0; u < kTilePacks; ++u) {
      const Pack<T> x = ahead.get<T>(round, u), y = ahead.get<T>(round, kTilePacks + u);
#pragma unroll
      for (int k = 0; k < cut.size; ++k)
        add_near<exact>(widened(x.value[k]), widened(y.value[k]), walk.unit, walk.centre, scale, sums, furthest);
    }
    const bool coarse = furthest < least || (least > 0 && round == cut.whole_rounds());
    if (__any_sync(0xffffffffu, sums.noised > walk.limit || !(furthest <= kNear) || coarse)) {
      way = __any_sync(0xffffffffu, coarse) ? Way::exact : Way::near;
      break;
    }
    ahead.ask(cut, round + 2, a, b);
    walk.add(sums);
  }
  ahead.stop();
  return round;
}

// The clean weight that a far pair may have on average before its unit moves.
constexpr float kMoreClean = 16;

// Rounds of whole packs whose pairs are near or far, from `round` on. Returns the first that was not done: because it wants
// care, or because the near way's turn has come again.
template <class T, class S>
__device__ __forceinline__ int sum_far(const T* a, const T* b, const Cut<T>& cut, int round, int wide_rounds, const S& scale,
                                       Walk& walk, Way& way, Room& room) {
  if (round >= wide_rounds) return round;
  const float clean_unit = room.clean_unit[threadIdx.x];
  room.ahead.ask(cut, round, a, b);
  room.ahead.ask(cut, round + 1, a, b);
#pragma unroll 1
  while (way == Way::far && round < wide_rounds) {
    room.ahead.wait();
    MixedSums sums;
#pragma unroll
    for (int u = 0; u < kTilePacks; ++u) {
      const Pack<T> x = room.ahead.get<T>(round, u), y = room.ahead.get<T>(round, kTilePacks + u);
#pragma unroll
      for (int k = 0; k < cut.size; ++k) {
        const float ak = widened(x.value[k]), bk = widened(y.value[k]);
        sums.add(delta_of<sizeof(T) == 4>(ak, bk, walk.centre) * scale.inverse,
                 exp2_fast(fmaf(ak, scale.log2e, -clean_unit)), exp2_fast(fmaf(bk, scale.log2e, -walk.unit)));
      }
    }
    if (__any_sync(0xffffffffu, sums.near.noised + sums.noised > walk.limit || !(sums.furthest < INFINITY) ||
                                    sums.clean > kMoreClean * kTilePacks * cut.size))
      break;
    ++round;
    room.ahead.ask(cut, round + 1, a, b);
    walk.add(sums, room);
    if (!__any_sync(0xffffffffu, sums.furthest > kNear)) way = Way::near;
  }
  room.ahead.stop();
  return round;
}

// This thread's part of a row. All threads of the block call it together.
template <class T, class S>
__device__ __forceinline__ RowPart part_of(const T* a, const T* b, int64_t cols, const S& scale, const Start& start,
                                           Room& room) {
  constexpr bool can_be_exact = sizeof(T) == 4;  // differences of 16-bit logits are
  const Cut<T> cut(a, cols);
  const bool wide = aligned(b + cut.head);
  const int rounds = cut.rounds_with_singles(), wide_rounds = wide ? cut.rounds() : 0;
  if (rounds > cut.rounds() && cut.single() >= 0) {
    prefetch(a + cut.single());
    prefetch(b + cut.single());
  }
  Walk walk{start.unit, start.centre, FLT_MAX, {0, 0, 0, 0}};
  for (int k = 0; k < 4; ++k) room.far[k][threadIdx.x] = 0;
  room.clean_unit[threadIdx.x] = start.clean_unit;
  Way way = uniform(start.careful) ? Way::careful : Way::near;
  bool asked = false;
  if (uniform(!start.given)) {
    asked = wide_rounds > 0;
    if (asked) {
      room.ahead.ask(cut, 0, a, b);
      room.ahead.ask(cut, 1, a, b);
    } else {
#pragma unroll 1
      for (int u = 0; u < kTilePacks; ++u) {
        room.ahead.put(0, u, load_some(a, cut, 0, u, true));
        room.ahead.put(0, kTilePacks + u, load_some(b, cut, 0, u, wide));
      }
    }
    room.ahead.wait();
    survey<T>(walk, room, scale);
  }
  int round = 0;
#pragma unroll 1
  while (round < rounds) {
    if (way == Way::near) round = sum_near<T, false>(a, b, cut, round, wide_rounds, scale, walk, way, room.ahead, asked);
    asked = false;
    if (can_be_exact && way == Way::exact)
      round = sum_near<T, can_be_exact>(a, b, cut, round, wide_rounds, scale, walk, way, room.ahead, false);
    if (way == Way::far) {
      round = sum_far(a, b, cut, round, wide_rounds, scale, walk, way, room);
      if (way == Way::near) continue;
    }
    if (round >= rounds) break;
    float furthest;
    sum_carefully(a, b, cut, round++, wide, scale, walk, room, start, furthest);
    const bool far = __any_sync(0xffffffffu, furthest > kNear);
    if (!start.careful && (far || way == Way::far)) way = far ? Way::far : Way::near;
  }
  return walk.part(room);
}

// The sums of a warp, in the units of its heaviest part, on all lanes.
template <class S>
__device__ __forceinline__ RowPart gathered(RowPart part, const S& scale) {
  const float weight = part.unit + log2f(static_cast<float>(part.near.noised + part.far.noised));
  const bool heaviest = weight == warp_max(weight);
  const float unit = value_of_first(heaviest, part.unit), centre = value_of_first(heaviest, part.centre);
  part = moved(part, unit, warp_max(part.clean_unit), centre, scale);
  part.near = {warp_sum(part.near.noised), warp_sum(part.near.second), warp_sum(part.near.noised_delta),
               warp_sum(part.near.excess_delta)};
  if (__any_sync(0xffffffffu, part.far.clean != 0 || part.far.noised != 0))
    part.far = {warp_sum(part.far.clean), warp_sum(part.far.noised), warp_sum(part.far.clean_delta),
                warp_sum(part.far.noised_delta)};
  return part;
}

// The sums of the block, on all lanes of the first warp.
template <class S>
__device__ __forceinline__ RowPart gathered(RowPart part, const S& scale, Room& room) {
#pragma unroll 1
  for (int level = 0; level < 2; ++level) {
    part = gathered(part, scale);
    if (level == 1) break;
    if (threadIdx.x % kWarp == 0) room.part[threadIdx.x / kWarp] = part;
    __syncthreads();
    if (threadIdx.x >= kWarp) break;
    part = threadIdx.x < kWarps ? room.part[threadIdx.x] : RowPart{0, -FLT_MAX, 0, {}, {}};
  }
  return part;
}

// What a row's sums say, on all lanes of a warp that have them: three of them work out a logarithm each.
template <class S>
__device__ __forceinline__ RowMeaning meaning_by_warp(const RowPart& sums, const S& scale) {
  return meaning_of(sums, scale, [](double clean, double noised, double ratio) -> Logs {
    const int lane = threadIdx.x % kWarp;
    const double found = log(lane == 0 ? clean : lane == 1 ? noised : ratio);
    return {__shfl_sync(0xffffffffu, found, 0), __shfl_sync(0xffffffffu, found, 1), __shfl_sync(0xffffffffu, found, 2)};
  });
}

// The largest logits of both streams, on all threads.
template <class T>
__device__ __forceinline__ Seed tops_of(const T* a, const T* b, int64_t cols, Room& room) {
  float x = -INFINITY, y = -INFINITY;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < cols; i += kRowThreads) {
    x = fmaxf(x, widened(a[i]));
    y = fmaxf(y, widened(b[i]));
  }
  x = warp_max(x);
  y = warp_max(y);
  if (threadIdx.x % kWarp == 0) room.seed[threadIdx.x / kWarp] = {y, x};
  __syncthreads();
#pragma unroll 1
  for (int w = 0; w < kWarps; ++w) {
    y = fmaxf(y, room.seed[w].noised);
    x = fmaxf(x, room.seed[w].clean);
  }
  return {y, x};
}

}  // namespace fastpost::cuda
