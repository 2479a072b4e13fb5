// Writing past the caches, for one instruction set. Everything here belongs to the file that includes it: as in all loops,
// what is compiled for one instruction set must not be linked into another's.
#pragma once

#include <string.h>

#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastpost::cpu {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Copies past the caches when asked to: what is written is not read again before gigabytes have passed, and its lines are
// not fetched only to be overwritten. Other threads see it once it is fenced; a fence waits for memory, so it stands behind
// a chunk and not behind each block.
inline void copy_unfenced(void* to, const void* from, int64_t bytes, bool stream) {
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

inline void fence([[maybe_unused]] bool stream) {
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
}

}  // namespace
}  // namespace fastpost::cpu
