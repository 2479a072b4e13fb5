// Inner loops of the parameter-list operations, for one instruction set.
#include "core/params.h"
#include "core/philox.h"
#include "cpu/loops.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastpost::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // elements whose float sums are folded into float64; also stays in the first cache

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Eight float64 lanes whatever the register width: the order of additions, and so the norm, is the same bits on every
// instruction set (the product of two floats is exact in float64, so fused or not makes no difference). They are in as many
// registers as they need: a vector wider than its registers GCC moves through memory, and what it makes of
// __builtin_convertvector takes four instructions in the place of one.
constexpr int kLanes = 8;
#if defined(__AVX512F__)
constexpr int kWidth = 8;  // numbers in a register
#elif defined(__AVX2__)
constexpr int kWidth = 4;
#else
constexpr int kWidth = 2;
#endif
constexpr int kParts = kLanes / kWidth;
typedef double Part __attribute__((vector_size(8 * kWidth)));

struct Lanes {
  Part part[kParts];
};

#if defined(__AVX512F__)
inline Part widened(__m256 x) { return _mm512_maskz_cvtps_pd(0xff, x); }  // without a mask GCC 12 warns of its own header

inline Part load_part(const float* x) { return widened(_mm256_loadu_ps(x)); }

inline Part load_part(const bf16* x) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return widened(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16)));
}

inline Part load_part(const f16* x) {
  return widened(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
}
#elif defined(__AVX2__)
inline Part load_part(const float* x) { return _mm256_cvtps_pd(_mm_loadu_ps(x)); }

inline Part load_part(const bf16* x) {
  const __m128i halves = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
  return _mm256_cvtps_pd(_mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(halves), 16)));
}

inline Part load_part(const f16* x) {
  return _mm256_cvtps_pd(_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
}
#else
inline Part load_part(const float* x) {
#if defined(__SSE2__)
  return _mm_cvtps_pd(_mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#else
  return Part{x[0], x[1]};
#endif
}
#endif

template <class T>
Lanes load_lanes(const T* x) {
  Lanes lanes;
#if !defined(__AVX2__)
  if constexpr (sizeof(T) == 2) {  // there is no instruction for a few; GCC makes vectors of a loop over eight
    float wide[kLanes];
    for (int j = 0; j < kLanes; ++j) wide[j] = to_float(x[j]);
    return load_lanes(wide);
  } else
#endif
    for (int p = 0; p < kParts; ++p) lanes.part[p] = load_part(x + p * kWidth);
  return lanes;
}

inline double fold(const Lanes& lanes) {
  double a[kLanes];
  memcpy(a, &lanes, sizeof a);
  return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
}

template <class T, Terms what>
double sum_of(const T* x, const T* y, double eta, int64_t n) {
  Lanes sum[4] = {};
  int64_t i = 0;
  const auto add = [&](Lanes& to, int64_t at) {
    const Lanes xs = load_lanes(x + at), ys = what == Terms::squares ? xs : load_lanes(y + at);
    for (int p = 0; p < kParts; ++p) {
      Part a = xs.part[p];
      const Part b = ys.part[p];
      if constexpr (what == Terms::scaled) a *= (b < 0 ? -b : b) + eta;
      if constexpr (what == Terms::differences) a -= b;
      to.part[p] += a * (what == Terms::products ? b : a);
    }
  };
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int k = 0; k < 4; ++k) add(sum[k], i + k * kLanes);
  for (; i + kLanes <= n; i += kLanes) add(sum[0], i);
  double tail = 0;
  for (; i < n; ++i) {
    double a = to_float(x[i]);
    if constexpr (what == Terms::scaled) a *= __builtin_fabs(to_float(y[i])) + eta;
    if constexpr (what == Terms::differences) a -= to_float(y[i]);
    tail += a * (what == Terms::products ? static_cast<double>(to_float(y[i])) : a);
  }
  for (int p = 0; p < kParts; ++p) sum[0].part[p] = (sum[0].part[p] + sum[1].part[p]) + (sum[2].part[p] + sum[3].part[p]);
  return fold(sum[0]) + tail;
}

// Copies past the caches when asked to: a stash is not read again before a whole forward and backward pass. Other threads
// see it once it is fenced; a fence waits for memory, so it stands behind a chunk and not behind each block.
void copy_unfenced(void* to, const void* from, int64_t bytes, bool stream) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
#if defined(__x86_64__)
  if (stream) {
    const int64_t head = least(bytes, (-reinterpret_cast<intptr_t>(out)) & 63);
    memcpy(out, in, head);
    int64_t i = head;
    for (; i + 64 <= bytes; i += 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), _mm512_loadu_si512(in + i));
#elif defined(__AVX__)
      for (int k = 0; k < 64; k += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i + k),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i + k)));
