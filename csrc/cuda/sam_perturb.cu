// SAM's ascent on lists of tensors on CUDA, from w to w + e: launches around core/params.h.
#include <type_traits>

#include "api.h"
#include "core/params.h"
#include "core/philox.h"
#include "cuda/launch.cuh"
#include "cuda/packs.cuh"
#include "cuda/sums.cuh"

namespace fastpost::cuda {
namespace {

constexpr int kSums = 6;

// The six sums over what perturbations e leave: e^2, s^2, e s, v^2, e v with s what was stored and v what of it is seen, and
// how many elements moved. Seen, the type that weights are read in, is T wherever the other type holds all of T's numbers.
template <class T, class Seen>
struct Moved {
  static constexpr bool sees_all = std::is_same_v<T, Seen>;
  float sum[kSums] = {};  // floats are enough for a chunk: at most 128 elements a thread

  // Of an even number of elements; one that has not moved adds nothing.
  template <int count>
  __device__ __forceinline__ void add(const float (&e)[count], const float (&before)[count], const float (&after)[count]) {
#pragma unroll
    for (int k = 0; k < count; ++k) {
      const float s = after[k] - before[k];
      sum[0] += e[k] * e[k];
      sum[1] += s * s;
      sum[2] += e[k] * s;
      sum[5] += s != 0.0f ? 1.0f : 0.0f;
    }
    if constexpr (!sees_all) {
#pragma unroll
      for (int k = 0; k < count; k += 2) {
        Seen from[2], to[2];
        round_pair(before[k], before[k + 1], from);
        round_pair(after[k], after[k + 1], to);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float v = widened(to[j]) - widened(from[j]);
          sum[3] += v * v;
          sum[4] += e[k + j] * v;
        }
      }
    }
  }
  template <bool folds = true>
  __device__ __forceinline__ void store(const SumsOf& sums, int64_t chunk) const {
    double wide[kSums];
#pragma unroll
    for (int k = 0; k < kSums; ++k) wide[k] = sum[sees_all && (k == 3 || k == 4) ? k - 2 : k];
    store_sums<folds>(wide, sums, chunk);
  }
};

// w + e. Fused with the product that e is, it would have other bits in one kernel than in the next.
__device__ __forceinline__ float moved_by(float w, float e) { return __fadd_rn(w, e); }

struct Step {
  bool moves;
  SplitScale scale;
};

__device__ __forceinline__ Step step_of(double rho, double squared) {
  const bool moved = moves(rho, squared);
  return {moved, split_scale(moved ? rho / sqrt(squared) : 0)};
}

// A pack of weights and of what moves them.
template <class T>
struct Held {
  Pack<T> ws, gs;
};

// Whether the last block of sam_perturb_kernel adds up. Where float16 is rounded randomly and seen in bfloat16, the 64
// registers of a thread do not hold that as well on sm_120.
template <class T, class Seen, bool stochastic>
constexpr bool kPerturbFolds = !(stochastic && std::is_same_v<T, f16> && !std::is_same_v<T, Seen>);

// How w is kept in column 2: before w + e is known, or when it is.
template <class T>
struct Copies {
  using Kept = T;
  static constexpr bool codes = false;
  T* stash;

  __device__ Copies(T* stash, const CodeList&, int64_t) : stash(stash) {}
  __device__ __forceinline__ void keep(int i, const Pack<T>& held, bool wide) const { store_pack(stash + i, held, wide); }
  __device__ __forceinline__ void keep(int i, T held) const { stash[i] = held; }
  __device__ __forceinline__ void code(int, const Pack<T>&, Pack<T>&, bool) const {}
  __device__ __forceinline__ void code(int, T, T&) const {}
};

// As codes (core/params.h). What neither a code nor the list has room for is pending, and stays w.
template <class T>
struct Codes {
  using Kept = Code<T>;
  static constexpr bool codes = true;
  Code<T>* stash;
  CodeList list;
  int64_t chunk;

