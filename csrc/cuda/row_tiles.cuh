// How the threads of a block share out a row of logits: single columns up to the clean stream's 16-byte boundary, tiles of
// two packs of 16 bytes per thread, and single columns again.
#pragma once

#include <cfloat>

#include "core/divergence.h"
#include "cuda/fast_math.cuh"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"

namespace fastpost::cuda {

constexpr int kRowThreads = 256;
constexpr int kWarps = kRowThreads / kWarp;

// What a thread does at a time: packs of 16 bytes of either stream. Enough loads in flight, few enough additions in float.
constexpr int kTilePacks = 2;

// A row as its block cuts it: single columns up to the clean stream's 16-byte boundary, tiles, and single columns again.
template <class T>
struct Cut {
  static constexpr int size = Pack<T>::size;
  static constexpr int round_packs = kRowThreads * kTilePacks;

  int64_t cols, head, packs;

  __device__ __forceinline__ Cut(const T* clean, int64_t cols) : cols(cols), head(head_of(cols, clean)) {
    packs = (cols - head) / size;
  }

  // Rounds of the block: those in which no thread lacks a pack, and all.
  __device__ __forceinline__ int whole_rounds() const { return static_cast<int>(packs / round_packs); }
  __device__ __forceinline__ int rounds() const { return static_cast<int>((packs + round_packs - 1) / round_packs); }
  // And one for the singles, at most 14, of the first warp alone.
  __device__ __forceinline__ int rounds_with_singles() const {
    return rounds() + uniform(packs * size < cols && threadIdx.x < kWarp);
  }

  // First column of one of this thread's packs.
  __device__ __forceinline__ int64_t column(int round, int u) const {
    return head + (int64_t{round} * round_packs + u * kRowThreads + threadIdx.x) * size;
  }
  __device__ __forceinline__ bool has(int round, int u) const {
    return int64_t{round} * round_packs + u * kRowThreads + threadIdx.x < packs;
  }
  // This thread's single column, or -1.
  __device__ __forceinline__ int64_t single() const {
    const int64_t t = threadIdx.x;
    if (t < head) return t;
    const int64_t column = packs * size + t;
    return column < cols ? column : -1;
  }
};

// The lowest number. Where a row has no column it stands in: it has no weight beside logits that are not huge.
template <class T>
__device__ __forceinline__ T lowest();
template <>
__device__ __forceinline__ float lowest<float>() {
  return -FLT_MAX;
}
template <>
__device__ __forceinline__ bf16 lowest<bf16>() {
  return bf16{0xff7f};
}
template <>
__device__ __forceinline__ f16 lowest<f16>() {
  return f16{0xfbff};
}

template <class T>
__device__ __forceinline__ Pack<T> lowest_pack() {
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < pack.size; ++k) pack.value[k] = lowest<T>();
  return pack;
}

// Two tiles on their way from global memory: a cp.async pipeline of two stages in shared memory. A thread reads what it has
// asked for itself, so nothing waits at a barrier.
struct Ahead {
  static constexpr int tiles = 2;
  float4 pack[tiles][2 * kTilePacks][kRowThreads];

  // Asks for the rows' tile of a round, if there is such a round. Where packs are missing the lowest numbers stand in.
  template <class T>
  __device__ __forceinline__ void ask(const Cut<T>& cut, int round, const T* row_a, const T* row_b) {
    const T *a = row_a + cut.column(round, 0), *b = row_b + cut.column(round, 0);
    if (round >= 0 && round < cut.whole_rounds()) {
      float4(*slot)[kRowThreads] = pack[round & (tiles - 1)];
#pragma unroll
      for (int u = 0; u < kTilePacks; ++u) {
        copy_ahead(&slot[u][threadIdx.x], a + u * kRowThreads * cut.size);
        copy_ahead(&slot[kTilePacks + u][threadIdx.x], b + u * kRowThreads * cut.size);
      }
    } else if (round == cut.whole_rounds()) {
#pragma unroll 1
      for (int u = 0; u < kTilePacks; ++u) {
        const bool there = cut.has(round, u);
        put(round, u, there ? load_pack(a + u * kRowThreads * cut.size, true) : lowest_pack<T>());
        put(round, kTilePacks + u, there ? load_pack(b + u * kRowThreads * cut.size, true) : lowest_pack<T>());
      }
    }
    end_group();
  }
  // A pack of a tile, as it is: the clean stream's, then the noised one's.
  template <class T>
  __device__ __forceinline__ void put(int round, int at, const Pack<T>& value) {
    memcpy(&pack[round & (tiles - 1)][at][threadIdx.x], &value, sizeof value);
  }
  // The tile asked for before the last is there.
  __device__ __forceinline__ void wait() const { wait_for_groups<1>(); }
  template <class T>
  __device__ __forceinline__ Pack<T> get(int round, int at) const {
    Pack<T> value;
    memcpy(&value, &pack[round & (tiles - 1)][at][threadIdx.x], sizeof value);
    return value;
  }
  // Nothing is on its way any more, and both slots are free.
  __device__ __forceinline__ void stop() const { wait_for_groups<0>(); }
};

// How a thread does its tiles, until one shows that it has to be done otherwise.
enum class Way : int { near, exact, far, careful };

// Where the largest |delta| of a tile is below this share of the centre, the rounding errors of a - b count. So they may
// where a tile is not whole: the lowest numbers have a delta too.
constexpr float kCoarse = 0.25f;

template <bool exact>
__device__ __forceinline__ float delta_of(float a, float b, float centre) {
  const float d = a - b;
  const float delta = d - centre;
  return exact ? delta + difference_error(a, b, d) : delta;
}

// From here on logits are huge: units of powers of two are no use, or the lowest number has a weight.
template <class T>
constexpr float kHuge = 0x1p21f;
template <>
constexpr float kHuge<f16> = 0x1p15f;

// One pack of a tile, wherever that is; in the round of the singles the first one begins with one. Where the row has no
// column there is -inf, a class of no weight. wide: packs of this
// stream lie on 16 bytes.
template <class T>
__device__ __forceinline__ Pack<T> load_some(const T* row, const Cut<T>& cut, int round, int u, bool wide) {
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < pack.size; ++k) pack.value[k] = from_float<T>(-INFINITY);
  if (round == cut.rounds()) {
    const int64_t i = u == 0 ? cut.single() : -1;
    if (i >= 0) pack.value[0] = row[i];
  } else if (cut.has(round, u)) {
    pack = load_pack(row + cut.column(round, u), wide);
  }
  return pack;
}

}  // namespace fastpost::cuda