#else
      for (int k = 0; k < 64; k += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(out + i + k),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i + k)));
#endif
    }
    memcpy(out + i, in + i, bytes - i);
    return;
  }
#endif
  memcpy(out, in, bytes);
}

void fence([[maybe_unused]] bool stream) {
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
}

void copy(void* to, const void* from, int64_t bytes, bool stream) {
  copy_unfenced(to, from, bytes, stream);
  fence(stream);
}

// 16 random bits per element, for n elements from one that is a multiple of 8.
void random_halves(uint64_t seed, uint64_t first, uint32_t stream, int64_t n, uint16_t* halves) {
  uint32_t words[4][kBlock / 8];
  const int64_t calls = (n + 7) / 8;
#pragma omp simd
  for (int64_t k = 0; k < calls; ++k) {
    const PhiloxWords r = philox(seed, first / 8 + k, stream);
    words[0][k] = r.word[0];
    words[1][k] = r.word[1];
    words[2][k] = r.word[2];
    words[3][k] = r.word[3];
  }
  for (int64_t k = 0; k < calls; ++k)
    for (int j = 0; j < 4; ++j) {
      halves[8 * k + 2 * j] = static_cast<uint16_t>(words[j][k]);
      halves[8 * k + 2 * j + 1] = static_cast<uint16_t>(words[j][k] >> 16);
    }
}

// from: the weights themselves, or their float masters. held: where to keep the weights, if anywhere.
template <class T, class From, class Seen, bool adaptive, bool stochastic, bool keep = false>
void perturb_block(T* w, const From* from, const T* __restrict g, const uint16_t* __restrict halves, int64_t n,
                   const PerturbLoop& how, double* sums, T* __restrict held = nullptr) {
  constexpr bool cast = !__is_same(T, Seen);  // otherwise the forward sees what is stored
  const SplitScale scale{how.scale_high, how.scale_low};
  float intended = 0, stored = 0, dot = 0, seen = 0, seen_dot = 0;
  int32_t changed = 0;
#pragma omp simd reduction(+ : intended, stored, dot, seen, seen_dot, changed)
  for (int64_t i = 0; i < n; ++i) {
    const float exact = to_float(from[i]);
    float before = exact;
    if constexpr (!__is_same(T, From)) before = to_float(from_float<T>(exact));
    float e;
    if constexpr (adaptive)
      e = perturbation(to_float(g[i]), scale, exact, how.eta);
    else
      e = perturbation(to_float(g[i]), scale);
    if constexpr (keep) memcpy(held + i, from + i, sizeof(T));
    // A T of its own, kept from here to there, would be a struct: GCC then leaves the loop scalar.
    if constexpr (stochastic)
      w[i] = round_randomly<T>(exact + e, halves[i]);
    else
      w[i] = from_float<T>(exact + e);
    const float after = to_float(w[i]);
    const float s = after - before;
    intended += e * e;
    stored += s * s;
    dot += e * s;
    changed += static_cast<int32_t>(s != 0.0f);
    if constexpr (cast) {
      const float v = to_float(from_float<Seen>(after)) - to_float(from_float<Seen>(before));
      seen += v * v;
      seen_dot += e * v;
    }
  }
  sums[kIntendedSq] += intended;
  sums[kStoredSq] += stored;
  sums[kStoredDot] += dot;
  sums[kSeenSq] += cast ? seen : stored;
  sums[kSeenDot] += cast ? seen_dot : dot;
  sums[kChanged] += changed;
}

template <class T, class Seen, bool adaptive>
void perturb_chunk(T* w, const T* g, void* stash, int64_t n, uint64_t first, uint32_t stream, const PerturbLoop& how,
                   double* sums) {
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = least(kBlock, n - i);
    if constexpr (sizeof(T) == 2) {
      if (how.masters) {
        const float* masters = static_cast<const float*>(stash) + i;
        perturb_block<T, float, Seen, adaptive, false>(w + i, masters, g + i, nullptr, m, how, sums);
        continue;
      }
    }
    copy_unfenced(static_cast<T*>(stash) + i, w + i, m * sizeof(T), how.stream);
    if constexpr (sizeof(T) == 2) {
      if (how.stochastic) {
        uint16_t halves[kBlock];
        random_halves(how.seed, first + i, stream, m, halves);
        perturb_block<T, T, Seen, adaptive, true>(w + i, w + i, g + i, halves, m, how, sums);
        continue;
      }
    }
    perturb_block<T, T, Seen, adaptive, false>(w + i, w + i, g + i, nullptr, m, how, sums);
  }
  fence(how.stream);
}

