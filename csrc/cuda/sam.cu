// SAM's operations on lists of tensors on CUDA: launches around core/params.h.
#include "api.h"
#include "core/params.h"
#include "core/philox.h"
#include "cuda/launch.cuh"
#include "cuda/sums.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kSums = 6;

// What one element's perturbation leaves in the six sums.
template <class T, class Seen>
__device__ __forceinline__ void add_to_sums(float (&sum)[kSums], float e, float before, T written) {
  const float after = to_float(written);
  const float s = after - before;
  const float v = to_float(from_float<Seen>(after)) - to_float(from_float<Seen>(before));
  sum[0] += e * e;
  sum[1] += s * s;
  sum[2] += e * s;
  sum[3] += v * v;
  sum[4] += e * v;
  sum[5] += s != 0.0f ? 1.0f : 0.0f;
}

__device__ __forceinline__ void store_sums(const float (&sum)[kSums], double* at) {
  double wide[kSums];
#pragma unroll
  for (int k = 0; k < kSums; ++k) wide[k] = sum[k];
  block_sum(wide);
  if (threadIdx.x == 0)
    for (int k = 0; k < kSums; ++k) at[k] = wide[k];
}

struct Step {
  bool moves;
  SplitScale scale;
};

__device__ __forceinline__ Step step_of(double rho, double squared) {
  const bool moves = rho != 0 && squared > 0 && isfinite(squared);
  return {moves, split_scale(moves ? rho / sqrt(squared) : 0)};
}

// Stochastic: column 3 of the table is the tensor's number, which keys its random bits.
template <class T, class Seen, bool adaptive, bool stochastic>
__global__ void __launch_bounds__(kThreads, kPair)
    sam_perturb_kernel(const __grid_constant__ Table<stochastic ? 4 : 3> table, double rho, float eta,
                       const double* __restrict__ squared_norm, const int64_t* __restrict__ seed,
                       double* __restrict__ partial) {
  const Step step = step_of(rho, *squared_norm);
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const auto place = locate(table, c);
    T* w = place.template at<T>(0);
    const T* g = place.template at<T>(1);
    T* stash = place.template at<T>(2);
    const bool wide_w = aligned(w), wide_g = aligned(g), wide_stash = aligned(stash);
    float sum[kSums] = {};  // of at most 128 elements per thread
    const auto words_of = [&](int64_t i) {
      if constexpr (stochastic)
        return philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(place.begin + i) / 8,
                      static_cast<uint32_t>(place.entry->word[3]));
      else
        return PhiloxWords{};
    };
    const auto perturbed = [&](T wi, T gi, uint32_t random) {
      if (!step.moves) return wi;  // its bits, not its value plus zero
      const float before = to_float(wi);
      const float e =
          adaptive ? perturbation(to_float(gi), step.scale, before, eta) : perturbation(to_float(gi), step.scale);
      const T written = stochastic ? round_randomly<T>(before + e, random) : from_float<T>(before + e);
      add_to_sums<T, Seen>(sum, e, before, written);
      return written;
    };
    walk<T, 1>(
        place.length,
        [&](int64_t i) {
          Pack<T> ws = load_pack(w + i, wide_w);
          const Pack<T> gs = load_pack<Cache::stream>(g + i, wide_g);  // read for the last time
          store_pack<Cache::stream>(stash + i, ws, wide_stash);
          const PhiloxWords words = words_of(i);
#pragma unroll
          for (int k = 0; k < Pack<T>::size; ++k)
            ws.value[k] = perturbed(ws.value[k], gs.value[k], words.word[k / 2 % 4] >> (k % 2 * 16) & 0xffffu);
          store_pack(w + i, ws, wide_w);
        },
        [&](int64_t i) {
          const T before = w[i];
          stash[i] = before;
          const PhiloxWords words = words_of(i);
          const unsigned which = i % 8 / 2;  // indexing with it would put the words into local memory
          const uint32_t word =
              which < 2 ? (which == 0 ? words.word[0] : words.word[1]) : (which == 2 ? words.word[2] : words.word[3]);
          w[i] = perturbed(before, g[i], word >> (i % 2 * 16) & 0xffffu);
        });
    store_sums(sum, partial + place.chunk * kSums);
  }
}

