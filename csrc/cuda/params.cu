// Parameter-list operations on CUDA: launches around core/params.h.
#include "api.h"
#include "core/params.h"
#include "cuda/launch.cuh"

namespace fastpost::cuda {
namespace {

template <class T, bool adaptive>
__global__ void __launch_bounds__(kThreads, 2)
    squared_norm_kernel(const __grid_constant__ Table table, double eta, double* __restrict__ partial) {
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place place = locate(table, c);
    const T* g = reinterpret_cast<const T*>(place.entry->base[kGrad]) + place.begin;
    const T* w = adaptive ? reinterpret_cast<const T*>(place.entry->base[kWeight]) + place.begin : nullptr;
    double sum[1] = {0};
    const auto add = [&](T gi, T wi) {
      double x = to_float(gi);
      if constexpr (adaptive) x *= fabs(static_cast<double>(to_float(wi))) + eta;
      sum[0] += x * x;
    };
    const int64_t head = head_of<T>(place.length, g, w, nullptr);
    const int64_t packs = (place.length - head) / Pack<T>::size;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < head; i += kThreads) add(g[i], adaptive ? w[i] : g[i]);
#pragma unroll 2
    for (int64_t v = threadIdx.x; v < packs; v += kThreads) {
      const Pack<T> gs = reinterpret_cast<const Pack<T>*>(g + head)[v];
      Pack<T> ws = gs;
      if constexpr (adaptive) ws = reinterpret_cast<const Pack<T>*>(w + head)[v];
#pragma unroll
      for (int k = 0; k < Pack<T>::size; ++k) add(gs.value[k], ws.value[k]);
    }
#pragma unroll 1
    for (int64_t i = head + packs * Pack<T>::size + threadIdx.x; i < place.length; i += kThreads)
      add(g[i], adaptive ? w[i] : g[i]);
    block_sum(sum);
    if (threadIdx.x == 0) partial[place.chunk] = sum[0];
  }
}

// Folds count sums per chunk into count sums, in an order that depends on the number of chunks alone.
template <int count>
__global__ void __launch_bounds__(kThreads) fold_kernel(const double* __restrict__ partial, int64_t chunks, double* out) {
  double sum[count] = {};
#pragma unroll 1
  for (int64_t c = threadIdx.x; c < chunks; c += kThreads)
    for (int k = 0; k < count; ++k) sum[k] += partial[c * count + k];
  block_sum(sum);
  if (threadIdx.x == 0)
    for (int k = 0; k < count; ++k) out[k] = sum[k];
}

constexpr int kSums = 6;

template <class T, class Seen, bool adaptive>
__global__ void __launch_bounds__(kThreads, 2)
    sam_perturb_kernel(const __grid_constant__ Table table, double rho, float eta, const double* __restrict__ squared_norm,
                       double* __restrict__ partial) {
  const double squared = *squared_norm;
  const bool moves = rho != 0 && squared > 0 && isfinite(squared);
  const SplitScale scale = split_scale(moves ? rho / sqrt(squared) : 0);
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place place = locate(table, c);
    T* w = reinterpret_cast<T*>(place.entry->base[kWeight]) + place.begin;
    const T* g = reinterpret_cast<const T*>(place.entry->base[kGrad]) + place.begin;
    T* stash = reinterpret_cast<T*>(place.entry->base[kStash]) + place.begin;
    float sum[kSums] = {};  // of at most 128 elements per thread
    const auto perturbed = [&](T wi, T gi) {
      if (!moves) return wi;  // its bits, not its value plus zero
      const float before = to_float(wi);
      const float e = adaptive ? perturbation(to_float(gi), scale, before, eta) : perturbation(to_float(gi), scale);
      const T written = from_float<T>(before + e);
      const float s = to_float(written) - before;
      const float v = to_float(from_float<Seen>(to_float(written))) - to_float(from_float<Seen>(before));
      sum[0] += e * e;
      sum[1] += s * s;
      sum[2] += e * s;
      sum[3] += v * v;
      sum[4] += e * v;
      sum[5] += s != 0.0f ? 1.0f : 0.0f;
      return written;
    };
    const int64_t head = head_of<T>(place.length, w, g, stash);
    const int64_t packs = (place.length - head) / Pack<T>::size;
    const auto single = [&](int64_t i) {
      const T before = w[i];
      stash[i] = before;
      w[i] = perturbed(before, g[i]);
    };
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < head; i += kThreads) single(i);
#pragma unroll 1
    for (int64_t v = threadIdx.x; v < packs; v += kThreads) {
      const float4 raw_w = reinterpret_cast<const float4*>(w + head)[v];
      const float4 raw_g = __ldcs(reinterpret_cast<const float4*>(g + head) + v);  // read for the last time
      __stcs(reinterpret_cast<float4*>(stash + head) + v, raw_w);
      Pack<T> ws, gs;
      memcpy(&ws, &raw_w, sizeof ws);
      memcpy(&gs, &raw_g, sizeof gs);
#pragma unroll
      for (int k = 0; k < Pack<T>::size; ++k) ws.value[k] = perturbed(ws.value[k], gs.value[k]);
      float4 out;
      memcpy(&out, &ws, sizeof out);
      reinterpret_cast<float4*>(w + head)[v] = out;
    }