template <class T>
void encode_block(const T* before, const T* after, Code<T>* __restrict codes, int64_t n) {
  using Bits = typename SignBits<T>::type;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i)
    codes[i] = distance_code<T>(reinterpret_cast<const Bits*>(before)[i], reinterpret_cast<const Bits*>(after)[i]);
}

// Which of 64 codes are `which`, a bit each.
inline uint64_t places_of(const int8_t* codes, int8_t which) {
  uint64_t places = 0;
#if defined(__AVX512BW__)
  places = _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(codes), _mm512_set1_epi8(which));
#elif defined(__SSE2__)
  for (int k = 0; k < 64; k += 16) {
    const __m128i some = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k));
    const int found = _mm_movemask_epi8(_mm_cmpeq_epi8(some, _mm_set1_epi8(which)));
    places |= static_cast<uint64_t>(static_cast<uint32_t>(found)) << k;
  }
#else
  for (int k = 0; k < 64; ++k) places |= static_cast<uint64_t>(codes[k] == which) << k;
#endif
  return places;
}

inline uint64_t places_of(const int16_t* codes, int16_t which) {
  uint64_t places = 0;
#if defined(__AVX512BW__)
  for (int k = 0; k < 64; k += 32)
    places |= static_cast<uint64_t>(_mm512_cmpeq_epi16_mask(_mm512_loadu_si512(codes + k), _mm512_set1_epi16(which))) << k;
#elif defined(__SSE2__)
  for (int k = 0; k < 64; k += 16) {
    const auto* some = reinterpret_cast<const __m128i*>(codes + k);
    const __m128i sought = _mm_set1_epi16(which);
    const __m128i low = _mm_cmpeq_epi16(_mm_loadu_si128(some), sought);
    const int found = _mm_movemask_epi8(_mm_packs_epi16(low, _mm_cmpeq_epi16(_mm_loadu_si128(some + 1), sought)));
    places |= static_cast<uint64_t>(static_cast<uint32_t>(found)) << k;
  }
#else
  for (int k = 0; k < 64; ++k) places |= static_cast<uint64_t>(codes[k] == which) << k;
#endif
  return places;
}

// Calls body with each place whose code is `which`.
template <class C, class F>
inline void for_places(const C* codes, int64_t n, C which, F&& body) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (uint64_t places = places_of(codes + i, which); places != 0; places &= places - 1) body(i + __builtin_ctzll(places));
  for (; i < n; ++i)
    if (codes[i] == which) body(i);
}

// Gives weights that are +0 their own code; returns how many codes are still `which`.
template <class T>
int64_t code_zeros(const T* before, Code<T>* codes, int64_t n) {
  int64_t wanted = 0;
  for_places(codes, n, kListed<T>, [&](int64_t i) {
    const bool zero = bits_of(before[i]) == 0;
    codes[i] = zero ? kZero<T> : kListed<T>;
    wanted += !zero;
  });
  return wanted;
}

// Lists the elements whose code is `which`, `wanted` of them; those that find no room are pending, and stay w.
template <class T>
void list_block(const T* before, T* after, Code<T>* codes, int64_t n, Code<T> which, int64_t wanted, int64_t chunk,
                int64_t begin, const CodeList& list) {
  if (wanted == 0) return;
  int64_t slot = static_cast<int64_t>(__atomic_fetch_add(list.words, static_cast<uint64_t>(wanted), __ATOMIC_RELAXED));
  for_places(codes, n, which, [&](int64_t i) {
    constexpr int64_t kAhead = 64;  // stores wait in order for lines that nobody has read before
    __builtin_prefetch(list.words + 1 + slot + kAhead, 1);
    const bool fits = slot < list.capacity;
    codes[i] = fits ? kListed<T> : kPending<T>;
    if (fits)
      list.words[1 + slot] = listed<T>(chunk, begin + i, bits_of(before[i]));
    else
      after[i] = before[i];
    ++slot;
  });
}

