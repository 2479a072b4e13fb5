// Arithmetic on 16 bytes of elements.
#pragma once

#include <type_traits>

#include "core/params.h"
#include "cuda/fast_math.cuh"
#include "cuda/launch.cuh"

namespace fastpost::cuda {

// The elements as floats. bfloat16 by words of two: a half taken out by itself costs two instructions, not one.
template <class T>
__device__ __forceinline__ void unpack(const Pack<T>& pack, float* x) {
  if constexpr (std::is_same_v<T, bf16>) {
    uint32_t word[Pack<T>::size / 2];
    memcpy(word, &pack, sizeof word);
#pragma unroll
    for (int k = 0; k < Pack<T>::size; ++k) x[k] = bits_float(k % 2 ? word[k / 2] & 0xffff0000u : word[k / 2] << 16);
  } else {
#pragma unroll
    for (int k = 0; k < Pack<T>::size; ++k) x[k] = widened(pack.value[k]);
  }
}

// Floats rounded to the nearest by the hardware, a pair at a time: the bits of from_float, except that a NaN loses its sign
// and its payload. For results of arithmetic, where these mean nothing.
template <class T>
__device__ __forceinline__ Pack<T> rounded(const float* x) {
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < pack.size; k += 2) round_pair(x[k], x[k + 1], &pack.value[k]);
  return pack;
}

// As rounded(), but with all bits of from_float: for numbers that change their type and nothing else.
template <class T>
__device__ __forceinline__ Pack<T> converted(const float* x) {
  Pack<T> pack = rounded<T>(x);
  float largest = x[0];
#pragma unroll
  for (int k = 1; k < pack.size; ++k) largest = max_or_nan(largest, x[k]);
  if (largest != largest) {
#pragma unroll
    for (int k = 0; k < pack.size; ++k) pack.value[k] = from_float<T>(x[k]);
  }
  return pack;
}

// Flips the sign of element k where bit k is set.
template <class T>
__device__ __forceinline__ Pack<T> flipped(const Pack<T>& pack, uint32_t bits) {
  constexpr int per_word = sizeof(uint32_t) / sizeof(T), words = sizeof(Pack<T>) / sizeof(uint32_t);
  uint32_t word[words];
  memcpy(word, &pack, sizeof word);
#pragma unroll
  for (int k = 0; k < words; ++k) {
    const uint32_t mine = bits >> (k * per_word);
    word[k] ^= per_word == 1 ? mine << 31 : (mine << 30 & 0x80000000u) | (mine << 15 & 0x8000u);
  }
  Pack<T> result;
  memcpy(&result, word, sizeof result);
  return result;
}

template <class T>
__device__ __forceinline__ Pack<T> negated(const Pack<T>& pack) {
  return flipped(pack, 0xffu);
}

// The codes of one pack, in one access where that is possible.
template <class T>
struct alignas(8) CodePack {
  Code<T> value[Pack<T>::size];
};

// float32 masters, as many as 16 bytes of T hold elements.
template <class T>
struct Masters {
  static constexpr int packs = Pack<T>::size / Pack<float>::size;
  Pack<float> pack[packs];

  __device__ __forceinline__ void load(const float* from, bool wide) {
#pragma unroll
    for (int k = 0; k < packs; ++k) pack[k] = load_pack(from + k * Pack<float>::size, wide);
  }
  __device__ __forceinline__ float operator[](int k) const {
    return pack[k / Pack<float>::size].value[k % Pack<float>::size];
  }
};

}  // namespace fastpost::cuda
