// Noise on CUDA: launches around core/noise.h. Compiled without FMA contraction: x + eps * z must be the same bits in every
// backend.
#include <type_traits>

#include "api.h"
#include "core/noise.h"
#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/warp.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kWarps = kRowThreads / kWarp;

// The keys of all rounds of Philox, worked out once per thread. The shuffle in uniform() changes no value, but makes the
// compiler keep them in registers; without it, it works them out again for every four words. All lanes of a warp make them
// together.
struct Keys {
  uint32_t low[kPhiloxRounds], high[kPhiloxRounds];
  // kUniformCentre as a number that is not known before run time. An instruction holds one constant, so that
  // uniform_numerator() would take two instructions for the bits that this lets it do in one.
  uint32_t centre;

  // block_threads: the threads of a block.
  __device__ __forceinline__ Keys(uint64_t key, uint32_t block_threads) {
#pragma unroll
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      low[round] = uniform(static_cast<uint32_t>(key) + round * kPhiloxKeyStep0);
      high[round] = uniform(static_cast<uint32_t>(key >> 32) + round * kPhiloxKeyStep1);
    }
    centre = kUniformCentre + (blockDim.x - block_threads);
  }
  // As philox(key, counter, 0).
  __device__ __forceinline__ PhiloxWords words(uint32_t counter_low, uint32_t counter_high) const {
    uint32_t c0 = counter_low, c1 = counter_high, c2 = 0, c3 = 0;
#pragma unroll
    for (int round = 0; round < kPhiloxRounds; ++round) philox_round(c0, c1, c2, c3, low[round], high[round]);
    return {{c0, c1, c2, c3}};
  }
};

// Four numbers from four words, uniform ones as numerators. centre: see uniform_numerator.
template <bool normal>
__device__ __forceinline__ void draw(const PhiloxWords& words, float (&z)[4], uint32_t centre = kUniformCentre) {
  if constexpr (normal) {
#pragma unroll
    for (int j = 0; j < 4; j += 2) {
      float cosine, sine;
      unit_circle(words.word[j + 1], &cosine, &sine);
      const float radius = normal_radius(words.word[j]);
      z[j] = radius * cosine;
      z[j + 1] = radius * sine;
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) z[j] = uniform_numerator(words.word[j], centre);
  }
}

struct Stream {
  uint64_t key;
  float eps;

  // x + eps z, from what draw() calls z.
  template <bool normal>
  __device__ __forceinline__ float add(float x, float z) const {
    return x + eps * (normal ? z : z * 0x1p-31f);
  }
};