template <class T, class Seen, bool adaptive>
void perturb_coded_chunk(T* w, const T* g, Code<T>* codes, int64_t n, uint64_t first, uint32_t stream, int64_t chunk,
                         const PerturbLoop& how, const CodeList& list, bool pending, double* sums) {
  T held[kBlock];
  Code<T> fresh[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = least(kBlock, n - i);
    int64_t waiting = 0;
    if (pending) {
      for (int64_t k = 0; k < m; ++k) waiting += codes[i + k] == kPending<T>;
      if (waiting == 0) continue;
    }
    bool done = false;
    if constexpr (sizeof(T) == 2) {
      if (how.stochastic) {
        uint16_t halves[kBlock];
        random_halves(how.seed, first + i, stream, m, halves);
        perturb_block<T, T, Seen, adaptive, true, true>(w + i, w + i, g + i, halves, m, how, sums, held);
        done = true;
      }
    }
    if (!done) perturb_block<T, T, Seen, adaptive, false, true>(w + i, w + i, g + i, nullptr, m, how, sums, held);
    if (pending) {
      for (int64_t k = 0; k < m; ++k)
        if (codes[i + k] != kPending<T>) w[i + k] = held[k];
      list_block(held, w + i, codes + i, m, kPending<T>, waiting, chunk, i, list);
    } else {
      encode_block(held, w + i, fresh, m);
      list_block(held, w + i, fresh, m, kListed<T>, code_zeros(held, fresh, m), chunk, i, list);
      copy_unfenced(codes + i, fresh, m * static_cast<int64_t>(sizeof(Code<T>)), how.stream);
    }
  }
  fence(how.stream);
}

// w may be where w + e lies.
template <class T>
void decode_of(const T* after, const Code<T>* codes, T* w, int64_t n) {
  using Bits = typename SignBits<T>::type;
  const auto* from = reinterpret_cast<const Bits*>(after);
  auto* bits = reinterpret_cast<Bits*>(w);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) bits[i] = decoded<T>(codes[i], from[i]);
}

template <class T>
void cast_of(T* w, const float* masters, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) w[i] = from_float<T>(masters[i]);
}

template <class T>
void negate_of(T* g, int64_t n) {
  using Bits = typename SignBits<T>::type;
  Bits* bits = reinterpret_cast<Bits*>(g);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) bits[i] ^= SignBits<T>::sign;
}

template <class T>
void scale_of(T* g, double factor, int64_t n) {
  // In float64 a factor below float's range still scales; the product is rounded to float, then to T.
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) g[i] = from_float<T>(static_cast<float>(to_float(g[i]) * factor));
}

template <class T>
void flip_signs_of(T* g, uint64_t seed, uint64_t first, uint32_t stream, int64_t n) {
  using Bits = typename SignBits<T>::type;
  Bits* bits = reinterpret_cast<Bits*>(g);
  constexpr int kCalls = 16;  // Philox calls at a time, 128 bits each; a chunk starts on a multiple of 128 elements
  uint32_t words[4][kCalls];
  for (int64_t i = 0; i < n; i += kCalls * 128) {
#pragma omp simd
    for (int k = 0; k < kCalls; ++k) {
      const PhiloxWords r = philox(seed, (first + i) / 128 + k, stream);
      words[0][k] = r.word[0];
      words[1][k] = r.word[1];
      words[2][k] = r.word[2];
      words[3][k] = r.word[3];
    }
    for (int64_t at = i; at < n && at < i + kCalls * 128; at += 32) {
      const uint32_t word = words[(at - i) / 32 % 4][(at - i) / 128];
      const int64_t m = least(32, n - at);
#pragma omp simd
      for (int64_t b = 0; b < m; ++b) bits[at + b] ^= static_cast<Bits>((word >> b & 1u) << (8 * sizeof(Bits) - 1));
    }
  }
}

template <class T>
void restore_adamw_of(T* __restrict w, const T* __restrict g, const T* __restrict stash, T* __restrict first,
                      T* __restrict second, int64_t n, const AdamWStep step, float unscale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float value = to_float(stash[i]), m = to_float(first[i]), v = to_float(second[i]);
    adamw_update(step, to_float(g[i]) * unscale, value, m, v);
    w[i] = from_float<T>(value);
    first[i] = from_float<T>(m);
    second[i] = from_float<T>(v);
  }
}

