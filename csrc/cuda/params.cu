// Norm, dot product and sign flips of lists of tensors on CUDA: launches around core/params.h.
#include "api.h"
#include "core/params.h"
#include "core/philox.h"
#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/sums.cuh"

namespace fastpost::cuda {
namespace {

template <class T>
__device__ __forceinline__ T flipped(T x, bool flips) {
  typename SignBits<T>::type bits;
  memcpy(&bits, &x, sizeof bits);
  bits ^= flips ? SignBits<T>::sign : 0;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Sums per chunk; negate: x changes sign in the same pass.
template <class T, Terms what, bool negate, class List>
__global__ void __launch_bounds__(kThreads, kPair)
    sum_kernel(const __grid_constant__ List table, double eta, const SumsOf sums) {
  constexpr bool two = what != Terms::squares;
  struct Held {
    Pack<T> xs, ys;
  };
  const auto place = locate(table, blockIdx.x);
  T* x = place.template at<T>(0);
  const T* y = two ? place.template at<T>(1) : nullptr;
  double sum[1] = {0};
  const auto add = [&](T xi, T yi) {
    double a = widened(xi);
    if constexpr (what == Terms::scaled) a *= fabs(static_cast<double>(widened(yi))) + eta;
    if constexpr (what == Terms::differences) a -= static_cast<double>(widened(yi));
    sum[0] += a * (what == Terms::products ? static_cast<double>(widened(yi)) : a);
  };
  walk<T, two ? 2 : 4>(
      place.length, aligned(x) && aligned(y),
      [&](int i, bool wide) {
        Held held;
        held.xs = load_pack(x + i, wide);
        if constexpr (two) held.ys = load_pack(y + i, wide);
        return held;
      },
      [&](int i, const Held& held, bool wide) {
#pragma unroll
        for (int k = 0; k < Pack<T>::size; ++k) add(held.xs.value[k], (two ? held.ys : held.xs).value[k]);
        if constexpr (negate) store_pack(x + i, negated(held.xs), wide);
      },
      [&](int i) {
        add(x[i], two ? y[i] : x[i]);
        if constexpr (negate) x[i] = flipped(x[i], true);
      });
  store_sums(sum, sums, place.chunk);
}

template <class T, class List>
__global__ void __launch_bounds__(kThreads, kPair) negate_kernel(const __grid_constant__ List table) {
  const auto place = locate(table, blockIdx.x);
  T* g = place.template at<T>(0);
  walk<T, 4>(
      place.length, aligned(g), [&](int i, bool wide) { return load_pack(g + i, wide); },
      [&](int i, const Pack<T>& held, bool wide) { store_pack(g + i, negated(held), wide); },
      [&](int i) { g[i] = flipped(g[i], true); });
}

// Column 1 of the table is the tensor's number, which keys its bits.
template <class T, class List>
__global__ void __launch_bounds__(kThreads, kPair)
    flip_signs_kernel(const __grid_constant__ List table, const int64_t* __restrict__ seed) {
  const uint64_t key = static_cast<uint64_t>(*seed);
  const auto place = locate(table, blockIdx.x);
  T* g = place.template at<T>(0);
  const uint32_t stream = static_cast<uint32_t>(place.entry->word[1]);
  // The 32 elements around i share a word. Indexing an array with it would put the array into local memory.
  const auto bits_of = [&](int i) {
    const uint64_t element = static_cast<uint64_t>(place.begin + i);
    const PhiloxWords words = philox(key, element / 128, stream);
    const unsigned which = element % 128 / 32;
    const uint32_t word =
        which < 2 ? (which == 0 ? words.word[0] : words.word[1]) : (which == 2 ? words.word[2] : words.word[3]);
    return word >> (i % 32);
  };
  walk<T, 4>(
      place.length, aligned(g), [&](int i, bool wide) { return load_pack(g + i, wide); },
      [&](int i, const Pack<T>& held, bool wide) { store_pack(g + i, flipped(held, bits_of(i)), wide); },
      [&](int i) { g[i] = flipped(g[i], (bits_of(i) & 1u) != 0); });
}

// g = -g * min(1, max_norm / norm). Unless the norm is finite and above max_norm the sign bits flip and nothing is scaled.
template <class T, class List>
__global__ void __launch_bounds__(kThreads, kPair)
    negate_clip_kernel(const __grid_constant__ List table, double max_norm, const double* __restrict__ squared_norm) {
  const double norm = sqrt(*squared_norm);
  const bool clipped = clips(norm, max_norm);
  const double factor = clipped ? -max_norm / norm : -1.0;
  const auto scaled = [&](T x) { return static_cast<float>(static_cast<double>(widened(x)) * factor); };
  const auto place = locate(table, blockIdx.x);
  T* g = place.template at<T>(0);
  walk<T, 4>(
      place.length, aligned(g), [&](int i, bool wide) { return load_pack(g + i, wide); },
      [&](int i, const Pack<T>& held, bool wide) {
        if (!clipped) return store_pack(g + i, negated(held), wide);
        float value[Pack<T>::size];
#pragma unroll
        for (int k = 0; k < Pack<T>::size; ++k) value[k] = scaled(held.value[k]);
        store_pack(g + i, rounded<T>(value), wide);
      },
      [&](int i) { g[i] = clipped ? from_float<T>(scaled(g[i])) : flipped(g[i], true); });
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

namespace {

template <Terms what, bool negate>
void launch_sum(const Call& call, const Plan& plan, Column x, Column y, double eta, const SumRoom& room) {
  const auto rows = tensor_rows<2>(plan, {x, y});
  launch_sums<1, 2>(call, plan, rows.size(), room, [&](const SumsOf& sums) {
    with_dtype(plan.dtype(), [&](auto t) {
      launch_list(
          call, rows, [](auto list) { return sum_kernel<decltype(t), what, negate, typename decltype(list)::type>; }, eta,
          sums);
    });
  });
}

}  // namespace

void squared_norm(const Plan& plan, bool adaptive, double eta, const SumRoom& room, int device, void* stream) {
  const Call call("squared_norm", device, stream);
  if (adaptive)
    launch_sum<Terms::scaled, false>(call, plan, kGrad, kWeight, eta, room);
  else
    launch_sum<Terms::squares, false>(call, plan, kGrad, kWeight, eta, room);
}

void squared_distance(const Plan& plan, const SumRoom& room, int device, void* stream) {
  const Call call("squared_distance", device, stream);
  launch_sum<Terms::differences, false>(call, plan, kWeight, kStash, 0.0, room);
}

void dot(const Plan& plan, const SumRoom& room, int device, void* stream) {
  const Call call("dot", device, stream);
  launch_sum<Terms::products, false>(call, plan, kGrad, kStash, 0.0, room);
}

void negate(const Plan& plan, int device, void* stream) {
  const Call call("negate_", device, stream);
  const auto rows = span_rows<1>(plan, {kGrad});
  launch_list<kPieceElements>(call, rows, [&](auto list) {
    using List = typename decltype(list)::type;
    return element_size(plan.dtype()) == 4 ? negate_kernel<float, List> : negate_kernel<bf16, List>;
  });
}

void flip_signs(const Plan& plan, const int64_t* seed, int device, void* stream) {
  const Call call("flip_signs_", device, stream);
  auto rows = tensor_rows<2>(plan, {kGrad, kGrad});
  for (int64_t t = 0; t < plan.tensors(); ++t) rows[t].word[1] = plan.stream(t);
  launch_list<kPieceElements>(
      call, rows,
      [&](auto list) {
        using List = typename decltype(list)::type;
        return element_size(plan.dtype()) == 4 ? flip_signs_kernel<float, List> : flip_signs_kernel<bf16, List>;
      },
      seed);
}

void negate_norm(const Plan& plan, const SumRoom& room, int device, void* stream) {
  const Call call("negate_clip_", device, stream);
  launch_sum<Terms::squares, true>(call, plan, kGrad, kWeight, 0.0, room);
}

void negate_clip(const Plan& plan, const double* squared_norm, double max_norm, int device, void* stream) {
  const Call call("negate_clip_", device, stream);
  const auto rows = span_rows<1>(plan, {kGrad});
  with_dtype(plan.dtype(), [&](auto t) {
    launch_list<kPieceElements>(
        call, rows, [](auto list) { return negate_clip_kernel<decltype(t), typename decltype(list)::type>; }, max_norm,
        squared_norm);
  });
}

}  // namespace fastpost::cuda
