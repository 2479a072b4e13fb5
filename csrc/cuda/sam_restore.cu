// SAM's way back to w on lists of tensors on CUDA, alone or with AdamW's step: launches around core/params.h.
#include <utility>

#include "api.h"
#include "core/params.h"
#include "cuda/launch.cuh"
#include "cuda/packs.cuh"

namespace fastpost::cuda {
namespace {

// Where w comes from: a copy, or w + e and codes. What is listed or pending stands in the weights' place already, or still.
template <class T>
struct FromCopy {
  using Kept = T;
  const T* stash;

  __device__ FromCopy(const T*, const T* stash) : stash(stash) {}
  __device__ bool wide() const { return aligned(stash); }
  __device__ __forceinline__ Pack<T> load(int i, bool wide) const { return load_pack(stash + i, wide); }
  __device__ __forceinline__ T operator[](int i) const { return stash[i]; }
  __device__ static __forceinline__ const Pack<T>& origin(const Pack<T>& held) { return held; }
};

template <class T>
struct FromCodes {
  using Kept = Code<T>;
  struct Held {
    Pack<T> after;
    CodePack<T> codes;
  };
  const T* w;
  const Code<T>* codes;

  __device__ FromCodes(const T* w, const Code<T>* codes) : w(w), codes(codes) {}
  __device__ bool wide() const { return (reinterpret_cast<uintptr_t>(codes) & 7u) == 0; }
  __device__ __forceinline__ Held load(int i, bool wide) const {
    Held held;
    held.after = load_pack(w + i, wide);
    if (wide) {
      const uint2 raw = __ldcs(reinterpret_cast<const uint2*>(codes + i));
      memcpy(&held.codes, &raw, sizeof raw);
    } else {
#pragma unroll
      for (int k = 0; k < Pack<T>::size; ++k) held.codes.value[k] = codes[i + k];
    }
    return held;
  }
  __device__ __forceinline__ T operator[](int i) const { return of_bits<T>(decoded<T>(codes[i], bits_of(w[i]))); }
  __device__ static __forceinline__ Pack<T> origin(const Held& held) {
    Pack<T> before;
#pragma unroll
    for (int k = 0; k < Pack<T>::size; ++k)
      before.value[k] = of_bits<T>(decoded<T>(held.codes.value[k], bits_of(held.after.value[k])));
    return before;
  }
};

template <class T, class List>
__global__ void __launch_bounds__(kThreads, kPair) decode_kernel(const __grid_constant__ List table) {
  using From = FromCodes<T>;
  const auto place = locate(table, blockIdx.x);
  T* w = place.template at<T>(0);
  const From from(w, place.template at<Code<T>>(1));
  walk<T, 2>(
      place.length, aligned(w) && from.wide(), [&](int i, bool wide) { return from.load(i, wide); },
      [&](int i, const typename From::Held& held, bool wide) { store_pack(w + i, From::origin(held), wide); },
      [&](int i) { w[i] = from[i]; });
}

// w of what is listed.
template <class T, class List>
__global__ void __launch_bounds__(kThreads) put_listed_kernel(const __grid_constant__ List table, const CodeList list) {
  using Bits = typename SignBits<T>::type;
  const uint64_t wanted = *list.words, capacity = static_cast<uint64_t>(list.capacity);
  const uint64_t entries = wanted < capacity ? wanted : capacity;
#pragma unroll 1
  for (uint64_t k = uint64_t{blockIdx.x} * kThreads + threadIdx.x; k < entries; k += uint64_t{gridDim.x} * kThreads) {
    const uint64_t word = list.words[1 + k], where = word >> (8 * sizeof(T));
    const int64_t chunk = static_cast<int64_t>(where >> 16) - table.first_chunk;
    if (chunk < 0 || chunk >= table.chunks) continue;  // another launch's
    locate(table, static_cast<int>(chunk)).template at<T>(0)[where & 0xffffu] = of_bits<T>(static_cast<Bits>(word));
  }
}

// w = m, rounded; column 1 holds the float masters m.
template <class T, class List>
__global__ void __launch_bounds__(kThreads, kPair) cast_kernel(const __grid_constant__ List table) {
  const auto place = locate(table, blockIdx.x);
  T* w = place.template at<T>(0);
  const float* masters = place.template at<float>(1);
  walk<T, 2>(
      place.length, aligned(w) && aligned(masters),
      [&](int i, bool wide) {
        Masters<T> ms;
        ms.load(masters + i, wide);
        return ms;
      },
      [&](int i, const Masters<T>& ms, bool wide) {
        float exact[Pack<T>::size];
#pragma unroll
        for (int k = 0; k < Pack<T>::size; ++k) exact[k] = ms[k];
        store_pack(w + i, converted<T>(exact), wide);
      },
      [&](int i) { w[i] = from_float<T>(masters[i]); });
}

// to = from; T is an integer of the element's width, since a copy knows no numbers.
template <class T, class List>
__global__ void __launch_bounds__(kThreads, kPair) restore_kernel(const __grid_constant__ List table) {
  const auto place = locate(table, blockIdx.x);
  T* to = place.template at<T>(0);
  const T* from = place.template at<T>(1);
  walk<T, 4>(
      place.length, aligned(to) && aligned(from),
      [&](int i, bool wide) { return wide ? __ldcs(reinterpret_cast<const float4*>(from + i)) : float4{}; },
      [&](int i, const float4& held, bool wide) {
        if (wide) {  // never apart: eight 16-bit values would be put together again one by one
          __stwb(reinterpret_cast<float4*>(to + i), held);
        } else {
#pragma unroll
          for (int k = 0; k < Pack<T>::size; ++k) to[i + k] = from[i + k];
        }
      },
      [&](int i) { to[i] = from[i]; });
}

// Column 5 is the address of the tensor's step count, a float; null: the tensor is restored and no more.
template <class T, template <class> class From, class List>
__global__ void __launch_bounds__(kThreads, 1)
    restore_adamw_kernel(const __grid_constant__ List table, const AdamW how, const float* __restrict__ grad_scale,
                         const float* __restrict__ found_inf) {
  struct State {
    decltype(std::declval<From<T>>().load(0, true)) kept;
    Pack<T> gs, ms, vs;
  };
  constexpr int size = Pack<T>::size;
  __shared__ AdamWStep shared;
  const auto place = locate(table, blockIdx.x);
  const float* count = reinterpret_cast<const float*>(place.entry->word[5]);
  const bool skips = count == nullptr || (found_inf != nullptr && *found_inf != 0.0f);
  const float unscale = grad_scale == nullptr ? 1.0f : 1.0f / *grad_scale;
  T* w = place.template at<T>(0);
  const T* g = place.template at<T>(1);
  const From<T> from(w, place.template at<typename From<T>::Kept>(2));
  T* first = place.template at<T>(3);
  T* second = place.template at<T>(4);
  if (threadIdx.x == 0 && count != nullptr) shared = adamw_step(how, *count);
  __syncthreads();
  const AdamWStep step = shared;
  walk<T, 1>(
      place.length, aligned(w) && aligned(g) && from.wide() && aligned(first) && aligned(second),
      [&](int i, bool wide) {
        State held{};
        held.kept = from.load(i, wide);
        if (!skips) {
          held.gs = load_pack(g + i, wide);
          held.ms = load_pack(first + i, wide);
          held.vs = load_pack(second + i, wide);
        }
        return held;
      },
      [&](int i, const State& held, bool wide) {
        const Pack<T> before = From<T>::origin(held.kept);
        if (skips) return store_pack(w + i, before, wide);
        float value[size], g[size], m[size], v[size];
        unpack(before, value);
        unpack(held.gs, g);
        unpack(held.ms, m);
        unpack(held.vs, v);
#pragma unroll
        for (int k = 0; k < size; ++k) adamw_update(step, g[k] * unscale, value[k], m[k], v[k]);
        store_pack(first + i, rounded<T>(m), wide);
        store_pack(second + i, rounded<T>(v), wide);
        store_pack(w + i, rounded<T>(value), wide);
      },
      [&](int i) {
        T old = from[i];
        if (!skips) {
          float value = widened(old), m = widened(first[i]), v = widened(second[i]);
          adamw_update(step, widened(g[i]) * unscale, value, m, v);
          first[i] = from_float<T>(m);
          second[i] = from_float<T>(v);
          old = from_float<T>(value);
        }
        w[i] = old;
      });
}

// Puts w of what is listed in the place of w + e, where decoding leaves it.
template <class T>
void put_listed(const Call& call, const std::vector<Entry<2>>& rows, const CodeList& list) {
  launch_long_list(call, rows, [](auto table) { return put_listed_kernel<T, typename decltype(table)::type>; }, list);
}

// Weights, gradients, stash, moments, and the address of each tensor's step count.
std::vector<Entry<6>> counted_rows(const Plan& plan, const float* const* steps) {
  const auto columns = tensor_rows<5>(plan, {kWeight, kGrad, kStash, kFirst, kSecond});
  std::vector<Entry<6>> rows(columns.size());
  for (size_t t = 0; t < rows.size(); ++t) {
    std::copy(columns[t].word, columns[t].word + 5, rows[t].word);
    rows[t].word[5] = reinterpret_cast<uintptr_t>(steps[t]);
    rows[t].elements = columns[t].elements;
  }
  return rows;
}

}  // namespace

void sam_decode(const Plan& plan, const CodeList& list, int device, void* stream) {
  const Call call("sam_decode_", device, stream);
  const auto rows = tensor_rows<2>(plan, {kWeight, kStash});
  with_dtype(plan.dtype(), [&](auto t) {
    using T = decltype(t);
    put_listed<T>(call, rows, list);
    launch_long_list<kPieceElements>(call, rows,
                                     [](auto table) { return decode_kernel<T, typename decltype(table)::type>; });
  });
}

void sam_cast(const Plan& plan, int device, void* stream) {
  const Call call("sam_cast_", device, stream);
  const auto rows = tensor_rows<2>(plan, {kWeight, kStash});
  with_dtype(plan.dtype(), [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2)
      launch_list<kPieceElements>(call, rows, [](auto list) { return cast_kernel<T, typename decltype(list)::type>; });
  });
}