template <class T>
void decode_adamw_of(T* w, const T* g, const Code<T>* codes, T* first, T* second, int64_t n, const AdamWStep& step,
                     float unscale) {
  T held[kBlock];
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = least(kBlock, n - i);
    decode_of(w + i, codes + i, held, m);
    restore_adamw_of(w + i, g + i, held, first + i, second + i, m, step, unscale);
  }
}

double sum(DType dtype, Terms what, const void* x, const void* y, double eta, int64_t n) {
  double total = 0;
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    const auto of = what == Terms::squares       ? sum_of<T, Terms::squares>
                    : what == Terms::scaled      ? sum_of<T, Terms::scaled>
                    : what == Terms::differences ? sum_of<T, Terms::differences>
                                                 : sum_of<T, Terms::products>;
    total = of(static_cast<const T*>(x), static_cast<const T*>(y), eta, n);
  });
  return total;
}

void perturb(DType dtype, void* w, const void* g, void* stash, int64_t n, uint64_t first, uint32_t stream,
             const PerturbLoop& how, double* sums) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    with_dtype(how.compute_dtype, [&](auto s) {
      using Seen = decltype(s);
      const auto run = how.adaptive ? perturb_chunk<T, Seen, true> : perturb_chunk<T, Seen, false>;
      run(static_cast<T*>(w), static_cast<const T*>(g), stash, n, first, stream, how, sums);
    });
  });
}

void perturb_coded(DType dtype, void* w, const void* g, void* codes, int64_t n, uint64_t first, uint32_t stream,
                   int64_t chunk, const PerturbLoop& how, const CodeList& list, bool pending, double* sums) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    with_dtype(how.compute_dtype, [&](auto s) {
      using Seen = decltype(s);
      const auto run = how.adaptive ? perturb_coded_chunk<T, Seen, true> : perturb_coded_chunk<T, Seen, false>;
      run(static_cast<T*>(w), static_cast<const T*>(g), static_cast<Code<T>*>(codes), n, first, stream, chunk, how, list,
          pending, sums);
    });
  });
}

void decode(DType dtype, void* w, const void* codes, int64_t n) {
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    decode_of(static_cast<const T*>(w), static_cast<const Code<T>*>(codes), static_cast<T*>(w), n);
  });
}

void cast(DType dtype, void* w, const float* masters, int64_t n) {
  with_dtype(dtype, [&](auto t) { cast_of(static_cast<decltype(t)*>(w), masters, n); });
}

void negate(DType dtype, void* g, int64_t n) {
  with_dtype(dtype, [&](auto t) { negate_of(static_cast<decltype(t)*>(g), n); });
}

void scale(DType dtype, void* g, double factor, int64_t n) {
  with_dtype(dtype, [&](auto t) { scale_of(static_cast<decltype(t)*>(g), factor, n); });
}

void flip_signs(DType dtype, void* g, uint64_t seed, uint64_t first, uint32_t stream, int64_t n) {
  with_dtype(dtype, [&](auto t) { flip_signs_of(static_cast<decltype(t)*>(g), seed, first, stream, n); });
}

void restore_adamw(DType dtype, void* w, const void* g, const void* stash, void* first, void* second, int64_t n,
                   const AdamW& how, double steps, double grad_scale) {
  const AdamWStep step = adamw_step(how, steps);
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    restore_adamw_of(static_cast<T*>(w), static_cast<const T*>(g), static_cast<const T*>(stash), static_cast<T*>(first),
                     static_cast<T*>(second), n, step, static_cast<float>(1.0 / grad_scale));
  });
}

void decode_adamw(DType dtype, void* w, const void* g, const void* codes, void* first, void* second, int64_t n,
                  const AdamW& how, double steps, double grad_scale) {
  const AdamWStep step = adamw_step(how, steps);
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    decode_adamw_of(static_cast<T*>(w), static_cast<const T*>(g), static_cast<const Code<T>*>(codes), static_cast<T*>(first),
                    static_cast<T*>(second), n, step, static_cast<float>(1.0 / grad_scale));
  });
}

}  // namespace

extern const ParamsLoops FASTPOST_PASTE(params_loops_, FASTPOST_ISA);
const ParamsLoops FASTPOST_PASTE(params_loops_, FASTPOST_ISA) = {
    sum, perturb, perturb_coded, decode, decode_adamw, cast, copy, negate, scale, flip_signs, restore_adamw};

}  // namespace fastpost::cpu