#pragma unroll 1
    for (int64_t i = head + packs * Pack<T>::size + threadIdx.x; i < place.length; i += kThreads) single(i);
    double wide[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) wide[k] = sum[k];
    block_sum(wide);
    if (threadIdx.x == 0)
      for (int k = 0; k < kSums; ++k) partial[place.chunk * kSums + k] = wide[k];
  }
}

// to = from; T is an integer of the element's width, since a copy knows no numbers.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) restore_kernel(const __grid_constant__ Table table) {
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place place = locate(table, c);
    T* to = reinterpret_cast<T*>(place.entry->base[kWeight]) + place.begin;
    const T* from = reinterpret_cast<const T*>(place.entry->base[kStash]) + place.begin;
    const int64_t head = head_of<T>(place.length, to, from, nullptr);
    const int64_t packs = (place.length - head) / Pack<T>::size;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < head; i += kThreads) to[i] = from[i];
#pragma unroll 2
    for (int64_t v = threadIdx.x; v < packs; v += kThreads)
      reinterpret_cast<float4*>(to + head)[v] = __ldcs(reinterpret_cast<const float4*>(from + head) + v);
#pragma unroll 1
    for (int64_t i = head + packs * Pack<T>::size + threadIdx.x; i < place.length; i += kThreads) to[i] = from[i];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) negate_kernel(const __grid_constant__ Table table) {
  using Bits = typename SignBits<T>::type;
  constexpr unsigned sign = sizeof(Bits) == 4 ? 0x80000000u : 0x80008000u;
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place place = locate(table, c);
    Bits* g = reinterpret_cast<Bits*>(place.entry->base[kGrad]) + place.begin;
    const int64_t head = head_of<Bits>(place.length, g, nullptr, nullptr);
    const int64_t packs = (place.length - head) / Pack<Bits>::size;
#pragma unroll 1
    for (int64_t i = threadIdx.x; i < head; i += kThreads) g[i] ^= SignBits<T>::sign;
#pragma unroll 2
    for (int64_t v = threadIdx.x; v < packs; v += kThreads) {
      uint4* at = reinterpret_cast<uint4*>(g + head) + v;
      uint4 x = *at;
      x.x ^= sign;
      x.y ^= sign;
      x.z ^= sign;
      x.w ^= sign;
      *at = x;
    }
#pragma unroll 1
    for (int64_t i = head + packs * Pack<Bits>::size + threadIdx.x; i < place.length; i += kThreads)
      g[i] ^= SignBits<T>::sign;
  }
}

cudaStream_t as_stream(void* stream) { return static_cast<cudaStream_t>(stream); }

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

void squared_norm(const Plan& plan, bool adaptive, double eta, double* partial, double* out, int device, void* stream) {
  const char* op = "squared_norm";
  const DeviceGuard guard(device, op);
  with_dtype(plan.dtype(), [&](auto t) {
    using T = decltype(t);
    const auto kernel = adaptive ? squared_norm_kernel<T, true> : squared_norm_kernel<T, false>;
    with_tables(tensor_rows(plan), device, op, [&](const Table& table, int blocks) {
      kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(table, eta, partial);
      check(cudaGetLastError(), op, device);
    });
  });
  fold_kernel<1><<<1, kThreads, 0, as_stream(stream)>>>(partial, static_cast<int64_t>(plan.chunks().size()), out);
  check(cudaGetLastError(), op, device);
}

void sam_perturb(const Plan& plan, const Perturbation& how, const double* squared_norm, double* partial, double* sums,
                 int device, void* stream) {
  const char* op = "sam_perturb_";
  const DeviceGuard guard(device, op);
  with_dtype(plan.dtype(), [&](auto t) {
    with_dtype(how.seen_dtype, [&](auto s) {
      using T = decltype(t);
      using Seen = decltype(s);
      const auto kernel = how.adaptive ? sam_perturb_kernel<T, Seen, true> : sam_perturb_kernel<T, Seen, false>;
      with_tables(tensor_rows(plan), device, op, [&](const Table& table, int blocks) {
        kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(table, how.rho, static_cast<float>(how.eta), squared_norm,
                                                           partial);
        check(cudaGetLastError(), op, device);
      });
    });
  });
  fold_kernel<kSums><<<1, kThreads, 0, as_stream(stream)>>>(partial, static_cast<int64_t>(plan.chunks().size()), sums);
  check(cudaGetLastError(), op, device);
}

void sam_restore(const Plan& plan, int device, void* stream) {
  const char* op = "sam_restore_";
  const DeviceGuard guard(device, op);
  const auto kernel = element_size(plan.dtype()) == 4 ? restore_kernel<uint32_t> : restore_kernel<uint16_t>;
  with_tables(span_rows(plan, 1 << kWeight | 1 << kStash), device, op, [&](const Table& table, int blocks) {
    kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(table);
    check(cudaGetLastError(), op, device);
  });
}

void negate(const Plan& plan, int device, void* stream) {
  const char* op = "negate_";
  const DeviceGuard guard(device, op);
  const auto kernel = element_size(plan.dtype()) == 4 ? negate_kernel<float> : negate_kernel<bf16>;
  with_tables(span_rows(plan, 1 << kGrad), device, op, [&](const Table& table, int blocks) {
    kernel<<<blocks, kThreads, 0, as_stream(stream)>>>(table);
    check(cudaGetLastError(), op, device);
  });
}

}  // namespace fastpost::cuda