// Elements [0, n) of one row, divided among `groups` groups of `threads` threads; this thread's group is number `group`. The
// row's first element takes number `first`. clean: where the row goes as it is, or null. Without noise the row is converted.
template <class In, class Out, bool normal, int threads>
__device__ void noise_row(const In* x, In* clean, Out* noised, int64_t n, uint64_t first, bool noise, const Stream& stream,
                          const Keys& keys, int64_t group, int64_t groups) {
  // A thread works on units: whole packs on both sides, whole fours of numbers. It loads `together` units, 64 bytes, before
  // it needs the first. Normal numbers take longer than memory, and they need the registers.
  constexpr int unit = 16 / (sizeof(In) < sizeof(Out) ? sizeof(In) : sizeof(Out));
  constexpr int in_packs = unit / Pack<In>::size, together = normal ? 1 : 4 / in_packs;
  const int64_t units = first % 4 == 0 ? n / unit : 0;  // a row may start inside a four
  const bool wide = aligned(x) && aligned(clean) && aligned(noised);
  struct Held {
    Pack<In> pack[in_packs];
  };
  const auto load = [&](int64_t i, bool wide) {
    Held held;
#pragma unroll
    for (int p = 0; p < in_packs; ++p) held.pack[p] = load_pack(x + i + p * Pack<In>::size, wide);
    return held;
  };
  // words(q): the q-th four words of the unit; add(x, z): x + eps z, z being what draw() calls so.
  const auto use = [&](int64_t i, const Held& held, bool wide, bool noise, auto&& words, auto&& add) {
    float value[unit];
#pragma unroll
    for (int p = 0; p < in_packs; ++p) {
      if (clean != nullptr) store_pack(clean + i + p * Pack<In>::size, held.pack[p], wide);
      unpack(held.pack[p], value + p * Pack<In>::size);
    }
    if (noise) {
#pragma unroll
      for (int part = 0; part < unit; part += 4) {
        float z[4];
        draw<normal>(words(part / 4), z, keys.centre);
#pragma unroll
        for (int k = 0; k < 4; ++k) value[part + k] = add(value[part + k], z[k]);
      }
    }
#pragma unroll
    for (int part = 0; part < unit; part += Pack<Out>::size)
      store_pack(noised + i + part, noise ? rounded<Out>(value + part) : converted<Out>(value + part), wide);
  };
  const int thread = threadIdx.x % threads;
  const uint32_t counter_high = static_cast<uint32_t>(first / 4 >> 32);
  // The numerators' power of two goes into eps, unless eps would lose bits.
  const float factor = normal ? stream.eps : stream.eps * 0x1p-31f;
  const bool factor_exact = normal || fabsf(factor) >= 0x1p-126f;
  // Units and words are counted in 32 bits, which is enough for all but the longest tensors.
  const bool counts_fit = units < int64_t{1} << 31 && (first + n) / 4 >> 32 == counter_high;
  int64_t begin = 0;  // of the units that are left
  if (noise && wide && first % unit == 0 && counts_fit && factor_exact) {
    const auto take = [&](auto count) {
      constexpr int at_once = decltype(count)::value, tile = at_once * threads;
      const uint32_t end = static_cast<uint32_t>(units / tile * tile), stride = static_cast<uint32_t>(groups) * tile;
#pragma unroll 1
      for (uint32_t u = static_cast<uint32_t>(begin) + static_cast<uint32_t>(group) * tile + thread; u < end; u += stride) {
        const int64_t i = int64_t{u} * unit;
        const uint32_t quad = static_cast<uint32_t>(first / 4) + u * (unit / 4);
        Held held[at_once];
#pragma unroll
        for (int k = 0; k < at_once; ++k) held[k] = load(i + k * threads * unit, true);
#pragma unroll
        for (int k = 0; k < at_once; ++k)
          use(
              i + k * threads * unit, held[k], true, true,
              [&](uint32_t q) { return keys.words(quad + k * threads * (unit / 4) + q, counter_high); },
              [&](float value, float z) { return value + factor * z; });
      }
      begin = end;
    };
    take(std::integral_constant<int, together>{});
    // What is left of a row is most of a short one. Of a whole tensor it is little, and registers are few there.
    if constexpr (threads == kWarp && together > 1) take(std::integral_constant<int, 1>{});
  }
#pragma unroll 1
  for (int64_t u = begin + group * threads + thread; u < units; u += groups * threads)
    use(
        u * unit, load(u * unit, wide), wide, noise,
        [&](uint32_t q) { return philox(stream.key, first / 4 + u * (unit / 4) + q, 0); },
        [&](float value, float z) { return stream.template add<normal>(value, z); });
#pragma unroll 1
  for (int64_t i = units * unit + group * threads + thread; i < n; i += groups * threads) {
    const In raw = x[i];
    if (clean != nullptr) clean[i] = raw;
    float value = to_float(raw);
    if (noise) {
      float z[4];
      draw<normal>(philox(stream.key, (first + i) / 4, 0), z);
      const unsigned which = (first + i) % 4;
      value = stream.template add<normal>(value, which < 2 ? (which == 0 ? z[0] : z[1]) : (which == 2 ? z[2] : z[3]));
    }
    noised[i] = from_float<Out>(value);
  }
}

// All of x as one row.
template <class In, class Out, bool normal>
__global__ void __launch_bounds__(kThreads, 2)
    add_noise_kernel(const In* x, Out* noised, int64_t n, float eps, const int64_t* __restrict__ seed) {
  const Stream stream{static_cast<uint64_t>(*seed), eps};
  noise_row<In, Out, normal, kThreads>(x, nullptr, noised, n, 0, true, stream, Keys(stream.key, kThreads), blockIdx.x,
                                       gridDim.x);
}

// A warp per row. ids: which row of the table each one is, or null for its own place; an id outside the table gives NaN.
// rows: the place whose numbers the row takes (negative: no noise), or null for its own. scales: factors of eps, or null.
template <class In, class Out, bool normal>
__global__ void __launch_bounds__(kRowThreads, 2)
    noise_rows_kernel(const In* table, const int64_t* __restrict__ ids, int64_t table_rows, int64_t stride, In* clean,
                      Out* noised, int64_t n_rows, int64_t width, float eps, const int64_t* __restrict__ seed,
                      const int64_t* __restrict__ rows, const float* __restrict__ scales) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  const Keys keys(key, kRowThreads);
  const int lane = threadIdx.x % kWarp;
