// Parameter-list operations on CUDA: launches around core/params.h.
#include "api.h"
#include "core/params.h"
#include "core/philox.h"
#include "cuda/launch.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kPair = 2;  // blocks of 512 threads that share a multiprocessor

// pack(v, i) for each 16 bytes of n elements that this thread holds, i being the first of them; single(i) for the rest.
template <class T, int unroll, class Packs, class Single>
__device__ __forceinline__ void walk(int64_t n, Packs&& pack, Single&& single) {
  constexpr int64_t size = Pack<T>::size;
  const int64_t packs = n / size;
#pragma unroll unroll
  for (int64_t v = threadIdx.x; v < packs; v += kThreads) pack(v * size);
#pragma unroll 1
  for (int64_t i = packs * size + threadIdx.x; i < n; i += kThreads) single(i);
}

template <class T>
__device__ __forceinline__ T negated(T x) {
  typename SignBits<T>::type bits;
  memcpy(&bits, &x, sizeof bits);
  bits ^= SignBits<T>::sign;
  memcpy(&x, &bits, sizeof x);
  return x;
}

// Sums of squares per chunk; negate: the gradients change sign in the same pass.
template <class T, bool adaptive, bool negate>
__global__ void __launch_bounds__(kThreads, kPair)
    squared_norm_kernel(const __grid_constant__ Table<2> table, double eta, double* __restrict__ partial) {
#pragma unroll 1
  for (int64_t c = blockIdx.x; c < table.chunks; c += gridDim.x) {
    const Place<2> place = locate(table, c);
    T* g = place.at<T>(0);
    const T* w = adaptive ? place.at<T>(1) : nullptr;
    const bool wide = aligned(g), wide_w = aligned(w);
    double sum[1] = {0};
    const auto add = [&](T gi, T wi) {
      double x = to_float(gi);
      if constexpr (adaptive) x *= fabs(static_cast<double>(to_float(wi))) + eta;
      sum[0] += x * x;
    };
    walk<T, 2>(
        place.length,
        [&](int64_t i) {
          Pack<T> gs = load_pack(g + i, wide);
          Pack<T> ws = gs;
          if constexpr (adaptive) ws = load_pack(w + i, wide_w);
#pragma unroll
          for (int k = 0; k < Pack<T>::size; ++k) add(gs.value[k], ws.value[k]);
          if constexpr (negate) {
#pragma unroll
            for (int k = 0; k < Pack<T>::size; ++k) gs.value[k] = negated(gs.value[k]);
            store_pack(g + i, gs, wide);
          }
        },
        [&](int64_t i) {
          add(g[i], adaptive ? w[i] : g[i]);
          if constexpr (negate) g[i] = negated(g[i]);
        });
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

template <int count>
void fold(const Call& call, const Plan& plan, const double* partial, double* out) {
  call.launch(fold_kernel<count>, 1, kThreads, partial, static_cast<int64_t>(plan.chunks().size()), out);
}

}  // namespace

void squared_norm(const Plan& plan, bool adaptive, double eta, double* partial, double* out, int device, void* stream) {
  const Call call("squared_norm", device, stream);
  const auto rows = tensor_rows<2>(plan, {kGrad, kWeight});
  with_dtype(plan.dtype(), [&](auto t) {
    using T = decltype(t);
    launch_list(call, rows, adaptive ? squared_norm_kernel<T, true, false> : squared_norm_kernel<T, false, false>, eta,
                partial);
  });
  fold<1>(call, plan, partial, out);
}

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
             [&](auto t) { launch_list(call, rows, squared_norm_kernel<decltype(t), false, true>, 0.0, partial); });
  fold<1>(call, plan, partial, out);
}

void negate_clip(const Plan& plan, const double* squared_norm, double max_norm, int device, void* stream) {
  const Call call("negate_clip_", device, stream);
  const auto rows = span_rows<1>(plan, {kGrad});
  with_dtype(plan.dtype(),
             [&](auto t) { launch_list(call, rows, negate_clip_kernel<decltype(t)>, max_norm, squared_norm); });
}

}  // namespace fastpost::cuda