void sam_restore(const Plan& plan, int device, void* stream) {
  const Call call("sam_restore_", device, stream);
  const auto rows = span_rows<2>(plan, {kWeight, kStash});
  launch_list<kPieceElements>(call, rows, [&](auto list) {
    using List = typename decltype(list)::type;
    return element_size(plan.dtype()) == 4 ? restore_kernel<uint32_t, List> : restore_kernel<uint16_t, List>;
  });
}

void sam_restore_adamw(const Plan& plan, const AdamW& how, const float* const* steps, const float* grad_scale,
                       const float* found_inf, int device, void* stream) {
  const Call call("sam_restore_adamw_", device, stream);
  with_dtype(plan.dtype(), [&](auto t) {
    launch_list(
        call, counted_rows(plan, steps),
        [](auto list) { return restore_adamw_kernel<decltype(t), FromCopy, typename decltype(list)::type>; }, how,
        grad_scale, found_inf);
  });
}

void sam_decode_adamw(const Plan& plan, const AdamW& how, const float* const* steps, const float* grad_scale,
                      const float* found_inf, const CodeList& list, int device, void* stream) {
  const Call call("sam_decode_adamw_", device, stream);
  with_dtype(plan.dtype(), [&](auto t) {
    using T = decltype(t);
    put_listed<T>(call, tensor_rows<2>(plan, {kWeight, kStash}), list);
    launch_long_list(
        call, counted_rows(plan, steps),
        [](auto table) { return restore_adamw_kernel<T, FromCodes, typename decltype(table)::type>; }, how, grad_scale,
        found_inf);
  });
}

}  // namespace fastpost::cuda