  __device__ Codes(Code<T>* stash, const CodeList& list, int64_t chunk) : stash(stash), list(list), chunk(chunk) {}
  __device__ __forceinline__ void keep(int, const Pack<T>&, bool) const {}
  __device__ __forceinline__ void keep(int, T) const {}
  // Lists `count` elements of `which` code among these; the place of the first is i.
  template <int count>
  __device__ __forceinline__ void enter(int i, const T (&held)[count], T (&written)[count], Code<T> (&code)[count],
                                        Code<T> which, int wanted) const {
    unsigned long long slot =
        atomicAdd(reinterpret_cast<unsigned long long*>(list.words), static_cast<unsigned long long>(wanted));
#pragma unroll
    for (int k = 0; k < count; ++k) {
      if (code[k] != which) continue;
      const bool fits = slot < static_cast<unsigned long long>(list.capacity);
      if (fits)
        list.words[1 + slot] = listed<T>(chunk, i + k, bits_of(held[k]));
      else
        written[k] = held[k];
      code[k] = fits ? kListed<T> : kPending<T>;
      ++slot;
    }
  }
  template <int count>
  __device__ __forceinline__ void encode(int i, const T (&held)[count], T (&written)[count], Code<T> (&code)[count]) const {
    int wanted = 0;
#pragma unroll
    for (int k = 0; k < count; ++k) {
      code[k] = encoded<T>(bits_of(held[k]), bits_of(written[k]));
      wanted += code[k] == kListed<T>;
    }
    if (wanted != 0) enter(i, held, written, code, kListed<T>, wanted);
  }
  __device__ __forceinline__ void code(int i, const Pack<T>& held, Pack<T>& written, bool wide) const {
    CodePack<T> pack;
    encode(i, held.value, written.value, pack.value);
    put(i, pack, wide);
  }
  __device__ __forceinline__ void code(int i, T held, T& written) const {
    const T before[1] = {held};
    T after[1] = {written};
    Code<T> code[1];
    encode(i, before, after, code);
    written = after[0];
    stash[i] = code[0];
  }
  __device__ __forceinline__ void put(int i, const CodePack<T>& pack, bool wide) const {
    if (wide) {
      uint2 raw;
      memcpy(&raw, &pack, sizeof raw);
      __stwb(reinterpret_cast<uint2*>(stash + i), raw);
    } else {
#pragma unroll
      for (int k = 0; k < Pack<T>::size; ++k) stash[i + k] = pack.value[k];
    }
  }
};

// Stochastic: column 3 of the table is the tensor's number, which keys its random bits. The list is of codes alone.
// With both, 64 registers do not hold a thread's numbers, so one block has the multiprocessor to itself.
template <class T, class Seen, bool adaptive, bool stochastic, template <class> class Keep, class List>
__global__ void __launch_bounds__(kThreads, stochastic&& Keep<T>::codes ? 1 : kPair)
    sam_perturb_kernel(const __grid_constant__ List table, double rho, float eta, const double* __restrict__ squared_norm,
                       const int64_t* __restrict__ seed, const CodeList list, const SumsOf sums) {
  constexpr int size = Pack<T>::size;
  constexpr int together = (stochastic && std::is_same_v<T, f16>) || Keep<T>::codes ? 1 : 2;  // as 64 registers allow
  const Step step = step_of(rho, *squared_norm);
  const uint64_t key = stochastic ? static_cast<uint64_t>(*seed) : 0;
  const auto place = locate(table, blockIdx.x);
  T* w = place.template at<T>(0);
  const T* g = place.template at<T>(1);
  using Kept = typename Keep<T>::Kept;
  Kept* stash = place.template at<Kept>(2);
  const Keep<T> stashed(stash, list, place.chunk);
  Moved<T, Seen> moved;
  const auto words_of = [&](int i) {
    if constexpr (stochastic)
      return philox(key, static_cast<uint64_t>(place.begin + i) / 8, static_cast<uint32_t>(place.entry->word[3]));
    else
      return PhiloxWords{};
  };
  const auto step_at = [&](float before, float gradient) {
    return adaptive ? perturbation(gradient, step.scale, before, eta) : perturbation(gradient, step.scale);
  };
  if (!step.moves) {  // w keeps its bits, which are more than its value plus zero
    if constexpr (Keep<T>::codes)
      for (int i = threadIdx.x; i < place.length; i += kThreads) stash[i] = 0;
    else
      walk<T, 4>(
          place.length, aligned(w) && aligned(stash), [&](int i, bool wide) { return load_pack(w + i, wide); },
          [&](int i, const Pack<T>& held, bool wide) { store_pack(stash + i, held, wide); },
          [&](int i) { stash[i] = w[i]; });
    moved.template store<kPerturbFolds<T, Seen, stochastic>>(sums, place.chunk);
    return;
  }
  walk<T, together>(
      place.length, aligned(w) && aligned(g) && aligned(stash),
      [&](int i, bool wide) { return Held<T>{load_pack(w + i, wide), load_pack(g + i, wide)}; },
      [&](int i, const Held<T>& held, bool wide) {
        stashed.keep(i, held.ws, wide);
        const PhiloxWords words = words_of(i);
        float before[size], e[size], after[size];
        unpack(held.ws, before);
        unpack(held.gs, e);
        Pack<T> written;
#pragma unroll
        for (int k = 0; k < size; ++k) {
          e[k] = step_at(before[k], e[k]);
          after[k] = moved_by(before[k], e[k]);
          if constexpr (stochastic)
            written.value[k] = round_randomly<T>(after[k], words.word[k / 2 % 4] >> (k % 2 * 16) & 0xffffu);
        }
        if constexpr (!stochastic) written = rounded<T>(after);
        unpack(written, after);
        moved.add(e, before, after);
        stashed.code(i, held.ws, written, wide);
        store_pack(w + i, written, wide);
      },
      [&](int i) {
        const T old = w[i];
        stashed.keep(i, old);
        const PhiloxWords words = words_of(i);
        const unsigned which = i % 8 / 2;  // indexing with it would put the words into local memory
        const uint32_t word =
            which < 2 ? (which == 0 ? words.word[0] : words.word[1]) : (which == 2 ? words.word[2] : words.word[3]);
        const float before = widened(old), e = step_at(before, widened(g[i]));
        T written = stochastic ? round_randomly<T>(moved_by(before, e), word >> (i % 2 * 16) & 0xffffu)
                               : from_float<T>(moved_by(before, e));
        moved.add({e, 0.0f}, {before, 0.0f}, {widened(written), 0.0f});
        stashed.code(i, old, written);
        w[i] = written;
      });
  moved.template store<kPerturbFolds<T, Seen, stochastic>>(sums, place.chunk);
}

// What found no room in the list before: perturbed now, as sam_perturb_kernel would have.
template <class T, bool adaptive, bool stochastic, class List>
__global__ void __launch_bounds__(kThreads, kPair)
    perturb_pending_kernel(const __grid_constant__ List table, double rho, float eta,
                           const double* __restrict__ squared_norm, const int64_t* __restrict__ seed, const CodeList list) {
  const Step step = step_of(rho, *squared_norm);
  const auto place = locate(table, blockIdx.x);
  T* w = place.template at<T>(0);
  const T* g = place.template at<T>(1);
  const Codes<T> stashed(place.template at<Code<T>>(2), list, place.chunk);
#pragma unroll 1
  for (int i = threadIdx.x; i < place.length; i += kThreads) {
    if (stashed.stash[i] != kPending<T>) continue;
    const T held[1] = {w[i]};
    const float before = widened(held[0]), gradient = widened(g[i]);
    const float e = adaptive ? perturbation(gradient, step.scale, before, eta) : perturbation(gradient, step.scale);
    T written[1];
    if constexpr (stochastic) {
      const auto words = philox(static_cast<uint64_t>(*seed), static_cast<uint64_t>(place.begin + i) / 8,
                                static_cast<uint32_t>(place.entry->word[3]));
      const unsigned which = i % 8 / 2;
      const uint32_t word =
          which < 2 ? (which == 0 ? words.word[0] : words.word[1]) : (which == 2 ? words.word[2] : words.word[3]);
      written[0] = round_randomly<T>(moved_by(before, e), word >> (i % 2 * 16) & 0xffffu);
    } else {
      T pair[2];  // as packs are rounded, whose NaNs have other bits
      round_pair(moved_by(before, e), moved_by(before, e), pair);
      written[0] = i < place.length / Pack<T>::size * Pack<T>::size ? pair[0] : from_float<T>(moved_by(before, e));
    }
    Code<T> code[1] = {kPending<T>};
    stashed.enter(i, held, written, code, kPending<T>, 1);
    w[i] = written[0];
    stashed.stash[i] = code[0];
  }
}

// w = m + e; column 2 holds the float masters m.
template <class T, class Seen, bool adaptive, class List>
__global__ void __launch_bounds__(kThreads, kPair)
    sam_perturb_masters_kernel(const __grid_constant__ List table, double rho, float eta,
                               const double* __restrict__ squared_norm, const SumsOf sums) {
  struct HeldMasters {
    Pack<T> gs;
    Masters<T> ms;
  };
  constexpr int size = Pack<T>::size;
  const Step step = step_of(rho, *squared_norm);
  const auto place = locate(table, blockIdx.x);
  T* w = place.template at<T>(0);
  const T* g = place.template at<T>(1);
  const float* masters = place.template at<float>(2);
  Moved<T, Seen> moved;
  const auto step_at = [&](float exact, float gradient) {
    return adaptive ? perturbation(gradient, step.scale, exact, eta) : perturbation(gradient, step.scale);
  };
  walk<T, 2>(
      place.length, aligned(w) && aligned(g) && aligned(masters),
      [&](int i, bool wide) {
        HeldMasters held;
        held.gs = load_pack(g + i, wide);
        held.ms.load(masters + i, wide);
        return held;
      },
      [&](int i, const HeldMasters& held, bool wide) {
        float before[size], e[size], after[size];
#pragma unroll
        for (int k = 0; k < size; ++k) before[k] = held.ms[k];
        const Pack<T> cast = converted<T>(before);
        if (!step.moves) return store_pack(w + i, cast, wide);
        unpack(held.gs, e);
#pragma unroll
        for (int k = 0; k < size; ++k) {
          e[k] = step_at(before[k], e[k]);
          after[k] = moved_by(before[k], e[k]);
        }
        const Pack<T> written = rounded<T>(after);
        unpack(cast, before);
        unpack(written, after);
        moved.add(e, before, after);
        store_pack(w + i, written, wide);
      },
      [&](int i) {
        const float exact = masters[i];
        const T cast = from_float<T>(exact);
        if (!step.moves) {
          w[i] = cast;
          return;
        }
        const float e = step_at(exact, widened(g[i]));
        const T written = from_float<T>(moved_by(exact, e));
        moved.add({e, 0.0f}, {widened(cast), 0.0f}, {widened(written), 0.0f});
        w[i] = written;
      });
  moved.store(sums, place.chunk);
}

// The element's type, and the one that weights are read in: the same where the second holds all numbers of the first.
template <class F>
void with_types(DType dtype, DType compute_dtype, F&& body) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    with_dtype(compute_dtype, [&](auto s) {
      if constexpr (std::is_same_v<decltype(s), float>)
        body(t, T{});
      else
        body(t, s);
    });
  });
}

