// Norm and sign flips of lists of tensors on CUDA: launches around core/params.h.
#include "api.h"
#include "core/params.h"
#include "core/philox.h"
#include "cuda/launch.cuh"
#include "cuda/sums.cuh"

namespace fastpost::cuda {
namespace {

template <class T>
__device__ __forceinline__ T negated(T x) {
  typename SignBits<T>::type bits;
  memcpy(&bits, &x, sizeof bits);
  bits ^= SignBits<T>::sign;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Sums of squares per chunk; negate: x changes sign in the same pass.
template <class T, Squares what, bool negate>
__global__ void __launch_bounds__(kThreads, kPair)
    squares_kernel(const __grid_constant__ Table<2> table, double eta, double* __restrict__ partial) {
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place<2> place = locate(table, c);
    constexpr bool two = what != Squares::plain;
    T* x = place.at<T>(0);
    const T* y = two ? place.at<T>(1) : nullptr;
    const bool wide = aligned(x), wide_y = aligned(y);
    double sum[1] = {0};
    const auto add = [&](T xi, T yi) {
      double a = to_float(xi);
      if constexpr (what == Squares::scaled) a *= fabs(static_cast<double>(to_float(yi))) + eta;
      if constexpr (what == Squares::difference) a -= static_cast<double>(to_float(yi));
      sum[0] += a * a;
    };
    walk<T, 2>(
        place.length,
        [&](int64_t i) {
          Pack<T> xs = load_pack(x + i, wide);
          Pack<T> ys = xs;
          if constexpr (two) ys = load_pack(y + i, wide_y);
#pragma unroll
          for (int k = 0; k < Pack<T>::size; ++k) add(xs.value[k], ys.value[k]);
          if constexpr (negate) {
#pragma unroll
            for (int k = 0; k < Pack<T>::size; ++k) xs.value[k] = negated(xs.value[k]);
            store_pack(x + i, xs, wide);
          }
        },
        [&](int64_t i) {
          add(x[i], two ? y[i] : x[i]);
          if constexpr (negate) x[i] = negated(x[i]);
        });
    block_sum(sum);
    if (threadIdx.x == 0) partial[place.chunk] = sum[0];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kPair) negate_kernel(const __grid_constant__ Table<1> table) {
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place<1> place = locate(table, c);
    T* g = place.at<T>(0);
    const bool wide = aligned(g);
    walk<T, 2>(
        place.length,
        [&](int64_t i) {
          Pack<T> pack = load_pack(g + i, wide);
#pragma unroll
          for (int k = 0; k < Pack<T>::size; ++k) pack.value[k] = negated(pack.value[k]);
          store_pack(g + i, pack, wide);
        },
        [&](int64_t i) { g[i] = negated(g[i]); });
  }
}

// Column 1 of the table is the tensor's number, which keys its bits.
template <class T>
__global__ void __launch_bounds__(kThreads, kPair)
    flip_signs_kernel(const __grid_constant__ Table<2> table, const int64_t* __restrict__ seed) {
  const uint64_t key = static_cast<uint64_t>(*seed);
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place<2> place = locate(table, c);
    T* g = place.at<T>(0);
    const bool wide = aligned(g);
    const uint32_t stream = static_cast<uint32_t>(place.entry->word[1]);
    // The 32 elements around i share a word. Indexing an array with it would put the array into local memory.
    const auto word_of = [&](int64_t i) {
      const uint64_t element = static_cast<uint64_t>(place.begin + i);
      const PhiloxWords words = philox(key, element / 128, stream);
      const unsigned which = element % 128 / 32;
      return which < 2 ? (which == 0 ? words.word[0] : words.word[1]) : (which == 2 ? words.word[2] : words.word[3]);
    };
    const auto flipped = [](T x, uint32_t bit) { return bit ? negated(x) : x; };
    walk<T, 1>(
        place.length,
        [&](int64_t i) {
          Pack<T> pack = load_pack(g + i, wide);
          const uint32_t bits = word_of(i) >> (i % 32);
#pragma unroll
          for (int k = 0; k < Pack<T>::size; ++k) pack.value[k] = flipped(pack.value[k], bits >> k & 1u);
          store_pack(g + i, pack, wide);
        },
        [&](int64_t i) { g[i] = flipped(g[i], word_of(i) >> (i % 32) & 1u); });
  }
}

// g = -g * min(1, max_norm / norm). Unless the norm is finite and above max_norm the sign bits flip and nothing is scaled.
template <class T>
__global__ void __launch_bounds__(kThreads, kPair)
    negate_clip_kernel(const __grid_constant__ Table<1> table, double max_norm, const double* __restrict__ squared_norm) {
  const double norm = sqrt(*squared_norm);
  const bool clips = norm > max_norm && isfinite(norm);
  const double factor = clips ? -max_norm / norm : -1.0;
  const auto clipped = [&](T x) {
    return clips ? from_float<T>(static_cast<float>(static_cast<double>(to_float(x)) * factor)) : negated(x);
  };
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place<1> place = locate(table, c);
    T* g = place.at<T>(0);
    const bool wide = aligned(g);
    walk<T, 2>(
        place.length,
        [&](int64_t i) {
          Pack<T> pack = load_pack(g + i, wide);
#pragma unroll
          for (int k = 0; k < Pack<T>::size; ++k) pack.value[k] = clipped(pack.value[k]);
          store_pack(g + i, pack, wide);
        },
        [&](int64_t i) { g[i] = clipped(g[i]); });
  }
}

}  // namespace