// w = m + e; column 2 holds the float masters m.
template <class T, class Seen, bool adaptive>
__global__ void __launch_bounds__(kThreads, kPair)
    sam_perturb_masters_kernel(const __grid_constant__ Table<3> table, double rho, float eta,
                               const double* __restrict__ squared_norm, double* __restrict__ partial) {
  const Step step = step_of(rho, *squared_norm);
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place<3> place = locate(table, c);
    T* w = place.at<T>(0);
    const T* g = place.at<T>(1);
    const float* masters = place.at<float>(2);
    const bool wide_w = aligned(w), wide_g = aligned(g), wide_masters = aligned(masters);
    float sum[kSums] = {};
    const auto perturbed = [&](float exact, T gi) {
      const T rounded = from_float<T>(exact);
      if (!step.moves) return rounded;
      const float e = adaptive ? perturbation(to_float(gi), step.scale, exact, eta) : perturbation(to_float(gi), step.scale);
      const T written = from_float<T>(exact + e);
      add_to_sums<T, Seen>(sum, e, to_float(rounded), written);
      return written;
    };
    walk<T, 1>(
        place.length,
        [&](int64_t i) {
          const Pack<T> gs = load_pack<Cache::stream>(g + i, wide_g);
          Pack<T> ws;
#pragma unroll
          for (int part = 0; part < Pack<T>::size; part += Pack<float>::size) {
            const Pack<float> ms = load_pack(masters + i + part, wide_masters);
#pragma unroll
            for (int k = 0; k < Pack<float>::size; ++k) ws.value[part + k] = perturbed(ms.value[k], gs.value[part + k]);
          }
          store_pack(w + i, ws, wide_w);
        },
        [&](int64_t i) { w[i] = perturbed(masters[i], g[i]); });
    store_sums(sum, partial + place.chunk * kSums);
  }
}

// w = m, rounded; column 1 holds the float masters m.
template <class T>
__global__ void __launch_bounds__(kThreads, kPair) cast_kernel(const __grid_constant__ Table<2> table) {
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place<2> place = locate(table, c);
    T* w = place.at<T>(0);
    const float* masters = place.at<float>(1);
    const bool wide = aligned(w), wide_masters = aligned(masters);
    walk<T, 1>(
        place.length,
        [&](int64_t i) {
          Pack<T> ws;
#pragma unroll
          for (int part = 0; part < Pack<T>::size; part += Pack<float>::size) {
            const Pack<float> ms = load_pack(masters + i + part, wide_masters);
#pragma unroll
            for (int k = 0; k < Pack<float>::size; ++k) ws.value[part + k] = from_float<T>(ms.value[k]);
          }
          store_pack(w + i, ws, wide);
        },
        [&](int64_t i) { w[i] = from_float<T>(masters[i]); });
  }
}

// to = from; T is an integer of the element's width, since a copy knows no numbers.
template <class T>
__global__ void __launch_bounds__(kThreads, kPair) restore_kernel(const __grid_constant__ Table<2> table) {
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place<2> place = locate(table, c);
    T* to = place.at<T>(0);
    const T* from = place.at<T>(1);
    const bool wide = aligned(to) && aligned(from);
    walk<T, 2>(
        place.length,
        [&](int64_t i) {
          if (wide) {  // never apart: eight 16-bit values would be put together again one by one
            __stwb(reinterpret_cast<float4*>(to + i), __ldcs(reinterpret_cast<const float4*>(from + i)));
          } else {
#pragma unroll
            for (int k = 0; k < Pack<T>::size; ++k) to[i + k] = from[i + k];
          }
        },
        [&](int64_t i) { to[i] = from[i]; });
  }
}

// Column 5 is the address of the tensor's step count, a float.
template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    restore_adamw_kernel(const __grid_constant__ Table<6> table, const AdamW how, const float* __restrict__ grad_scale,
                         const float* __restrict__ found_inf) {
  const bool skips = found_inf != nullptr && *found_inf != 0.0f;
  const float unscale = grad_scale == nullptr ? 1.0f : 1.0f / *grad_scale;
  __shared__ AdamWStep shared;
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place<6> place = locate(table, c);
    T* w = place.at<T>(0);
    const T* g = place.at<T>(1);
    const T* stash = place.at<T>(2);
    T* first = place.at<T>(3);
    T* second = place.at<T>(4);
    __syncthreads();  // the last chunk's constants have been read
    if (threadIdx.x == 0) shared = adamw_step(how, *reinterpret_cast<const float*>(place.entry->word[5]));
    __syncthreads();
    const AdamWStep step = shared;
    const bool wide_w = aligned(w), wide_g = aligned(g), wide_stash = aligned(stash), wide_first = aligned(first),
               wide_second = aligned(second);
    const auto update = [&](T& wi, T gi, T& mi, T& vi) {
      float value = to_float(wi), m = to_float(mi), v = to_float(vi);
      adamw_update(step, to_float(gi) * unscale, value, m, v);
      wi = from_float<T>(value);
      mi = from_float<T>(m);
      vi = from_float<T>(v);
    };
    walk<T, 1>(
        place.length,
        [&](int64_t i) {
          Pack<T> ws = load_pack<Cache::stream>(stash + i, wide_stash);
          if (!skips) {
            const Pack<T> gs = load_pack<Cache::stream>(g + i, wide_g);
            Pack<T> ms = load_pack(first + i, wide_first), vs = load_pack(second + i, wide_second);
#pragma unroll
            for (int k = 0; k < Pack<T>::size; ++k) update(ws.value[k], gs.value[k], ms.value[k], vs.value[k]);
            store_pack<Cache::stream>(first + i, ms, wide_first);
            store_pack<Cache::stream>(second + i, vs, wide_second);
          }
          store_pack(w + i, ws, wide_w);
        },
        [&](int64_t i) {
          T value = stash[i];
          if (!skips) update(value, g[i], first[i], second[i]);
          w[i] = value;
        });
  }
}

}  // namespace