#pragma unroll 1
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; row < n_rows; row += int64_t{gridDim.x} * kWarps) {
    const int64_t id = ids == nullptr ? row : ids[row];
    In* clean_row = clean == nullptr ? nullptr : clean + row * width;
    if (id < 0 || id >= table_rows) {
#pragma unroll 1
      for (int64_t i = lane; i < width; i += kWarp) {
        if (clean != nullptr) clean_row[i] = from_float<In>(NAN);
        noised[row * width + i] = from_float<Out>(NAN);
      }
      continue;
    }
    const int64_t place = rows == nullptr ? row : rows[row];
    const Stream stream{key, scales == nullptr ? eps : eps * scales[row]};
    noise_row<In, Out, normal, kWarp>(table + id * stride, clean_row, noised + row * width, width,
                                      static_cast<uint64_t>(place < 0 ? 0 : place) * width, place >= 0, stream, keys, 0, 1);
  }
}

template <class F>
void with_types(DType in, DType out, NoiseType type, F&& body) {
  with_dtype(in, [&](auto from) {
    with_dtype(out, [&](auto to) {
      if (type == NoiseType::normal)
        body(from, to, std::true_type{});
      else
        body(from, to, std::false_type{});
    });
  });
}

struct Rows {
  const int64_t* ids;
  int64_t table_rows, stride;
  int64_t n_rows, width;
  const int64_t* places;
  const float* scales;
};

void noise_rows(const Call& call, const void* table, void* clean, void* noised, DType in, DType out, const Rows& rows,
                double eps, NoiseType type, const int64_t* seed) {
  if (rows.n_rows == 0 || rows.width == 0) return;
  const int64_t blocks = std::min((rows.n_rows + kWarps - 1) / kWarps, kMostBlocks);
  with_types(in, out, type, [&](auto from, auto to, auto normal) {
    using In = decltype(from);
    using Out = decltype(to);
    call.launch(noise_rows_kernel<In, Out, decltype(normal)::value>, blocks, kRowThreads, static_cast<const In*>(table),
                rows.ids, rows.table_rows, rows.stride, static_cast<In*>(clean), static_cast<Out*>(noised), rows.n_rows,
                rows.width, static_cast<float>(eps), seed, rows.places, rows.scales);
  });
}

}  // namespace

void add_noise(const void* x, void* out, DType in_dtype, DType out_dtype, int64_t n, double eps, NoiseType type,
               const int64_t* seed, const int64_t* rows, const float* scales, int64_t row_length, int device, void* stream) {
  const Call call("add_noise", device, stream);
  if (n == 0) return;
  if (rows != nullptr || scales != nullptr) {
    const int64_t n_rows = n / row_length;
    return noise_rows(call, x, nullptr, out, in_dtype, out_dtype,
                      {nullptr, n_rows, row_length, n_rows, row_length, rows, scales}, eps, type, seed);
  }
  // In 16 bits a block's keys cost too much for one tile: there the grid stays (docs/measured-facts.md).
  constexpr int64_t share = 32 * kThreads;  // elements of a block
  const bool in_16_bits = in_dtype != DType::f32 || out_dtype != DType::f32;
  const int64_t blocks = std::min((n + share - 1) / share, in_16_bits ? call.resident() : kMostBlocks);
  with_types(in_dtype, out_dtype, type, [&](auto from, auto to, auto normal) {
    using In = decltype(from);
    using Out = decltype(to);
    call.launch(add_noise_kernel<In, Out, decltype(normal)::value>, blocks, kThreads, static_cast<const In*>(x),
                static_cast<Out*>(out), n, static_cast<float>(eps), seed);
  });
}

void embedding_noise(const void* table, const int64_t* ids, void* clean, void* noised, DType table_dtype, DType noised_dtype,
                     int64_t tokens, int64_t table_rows, int64_t width, int64_t table_stride, double eps, NoiseType type,
                     const int64_t* seed, const int64_t* rows, const float* scales, int device, void* stream) {
  noise_rows(Call("embedding_noise", device, stream), table, clean, noised, table_dtype, noised_dtype,
             {ids, table_rows, table_stride, tokens, width, rows, scales}, eps, type, seed);
}

}  // namespace fastpost::cuda