int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorNoDevice) {
    cudaGetLastError();
    return 0;
  }
  check(status, "looking for devices", 0);
  return count;
}

bool supports(int device) {
  const Call call("looking for this build's kernels", device, nullptr);
  cudaFuncAttributes attributes;
  const cudaError_t status = cudaFuncGetAttributes(&attributes, fold_kernel<1>);
  if (status != cudaErrorNoKernelImageForDevice && status != cudaErrorInvalidDeviceFunction) {
    check(status, "looking for this build's kernels", device);
    return true;
  }
  cudaGetLastError();
  return false;
}

void squared_norm(const Plan& plan, bool adaptive, double eta, double* partial, double* out, int device, void* stream) {
  const Call call("squared_norm", device, stream);
  const auto rows = tensor_rows<2>(plan, {kGrad, kWeight});
  with_dtype(plan.dtype(), [&](auto t) {
    using T = decltype(t);
    launch_list(call, rows, adaptive ? squares_kernel<T, Squares::scaled, false> : squares_kernel<T, Squares::plain, false>,
                eta, partial);
  });
  fold<1>(call, plan, partial, out);
}

void squared_distance(const Plan& plan, double* partial, double* out, int device, void* stream) {
  const Call call("squared_distance", device, stream);
  const auto rows = tensor_rows<2>(plan, {kWeight, kStash});
  with_dtype(plan.dtype(), [&](auto t) {
    launch_list(call, rows, squares_kernel<decltype(t), Squares::difference, false>, 0.0, partial);
  });
  fold<1>(call, plan, partial, out);
}

void negate(const Plan& plan, int device, void* stream) {
  const Call call("negate_", device, stream);
  launch_list(call, span_rows<1>(plan, {kGrad}),
              element_size(plan.dtype()) == 4 ? negate_kernel<float> : negate_kernel<bf16>);
}

void flip_signs(const Plan& plan, const int64_t* seed, int device, void* stream) {
  const Call call("flip_signs_", device, stream);
  auto rows = tensor_rows<2>(plan, {kGrad, kGrad});
  for (int64_t t = 0; t < plan.tensors(); ++t) rows[t].word[1] = plan.stream(t);
  launch_list(call, rows, element_size(plan.dtype()) == 4 ? flip_signs_kernel<float> : flip_signs_kernel<bf16>, seed);
}

void negate_norm(const Plan& plan, double* partial, double* out, int device, void* stream) {
  const Call call("negate_clip_", device, stream);
  const auto rows = tensor_rows<2>(plan, {kGrad, kWeight});
  with_dtype(plan.dtype(),
             [&](auto t) { launch_list(call, rows, squares_kernel<decltype(t), Squares::plain, true>, 0.0, partial); });
  fold<1>(call, plan, partial, out);
}

void negate_clip(const Plan& plan, const double* squared_norm, double max_norm, int device, void* stream) {
  const Call call("negate_clip_", device, stream);
  const auto rows = span_rows<1>(plan, {kGrad});
  with_dtype(plan.dtype(),
             [&](auto t) { launch_list(call, rows, negate_clip_kernel<decltype(t)>, max_norm, squared_norm); });
}

}  // namespace fastpost::cuda
