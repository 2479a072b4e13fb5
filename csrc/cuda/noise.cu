// Noise on CUDA: launches around core/noise.h. Compiled without FMA contraction: x + eps * z must be the same bits in every
// backend.
#include "api.h"
#include "core/noise.h"
#include "cuda/launch.cuh"
#include "cuda/warp.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kRowThreads = 256;
constexpr int kWarps = kRowThreads / kWarp;

// Numbers 4 * quad ... 4 * quad + 3.
template <bool normal>
__device__ __forceinline__ void draw(uint64_t key, uint64_t quad, float (&z)[4]) {
  const PhiloxWords words = philox(key, quad, 0);
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
    for (int j = 0; j < 4; ++j) z[j] = uniform_from_word(words.word[j]);
  }
}

struct Stream {
  uint64_t key;
  float eps;
};

// Elements [0, n) of one row, shared out among `threads` threads of which this is number `thread`. The row's first element
// takes number `first`. clean: where the row goes as it is, or null. Without noise the row is converted.
template <class In, class Out, bool normal>
__device__ void noise_row(const In* x, In* clean, Out* noised, int64_t n, uint64_t first, bool noise, const Stream& stream,
                          int64_t thread, int64_t threads) {
  constexpr int unit = 16 / (sizeof(In) < sizeof(Out) ? sizeof(In) : sizeof(Out));  // whole packs on both sides, whole quads
  const bool wide_x = aligned(x), wide_clean = aligned(clean), wide_noised = aligned(noised);
  const int64_t units = first % 4 == 0 ? n / unit : 0;  // a row may start inside a quad
#pragma unroll 1
  for (int64_t u = thread; u < units; u += threads) {
    const int64_t i = u * unit;
    float value[unit];
#pragma unroll
    for (int part = 0; part < unit; part += Pack<In>::size) {
      const Pack<In> pack = load_pack(x + i + part, wide_x);
      if (clean != nullptr) store_pack(clean + i + part, pack, wide_clean);
#pragma unroll
      for (int k = 0; k < Pack<In>::size; ++k) value[part + k] = to_float(pack.value[k]);
    }
    if (noise) {
#pragma unroll
      for (int part = 0; part < unit; part += 4) {
        float z[4];
        draw<normal>(stream.key, (first + i + part) / 4, z);
#pragma unroll
        for (int k = 0; k < 4; ++k) value[part + k] += stream.eps * z[k];
      }
    }
#pragma unroll
    for (int part = 0; part < unit; part += Pack<Out>::size) {
      Pack<Out> pack;
#pragma unroll
      for (int k = 0; k < Pack<Out>::size; ++k) pack.value[k] = from_float<Out>(value[part + k]);
      store_pack(noised + i + part, pack, wide_noised);
    }
  }
#pragma unroll 1
  for (int64_t i = units * unit + thread; i < n; i += threads) {
    const In raw = x[i];
    if (clean != nullptr) clean[i] = raw;
    float value = to_float(raw);
    if (noise) {
      float z[4];
      draw<normal>(stream.key, (first + i) / 4, z);
      const unsigned which = (first + i) % 4;
      value += stream.eps * (which < 2 ? (which == 0 ? z[0] : z[1]) : (which == 2 ? z[2] : z[3]));
    }
    noised[i] = from_float<Out>(value);
  }
}

// All of x as one row.
template <class In, class Out, bool normal>
__global__ void __launch_bounds__(kThreads, 2)
    add_noise_kernel(const In* x, Out* noised, int64_t n, float eps, const int64_t* __restrict__ seed) {
  const Stream stream{static_cast<uint64_t>(*seed), eps};
  noise_row<In, Out, normal>(x, nullptr, noised, n, 0, true, stream, int64_t{blockIdx.x} * kThreads + threadIdx.x,
                             int64_t{gridDim.x} * kThreads);
}

// A warp per row. ids: which row of the table each one is, or null for its own place; an id outside the table gives NaN.
// rows: the place whose numbers the row takes (negative: no noise), or null for its own. scales: factors of eps, or null.
template <class In, class Out, bool normal>
__global__ void __launch_bounds__(kRowThreads, 2)
    noise_rows_kernel(const In* table, const int64_t* __restrict__ ids, int64_t table_rows, int64_t stride, In* clean,
                      Out* noised, int64_t n_rows, int64_t width, float eps, const int64_t* __restrict__ seed,
                      const int64_t* __restrict__ rows, const float* __restrict__ scales) {
  const uint64_t key = static_cast<uint64_t>(*seed);
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
    noise_row<In, Out, normal>(table + id * stride, clean_row, noised + row * width, width,
                               static_cast<uint64_t>(place < 0 ? 0 : place) * width, place >= 0, stream, lane, kWarp);
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
  const int64_t blocks = std::min((rows.n_rows + kWarps - 1) / kWarps, 2 * call.resident());
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
  const int64_t blocks = std::min((n + 8 * kThreads - 1) / (8 * kThreads), call.resident());
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