// Weights, gradients, stash, and the number of each tensor, which keys its random bits.
std::vector<Entry<4>> numbered_rows(const Plan& plan) {
  auto rows = tensor_rows<4>(plan, {kWeight, kGrad, kStash, kStash});
  for (int64_t i = 0; i < plan.tensors(); ++i) rows[i].word[3] = plan.stream(i);
  return rows;
}

// list: null where the stash is a copy.
void perturb(const Call& call, const Plan& plan, const Perturbation& how, const double* squared_norm, const int64_t* seed,
             const CodeList* list, const SumRoom& room) {
  const float eta = static_cast<float>(how.eta);
  with_types(plan.dtype(), how.compute_dtype, [&](auto t, auto s) {
    using T = decltype(t);
    using Seen = decltype(s);
    const auto launch = [&](const auto& rows, auto stochastic, const SumsOf& sums) {
      constexpr bool random = decltype(stochastic)::value;
      if (list != nullptr)
        return launch_long_list(
            call, rows,
            [&](auto table) {
              using List = typename decltype(table)::type;
              return how.adaptive ? sam_perturb_kernel<T, Seen, true, random, Codes, List>
                                  : sam_perturb_kernel<T, Seen, false, random, Codes, List>;
            },
            how.rho, eta, squared_norm, seed, *list, sums);
      launch_list(
          call, rows,
          [&](auto table) {
            using List = typename decltype(table)::type;
            return how.adaptive ? sam_perturb_kernel<T, Seen, true, random, Copies, List>
                                : sam_perturb_kernel<T, Seen, false, random, Copies, List>;
          },
          how.rho, eta, squared_norm, seed, CodeList{}, sums);
    };
    if constexpr (sizeof(T) == 2) {
      if (seed != nullptr) {
        const auto rows = numbered_rows(plan);
        SumRoom here = room;
        if (!kPerturbFolds<T, Seen, true>) here.ticket = nullptr;
        return launch_sums<kSums, 4>(call, plan, rows.size(), here,
                                     [&](const SumsOf& sums) { launch(rows, std::true_type{}, sums); });
      }
    }
    const auto rows = tensor_rows<3>(plan, {kWeight, kGrad, kStash});
    launch_sums<kSums, 3>(call, plan, rows.size(), room, [&](const SumsOf& sums) { launch(rows, std::false_type{}, sums); });
  });
}

}  // namespace

