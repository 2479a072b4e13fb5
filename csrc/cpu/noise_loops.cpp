// Inner loops of noise, for one instruction set. Compiled without FMA contraction: x + eps * z must be the same bits in
// every backend.
#include "api.h"
#include "core/noise.h"
#include "cpu/loops.h"

namespace fastpost::cpu {
namespace {

constexpr int kQuads = 64;  // Philox calls at a time, four numbers each
constexpr int kLanes = 16;  // and at least so many: no instruction set has wider vectors

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// z of elements 4 * quad ... 4 * (quad + quads) - 1. The words are drawn and turned into numbers side by side, then
// interleaved. quads is a multiple of kLanes, at most kQuads.
void draw(uint64_t seed, uint64_t quad, int quads, int type, float* z) {
  alignas(64) uint32_t words[4][kQuads];
  alignas(64) float numbers[4][kQuads];
#pragma omp simd
  for (int k = 0; k < quads; ++k) {
    const PhiloxWords r = philox(seed, quad + k, 0);
    words[0][k] = r.word[0];
    words[1][k] = r.word[1];
    words[2][k] = r.word[2];
    words[3][k] = r.word[3];
  }
  if (type == static_cast<int>(NoiseType::uniform)) {
    for (int j = 0; j < 4; ++j)
#pragma omp simd
      for (int k = 0; k < quads; ++k) numbers[j][k] = uniform_from_word(words[j][k]);
  } else {
    for (int j = 0; j < 4; j += 2)
#pragma omp simd
      for (int k = 0; k < quads; ++k) {
        float cosine, sine;
        unit_circle(words[j + 1][k], &cosine, &sine);
        const float radius = normal_radius(words[j][k]);
        numbers[j][k] = radius * cosine;
        numbers[j + 1][k] = radius * sine;
      }
  }
#pragma omp simd
  for (int k = 0; k < quads; ++k) {
    z[4 * k] = numbers[0][k];
    z[4 * k + 1] = numbers[1][k];
    z[4 * k + 2] = numbers[2][k];
    z[4 * k + 3] = numbers[3][k];
  }
}

template <class In, class Out>
void add_noise_to(const In* x, Out* y, uint64_t first, int64_t n, float eps, int type, uint64_t seed, bool noise) {
  if (!noise) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] = from_float<Out>(to_float(x[i]));
    return;
  }
  alignas(64) float z[4 * kQuads];
  for (int64_t i = 0; i < n;) {
    const uint64_t element = first + i;
    const int64_t skipped = static_cast<int64_t>(element % 4);
    const int64_t m = least(4 * kQuads - skipped, n - i);
    const int64_t quads = (skipped + m + 4 * kLanes - 1) / (4 * kLanes) * kLanes;  // a short row draws only what it needs
    draw(seed, element / 4, static_cast<int>(quads), type, z);
    const float* zi = z + skipped;
#pragma omp simd
    for (int64_t k = 0; k < m; ++k) y[i + k] = from_float<Out>(to_float(x[i + k]) + eps * zi[k]);
    i += m;
  }
}

void add_noise(DType in, DType out, const void* x, void* y, uint64_t first, int64_t n, float eps, int type, uint64_t seed,
               bool noise) {
  with_dtype(in, [&](auto from) {
    with_dtype(out, [&](auto to) {
      add_noise_to(static_cast<const decltype(from)*>(x), static_cast<decltype(to)*>(y), first, n, eps, type, seed, noise);
    });
  });
}

}  // namespace

extern const NoiseLoops FASTPOST_PASTE(noise_loops_, FASTPOST_ISA);
const NoiseLoops FASTPOST_PASTE(noise_loops_, FASTPOST_ISA) = {add_noise};

}  // namespace fastpost::cpu