void sam_perturb(const Plan& plan, const Perturbation& how, const double* squared_norm, const int64_t* seed, double* partial,
                 double* sums, int device, void* stream) {
  const Call call("sam_perturb_", device, stream);
  const float eta = static_cast<float>(how.eta);
  with_dtype(plan.dtype(), [&](auto t) {
    with_dtype(how.seen_dtype, [&](auto s) {
      using T = decltype(t);
      using Seen = decltype(s);
      if constexpr (sizeof(T) == 2) {
        if (seed != nullptr) {
          auto rows = tensor_rows<4>(plan, {kWeight, kGrad, kStash, kStash});
          for (int64_t i = 0; i < plan.tensors(); ++i) rows[i].word[3] = plan.stream(i);
          return launch_list(
              call, rows, how.adaptive ? sam_perturb_kernel<T, Seen, true, true> : sam_perturb_kernel<T, Seen, false, true>,
              how.rho, eta, squared_norm, seed, partial);
        }
      }
      launch_list(call, tensor_rows<3>(plan, {kWeight, kGrad, kStash}),
                  how.adaptive ? sam_perturb_kernel<T, Seen, true, false> : sam_perturb_kernel<T, Seen, false, false>,
                  how.rho, eta, squared_norm, seed, partial);
    });
  });
  fold<kSums>(call, plan, partial, sums);
}

void sam_perturb_masters(const Plan& plan, const Perturbation& how, const double* squared_norm, double* partial,
                         double* sums, int device, void* stream) {
  const Call call("sam_perturb_masters_", device, stream);
  const auto rows = tensor_rows<3>(plan, {kWeight, kGrad, kStash});
  with_dtype(plan.dtype(), [&](auto t) {
    with_dtype(how.seen_dtype, [&](auto s) {
      using T = decltype(t);
      using Seen = decltype(s);
      if constexpr (sizeof(T) == 2)
        launch_list(call, rows,
                    how.adaptive ? sam_perturb_masters_kernel<T, Seen, true> : sam_perturb_masters_kernel<T, Seen, false>,
                    how.rho, static_cast<float>(how.eta), squared_norm, partial);
    });
  });
  fold<kSums>(call, plan, partial, sums);
}

void sam_cast(const Plan& plan, int device, void* stream) {
  const Call call("sam_cast_", device, stream);
  const auto rows = tensor_rows<2>(plan, {kWeight, kStash});
  with_dtype(plan.dtype(), [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2) launch_list(call, rows, cast_kernel<T>);
  });
}

void sam_restore(const Plan& plan, int device, void* stream) {
  const Call call("sam_restore_", device, stream);
  launch_list(call, span_rows<2>(plan, {kWeight, kStash}),
              element_size(plan.dtype()) == 4 ? restore_kernel<uint32_t> : restore_kernel<uint16_t>);
}

void sam_restore_adamw(const Plan& plan, const AdamW& how, const float* const* steps, const float* grad_scale,
                       const float* found_inf, int device, void* stream) {
  const Call call("sam_restore_adamw_", device, stream);
  const auto columns = tensor_rows<5>(plan, {kWeight, kGrad, kStash, kFirst, kSecond});
  std::vector<Entry<6>> rows(columns.size());
  for (size_t t = 0; t < rows.size(); ++t) {
    std::copy(columns[t].word, columns[t].word + 5, rows[t].word);
    rows[t].word[5] = reinterpret_cast<uintptr_t>(steps[t]);
    rows[t].elements = columns[t].elements;
  }
  with_dtype(plan.dtype(),
             [&](auto t) { launch_list(call, rows, restore_adamw_kernel<decltype(t)>, how, grad_scale, found_inf); });
}

}  // namespace fastpost::cuda