void sam_perturb(const Plan& plan, const Perturbation& how, const double* squared_norm, const int64_t* seed,
                 const SumRoom& room, int device, void* stream) {
  perturb(Call("sam_perturb_", device, stream), plan, how, squared_norm, seed, nullptr, room);
}

void sam_perturb_coded(const Plan& plan, const Perturbation& how, const double* squared_norm, const int64_t* seed,
                       const CodeList& list, const SumRoom& room, int device, void* stream) {
  perturb(Call("sam_perturb_coded_", device, stream), plan, how, squared_norm, seed, &list, room);
}

void sam_perturb_pending(const Plan& plan, const Perturbation& how, const double* squared_norm, const int64_t* seed,
                         const CodeList& list, int device, void* stream) {
  const Call call("sam_perturb_coded_", device, stream);
  const auto rows = numbered_rows(plan);
  const float eta = static_cast<float>(how.eta);
  with_dtype(plan.dtype(), [&](auto t) {
    using T = decltype(t);
    launch_long_list(
        call, rows,
        [&](auto table) {
          using List = typename decltype(table)::type;
          if constexpr (sizeof(T) == 2)
            if (seed != nullptr)
              return how.adaptive ? perturb_pending_kernel<T, true, true, List>
                                  : perturb_pending_kernel<T, false, true, List>;
          return how.adaptive ? perturb_pending_kernel<T, true, false, List> : perturb_pending_kernel<T, false, false, List>;
        },
        how.rho, eta, squared_norm, seed, list);
  });
}

void sam_perturb_masters(const Plan& plan, const Perturbation& how, const double* squared_norm, const SumRoom& room,
                         int device, void* stream) {
  const Call call("sam_perturb_masters_", device, stream);
  const auto rows = tensor_rows<3>(plan, {kWeight, kGrad, kStash});
  launch_sums<kSums, 3>(call, plan, rows.size(), room, [&](const SumsOf& sums) {
    with_types(plan.dtype(), how.compute_dtype, [&](auto t, auto s) {
      using T = decltype(t);
      using Seen = decltype(s);
      if constexpr (sizeof(T) == 2)
        launch_list(
            call, rows,
            [&](auto list) {
              using List = typename decltype(list)::type;
              return how.adaptive ? sam_perturb_masters_kernel<T, Seen, true, List>
                                  : sam_perturb_masters_kernel<T, Seen, false, List>;
            },
            how.rho, static_cast<float>(how.eta), squared_norm, sums);
    });
  });
}

}  // namespace fastpost::cuda
